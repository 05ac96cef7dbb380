"""LoRA and LoKr adapters in PEFT's file format, in and out, without importing a model library.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``. Every layer may have its own rank and alpha
(``rank_pattern``, ``alpha_pattern``); the scale is alpha / r, or alpha / sqrt(r) with ``use_rslora``. LoKr's factors
are dense parameters of an `Adapter` (`polyrank.local.lokr`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from polyrank.core.lowrank import Adapter, LowRank
from polyrank.files import write_bytes, write_json
from polyrank.local import lokr
from polyrank.local.patterns import as_pattern, value_of
from polyrank.local.peft_config import CONFIG as CONFIG
from polyrank.local.peft_config import AdapterError as AdapterError
from polyrank.local.peft_config import read_config
from polyrank.local.peft_files import WEIGHTS, check_folder, read_tensors
from polyrank.local.peft_keys import PREFIX, parted


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter's config says besides ranks and scales.

    Attributes:
        base: name or path of the base model.
        task: PEFT's task type, for example ``SEQ_CLS``, or None.
        fan_in_fan_out: whether the adapted modules keep their weight as (d_in, d_out), as GPT-2's Conv1D does.
        modules_to_save: modules whose dense parameters belong to the adapter, such as a classifier.
        rank: LoKr's r, which its factors need not show; None for a LoRA.
        revision: of the base on the hub, or None.
    """

    base: str | None = None
    task: str | None = None
    fan_in_fan_out: bool = False
    modules_to_save: tuple[str, ...] = field(default=())
    rank: int | None = None
    revision: str | None = None


def read_adapter(folder: Path) -> tuple[Adapter, AdapterInfo]:
    """The adapter in a folder; scales as its config states them, per layer.

    Raises:
        AdapterError: if a file is missing or broken, the config says anything that is not understood, a tensor is
            neither a factor of a linear layer nor a parameter of a saved module, a tensor's rank is not the one that
            the config states, or a value is not finite.
    """
    check_folder(folder)
    config = read_config(folder)
    kron = config["peft_type"] == "LOKR"
    saved, path = tuple(config.get("modules_to_save") or ()), folder / WEIGHTS
    parts = parted(path, read_tensors(folder), kron, saved)
    layers = {name: _layer(path, name, pair, config) for name, pair in parts.factors.items()}
    dense = parts.dense | (_lokr_scales(path, parts.dense, config) if kron else {})
    info = AdapterInfo(
        config.get("base_model_name_or_path"),
        config.get("task_type"),
        config.get("fan_in_fan_out", False),
        saved,
        config["r"] if kron else None,
        config.get("revision"),
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
        tensors[f"{PREFIX}{name}.lora_A.weight"] = x.A.detach().cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = x.B.detach().cpu().contiguous()
    for name, tensor in sorted(adapter.dense.items()):
        if not lokr.is_scale(name):
            tensors[f"{PREFIX}{name}"] = tensor.detach().cpu().contiguous()
    write_bytes(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    config = _lokr_config(kron, info) if kron else _config(layers, info)
    write_json(folder / CONFIG, config | ({"revision": info.revision} if info.revision else {}))


def adapted(adapter: Adapter) -> list[str]:
    """The names of the modules that an adapter updates, low-rank or LoKr."""
    return [*adapter.layers, *lokr.grouped(adapter.dense)]


def _layer(path: Path, name: str, pair: Mapping[str, Tensor], config: Mapping[str, Any]) -> LowRank:
    if set(pair) != {"A", "B"}:
        raise AdapterError(f"{path}: layer {name} has lora_{next(iter(pair))} only; both factors are needed")
    A, B = pair["A"], pair["B"]
    if A.ndim > 2 or B.ndim > 2:
        raise AdapterError(
            f"{path}: layer {name}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are of a convolution; "
            "only those of linear layers, which are matrices, can be read"
        )
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or not A.shape[0]:
        raise AdapterError(f"{path}: layer {name}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} do not fit")
    rank = value_of(config.get("rank_pattern"), name, config["r"])
    if rank != A.shape[0]:
        raise AdapterError(f"{path}: layer {name} has rank {A.shape[0]}, but {CONFIG} says {rank}")
    alpha = value_of(config.get("alpha_pattern"), name, config["lora_alpha"])
    return LowRank(A, B, float(alpha) / (rank**0.5 if config.get("use_rslora") else rank))


def _lokr_scales(path: Path, dense: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The scales of the LoKr layers that have one; refuses what does not fit the config."""
    try:
        layers = lokr.grouped(dense)
    except ValueError as error:
        raise AdapterError(f"{path}: {error}") from None
    scales: dict[str, Tensor] = {}
    for name, x in layers.items():
        rank = value_of(config.get("rank_pattern"), name, config["r"])
        alpha = value_of(config.get("alpha_pattern"), name, config["alpha"])
        due = x.rank or max(rank, x.least_rank)
        if due != rank:
            raise AdapterError(f"{path}: layer {name} has factors of rank {due}, but {CONFIG} says {rank}")
        scales |= lokr.scales([name], alpha / rank)
    return scales


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
        "decompose_both": False,
        "decompose_factor": -1,
        "use_effective_conv2d": False,
        "init_weights": True,
    }


def _stated(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> tuple[int, float, dict[str, dict[str, Any]]]:
    """The commonest rank and alpha, and the patterns that say where a layer has others."""
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    alpha = Counter(alphas.values()).most_common(1)[0][0] if alphas else 1.0
    # PEFT matches patterns against the end of a name and takes the first: longest first, and every layer named.
    order = sorted(ranks, key=lambda name: (-len(name), name))
    patterns: dict[str, dict[str, Any]] = {
        "rank_pattern": {as_pattern(name): ranks[name] for name in order} if len(set(ranks.values())) > 1 else {},
        "alpha_pattern": {as_pattern(name): alphas[name] for name in order} if len(set(alphas.values())) > 1 else {},
    }
    return rank, alpha, patterns
