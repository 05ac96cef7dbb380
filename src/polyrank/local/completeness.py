"""Whether a checkpoint is the one of its config: what it lacks, what it has besides, and what has another shape.

Transformers draws at random what a checkpoint lacks, and drops what the model has no place for. What may be drawn is a
head: all outside the backbone, and a pooler. A block, an embedding or a norm that is missing is another model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from polyrank.errors import InputError
from polyrank.local.base import backbone_of
from polyrank.local.checkpoint import Entry

_UNUSED = ("mask_token", "num_batches_tracked")
"""Tensors that nothing is computed with: of masked images, and a counter."""
_WRAPPERS = {
    "module.": "DataParallel or DistributedDataParallel; save its `.module`",
    "_orig_mod.": "torch.compile; save its `._orig_mod`",
    "base_model.model.": "PEFT; save what `merge_and_unload()` returns",
    "_fsdp_wrapped_module.": "FSDP; save its full state",
}
_SHOWN = 3


@dataclass(frozen=True)
class Gaps:
    """What Transformers reports of loading, by tensor's name.

    Attributes:
        missing: drawn at random.
        unexpected: dropped.
        misshapen: of another shape than the model's; drawn at random.
    """

    missing: Collection[str]
    unexpected: Collection[str]
    misshapen: Collection[str]


def gaps_of(report: Mapping[str, Any]) -> Gaps:
    """Of what ``from_pretrained(..., output_loading_info=True)`` reports."""
    misshapen = [entry[0] for entry in report["mismatched_keys"]]
    return Gaps(report["missing_keys"], report["unexpected_keys"], misshapen)


def gaps_without_weights(model: nn.Module, entries: Mapping[str, Entry]) -> Gaps:
    """The same of a model on the meta device and the headers of its files: Transformers' own loading, without a value.

    Args:
        model: from its config; it stays as it is.
        entries: of its files.
    """
    empty = {name: torch.empty(entry.shape, device="meta") for name, entry in entries.items()}
    kind: Any = type(model)
    _, report = kind.from_pretrained(
        None,
        config=model.config,
        state_dict=empty,
        device_map={"": "meta"},
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    return gaps_of(report)


def check_complete(model: nn.Module, gaps: Gaps, name: str, *, causal: bool) -> None:
    """Refuses a checkpoint whose backbone is not whole.

    Args:
        model: as its config has it.
        gaps: what its checkpoint lacks.
        name: the model's, for messages.
        causal: whether its head has to be in the checkpoint, too.

    Raises:
        InputError: with the first names, how many there are, and the reason where it is known.
    """
    what, total = f"model.name: {name!r}", len(model.state_dict())
    missing = [key for key in sorted(gaps.missing, key=_in_order) if not key.endswith(_UNUSED)]
    lost = [key for key in missing if causal or not _new(model, key, gaps.missing)]
    if lost:
        wrapper = next((w for w in _WRAPPERS if any(key.startswith(w) for key in gaps.unexpected)), None)
        if wrapper:
            because = f": names in its file begin with {wrapper!r}, as saved from {_WRAPPERS[wrapper]}"
        elif causal and not any(key.startswith(backbone_of(model) or "\0") for key in lost):
            because = ": not a causal language model"
        else:
            because = _instead(gaps.unexpected)
        raise InputError(f"{what} lacks {_listed(lost)}, {len(lost)} of its {total} tensors{because}")
    misshapen = sorted((k for k in gaps.misshapen if causal or _inside(model, k)), key=_in_order)
    if misshapen:
        raise InputError(f"{what} does not fit its own config: {_listed(misshapen)} have another shape")
    extra = sorted((key for key in gaps.unexpected if _foreign(model, key)), key=_in_order)
    if extra:
        raise InputError(
            f"{what} holds {_listed(extra)}, {len(extra)} tensors in its blocks that a {model.config.model_type} of "
            "its config.json has no place for: they would be dropped; another config, or another checkpoint"
        )


def _new(model: nn.Module, key: str, missing: Collection[str]) -> bool:
    """Whether a missing tensor may be drawn and trained: of a head, or of a pooler that lacks all of its tensors."""
    if not _inside(model, key):
        return True
    path = key.split(".")
    ends = [place + 1 for place, part in enumerate(path[:-1]) if "pool" in part.lower()]
    if not ends or _in_list(model, path):
        return False
    module = ".".join(path[: ends[0]])
    return all(name in missing for name in model.state_dict() if name.startswith(f"{module}."))


def _inside(model: nn.Module, key: str) -> bool:
    """Whether a tensor is of the backbone; where the model has no prefix for it, of a part that holds blocks."""
    prefix = backbone_of(model)
    if prefix:
        return key.startswith(prefix)
    first = getattr(model, key.split(".", 1)[0], None)
    blocks = isinstance(first, nn.Module) and any(isinstance(module, nn.ModuleList) for module in first.modules())
    return blocks or "embed" in key


def _in_list(model: nn.Module, path: Sequence[str]) -> bool:
    modules = dict(model.named_modules())
    return any(isinstance(modules.get(".".join(path[:end])), nn.ModuleList) for end in range(1, len(path)))


def _foreign(model: nn.Module, key: str) -> bool:
    """Whether a dropped tensor tells of another model: of one block more, a bias, or an adapter that was not merged."""
    modules = dict(model.named_modules())
    later = int(getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0)
    for name in (key, backbone_of(model) + key):
        parent, _, leaf = name.rpartition(".")
        module = modules.get(parent)
        layer = module is not None and not list(module.children()) and bool(list(module.parameters()))
        if layer and leaf in ("weight", "bias") and _in_list(model, name.split(".")):
            return True
        if re.search(r"\.(lora_[AB]|base_layer)\b", name):
            return True
        for match in re.finditer(r"\.(\d+)\.", name):
            blocks = modules.get(name[: match.start()])
            if isinstance(blocks, nn.ModuleList) and int(match[1]) >= len(blocks) + later:
                return True
    return False


def _instead(unexpected: Collection[str]) -> str:
    first = min(unexpected, key=_in_order, default=None)
    return "" if first is None else f"; it has {first} instead, which the model has no place for"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" and more" if len(names) > _SHOWN else "")


def _in_order(name: str) -> tuple[tuple[bool, int | str], ...]:
    """Block 2 before block 10."""
    return tuple((not part.isdigit(), int(part) if part.isdigit() else part) for part in name.split("."))
