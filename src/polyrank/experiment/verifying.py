"""An export held against the run: what others load of it gives the logits that polyrank gives, on one small batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from polyrank.core.lowrank import Adapter
from polyrank.core.rng import stream
from polyrank.errors import InputError
from polyrank.experiment.config import Experiment, ModelConfig
from polyrank.experiment.models import Kind, load_base
from polyrank.experiment.planning import free_memory, from_config
from polyrank.local import hf
from polyrank.local.base import Base

_EXAMPLES, _TOKENS = 2, 16
_NEAR = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Of the largest logit; 16-bit weights are rounded once more where an adapter is merged into them."""


@dataclass(frozen=True)
class Sample:
    """A random batch, and polyrank's logits of it.

    Attributes:
        batch: inputs.
        logits: of the base with the adapter attached.
    """

    batch: Mapping[str, Tensor]
    logits: Tensor


def sample(base: Base, adapter: Adapter) -> Sample:
    """What a base with an adapter gives for a batch."""
    batch = base.random_batch(_EXAMPLES, stream(0, "verify"))
    with base.attached(adapter) as live, torch.no_grad():
        return Sample(batch, live(batch).float().cpu())


def small(model: ModelConfig) -> ModelConfig:
    """A run's model as it is held against its export: not quantised, on a CPU, with short texts."""
    dtype = "float32" if model.dtype == "float16" else model.dtype
    return model.model_copy(update={"quantize": None, "dtype": dtype, "max_length": min(model.max_length, _TOKENS)})


def verify_adapter(experiment: Experiment, kind: Kind, classes: list[str], adapter: Adapter, folder: Path) -> str:
    """Has PEFT load an exported adapter.

    Args:
        experiment: what was run.
        kind: of data.
        classes: of the head.
        adapter: as it was exported.
        folder: where it was written.

    Returns:
        What was found, as a sentence; or why nothing was.

    Raises:
        InputError: if PEFT cannot load it, loses layers of it, or gives other logits.
    """
    config = small(experiment.model)
    empty = from_config(experiment.model_copy(update={"model": config}), "meta")
    needed = sum(p.numel() * p.element_size() for p in empty.model.parameters())
    if needed > free_memory():
        return f"not verified: the base takes {needed / 2**30:.1f} GiB, more than is free here"
    base = load_base(config, kind, classes, "cpu", stream(experiment.seed, "head"))
    expected = sample(base, adapter)
    return "verified: PEFT gives polyrank's logits" + _compared(expected, hf.load_exported(base, folder), base, folder)


def verify_merged(expected: Sample, base: Base, kind: Kind, folder: Path) -> str:
    """Has Transformers load a merged model.

    Args:
        expected: of the base before the adapter was merged into it.
        base: the base after.
        kind: of data.
        folder: where the merged model was written.

    Returns:
        What was found, as a sentence.

    Raises:
        InputError: if it gives other logits.
    """
    call = hf.load_plain(folder, kind)
    return "verified: Transformers gives polyrank's logits" + _compared(expected, call, base, folder)


@torch.no_grad()
def _compared(expected: Sample, call: Callable[[Mapping[str, Tensor]], Tensor], base: Base, folder: Path) -> str:
    """By how much logits differ, relative to the largest."""
    found = call(expected.batch).float().cpu()
    gap = float((found - expected.logits).abs().max() / expected.logits.abs().max().clamp(min=1e-30))
    near = _NEAR.get(base.model.dtype, 5e-2)  # type: ignore[arg-type]
    if not gap <= near:
        raise InputError(f"{folder}: its logits differ from polyrank's by {gap:.1e} of the largest, more than {near:g}")
    return f", to {gap:.0e} of the largest"
