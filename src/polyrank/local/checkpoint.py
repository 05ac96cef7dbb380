"""The files of a model's folder, looked at before a library reads them; of weights, their names and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyrank.errors import InputError
from polyrank.files import from_json

CONFIG, ADAPTER = "config.json", "adapter_config.json"
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Files that hold the weights or name the shards of them, in the order in which Transformers looks for them."""

_POINTER = b"version https://git-lfs"
_LONGEST_HEADER = 100_000_000  # bytes, safetensors' own limit
_SHOWN = 6  # files of a folder


class CheckpointError(InputError):
    """A file of a model's folder is missing or broken."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a file.

    Attributes:
        dtype: as safetensors names it, for example ``F32``.
        shape: in elements.
    """

    dtype: str
    shape: tuple[int, ...]


def check_config(folder: Path) -> dict[str, Any]:
    """The content of a model's ``config.json``.

    Raises:
        CheckpointError: if the folder has none, or an adapter's, or one that is no JSON object.
    """
    if (folder / ADAPTER).is_file():
        raise CheckpointError(_adapter(folder))
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"no {CONFIG}; the folder {_content(folder)}")
    return _json(folder / CONFIG)


def entries(folder: Path) -> dict[str, Entry] | None:
    """All tensors of a folder's safetensors files, by name; None where the weights are in another format, or absent.

    Raises:
        CheckpointError: if a file of weights is missing, incomplete, or a pointer of git-lfs.
    """
    first = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        return None
    if not first.name.endswith(".index.json"):
        return _entries(first) if first.suffix == ".safetensors" else _unread([first])
    index = _json(first).get("weight_map")
    if not isinstance(index, Mapping) or not all(isinstance(name, str) for name in index.values()):
        raise CheckpointError(f"{first}: weight_map does not name a file for each tensor")
    shards = [folder / name for name in sorted(set(index.values()))]
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        count = f"{len(missing)} of {len(shards)} files that {first.name} names are missing"
        raise CheckpointError(f"{count}, the first is {missing[0]}")
    if shards and shards[0].suffix != ".safetensors":
        return _unread(shards)
    by_shard = {shard.name: _entries(shard) for shard in shards}
    lost = [name for name, shard in index.items() if name not in by_shard[shard]]
    if lost:
        raise CheckpointError(f"{folder / index[lost[0]]}: has no tensor {lost[0]}, which {first.name} says it has")
    return {name: entry for shard in by_shard.values() for name, entry in shard.items()}


def check_weights(folder: Path) -> None:
    """Refuses a folder that holds no weights.

    Raises:
        CheckpointError: saying what the folder holds.
    """
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise CheckpointError(f"no weights ({WEIGHTS[0]}); the folder {_content(folder)}")


def _entries(path: Path) -> dict[str, Entry]:
    """The header of a safetensors file: 8 bytes with its length, then JSON with the place of each tensor."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        _check_pointer(path, first + file.read(len(_POINTER)))
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise CheckpointError(
                f"{path}: incomplete: the file ends within its header, at {size} bytes; copy it again"
            )
        file.seek(8)
        try:
            header = from_json(file.read(length))
            header.pop("__metadata__", None)
            found = {name: Entry(x["dtype"], tuple(map(int, x["shape"]))) for name, x in header.items()}
            end = 8 + length + max((int(x["data_offsets"][1]) for x in header.values()), default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError):
            raise CheckpointError(f"{path}: not a safetensors file: its header cannot be read") from None
    if size != end:
        what = "incomplete" if size < end else "not a safetensors file"
        raise CheckpointError(f"{path}: {what}: {size} bytes, and its header says {end}; copy it again")
    return found


def _unread(paths: list[Path]) -> None:
    """PyTorch's files are pickles, whose names cannot be had without loading them: only pointers are told apart."""
    for path in paths:
        with path.open("rb") as file:
            _check_pointer(path, file.read(len(_POINTER)))
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path}: empty; copy it again")


def _check_pointer(path: Path, first: bytes) -> None:
    if first.startswith(_POINTER):
        raise CheckpointError(f"{path}: a pointer of git-lfs, not the file itself; `git lfs pull` fetches it")


def _json(path: Path) -> dict[str, Any]:
    """A JSON object of a file."""
    try:
        blob = path.read_bytes()
        _check_pointer(path, blob)
        found = from_json(blob)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds no JSON object, but a {type(found).__name__}")
    return found


def _adapter(folder: Path) -> str:
    try:
        base = _json(folder / ADAPTER).get("base_model_name_or_path")
    except CheckpointError:
        base = None
    names = f" ({base})" if base else ""
    return (
        f"the folder is an adapter, it has {ADAPTER}; model.name is the model that it adapts{names}, and "
        "model.adapter the adapter to start from"
    )


def _content(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return "is empty"
    return "holds " + ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
