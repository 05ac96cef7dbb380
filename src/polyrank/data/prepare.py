"""Splits made ready once: texts as token ids, images as pixels; then batches of either are only indexing."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap

from polyrank.data.cache import cache_path, log, replacing
from polyrank.data.images import Scale, read_image
from polyrank.data.padding import RIGHT, Padding
from polyrank.data.source import DataError, Source

_TEXTS_AT_ONCE = 1000
_DECODING = 2  # part of the name of decoded images that are kept: raised when the same bytes come to mean other pixels


@dataclass(frozen=True, eq=False)
class TextSplit:
    """Tokenised texts, end to end: text i is ``ids[offsets[i]:offsets[i + 1]]``.

    Attributes:
        ids: all token ids, int32.
        offsets: int64 (N + 1,).
        labels: int64 (N,).
        pad_id: the token that fills up a batch.
        padding: how it does.
    """

    ids: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    pad_id: int
    padding: Padding = RIGHT

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Input positions per text, int64 (N,): its tokens, but where all texts are filled up to one width."""
        return self.padding.lengths(np.diff(self.offsets))

    @cached_property
    def targets(self) -> np.ndarray:
        """What is asked of each text: one class, int64 (N,)."""
        return np.ones(len(self.labels), np.int64)

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask (both b x longest, int64) and labels (b)."""
        ids, mask = self.padding.rows(self.ids, self.offsets, indices, self.pad_id)
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
            "labels": torch.from_numpy(self.labels[indices]),
        }


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """Decoded images of one size.

    Attributes:
        pixels: uint8 (N, C, H, W), possibly mapped from disk.
        labels: int64 (N,).
        mean: per channel, in units of full intensity (C,).
        std: per channel, likewise.
    """

    pixels: np.ndarray
    labels: np.ndarray
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def targets(self) -> np.ndarray:
        """What is asked of each image: one class, int64 (N,)."""
        return np.ones(len(self.labels), np.int64)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Patches of 16 x 16 pixels per image, rounded up, int64 (N,): what an image costs in a batch."""
        height, width = self.pixels.shape[2:]
        return np.full(len(self.labels), -(-height // 16) * -(-width // 16), np.int64)

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """pixel_values (b, C, H, W) = (pixels / 255 - mean) / std in float32, and labels (b)."""
        mean = torch.tensor(self.mean).view(-1, 1, 1)
        std = torch.tensor(self.std).view(-1, 1, 1)
        # Indexing with an array copies, so the tensor is writable even when the pixels are mapped read-only.
        values = torch.from_numpy(np.asarray(self.pixels[indices])).float().div_(255)
        return {"pixel_values": values.sub_(mean).div_(std), "labels": torch.from_numpy(self.labels[indices])}


def prepare_text(
    source: Source, encode: Callable[[list[str]], list[list[int]]], pad_id: int, fingerprint: str
) -> TextSplit:
    """Tokenises a split once; the next call with the same texts and fingerprint reads the result from disk.

    Args:
        source: texts and labels.
        encode: a list of texts to their token ids, truncated as the model needs. A text without any token
            becomes one padding token, so that no row of a batch is empty.
        pad_id: the padding token.
        fingerprint: says all that decides what `encode` returns (tokenizer, its files, largest length).

    Raises:
        DataError: if the tokens of a text tell no more than its length.
    """
    path = cache_path(source.inputs, "text", fingerprint, pad_id, suffix=".npz")
    ready = read_arrays_of(path, len(source), "ids", "offsets") if path else None
    if ready is None:
        ready = _tokenise(source.inputs, encode, pad_id)
        if path:
            with replacing(path) as temporary:
                np.savez(temporary, ids=ready[0], offsets=ready[1])
    _check_tokens(source.inputs, *ready)
    return TextSplit(ready[0], ready[1], source.labels, pad_id)


def prepare_images(source: Source, size: int, channels: int, mean: Sequence[float], std: Sequence[float]) -> ImageSplit:
    """Decodes and resizes a split once; the next call with the same images and size maps the result from disk.

    Each image becomes RGB (3 channels) or grey (1), and is resized to size x size, bilinear, whatever its shape; see
    `read_image`.

    Args:
        source: encoded or raw images, and labels.
        size: height and width, in pixels.
        channels: 3 or 1.
        mean: per channel, in units of full intensity; one value serves all channels.
        std: per channel, likewise.

    Raises:
        DataError: naming the file and the row of an image that cannot be read, rows counted from 1.
    """
    if channels not in (1, 3):
        raise DataError(f"images have 1 or 3 channels, not {channels}")
    mean, std = (tuple(map(float, v)) * (channels if len(v) == 1 else 1) for v in (mean, std))
    if not len(mean) == len(std) == channels:
        raise DataError(f"images of {channels} channels need as many means and deviations; got {mean} and {std}")
    shape = (len(source), channels, size, size)
    coded = () if isinstance(source.inputs, np.ndarray) else (_DECODING, source.image_range)
    path = cache_path(source.inputs, "images", size, channels, *coded, suffix=".npy") if len(source) else None
    if path is None:
        pixels = np.empty(shape, np.uint8)
        _decode(source, pixels)
        return ImageSplit(pixels, source.labels, mean, std)
    pixels = _map_pixels(path, shape)
    if pixels is None:
        with replacing(path) as temporary:
            written = open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
            _decode(source, written)
            written.flush()
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    return ImageSplit(pixels, source.labels, mean, std)


def read_arrays_of(path: Path, texts: int, *names: str) -> tuple[np.ndarray, ...] | None:
    """Arrays of so many texts that were kept in a file, ``ids`` and ``offsets`` among them; None if it is of no use."""
    if not path.exists():
        return None
    try:
        # Opened here, because numpy leaves its own handle open when a zip turns out to be broken.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in names}
        if found["offsets"].shape == (texts + 1,) and found["offsets"][-1] == len(found["ids"]):
            return tuple(found.values())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile):
        pass
    log.warning("%s is damaged; making it again", path)
    return None


def _map_pixels(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    if not path.exists():
        return None
    try:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        if pixels.shape == shape and pixels.dtype == np.uint8:
            return pixels
    except (OSError, ValueError, EOFError):
        pass
    log.warning("%s is damaged; making it again", path)
    return None


def _tokenise(
    texts: list[str], encode: Callable[[list[str]], list[list[int]]], pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    pieces = [np.empty(0, np.int32)]
    lengths: list[int] = []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        rows = [row or [pad_id] for row in encode(texts[start : start + _TEXTS_AT_ONCE])]
        lengths.extend(map(len, rows))
        pieces.append(np.fromiter((token for row in rows for token in row), np.int32))
    return np.concatenate(pieces), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _check_tokens(texts: list[str], ids: np.ndarray, offsets: np.ndarray) -> None:
    """Refuses tokens that tell texts apart by their length alone, as those of words that a tokenizer does not know do.

    The longest rows are left out: they may be cut off.
    """
    lengths = np.diff(offsets[: _TEXTS_AT_ONCE + 1])
    whole = np.flatnonzero(lengths < lengths.max(initial=0))
    different = len({texts[row] for row in whole.tolist()})
    rows = len({ids[offsets[row] : offsets[row + 1]].tobytes() for row in whole.tolist()})
    if different >= 10 and rows <= different / 2 and rows == len(set(lengths[whole].tolist())):
        raise DataError(
            f"the tokenizer makes the same tokens of all texts of a length, {rows} different rows of {different} different"
            " texts: it does not know their words. Is it the model's, and is the model one of this language?"
        )


def _decode(source: Source, pixels: np.ndarray) -> None:
    """Fills `pixels` (N, C, H, W) from encoded images or raw ones (N, H, W, C)."""
    inputs: Any = source.inputs
    channels, size = pixels.shape[1:3]
    if isinstance(inputs, np.ndarray) and inputs.shape[1:] == (size, size, channels):
        pixels[...] = inputs.transpose(0, 3, 1, 2)
        return
    scale = Scale(source.image_range)
    for index, item in enumerate(inputs):
        try:
            pixels[index] = read_image(item, size, channels, scale).transpose(2, 0, 1)
        except DataError as error:
            file, row = source.origin.place(index) if source.origin else ("data", index + 1)
            raise DataError(f"{file}: the image in row {row} cannot be read: {error}") from error
    scale.check(str(source.origin or "data"))
