"""Questions that a model itself answers, by small passes over real examples: families and names tell too little.

- Where are the examples of a batch in what enters its modules (`polyrank.local.layout`)?
- Do adapters of several clients side by side in one pass give what each gives alone, forward and backward? On this
  clients that train together rely, and gradients of single examples.
- Do a text's logits depend on how far its batch is filled up (`polyrank.local.padding`)?

An answer is a property of the model. It is asked for once, before anything is trained.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from polyrank.core.lowrank import Adapter, LowRank
from polyrank.core.rng import stream, torch_generator
from polyrank.core.types import LocalTraining, Task
from polyrank.local.attach import Batch
from polyrank.local.base import Base
from polyrank.local.cohort import Cohort, Job, Key
from polyrank.local.data import Examples, Indices
from polyrank.local.heads import owners, stackable
from polyrank.local.layout import BATCH_FIRST, Layout
from polyrank.local.losses import asked_alone, losses

_log = logging.getLogger(__name__)

POSITIONS = 32
"""Examples of about so many positions answer: few cost little, and very short texts are a case of their own."""

_CHOICE = 256  # examples among which those that answer are looked for
_CLIENTS = 2
_RANKS = (3, 2)


@dataclass(frozen=True)
class Answer:
    """What a model says of adapters side by side.

    Attributes:
        layouts: of the modules that carry adapters or are trained and are not batch-first.
        reason: why they do not go side by side, with the module where it is known; None where they do.
    """

    layouts: Mapping[str, Layout] = field(default_factory=dict)
    reason: str | None = None


def side_by_side(base: Base, data: Examples, dropout: float = 0.0) -> str | None:
    """Why adapters of several clients, or of several examples, cannot share a pass; None where they can.

    The base then knows the layouts of its modules. What was answered before is not asked again; a no is logged, once.

    Args:
        base: the model.
        data: examples to ask with.
        dropout: that clients train with; 0 for gradients of single examples without.
    """
    key = dropout > 0
    if key not in base.answers:
        base.answers[key] = _answer(base, data, dropout)
        if (reason := base.answers[key].reason) is not None:
            _log.warning("%s: clients train one by one, and so do examples: %s", base.info.base, reason)
    base.layouts.update(base.answers[key].layouts)
    return base.answers[key].reason


def _answer(base: Base, data: Examples, dropout: float) -> Answer:
    examples = distinct(data, 2 * _CLIENTS)
    if len(examples) < 2 * _CLIENTS:
        return Answer(reason=f"fewer than {2 * _CLIENTS} different examples are there to ask the model with")
    layouts = layouts_of(base, data, examples)
    irregular = {name: layout for name, layout in layouts.items() if isinstance(layout, str)}
    if irregular:
        name, reason = next(iter(irregular.items()))
        more = f", and so are {len(irregular) - 1} more modules" if len(irregular) > 1 else ""
        return Answer(reason=f"{name}: {reason}{more}")
    unusual = {n: layout for n, layout in layouts.items() if isinstance(layout, Layout) and layout != BATCH_FIRST}
    base.layouts.update(unusual)
    reason = _own_filling(base, data) if dropout else None
    return Answer(unusual, reason or _disagreement(base, data, examples, dropout))


def distinct(data: Examples, count: int) -> Indices:
    """As many examples as `count`, no two alike, of about `POSITIONS` positions each, those of most positions first."""
    order = np.argsort(np.abs(data.lengths - min(np.median(data.lengths), POSITIONS)), kind="stable")[:_CHOICE]
    unlike: dict[bytes, int] = {}
    for example in order.tolist():
        if len(unlike) < count:
            unlike.setdefault(_content(data.batch(np.array([example]))), example)
    chosen = np.array(list(unlike.values()), np.int64)
    return chosen[np.argsort(-data.lengths[chosen], kind="stable")]


def _content(batch: Batch) -> bytes:
    return b"".join(batch[name].numpy().tobytes() for name in sorted(batch) if name != "labels")


# --- where examples are


def layouts_of(base: Base, data: Examples, examples: Indices) -> dict[str, Layout | str]:
    """The layout of every module that carries adapters or is trained, or why it has none.

    The same pass over two and over three examples shows which dimension follows the batch; a pass in which the second
    example is another one shows which slices along it are that example's.

    Args:
        base: the model.
        data: has the examples.
        examples: four that differ, those of most positions first.
    """
    names = [*base.spec.modules, *owners(base.head)]
    first, second, third, other = examples.tolist()
    two, three, changed = (
        _inputs(base, names, data.batch(np.array(rows)))
        for rows in ([first, second], [first, second, third], [first, other, third])
    )
    return {name: _layout(two[name], three[name], changed[name]) for name in names}


@torch.no_grad()
def _inputs(base: Base, names: Sequence[str], batch: Batch) -> dict[str, list[Tensor]]:
    """What enters each module, call by call."""
    calls: dict[str, list[Tensor]] = {name: [] for name in names}

    def note(name: str) -> torch.utils.hooks.RemovableHandle:
        def keep(module: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            calls[name].append((args or tuple(kwargs.values()))[0].detach().clone())

        return base.modules[name].register_forward_pre_hook(keep, with_kwargs=True)

    handles = [note(name) for name in names]
    try:
        base.logits(batch, {})
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _layout(two: list[Tensor], three: list[Tensor], changed: list[Tensor]) -> Layout | str:
    """A module's layout, from the calls of the three passes of `layouts_of`."""
    if not len(two) == len(three) == len(changed):
        return "how often it runs depends on the batch"
    kinds = {_of_call(*call) for call in zip(two, three, changed, strict=True)} or {BATCH_FIRST}
    if len(kinds) > 1:
        return next((kind for kind in kinds if isinstance(kind, str)), "its calls have inputs of different layouts")
    return kinds.pop()


