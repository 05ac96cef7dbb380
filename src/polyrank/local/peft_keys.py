"""The names of an adapter's tensors: the modules they belong to, without what wrappers have put before or between.

``torch.compile``, data parallelism, FSDP and a PEFT model inside of another leave their attributes in a file's keys,
and a file may carry an adapter's own name. All that is known is taken away; what is not understood is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from polyrank.local.peft_config import AdapterError

PREFIX = "base_model.model."
"""Of every key of PEFT."""

EMBEDDINGS = (
    *("embed_tokens", "lm_head"),  # PEFT's names
    *("wte", "embed_in", "embed_out", "word_embeddings", "tok_embeddings", "shared"),
)
"""Modules that PEFT saves whole where the vocabulary has grown (``save_embedding_layers``)."""

_INSIDE = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
_BEFORE = (("module",), ("base_model", "model"))
_NESTING = {"base_model", "model", "module", "language_model"}
_FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?P<factor>[AB])(\.[^.]+)?\.weight")
_LOKR = re.compile(r"(?P<name>.+\.lokr_(w1|w2|w2_a|w2_b))(\.[^.]+)?")
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save(\.[^.]+)?\.(?P<rest>.+)")


@dataclass(frozen=True)
class Parts:
    """An adapter's tensors by what they are.

    Attributes:
        factors: A and B of low-rank layers, by module.
        dense: LoKr's factors, and the parameters of modules that were saved whole.
    """

    factors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)


def bare(key: str) -> str:
    """A key without wrappers and PEFT's prefix, however often they are there.

    >>> bare("_orig_mod.base_model.model.base_model.model.module.layer.0.lora_A.weight")
    'layer.0.lora_A.weight'
    """
    parts = [part for part in key.split(".") if part not in _INSIDE]
    while True:
        if parts[:3] == ["model", "base_model", "model"]:
            parts = parts[1:]
        length = next((len(start) for start in _BEFORE if tuple(parts[: len(start)]) == start), 0)
        if not length or len(parts) <= length:
            return ".".join(parts)
        parts = parts[length:]


def parted(path: Path, tensors: Mapping[str, Tensor], kron: bool, saved: Sequence[str]) -> Parts:
    """An adapter's tensors, sorted by what they are.

    Args:
        path: names the file in messages.
        tensors: by the file's keys.
        kron: whether it is a LoKr.
        saved: the config's ``modules_to_save``.

    Raises:
        AdapterError: for a key that is neither a factor nor a parameter of a saved module, for two keys of one
            parameter, and for values that are not finite.
    """
    parts, sources = Parts(), {}
    copies: dict[str, str] = {}
    for key in sorted(tensors):
        name = bare(key)
        if ".original_module." in name:  # PEFT writes the base's own module beside the one that takes its place
            copies[name.replace(".original_module.", ".")] = key
            continue
        if match := None if kron else _FACTOR.fullmatch(name):
            name, target = f"{match['layer']}.lora_{match['factor']}", parts.factors.setdefault(match["layer"], {})
            place = match["factor"]
        else:
            name = place = _dense(path, key, name, kron, saved)
            target = parts.dense
        if place in target and not _repeats(sources[name], key, target[place], tensors[key]):
            raise AdapterError(f"{path}: {sources[name]} and {key} are both {name}")
        if not torch.isfinite(tensors[key]).all():
            owner = f"layer {match['layer']}" if match else name
            raise AdapterError(f"{path}: {owner} holds NaN or infinite values")
        sources[name], target[place] = key, tensors[key]
    for name, key in copies.items():
        if name not in parts.dense:
            raise AdapterError(f"{path}: {key} is a module of the base, and the one that takes its place is missing")
    return parts


def _repeats(first: str, second: str, one: Tensor, other: Tensor) -> bool:
    """Whether it is the second copy that PEFT writes of a module that is saved both for itself and as an embedding."""
    return ".modules_to_save." in first + second and torch.equal(one, other)


def _dense(path: Path, key: str, name: str, kron: bool, saved: Sequence[str]) -> str:
    """The name of what is no factor of a LoRA."""
    if kron and (match := _LOKR.fullmatch(name)):
        return match["name"]
    kind = "LoKr" if kron else "LoRA"
    if ".lora_" in name or ".lokr_" in name:
        raise AdapterError(f"{path}: {key} is no factor of a plain {kind} on a linear layer")
    if match := _SAVED.fullmatch(name):
        name = f"{match['module']}.{match['rest']}"
    ancestors = [name[: i or None] for i in (*(m.start() for m in re.finditer(r"\.", name)), 0)]
    if any(module.endswith(tuple(filter(None, saved))) for module in ancestors):
        return name
    if name.split(".")[-2:-1] and name.split(".")[-2] in EMBEDDINGS:
        return name
    raise AdapterError(
        f"{path}: {key} is neither a factor of a plain {kind} nor a parameter of modules_to_save, which is "
        f"{', '.join(saved) or 'empty'}"
    )


def renamed(adapters: Sequence[Iterable[str]]) -> list[dict[str, str]]:
    """New names, by old, of layers that only their nesting tells apart from those of other adapters.

    ``language_model.model.layers.0`` and ``model.layers.0`` become what most of the adapters say, or the first of
    them. Nothing is renamed where an adapter has both.

    Args:
        adapters: the names of each adapter's modules.
    """
    held = [list(names) for names in adapters]
    votes: dict[str, Counter[str]] = {}
    for names in held:
        for name in names:
            votes.setdefault(_inner(name), Counter())[name] += 1
    both = {inner for names in held for inner, n in Counter(map(_inner, names)).items() if n > 1}
    chosen = {inner: count.most_common(1)[0][0] for inner, count in votes.items() if inner not in both}
    return [{name: to for name in names if (to := chosen.get(_inner(name), name)) != name} for names in held]


def _inner(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _NESTING)
