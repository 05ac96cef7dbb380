"""The files of an adapter's folder: its tensors from safetensors, whole or in shards, and what else may lie there.

Pickles are never loaded. A folder that cannot be read is told by what it holds, with the command that converts it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from polyrank.local.peft_config import CONFIG, AdapterError, check_pointer, few, read_json

WEIGHTS = "adapter_model.safetensors"

CONVERSION = (
    "import sys, torch; from safetensors.torch import save_file; t = {}; "
    "[t.update(torch.load(f, map_location='cpu', weights_only=True)) for f in sys.argv[2:]]; "
    "save_file({k: v.clone().contiguous() for k, v in t.items()}, sys.argv[1], metadata={'format': 'pt'})"
)
"""A program that makes safetensors (its first argument) of files of torch.save (the others)."""

_NEEDS = f"a PEFT adapter folder has {CONFIG} and {WEIGHTS}"
_INDEX = f"{WEIGHTS}.index.json"
_SHARD = re.compile(r"adapter_model-(\d+)-of-(\d+)\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_EXACT = (torch.float32, torch.float64)


def check_folder(folder: Path) -> None:
    """Refuses what is no folder of an adapter, and says what it is.

    Raises:
        AdapterError: if there is no config.
    """
    if folder.is_file():
        raise AdapterError(f"{folder}: is a file; give the folder that holds {CONFIG} and {WEIGHTS}: {folder.parent}")
    if not folder.is_dir():
        hub = "`hf download USER/NAME --local-dir DIR` fetches an adapter from the hub"
        raise AdapterError(f"{folder}: no such folder, so no {CONFIG}; {hub}")
    if (folder / CONFIG).is_file():
        return
    below = sorted(
        {path.parent.relative_to(folder) for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{CONFIG}")}
    )
    if below:
        raise AdapterError(f"{folder}: no {CONFIG}, but adapters in folders below: {few(below)}; give one of these")
    if (folder / "config.json").is_file():
        raise AdapterError(f"{folder}: no {CONFIG}: it holds a model, not an adapter ({_NEEDS})")
    raise AdapterError(f"{folder}: no {CONFIG} ({_NEEDS})")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's folder, as its file names them, in float32 or float64.

    Raises:
        AdapterError: if there are none that can be read: no file, a pointer of git-lfs, a broken file, shards that
            are missing or unlike their index, or values that are no floating-point numbers.
    """
    tensors: dict[str, Tensor] = {}
    for path in _files(folder):
        for key, tensor in _load(path).items():
            if key in tensors:
                raise AdapterError(f"{path}: {key} is in another shard too")
            tensors[key] = _exact(path, key, tensor)
    if (folder / WEIGHTS).is_file() or not (folder / _INDEX).is_file():
        return tensors
    for key in sorted(read_json(folder / _INDEX)["weight_map"].keys() ^ tensors.keys()):
        raise AdapterError(f"{folder / _INDEX}: {key} is not both in the index and in a shard")
    return tensors


def _files(folder: Path) -> Sequence[Path]:
    """The safetensors files that hold the adapter."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    shards = sorted(path for path in folder.iterdir() if _SHARD.fullmatch(path.name))
    if (folder / _INDEX).is_file():
        named = _indexed(folder / _INDEX)
    else:
        counts = {int(_SHARD.fullmatch(path.name)[2]) for path in shards}  # type: ignore[index]
        most = min(max(counts, default=0), 10 * len(shards) + 10)
        width = len(_SHARD.fullmatch(shards[0].name)[1]) if shards else 0  # type: ignore[index]
        named = [f"adapter_model-{i:0{width}}-of-{most:0{width}}.safetensors" for i in range(1, most + 1)]
    for name in named:
        if not (folder / name).is_file():
            raise AdapterError(f"{folder}: no {name}, which is one of {len(named)} shards of the adapter")
    if named:
        return [folder / name for name in named]
    raise AdapterError(f"{folder}: no {WEIGHTS} ({_NEEDS}); {_instead(folder)}")


def _indexed(path: Path) -> list[str]:
    """The files that an index names."""
    named = read_json(path).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(n, str) and _SHARD.fullmatch(n) for n in named.values()):
        raise AdapterError(
            f"{path}: weight_map must map tensors to files such as adapter_model-00001-of-00002.safetensors"
        )
    return sorted(set(named.values()))


def _instead(folder: Path) -> str:
    """What lies there in place of the weights, and the command that converts it."""
    pickles = sorted(
        path for path in folder.iterdir() if path.suffix in _PICKLES and path.name.startswith("adapter_model")
    )
    if pickles:
        files = " ".join(shlex.quote(str(path)) for path in [folder / WEIGHTS, *pickles])
        return (
            f"{few([path.name for path in pickles])} can run code when it is loaded, so polyrank never does; "
            f'if you trust it, convert it: python -c "{CONVERSION}" {files}'
        )
    others = sorted(path.name for path in folder.iterdir() if path.name != CONFIG)
    return f"there is {few(others)}" if others else "there is nothing else"


def _load(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        start = file.read(100)
    if not start:
        raise AdapterError(f"{path}: not a safetensors file: it is empty")
    check_pointer(path, start)
    try:
        return load_file(path)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise AdapterError(f"{path}: not a safetensors file that can be read: {error}") from None


def _exact(path: Path, key: str, tensor: Tensor) -> Tensor:
    """In float32 where it has fewer bits, as PEFT loads adapters; nothing is lost."""
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise AdapterError(f"{path}: {key} holds {kind}; an adapter holds floating-point numbers")
    return tensor if tensor.dtype in _EXACT else tensor.float()