def _of_call(two: Tensor, three: Tensor, changed: Tensor) -> Layout | str:
    if two.shape == three.shape:
        return "its input does not depend on the batch"
    axes = [axis for axis, (a, b) in enumerate(zip(two.shape, three.shape, strict=False)) if a != b]
    regular = two.ndim == three.ndim and len(axes) == 1 and three.shape == changed.shape
    if not regular or 3 * two.shape[axes[0]] != 2 * three.shape[axes[0]] or axes[0] == two.ndim - 1:
        return "its input does not grow with the batch as rows do"
    (axis,) = axes
    slices = (three - changed).abs().movedim(axis, 0).flatten(1).amax(1) > 1e-4 * three.abs().max()
    at = torch.nonzero(slices).flatten()
    size = three.shape[axis] // 3
    outer, turns = bool((at // size == 1).all()), bool((at % 3 == 1).all())
    if not len(at):
        return BATCH_FIRST if axis == 0 and size == 1 else Layout(axis)
    if outer or turns:
        return Layout(axis, outer)
    return "its rows depend on other examples"


def _own_filling(base: Base, data: Examples) -> str | None:
    """Which module sees texts that the model itself has filled up or shortened, if any does: its masks depend on it.

    Asked with the longest and the shortest text: every dimension is that of the batch, or the same for both.
    """
    batches = [data.batch(np.array([example])) for example in (np.argmax(data.lengths), np.argmin(data.lengths))]
    if "input_ids" not in batches[0]:
        return None
    widths = tuple(batch["input_ids"].shape[1] for batch in batches)
    long, short = (_inputs(base, list(base.spec.modules), batch) for batch in batches)
    for name in base.spec.modules:
        for calls in zip(long[name], short[name], strict=False):
            sizes = set(zip(*(x.shape for x in calls), strict=False))
            if any(pair != widths and pair[0] != pair[1] for pair in sizes):
                return f"{name}: the model itself changes how long texts are, and so the masks of local.dropout"
    return None


# --- side by side against alone


def _disagreement(base: Base, data: Examples, examples: Indices, dropout: float) -> str | None:
    """Which module's gradients differ between clients side by side and each alone, if any do."""
    split = len(examples) // _CLIENTS
    several = [_job(base, c, examples[c * split : (c + 1) * split], dropout) for c in range(_CLIENTS)]
    singles = [_job(base, c, examples[c : c + 1], dropout) for c in range(len(examples))]
    near = 1e-3 if next(base.model.parameters()).dtype == torch.float32 else 1e-1
    for jobs in (several, singles):
        together = _gradients(base, data, jobs)
        for client, job in enumerate(jobs):
            (alone,) = _gradients(base, data, [job])
            scale = max(float(g.norm()) for g in alone.values())
            for (kind, name), gradient in alone.items():
                gap = float((together[client][kind, name] - gradient).norm())
                if not gap <= near * max(float(gradient.norm()), near * scale):
                    return f"{name}: adapters side by side do not get the gradients that each gets alone"
    return None


def _job(base: Base, client: int, examples: Indices, dropout: float) -> Job:
    """A client with a random adapter of its own, which takes one step on these examples."""
    generator = torch_generator(stream(client, "probe"))
    rank = _RANKS[client % len(_RANKS)]

    def layer(d_out: int, d_in: int) -> LowRank:
        r = min(rank, d_out, d_in)
        A, B = (torch.randn(shape, generator=generator) for shape in ((r, d_in), (d_out, r)))
        return LowRank(A / d_in**0.5, B / r**0.5, 0.5)

    layers = {name: layer(*shape) for name, shape in base.spec.modules.items()}
    head = base.initial_head() if stackable(base.modules, base.head) else {}
    dense = {
        name: t + 0.1 * t.std(correction=0) * torch.randn(t.shape, generator=generator) for name, t in head.items()
    }
    local = LocalTraining(batch=len(examples), dropout=dropout, precision="fp32", clip=None)
    task = Task(0, Adapter(layers, dense), Adapter(), "AB", local, None, 0)
    return Job(f"{client:03d}", task, [[examples]], client, len(examples))


def _gradients(base: Base, data: Examples, jobs: Sequence[Job]) -> list[dict[Key, Tensor]]:
    """Each client's gradients in one pass over the examples of all, of which they have as many each."""
    cohort = Cohort(base, jobs)
    parts = [job.steps[0][0] for job in jobs]
    batch = data.batch(np.concatenate(parts))
    with cohort.attached() as model:
        if cohort.masks is not None:
            width = batch["input_ids"].shape[1] if "input_ids" in batch else 0
            positions = [int(data.lengths[part].max()) for part in parts] if width else []
            cohort.meet(list(map(len, parts)), positions, width)
        with asked_alone(base.output, batch["labels"]):
            logits = model(batch)
        losses(logits, batch["labels"]).sum().backward()
        return [cohort.gradients_of(client) for client in range(len(jobs))]
