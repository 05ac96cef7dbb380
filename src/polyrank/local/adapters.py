"""LoRA and LoKr adapters in PEFT's file format, in and out, without importing a model library.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``. Every layer may have its own rank and alpha
(``rank_pattern``, ``alpha_pattern``); the scale is alpha / r, or alpha / sqrt(r) with ``use_rslora``. LoKr's factors
are dense parameters of an `Adapter` (`polyrank.local.lokr`).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from polyrank.core.lowrank import Adapter, LowRank
from polyrank.errors import InputError
from polyrank.files import write_bytes, write_json
from polyrank.local import lokr

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PLAIN: dict[str, dict[str, Any]] = {
    "LORA": {"use_dora": False, "bias": "none", "layer_replication": None, "megatron_config": None},
    "LOKR": {"decompose_both": False, "decompose_factor": -1, "use_effective_conv2d": False},
}
"""What a config must say, where it says it, of an adapter that can be read."""
_FACTOR = re.compile(r"^(?P<layer>.+)\.lora_(?P<factor>[AB])(\.default)?\.weight$")


class AdapterError(InputError):
    """A folder is not an adapter that polyrank can read, or not one of the expected model."""


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter's config says besides ranks and scales.

    Attributes:
        base: name or path of the base model.
        task: PEFT's task type, for example ``SEQ_CLS``, or None.
        fan_in_fan_out: whether the adapted modules keep their weight as (d_in, d_out), as GPT-2's Conv1D does.
        modules_to_save: modules whose dense parameters belong to the adapter, such as a classifier.
        rank: LoKr's r, which its factors need not show; None for a LoRA.
    """

    base: str | None = None
    task: str | None = None
    fan_in_fan_out: bool = False
    modules_to_save: tuple[str, ...] = field(default=())
    rank: int | None = None


def read_adapter(folder: Path) -> tuple[Adapter, AdapterInfo]:
    """The adapter in a folder; scales as its config states them, per layer.

    Raises:
        AdapterError: if a file is missing or broken, the adapter is not a plain LoRA (DoRA, biases, embeddings) or a
            plain LoKr, a tensor's rank is not the one that the config states, or a value is not finite.
    """
    config = _read_config(folder / CONFIG)
    kron = config["peft_type"].upper() == "LOKR"
    path = folder / WEIGHTS
    if not path.is_file():
        raise AdapterError(f"{folder}: no {WEIGHTS} (a PEFT adapter folder has {CONFIG} and {WEIGHTS})")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise AdapterError(f"{path}: not a safetensors file: {error}") from None
    factors: dict[str, dict[str, Tensor]] = {}
    dense: dict[str, Tensor] = {}
    for key in sorted(tensors):
        name = key.removeprefix(_PREFIX)
        match = _FACTOR.match(name)
        if match and not kron:
            factors.setdefault(match["layer"], {})[match["factor"]] = tensors[key]
        elif ".lora_" in name or (".lokr_" in name and not (kron and lokr.is_part(name))):
            kind = "LoKr" if kron else "LoRA"
            raise AdapterError(f"{path}: {key} is not a factor of a plain {kind} on a linear layer")
        elif not torch.isfinite(tensors[key]).all():
            raise AdapterError(f"{path}: {name} holds NaN or infinite values")
        else:
            dense[name] = tensors[key]
    layers = {name: _layer(path, name, pair, config) for name, pair in factors.items()}
    dense |= _lokr_scales(path, dense, config) if kron else {}
    info = AdapterInfo(
        config.get("base_model_name_or_path"),
        config.get("task_type"),
        bool(config.get("fan_in_fan_out", False)),
        tuple(config.get("modules_to_save") or ()),
        config["r"] if kron else None,
    )
    return Adapter(layers, dense), info


