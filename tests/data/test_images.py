"""Images of every kind: the right pixels, or one message that names the file and the row."""

import io
import json
import struct
import warnings
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image, ImageOps

from polyrank.data import DATASETS, DataError, Source, files, limit, per_client, prepare_images, write_per_client
from polyrank.data.images import Scale, read_image
from polyrank.data.source import Origin

RAMP = np.linspace(0, 1, 64)[None].repeat(64, 0)
GREY = np.rint(RAMP * 255).astype(np.uint8)
COLOUR = np.stack([GREY, GREY[:, ::-1], GREY.T], -1)
LEFT = np.s_[:, :32]  # what is transparent in the tests


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYRANK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def encoded(pixels, form="PNG", mode=None, **options) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, form, **options)
    return buffer.getvalue()


def png(samples: np.ndarray, bits: int, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG by its specification, of kinds that Pillow does not write; samples (H, W) or (H, W, C)."""
    planes = samples.reshape(*samples.shape[:2], -1)
    if bits == 16:
        rows = planes.astype(">u2").reshape(len(planes), -1).view(np.uint8)
    else:  # the lowest bits of each sample, packed
        rows = np.packbits(np.unpackbits(planes.astype(np.uint8), axis=2)[..., 8 - bits :].reshape(len(planes), -1), 1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", planes.shape[1], planes.shape[0], bits, colour, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    whole = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(whole)


def tiff(data: bytes, bits: int, photometric: int, alpha: int | None = None) -> bytes:
    """A 64 x 64 grey TIFF by its specification: one strip, after the tags; `alpha` is its kind, 1: premultiplied."""
    start = 150
    tags = [(256, 64), (257, 64), (258, bits), (259, 1), (262, photometric), (273, start), (277, 1), (278, 64)]
    if alpha is not None:  # the bits of two channels fit into the entry itself
        tags[2], tags[6] = (258, bits << 16 | bits), (277, 2)
        tags.append((338, alpha))
    entries = b"".join(struct.pack("<HHII", tag, 3, 1 + (value > 65535), value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return head.ljust(start, b"\0") + data


def twelve(values: np.ndarray) -> bytes:
    """Two values of 12 bits in three bytes."""
    a, b = values.reshape(-1, 2).T.astype(np.uint16)
    return np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype(np.uint8).tobytes()


def pixels_of(item: bytes, channels: int = 3, image_range=None) -> np.ndarray:
    """(C, 64, 64)."""
    source = Source([item], np.zeros(1, np.int64), image_range=image_range)
    return np.array(prepare_images(source, 64, channels, [0.5], [0.5]).pixels[0])


def grey_of(values: np.ndarray) -> np.ndarray:
    return np.broadcast_to(values, (3, 64, 64))


def wide(scale: float, kind: str) -> np.ndarray:
    values = RAMP * scale
    return values.astype(kind) if np.dtype(kind).kind == "f" else np.rint(values).astype(kind)


DEEP = {
    "png": encoded(wide(65535, "u2")),
    "tiff": encoded(wide(65535, "u2"), "TIFF"),
    "tiff, lzw": encoded(wide(65535, "u2"), "TIFF", compression="tiff_lzw"),
    "big-endian tiff": encoded(Image.frombytes("I;16B", (64, 64), wide(65535, ">u2").tobytes()), "TIFF"),
    "jpeg 2000": encoded(wide(65535, "u2"), "JPEG2000"),
    "pgm": b"P5 64 64 65535\n" + wide(65535, ">u2").tobytes(),
    "pgm of 12 bits": b"P5 64 64 4095\n" + wide(4095, ">u2").tobytes(),
    "32 bits": encoded(wide(65535, "i4"), "TIFF"),
    "floats": encoded(wide(1, "f4"), "TIFF"),
    "tiff of 12 bits": tiff(twelve(wide(4095, "u2")), 12, 1),
    "white is zero": tiff((65535 - wide(65535, "<u2")).tobytes(), 16, 0),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", DEEP)
def test_deep_greys_keep_their_range(name, channels):
    pixels = pixels_of(DEEP[name], channels)
    assert pixels.shape == (channels, 64, 64)
    assert np.abs(pixels.astype(int) - GREY).max() <= 1
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_what_the_range_says_is_black_and_white():
    image = encoded(wide(4095, "u2"))
    np.testing.assert_array_equal(pixels_of(image, image_range=(0, 4095)), grey_of(GREY))
    np.testing.assert_array_equal(pixels_of(image, image_range=(4095, 0)), grey_of(255 - GREY))
    assert pixels_of(image, image_range=(0, 65535)).max() == 16  # 4095 / 257
    hounsfield = encoded((RAMP * 4000 - 1000).astype(np.float32), "TIFF")
    assert np.abs(pixels_of(hounsfield, image_range=(-1000, 3000)).astype(int) - GREY).max() <= 1
    # 8-bit images beside them are as they are.
    np.testing.assert_array_equal(pixels_of(encoded(GREY), image_range=(0, 4095)), grey_of(GREY))


def test_twelve_bits_in_sixteen_are_refused_until_the_range_is_given():
    with pytest.raises(DataError, match=r"above 4095, where white is 65535.*hold 12 bits.*image_range: \[0, 4095\]"):
        pixels_of(encoded(wide(4095, "u2")))
    # One image that uses its bits is enough, and a dark one beside it is not stretched.
    images = [encoded(wide(300, "u2")), encoded(wide(65535, "u2"))]
    split = prepare_images(Source(images, np.zeros(2, np.int64)), 64, 1, [0.5], [0.5])
    assert split.pixels[0].max() == 1
    assert pixels_of(encoded(np.zeros((64, 64), np.uint16))).max() == 0


@pytest.mark.parametrize("colour", [2, 4, 6])
def test_colours_of_sixteen_bits(colour):
    """Pillow keeps the upper byte: one level from the nearest at most."""
    planes = [GREY] if colour == 4 else [GREY, GREY[:, ::-1], GREY.T]
    alpha = [np.full_like(GREY, 255)] if colour in (4, 6) else []
    samples = np.stack(planes + alpha, -1).astype(np.uint16) * 257
    due = np.broadcast_to(np.stack(planes), (3, 64, 64))
    np.testing.assert_array_equal(pixels_of(png(samples, 16, colour)), due)
    np.testing.assert_array_equal(pixels_of(png(samples, 16, colour), image_range=(0, 65535)), due)
    samples[..., : len(planes)] //= 16
    with pytest.raises(DataError, match="above 4095, where white"):
        pixels_of(png(samples, 16, colour))
    with pytest.raises(DataError, match="of which Pillow reads the upper 8"):
        pixels_of(png(samples, 16, colour), image_range=(0, 4095))


@pytest.mark.parametrize(
    ("values", "due"),
    [
        (wide(255, "f4"), "0 to 255, but black is 0 and white 1; set data.image_range"),
        (wide(1, "f4") - 0.5, "-0.5 to 0.5"),
        (np.where(RAMP > 0.5, np.nan, 0).astype(np.float32), "nan"),
        (np.where(RAMP > 0.5, np.inf, 0).astype(np.float32), "inf"),
        (wide(10**6, "i4"), r"1e\+06, but black is 0 and white 65535"),
        (wide(500, "i4") - 1, "-1 to 499"),
    ],
)
def test_values_beyond_black_and_white_are_refused(values, due):
    with pytest.raises(DataError, match=f"the image in row 1 cannot be read: its values are .*{due}"):
        pixels_of(encoded(values, "TIFF"))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(9))
def test_images_are_upright(orientation, form):
    tag = Image.Exif()
    tag[0x0112] = orientation
    image = encoded(COLOUR[:40], form, exif=tag)
    due = ImageOps.exif_transpose(Image.open(io.BytesIO(image))).convert("RGB")
    due = np.asarray(due.resize((64, 64), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    np.testing.assert_array_equal(pixels_of(image), due)


def test_deep_images_are_upright_and_broken_orientations_are_ignored():
    tag = Image.Exif()
    tag[0x0112] = 6
    turned = pixels_of(encoded(wide(65535, "u2"), exif=tag), 1)
    np.testing.assert_array_equal(turned[0], np.rot90(GREY, -1))
    for broken in (b"Exif\0\0no TIFF", b"Exif\0\0II*\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"):
        image = encoded(COLOUR, "JPEG", exif=broken)
        np.testing.assert_array_equal(pixels_of(image), pixels_of(encoded(COLOUR, "JPEG")))


def _transparent() -> dict[str, tuple[bytes, np.ndarray]]:
    """Images whose left half is transparent, whatever is hidden there, and what is to be seen (H, W, 3)."""
    alpha = np.full((64, 64), 255, np.uint8)
    alpha[LEFT] = 0
    seen, hidden = COLOUR.copy(), COLOUR.copy()
    seen[LEFT], hidden[LEFT] = 255, (255, 0, 0)
    rgba = np.dstack([hidden, alpha])
    grey = GREY.copy()
    grey[LEFT] = 255
    greys = np.repeat(grey[..., None], 3, 2)
    index = np.full((64, 64), 1, np.uint8)
    index[LEFT] = 0
    blue = np.zeros((64, 64, 3), np.uint8)
    blue[..., 2], blue[LEFT] = 255, 255
    half = np.dstack([np.zeros_like(COLOUR), np.full_like(GREY, 64)])
    marked = COLOUR.copy()
    marked[LEFT] = (1, 2, 3)
    entries = (b"PLTE", bytes([255, 0, 0, 0, 0, 255]))
    made = {
        "RGBA png": (encoded(rgba), seen),
        "RGBA webp": (encoded(rgba, "WEBP", lossless=True), seen),
        "RGBA tiff": (encoded(rgba, "TIFF"), seen),
        "LA": (encoded(Image.fromarray(np.dstack([GREY, alpha]), "LA")), greys),
        "LA, 16 bits": (png(np.dstack([GREY, alpha]).astype(np.uint16) * 257, 16, 4), greys),
        "one entry": (png(index, 8, 3, entries, (b"tRNS", b"\0")), blue),
        "alpha of entries": (png(index, 8, 3, entries, (b"tRNS", b"\0\xff")), blue),
        "a colour": (png(marked, 8, 2, (b"tRNS", struct.pack(">HHH", 1, 2, 3))), seen),
        "a quarter": (encoded(half), np.full((64, 64, 3), 191, np.uint8)),
    }
    for bits in (1, 2, 4, 8, 16):
        top = 2**bits - 1
        levels = np.full((64, 64), 0, np.int64)
        levels[LEFT] = top // 2 if bits > 1 else 1
        due = np.zeros((64, 64, 3), np.uint8)
        due[LEFT] = 255
        levels[0, 63], due[0, 63] = top if bits > 1 else 0, 255 if bits > 1 else 0  # so that 16 bits are used
        made[f"grey of {bits} bits"] = (png(levels, bits, 0, (b"tRNS", struct.pack(">H", levels[5, 5]))), due)
    gif = Image.frombytes("P", (64, 64), index.tobytes())
    gif.putpalette([255, 0, 0, 0, 0, 255])
    made["gif"] = (encoded(gif, "GIF", transparency=0), blue)
    return made


TRANSPARENT = _transparent()


@pytest.mark.parametrize("name", TRANSPARENT)
def test_what_is_transparent_shows_white(name):
    image, due = TRANSPARENT[name]
    np.testing.assert_array_equal(pixels_of(image).transpose(1, 2, 0), due)
    grey = np.asarray(Image.fromarray(due).convert("L"))
    np.testing.assert_array_equal(pixels_of(image, 1)[0], grey)


def test_a_transparent_colour_of_sixteen_bits_is_refused():
    samples = COLOUR.astype(np.uint16) * 257
    with pytest.raises(DataError, match="16 bits a colour, and one colour that is transparent"):
        pixels_of(png(samples, 16, 2, (b"tRNS", struct.pack(">HHH", 1, 2, 3))))


@pytest.mark.parametrize("channels", [1, 3])
def test_plain_images_are_what_pillow_reads(channels):
    """The pixels of 8-bit images do not change from one version to the next."""
    palette = Image.fromarray(COLOUR).quantize(64)
    images = [encoded(COLOUR), encoded(GREY), encoded(GREY > 127), encoded(palette), encoded(COLOUR, "JPEG")]
    images += [encoded(GREY, "JPEG"), encoded(COLOUR, "JPEG", "CMYK"), encoded(COLOUR, "GIF"), encoded(COLOUR, "BMP")]
    images += [encoded(COLOUR, "WEBP"), encoded(COLOUR, "TIFF", "CMYK"), encoded(COLOUR[:30], "TIFF")]
    images += [encoded(np.dstack([COLOUR, np.full_like(GREY, 255)]))]
    split = prepare_images(Source(images, np.zeros(len(images), np.int64)), 48, channels, [0.5], [0.5])
    for image, pixels in zip(images, split.pixels, strict=True):
        due = Image.open(io.BytesIO(image)).convert("L" if channels == 1 else "RGB")
        due = np.asarray(due.resize((48, 48), Image.Resampling.BILINEAR)).reshape(48, 48, channels)
        np.testing.assert_array_equal(pixels, due.transpose(2, 0, 1))
    assert np.abs(split.pixels[3].astype(int) - split.pixels[0]).mean() < 20  # a palette is near what it was made of


def test_colour_spaces_that_pillow_converts_to_rgb_only():
    lab = Image.frombytes("LAB", (64, 64), np.dstack([GREY, *np.zeros((2, 64, 64), np.uint8)]).tobytes())
    colour, grey = (pixels_of(encoded(lab, "TIFF"), channels) for channels in (3, 1))
    assert np.ptp(colour.astype(int), 0).max() <= 2  # L alone is grey, from black to white
    assert colour.min() < 5
    assert colour.max() > 250
    assert np.abs(grey.astype(int) - colour).max() <= 2
    premultiplied = tiff(np.dstack([GREY // 2, np.full_like(GREY, 128)]).tobytes(), 8, 1, alpha=1)
    assert np.abs(pixels_of(premultiplied).astype(int) - (GREY // 2 + 127)).max() <= 1


def test_of_frames_and_pages_the_first_is_read():
    frames = [Image.fromarray(COLOUR), Image.fromarray(COLOUR[::-1].copy())]
    for form in ("GIF", "TIFF", "WEBP", "PNG"):
        many = encoded(frames[0], form, save_all=True, append_images=frames[1:], lossless=True)
        np.testing.assert_array_equal(pixels_of(many), pixels_of(encoded(frames[0], form, lossless=True)))


def _table(path, images):
    labels = [index % 2 for index in range(len(images))]
    pa.parquet.write_table(pa.table({"image": pa.array(images, pa.binary()), "label": labels}), path)
    return path


BROKEN = {
    "empty": (b"", "it is empty"),
    "page": (b"404 not found", "no such format.*b'404 not found'"),
    "cut": (encoded(COLOUR, "JPEG")[:600], ""),
    "bomb": (encoded(Image.new("1", (20000, 20000))), "400000000 pixels"),
    "no pixel": (b"P5 0 4 255\n", ""),
    "a program": (encoded(COLOUR, "EPS"), "no such format"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_message_names_the_file_and_its_row_whatever_was_selected(tmp_path, name):
    broken, due = BROKEN[name]
    images = [encoded(np.full((8, 8), level, np.uint8)) for level in range(12)]
    images[7] = broken
    train = _table(tmp_path / "train.parquet", images)
    test = _table(tmp_path / "test.parquet", images[:7])
    dataset = files(train=train, test=test, image="image")
    chosen = dataset.train.select(np.array([9, 3, 7, 1])).select(np.array([3, 2]))
    for source in (dataset.train, chosen):
        with pytest.raises(DataError, match=f"^{train}: the image in row 8 cannot be read: .*{due}"):
            prepare_images(source, 8, 3, [0.5], [0.5])
    assert len(prepare_images(dataset.test, 8, 3, [0.5], [0.5])) == 7
    cut = limit(dataset, {"train": 11}, np.random.default_rng(0)).train
    assert cut.origin.rows.tolist() == [level for level in range(12) if images[level] in cut.inputs]


def test_the_row_is_that_of_each_clients_file(tmp_path):
    images = [encoded(np.full((8, 8), level, np.uint8)) for level in range(12)]
    train, test = _table(tmp_path / "train.parquet", images), _table(tmp_path / "test.parquet", images)
    dataset = files(train=train, test=test, image="image")
    folder = tmp_path / "split"
    write_per_client(folder, dataset, {"a": np.arange(5), "b": np.arange(5, 12)})
    _table(folder / "clients" / "b.parquet", [*images[5:9], b"broken", *images[10:]])
    with pytest.raises(DataError, match=f"{folder / 'clients' / 'b.parquet'}: the image in row 5 cannot be read"):
        prepare_images(per_client(folder=folder).train, 8, 3, [0.5], [0.5])
    origin = Origin.whole(("a", 2), ("none", 0), ("b", 3))
    assert [origin.place(index) for index in range(5)] == [("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3)]


def test_clients_and_sites_take_over_the_range(tmp_path):
    """What a split that is written for each client, and the site that reads a file of it, make of the same images."""
    images = [encoded(np.full((8, 8), 400 * level, np.uint16)) for level in range(6)]
    path = _table(tmp_path / "all.parquet", images)
    options = {"train": path, "test": path, "image": "image"}
    due = np.rint(np.arange(6) * 400 / 4095 * 255)
    simulated = files(**options, image_range=(0, 4095))
    write_per_client(tmp_path / "split", simulated, {"a": np.array([4, 1]), "b": np.array([0, 5])})
    together = per_client(folder=tmp_path / "split")
    manifest = json.loads((tmp_path / "split" / "manifest.json").read_text())
    own = tmp_path / "split" / manifest["clients"]["b"]["file"]
    settings = {key: value for key, value in manifest["data"].items() if key != "name"}
    site = DATASETS["files"](train=own, test=own, **settings)
    for source, rows in ((simulated.train, range(6)), (together.train, (4, 1, 0, 5)), (site.train, (0, 5))):
        pixels = prepare_images(source, 8, 1, [0.5], [0.5]).pixels
        assert pixels[:, 0, 0, 0].tolist() == due[list(rows)].tolist()
    with pytest.raises(DataError, match=rf"^{path}: no value .* above 2000"):
        prepare_images(files(**options).train, 8, 1, [0.5], [0.5])


def test_the_range_is_of_images_and_has_two_ends(tmp_path):
    path = _table(tmp_path / "all.parquet", [encoded(GREY)] * 2)
    for options in ({"image": "image", "image_range": (3, 3)}, {"text": "image", "image_range": (0, 4095)}):
        with pytest.raises(DataError, match=r"data.image_range: \["):
            files(train=path, test=path, **options)


@pytest.mark.parametrize("span", [[0], [0, 1, 2], [0, "white"], [7, 7]])
def test_a_range_in_a_manifest_is_checked(tmp_path, span):
    path = _table(tmp_path / "all.parquet", [encoded(GREY)] * 2)
    write_per_client(tmp_path / "split", files(train=path, test=path, image="image"), {"a": np.arange(2)})
    manifest = json.loads((tmp_path / "split" / "manifest.json").read_text())
    manifest["data"]["image_range"] = span
    (tmp_path / "split" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"data.image_range: \["):
        per_client(folder=tmp_path / "split")


def test_raw_arrays_of_more_bits_are_read_alike(tmp_path):
    due = np.stack([GREY, GREY.T])

    def read(array, **options):
        np.savez(tmp_path / "raw.npz", image=array, label=np.arange(2))
        return files(train=tmp_path / "raw.npz", test=tmp_path / "raw.npz", image="image", **options).train.inputs

    ramps = np.stack([RAMP, RAMP.T])
    for kind, scale in (("u1", 255), ("u2", 65535), ("i8", 65535), ("f4", 1), ("f8", 1)):
        values = ramps * scale if kind[0] == "f" else np.rint(ramps * scale)
        read_back = read(values.astype(kind))
        assert read_back.dtype == np.uint8
        assert np.abs(read_back[..., 0].astype(int) - due).max() <= (kind != "u1")
    np.testing.assert_array_equal(read(np.rint(ramps * 4095).astype("u2"), image_range=(0, 4095))[..., 0], due)
    raw = f"{tmp_path / 'raw.npz'}: "
    with pytest.raises(DataError, match=raw + r"no value .* above 255.*image_range: \[0, 255\]"):
        read(due.astype(np.int64))
    with pytest.raises(
        DataError, match=raw + "the image in row 2 of array 'image' cannot be read: its values are 0 to 2"
    ):
        read(np.stack([RAMP, 2 * RAMP]))
    shapes = [((2, 3, 8, 8), "u1"), ((2, 8, 8, 2), "u2"), ((2, 8, 0, 1), "u1"), ((2, 8), "u1"), ((2, 8, 8), "?")]
    for shape, kind in shapes:
        with pytest.raises(DataError, match=raw + r"array 'image' is .*; an .npz file holds images"):
            read(np.zeros(shape, kind))


def test_raw_alpha_shows_white():
    raw = np.zeros((1, 8, 8, 4), np.uint8)
    raw[0, :4, :, 3] = 255
    pixels = prepare_images(Source(raw, np.zeros(1, np.int64)), 8, 1, [0.5], [0.5]).pixels
    assert pixels[0, 0, :, 0].tolist() == [0] * 4 + [255] * 4


def test_pixels_that_are_kept_are_of_their_range(cache):
    image = encoded(wide(4095, "u2"))
    first = pixels_of(image, image_range=(0, 4095))
    assert pixels_of(image, image_range=(0, 8191)).max() < 255
    np.testing.assert_array_equal(pixels_of(image, image_range=(0, 4095)), first)
    assert len(list(cache.iterdir())) == 2


def test_mutated_images_are_read_or_refused(monkeypatch):
    """Whatever a broken file makes of the library: an array or a DataError, and not a warning."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    small, deep = COLOUR[:12, :12], wide(65535, "u2")[:12, 20:32]
    tag = Image.Exif()
    tag[0x0112] = 6
    images = [encoded(small), encoded(deep), encoded(deep, "TIFF"), encoded(small, "TIFF", compression="tiff_lzw")]
    images += [encoded(small, "JPEG", exif=tag), encoded(small, "GIF"), encoded(small, "WEBP"), encoded(small, "BMP")]
    images += [encoded(small, "PPM"), encoded(small, "TGA"), encoded(small, "JPEG2000"), encoded(small, "ICO")]
    images += [encoded(Image.fromarray(small).quantize(9), transparency=3, exif=tag), TRANSPARENT["grey of 4 bits"][0]]
    rng, outcomes = np.random.default_rng(0), {"read": 0, "refused": 0}
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        for image in images:
            for _ in range(200):
                broken = bytearray(image)
                for _ in range(rng.integers(1, 5)):
                    broken[rng.integers(min(len(broken), 300))] = rng.integers(256)
                if rng.random() < 0.2:
                    del broken[rng.integers(len(broken)) :]
                try:
                    pixels = read_image(bytes(broken), 8, 3, Scale())
                    assert (pixels.shape, pixels.dtype) == ((8, 8, 3), np.uint8)
                    outcomes["read"] += 1
                except DataError:
                    outcomes["refused"] += 1
    assert not leaked
    assert min(outcomes.values()) > 100
