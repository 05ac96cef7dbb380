"""Prepared splits: the right batches, made once, and again only when they must be."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from polyrank.data import DATASETS, DataError, Source, cache_dir, prepare_images, prepare_text, public_digits


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYRANK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Words:
    """A word's number is its length; counts how many texts it was asked to encode, and how many at once."""

    def __init__(self):
        self.calls: list[int] = []

    def __call__(self, texts: list[str]) -> list[list[int]]:
        self.calls.append(len(texts))
        return [[len(word) for word in text.split()] for text in texts]


TEXTS = Source(["a bb ccc", "dddd", "", "ee ff"], np.array([0, 1, 1, 0]))


def test_text_batches_are_padded_to_their_own_longest():
    split = prepare_text(TEXTS, Words(), pad_id=9, fingerprint="words")
    assert len(split) == 4
    assert split.lengths.tolist() == [3, 1, 1, 2]
    batch = split.batch(np.array([3, 1]))
    assert batch["input_ids"].tolist() == [[2, 2], [4, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [0, 1]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    # An empty text is one padding token that counts.
    assert split.batch(np.array([2]))["attention_mask"].tolist() == [[1]]
    # The last text of all, beside a longer one: padding never reads past the end.
    assert split.batch(np.array([0, 3]))["input_ids"].tolist() == [[1, 2, 3], [2, 2, 9]]


def test_texts_are_tokenised_a_thousand_at_a_time_and_only_once():
    source = Source([f"t{'x' * (i % 7)} end" for i in range(2500)], np.zeros(2500, np.int64))
    words = Words()
    first = prepare_text(source, words, 0, "words")
    assert words.calls == [1000, 1000, 500]
    second = prepare_text(source, words, 0, "words")
    assert len(words.calls) == 3
    np.testing.assert_array_equal(first.ids, second.ids)
    np.testing.assert_array_equal(first.offsets, second.offsets)


def test_another_tokenizer_or_text_is_prepared_anew(cache):
    words = Words()
    prepare_text(TEXTS, words, 0, "words")
    prepare_text(TEXTS, words, 0, "other")
    # The same letters cut differently are other texts.
    prepare_text(Source(["a bb cccd", "ddd", "", "ee ff"], TEXTS.labels), words, 0, "words")
    assert len(words.calls) == 3
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("damage", [b"", b"not a zip", "cut", "flipped"])
def test_a_damaged_token_cache_is_rebuilt(cache, damage, caplog):
    words = Words()
    expected = prepare_text(TEXTS, words, 0, "words")
    (path,) = cache.iterdir()
    data = bytearray(path.read_bytes())
    if damage == "cut":
        damage = data[: len(data) // 2]
    elif damage == "flipped":
        data[data.index(b"NUMPY") + 130] ^= 255
        damage = data
    path.write_bytes(damage)
    again = prepare_text(TEXTS, words, 0, "words")
    np.testing.assert_array_equal(again.ids, expected.ids)
    assert len(words.calls) == 2
    assert "damaged" in caplog.text
    prepare_text(TEXTS, words, 0, "words")
    assert len(words.calls) == 2


def test_an_interrupted_write_leaves_nothing(cache):
    def broken(texts):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        prepare_text(TEXTS, broken, 0, "words")
    whole = _png(40, 40, "RGB")
    for broken_image in (b"no image", whole[: len(whole) - 30]):
        bad = Source([whole, broken_image], np.zeros(2, np.int64))
        with pytest.raises(DataError, match="the image in row 2 cannot be read"):
            prepare_images(bad, 4, 3, [0.5], [0.5])
    assert list(cache.iterdir()) == []


def test_the_cache_can_be_off_and_moved(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("POLYRANK_CACHE", "")
    words = Words()
    prepare_text(TEXTS, words, 0, "words")
    prepare_text(TEXTS, words, 0, "words")
    assert len(words.calls) == 2
    assert not cache.exists()
    monkeypatch.delenv("POLYRANK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "polyrank"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "polyrank"


def test_a_cache_folder_that_cannot_be_made_is_done_without(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("POLYRANK_CACHE", str(tmp_path / "file" / "cache"))
    assert len(prepare_text(TEXTS, Words(), 0, "words")) == 4
    assert "going on without it" in caplog.text


def _png(width: int, height: int, mode: str, colour: object = None) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height), colour or 0).save(buffer, "PNG")
    return buffer.getvalue()


def test_image_batches_are_resized_and_normalised():
    images = [_png(8, 4, "RGB", (255, 0, 51)), _png(3, 9, "L", 255), _png(6, 6, "P")]
    split = prepare_images(Source(images, np.array([2, 0, 1])), 6, 3, [0.5, 0.0, 0.2], [0.5, 1.0, 0.1])
    assert split.pixels.shape == (3, 3, 6, 6)
    assert split.pixels.dtype == np.uint8
    batch = split.batch(np.array([0, 1]))
    assert batch["labels"].tolist() == [2, 0]
    values = batch["pixel_values"]
    assert values.dtype == torch.float32
    assert values.shape == (2, 3, 6, 6)
    torch.testing.assert_close(values[0, :, 3, 3], torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(values[1, :, 0, 5], torch.tensor([1.0, 1.0, 8.0]))


def test_images_are_decoded_once_and_mapped_from_disk(cache):
    source = Source([_png(5, 5, "RGB", (i, 2 * i, 7)) for i in range(20)], np.arange(20))
    first = prepare_images(source, 5, 3, [0.5], [0.5])
    (path,) = cache.iterdir()
    stamp = path.stat().st_mtime_ns
    second = prepare_images(source, 5, 3, [0.0], [1.0])
    assert path.stat().st_mtime_ns == stamp
    assert isinstance(second.pixels, np.memmap)
    np.testing.assert_array_equal(first.pixels, second.pixels)
    assert second.pixels[3, :, 0, 0].tolist() == [3, 6, 7]
    prepare_images(source, 5, 1, [0.5], [0.5])
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("keep", [0, 40, 200])
def test_a_damaged_pixel_cache_is_rebuilt(cache, keep):
    source = Source([_png(5, 5, "RGB", (9, 8, 7))], np.arange(1))
    expected = np.array(prepare_images(source, 5, 3, [0.5], [0.5]).pixels)
    (path,) = cache.iterdir()
    path.write_bytes(path.read_bytes()[:keep])
    np.testing.assert_array_equal(prepare_images(source, 5, 3, [0.5], [0.5]).pixels, expected)


def test_raw_images_are_used_as_they_are_or_resized(monkeypatch):
    monkeypatch.setenv("POLYRANK_CACHE", "")
    raw = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
    source = Source(raw, np.arange(4))
    np.testing.assert_array_equal(prepare_images(source, 8, 1, [0.5], [0.5]).pixels[:, 0], raw[..., 0])
    coloured = prepare_images(source, 8, 3, [0.5], [0.5]).pixels
    np.testing.assert_array_equal(coloured[:, 2], raw[..., 0])
    assert prepare_images(source, 16, 1, [0.5], [0.5]).pixels.shape == (4, 1, 16, 16)


def test_channels_and_constants_must_agree():
    source = Source(np.zeros((1, 8, 8, 1), np.uint8), np.arange(1))
    with pytest.raises(DataError, match="1 or 3 channels, not 4"):
        prepare_images(source, 8, 4, [0.5], [0.5])
    with pytest.raises(DataError, match="as many means"):
        prepare_images(source, 8, 3, [0.5, 0.5], [0.5])


def test_the_digits_are_always_the_same_and_never_both_public_and_private():
    data, public = DATASETS["digits"](), public_digits()
    splits = [data.train, data.validation, data.test]
    assert data.kind == "image"
    assert [len(split) for split in (public, *splits)] == [629, 718, 180, 270]
    assert public.inputs.dtype == np.uint8
    assert public.inputs.shape[1:] == (8, 8, 1)
    assert public.inputs.max() == 255
    for split in (public, *splits):
        assert np.bincount(split.labels).min() >= 0.9 * len(split) / 10
    # Turned back and inverted again, the private images are digits that the public slice does not have.
    upright = [public.inputs] + [np.rot90(255 - split.inputs, k=-1, axes=(1, 2)) for split in splits]
    seen = [image.tobytes() for images in upright for image in np.ascontiguousarray(images)]
    assert len(set(seen)) == len(seen) == 1797
    from sklearn.datasets import load_digits

    whole = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
    assert {image.tobytes() for image in whole} == set(seen)
    np.testing.assert_array_equal(data.train.inputs, DATASETS["digits"]().train.inputs)


def test_a_tokenizer_that_does_not_know_the_words_is_refused():
    texts = [f"слово{number} другое{number % 7}" for number in range(40)]
    labels = np.zeros(40, np.int64)

    def unknown(rows):
        return [[1] * (2 + number % 5) for number, _ in enumerate(rows)]

    with pytest.raises(DataError, match="4 different rows of 32 different texts: it does not know"):
        prepare_text(Source(texts, labels), unknown, 0, "unknown")
    cut = prepare_text(Source(texts, labels), lambda rows: [[5, 6] for _ in rows], 0, "cut")  # all of one length
    assert len(cut) == 40
