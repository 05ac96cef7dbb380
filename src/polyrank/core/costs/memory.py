"""Bytes on a client's device, by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from polyrank.core.architecture import Architecture, ModelSpec
from polyrank.core.costs.families import FAMILIES
from polyrank.core.costs.peak import moments, saved_bytes
from polyrank.core.costs.tape import FLOAT32, Step, Tape
from polyrank.core.lokr import lokr_elements, lokr_shapes
from polyrank.core.lowrank import Factors, nbytes
from polyrank.core.types import LocalTraining, Task

# Bytes per element of a quantised linear layer: LLM.int8 (arXiv 2208.07339) keeps one float32 per row besides; NF4
# (arXiv 2305.14314) half a byte and one float32 per 64 elements.
_QUANTIZED = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a training step, by part.

    Attributes:
        base: the frozen model.
        adapter: low-rank or Kronecker factors and the head, in float32.
        gradients: of what is trained.
        optimizer: its states: two per trained parameter for AdamW, one for SGD with momentum.
        activations: kept from the forward for the backward pass.
        working: what comes and goes on top of them: gradients of activations, blocks that are run again.
        apart: what is never there together, below 0: a parameter has its gradient only when the backward pass has come
            to it, and most activations are gone by then.
        overhead: beyond tensors; see `Calibration`.
    """

    base: float
    adapter: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    apart: float
    overhead: float

    @property
    def total(self) -> float:
        """All parts together."""
        return float(sum(getattr(self, part.name) for part in fields(self)))


class NoFormulaError(ValueError):
    """The model's family has no closed form for its activations, and none was measured."""


def memory(spec: ModelSpec, local: LocalTraining, ranks: Mapping[str, int], factors: Factors = "AB") -> Memory:
    """What a client needs to train `ranks`.

    Args:
        spec: the model, with its architecture.
        local: batch, optimizer, dropout, precision, checkpointing. ``auto`` counts as fp32: only a device can tell.
        ranks: rank of each trained module; modules left out, or of rank 0, are frozen.
        factors: the factors that are trained.

    Raises:
        NoFormulaError: where activations can neither be computed nor have been measured.
    """
    model = architecture_of(spec)
    head = sum(spec.head.values())
    adapter = adapter_elements(spec, ranks, "AB") + head
    trained = adapter_elements(spec, ranks, factors) + head * spec.head_trained
    states = 2 if local.optimizer == "adamw" else int(local.momentum > 0)
    gradients = FLOAT32 * trained
    activations, working, apart = _activations(spec, local, ranks, factors, gradients)
    return Memory(
        base=base_bytes(model),
        adapter=float(FLOAT32 * adapter),
        gradients=float(gradients),
        optimizer=float(FLOAT32 * trained * states),
        activations=activations,
        working=working,
        apart=apart,
        overhead=spec.calibration.overhead,
    )


def task_memory(spec: ModelSpec, task: Task) -> Memory:
    """What a client needs for a task, with the layers that it only runs."""
    ranks = {name: x.rank for name, x in task.adapter.layers.items()}
    needed = memory(spec, task.local, ranks, task.factors)
    carried = sum(nbytes(layer) for layer in task.frozen.layers.values())
    return replace(needed, adapter=needed.adapter + carried)


def architecture_of(spec: ModelSpec) -> Architecture:
    """The architecture that costs are computed from.

    Raises:
        NoFormulaError: if the spec carries none.
    """
    if spec.architecture is None:
        raise NoFormulaError("the model's architecture is not known, so its costs cannot be computed")
    return spec.architecture


def adapter_elements(spec: ModelSpec, ranks: Mapping[str, int], factors: Factors) -> int:
    """Elements of the named factors: r * d_in in A and d_out * r in B, over the modules; all of LoKr's where it is."""
    if spec.lokr is not None:
        return lokr_elements(spec.modules, spec.lokr)
    total = 0
    for name, rank in ranks.items():
        d_out, d_in = spec.modules[name]
        total += rank * (d_in * ("A" in factors) + d_out * ("B" in factors))
    return total


def base_bytes(model: Architecture) -> float:
    """Bytes of the frozen model; quantisation reaches the linear layers of the backbone."""
    if model.quantization is None:
        return float(model.weights * model.parameters)
    linear = sum(d_out * d_in for d_out, d_in in model.linears.values())
    rows = sum(d_out for d_out, _ in model.linears.values()) if model.quantization == "8bit" else 0
    return linear * _QUANTIZED[model.quantization] + 4 * rows + model.weights * (model.parameters - linear)


def record(
    spec: ModelSpec, local: LocalTraining, ranks: Mapping[str, int], factors: Factors = "AB", *, padded: bool = True
) -> Tape:
    """The forward pass of one training step on a tape.

    Args:
        spec, local, ranks, factors: as for `memory`.
        padded: whether texts of a batch differ in length, so that attention carries a mask.

    Raises:
        NoFormulaError: if the model's family has none.
    """
    model = architecture_of(spec)
    if model.family not in FAMILIES:
        raise NoFormulaError("its family has no formula for activations")
    step = Step(
        batch=local.batch,
        ranks=ranks,
        factors=factors,
        dropout=local.dropout > 0,
        autocast=local.precision == "bf16",
        checkpointing=local.checkpointing,
        padded=padded,
        head=sum(spec.head.values()) * spec.head_trained,
        lokr={} if spec.lokr is None else {n: lokr_shapes(shape, spec.lokr) for n, shape in spec.modules.items()},
    )
    tape = Tape(model, step)
    FAMILIES[model.family](tape, model)
    return tape


def _activations(
    spec: ModelSpec, local: LocalTraining, ranks: Mapping[str, int], factors: Factors, gradients: int
) -> tuple[float, float, float]:
    """Kept and passing bytes, and what of them and of `gradients` is apart: from the tape, scaled as measured.

    Or the measured line, of which nothing more is known.
    """
    measured = spec.calibration
    if measured.constant is not None and measured.per_rank is not None:
        return local.batch * (measured.constant + measured.per_rank * sum(ranks.values())), 0.0, 0.0
    tape = record(spec, local, ranks, factors)
    found = moments(tape.ops, gradients if local.accumulate > 1 else 0)
    kept = measured.scale * saved_bytes(tape.ops)
    highest = measured.scale * max(moment.activations for moment in found)
    together = max(measured.scale * moment.activations + moment.gradients for moment in found)
    return kept, highest - kept, together - highest - gradients