def write_adapter(folder: Path, adapter: Adapter, info: AdapterInfo) -> None:
    """Writes a folder that ``PeftModel.from_pretrained`` loads. Layers of rank 0 are left out.

    Raises:
        AdapterError: if the adapter has layers of LoRA and of LoKr; PEFT's file holds one kind.
    """
    layers = {name: x for name, x in sorted(adapter.layers.items()) if x.rank > 0}
    kron = lokr.grouped(adapter.dense)
    if kron and layers:
        raise AdapterError(f"{folder}: an adapter is written as a LoRA or as a LoKr, and this one has layers of both")
    tensors: dict[str, Tensor] = {}
    for name, x in layers.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = x.A.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = x.B.detach().cpu().contiguous()
    for name, tensor in sorted(adapter.dense.items()):
        if not lokr.is_scale(name):
            tensors[f"{_PREFIX}{name}"] = tensor.detach().cpu().contiguous()
    write_bytes(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_json(folder / CONFIG, _lokr_config(kron, info) if kron else _config(layers, info))


def adapted(adapter: Adapter) -> list[str]:
    """The names of the modules that an adapter updates, low-rank or LoKr."""
    return [*adapter.layers, *lokr.grouped(adapter.dense)]


def check_same_model(folders: list[Path], adapters: list[Adapter], infos: list[AdapterInfo]) -> None:
    """Refuses adapters of different models: unequal shapes of a layer, no layer in common, or another base."""
    bases = {info.base: folder for folder, info in zip(folders, infos, strict=True) if info.base}
    if len(bases) > 1:
        named = "; ".join(f"{folder}: {base}" for base, folder in bases.items())
        raise AdapterError(f"adapters of different base models cannot be merged ({named})")
    shapes: dict[str, tuple[tuple[int, ...], Path]] = {}
    for folder, adapter in zip(folders, adapters, strict=True):
        found = {name: x.shape for name, x in adapter.layers.items()}
        found |= {name: tuple(tensor.shape) for name, tensor in adapter.dense.items()}
        for name, shape in found.items():
            first, where = shapes.setdefault(name, (shape, folder))
            if first != shape:
                raise AdapterError(f"{folder}: {name} has shape {shape}, but {where} has {first}: not the same model")
    if folders and not shapes:
        raise AdapterError(f"{folders[0]}: holds no LoRA layer")


def _layer(path: Path, name: str, pair: Mapping[str, Tensor], config: Mapping[str, Any]) -> LowRank:
    if set(pair) != {"A", "B"}:
        raise AdapterError(f"{path}: layer {name} has lora_{next(iter(pair))} only; both factors are needed")
    A, B = pair["A"], pair["B"]
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise AdapterError(f"{path}: layer {name}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} do not fit")
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise AdapterError(f"{path}: layer {name} holds NaN or infinite values")
    rank = _pattern(config.get("rank_pattern"), name, config["r"])
    if rank != A.shape[0]:
        raise AdapterError(f"{path}: layer {name} has rank {A.shape[0]}, but {CONFIG} says {rank}")
    alpha = _pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
    return LowRank(A, B, float(alpha) / (rank**0.5 if config.get("use_rslora") else rank))


def _lokr_scales(path: Path, dense: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The scales of the LoKr layers that have one; refuses what does not fit the config."""
    try:
        layers = lokr.grouped(dense)
    except ValueError as error:
        raise AdapterError(f"{path}: {error}") from None
    scales: dict[str, Tensor] = {}
    for name, x in layers.items():
        rank = _pattern(config.get("rank_pattern"), name, config["r"])
        alpha = _pattern(config.get("alpha_pattern"), name, config["alpha"])
        due = x.rank or max(rank, x.least_rank)
        if due != rank:
            raise AdapterError(f"{path}: layer {name} has factors of rank {due}, but {CONFIG} says {rank}")
        scales |= lokr.scales([name], alpha / rank)
    return scales


def _pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches the end of the module's name, as a regular expression."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise AdapterError(f"{path.parent}: no {CONFIG} (a PEFT adapter folder has {CONFIG} and {WEIGHTS})")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise AdapterError(f"{path}: not JSON: {error}") from None
    kind = str(config.get("peft_type", "")).upper() if isinstance(config, dict) else ""
    if kind not in _PLAIN:
        raise AdapterError(f"{path}: peft_type must be LORA or LOKR")
    for key, plain in _PLAIN[kind].items():
        if config.get(key, plain) not in (plain, None):
            name = "LoRA" if kind == "LORA" else "LoKr"
            raise AdapterError(
                f"{path}: {key} = {config[key]!r} is more than a plain {name}, which is what can be read"
            )
    for key in ("r", "lora_alpha" if kind == "LORA" else "alpha"):
        if not isinstance(config.get(key), int | float) or config[key] <= 0:
            raise AdapterError(f"{path}: {key} must be a positive number, got {config.get(key)!r}")
    return config


def _config(layers: Mapping[str, LowRank], info: AdapterInfo) -> dict[str, Any]:
    ranks = {name: x.rank for name, x in layers.items()}
    alphas = {name: x.scale * x.rank for name, x in layers.items()}
    rank, alpha, patterns = _stated(ranks, alphas)
    return {
        "peft_type": "LORA",
        "task_type": info.task,
        "base_model_name_or_path": info.base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        **patterns,
        "target_modules": sorted(layers),
        "modules_to_save": list(info.modules_to_save) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": info.fan_in_fan_out,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }


def _lokr_config(layers: Mapping[str, lokr.LoKr], info: AdapterInfo) -> dict[str, Any]:
    # A w2 that is not factored does not show r: any from half its larger side on stands for the same shapes.
    common = max([info.rank or 1, *(x.rank or x.least_rank for x in layers.values())])
    ranks = {name: x.rank or common for name, x in layers.items()}
    rank, alpha, patterns = _stated(ranks, {name: x.scale * ranks[name] for name, x in layers.items()})
    return {
        "peft_type": "LOKR",
        "task_type": info.task,
        "base_model_name_or_path": info.base,
        "inference_mode": True,
        "r": rank,
        "alpha": alpha,
        **patterns,
        "target_modules": sorted(layers),
        "modules_to_save": list(info.modules_to_save) or None,
        "rank_dropout": 0.0,
        "module_dropout": 0.0,
        **_PLAIN["LOKR"],
        "init_weights": True,
    }


def _stated(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> tuple[int, float, dict[str, dict[str, Any]]]:
    """The commonest rank and alpha, and the patterns that say where a layer has others."""
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    alpha = Counter(alphas.values()).most_common(1)[0][0] if alphas else 1.0
    # PEFT matches patterns against the end of a name and takes the first: longest first, and every layer named.
    order = sorted(ranks, key=lambda name: (-len(name), name))
    patterns: dict[str, dict[str, Any]] = {
        "rank_pattern": {name: ranks[name] for name in order} if len(set(ranks.values())) > 1 else {},
        "alpha_pattern": {name: alphas[name] for name in order} if len(set(alphas.values())) > 1 else {},
    }
    return rank, alpha, patterns
