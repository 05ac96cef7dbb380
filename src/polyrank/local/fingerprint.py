"""Which base an adapter is of: by its weights where they are on this disk, by its name otherwise."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from polyrank.files import from_json

_WHOLE = 2**30
"""Bytes of weights up to which all are read; of larger models, the ends and the middle of every tensor."""
_PIECE = 2**16
_MOST_HEADER = 100_000_000

Tensor = tuple[str, str, tuple[int, ...], Path, int, int]
"""A tensor's name, type, shape, file, and the bytes of the file where it begins and ends."""


def fingerprint(base: str, revision: str | None = None) -> str | None:
    """A SHA-256 of the weights of a base model that is on this disk, however they are divided among files.

    Names, types, shapes and values count. Of more than 1 GiB of weights, 64 KiB at both ends and in the middle of
    every tensor are read.

    Args:
        base: a folder, or a name on the hub, which is looked up in the cache.
        revision: of a name on the hub: a branch, a tag or a commit; None: ``main``.

    Returns:
        None where there is no such folder, or no safetensors files in it that can be read.
    """
    folder = _folder(base, revision or "main")
    if folder is None:
        return None
    try:
        tensors = sorted(tensor for path in sorted(folder.glob("*.safetensors")) for tensor in _tensors(path))
        return _hashed(tensors) if tensors else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None  # a broken base is nothing to compare with


def _folder(base: str, revision: str) -> Path | None:
    """Where the weights of a base are."""
    try:
        if Path(base).is_dir():
            return Path(base)
        home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
        cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
        repository = cache / f"models--{base.replace('/', '--')}"
        reference = repository / "refs" / revision
        snapshot = (
            repository
            / "snapshots"
            / (reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision)
        )
        return snapshot if snapshot.is_dir() else None
    except (OSError, ValueError):
        return None


def _tensors(path: Path) -> Iterator[Tensor]:
    """What the header of a safetensors file says."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MOST_HEADER:
            raise ValueError(f"{path}: not a safetensors file")
        header = from_json(file.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            yield name, str(entry["dtype"]), tuple(entry["shape"]), path, 8 + length + begin, 8 + length + end


def _hashed(tensors: list[Tensor]) -> str:
    total = hashlib.sha256()
    whole = sum(end - begin for *_, begin, end in tensors) <= _WHOLE
    for name, dtype, shape, path, begin, end in tensors:
        total.update(f"{name} {dtype} {shape}\n".encode())
        with path.open("rb") as file:
            middle = (begin + end) // 2
            starts = range(begin, end, _PIECE) if whole else (begin, middle, max(begin, end - _PIECE))
            for start in starts:
                total.update(_read(file, start, min(end, start + _PIECE)))
    return total.hexdigest()


def _read(file: BinaryIO, begin: int, end: int) -> bytes:
    file.seek(begin)
    return file.read(end - begin)
