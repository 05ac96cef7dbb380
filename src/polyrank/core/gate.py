"""What an update must satisfy before it touches the model, whoever trained it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median_low

import numpy as np
import torch
from torch import Tensor

from polyrank.core.lowrank import Adapter, LowRank, norm, stack
from polyrank.core.types import Client, Task, Update

Refuse = Callable[[Client, str], None]
"""Takes note of a client whose update is not used, and why."""

_SLACK = 1.25  # for the rounding of messages that are quantised
_BETA_1, _BETA_2 = 0.9, 0.999  # of torch's AdamW
_SETTLED = 10_000  # steps, after which c_t of `reachable` is its limit to five digits
_BEYOND = 1e6
_GROWN = 700.0  # exp of more is no float


@dataclass(frozen=True)
class Gate:
    """Checks of every update against its task and its cohort; one that fails any is dropped, and the round goes on.

    An update for a task that nobody was given, or with a value that is not finite, is always refused; so is one with a
    value a million beyond all that were sent: no training leads there, and rules' products may overflow float32.

    Attributes:
        norm: refuse an update whose change of the model is more than this many times the cohort's median change
            (Frobenius norm over all layers, in factored form). None: no such check. A cohort's updates are then held
            until the last has come, also where the rule streams.
        reach: refuse an update that the task's optimizer could not have reached in its steps (`reachable`).
        most_examples: refuse an update that claims more examples. None: no cap.
    """

    norm: float | None = None
    reach: bool = False
    most_examples: float | None = None

    def __post_init__(self) -> None:
        for name in ("norm", "most_examples"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"trust.{name}: {value} must be more than 0")

    def admitted(self, tasks: Mapping[Client, Task], updates: Iterable[Update], refuse: Refuse) -> Iterator[Update]:
        """The updates that pass, in the order in which they come."""
        passed = self._each(tasks, updates, refuse)
        if self.norm is None:
            yield from passed
            return
        held = list(passed)
        changes = [change(tasks[update.client].adapter, update.adapter) for update in held]
        # Who changes nothing, for example for want of examples, says nothing of what is usual.
        usual = median_low([own for own in changes if own > 0] or [0.0])
        for update, own in zip(held, changes, strict=True):
            if own > self.norm * usual > 0:
                most = f"{self.norm:g} times the median {usual:.3g}"
                refuse(update.client, f"changes the model by {own:.3g}, over {most}")
            else:
                yield update

    def _each(self, tasks: Mapping[Client, Task], updates: Iterable[Update], refuse: Refuse) -> Iterator[Update]:
        for update in updates:
            fault = self._fault(tasks.get(update.client), update)
            if fault is None:
                yield update
            else:
                refuse(update.client, fault)

    def _fault(self, task: Task | None, update: Update) -> str | None:
        if task is None:
            return "was given no task in this round"
        if not math.isfinite(update.examples) or update.examples < 0:
            return f"claims {update.examples:g} examples"
        if self.most_examples is not None and update.examples > self.most_examples:
            return f"claims {update.examples:g} examples, over the cap of {self.most_examples:g}"
        largest = max((_largest(tensor) for _, tensor in _tensors(task.adapter)), default=0.0)
        for name, tensor in _tensors(update.adapter):
            if not math.isfinite(own := _largest(tensor)):
                return f"has a value that is not finite in {name}"
            if own > _BEYOND + largest:
                return f"has a value of {own:.3g} in {name}, more than {_BEYOND:g} beyond the largest that was sent"
        if self.reach:
            far, most = moved(task.adapter, update.adapter), _SLACK * reachable(task, update.examples)
            if far > most:
                return f"moves by {far:.3g}, beyond {most:.3g}, which {task.local.optimizer} can reach"
        return None


def change(sent: Adapter, trained: Adapter) -> float:
    """How far an update moves the model: ||(scale B' A' - scale B A)||_F over all layers, and dense parameters."""
    # In float64 no product of two finite float32 values overflows.
    pairs = [(_double(x), _double(sent.layers[name])) for name, x in trained.layers.items()]
    layers = [stack([x, before], [1.0, -1.0]) for x, before in pairs if not _equal(x, before)]
    dense = [_distance(tensor, sent.dense[name]) for name, tensor in trained.dense.items()]
    return math.hypot(*(norm(x) for x in layers), *dense)


def moved(sent: Adapter, trained: Adapter) -> float:
    """How far the trained values themselves lie from those that were sent; rows that a client pruned count as kept."""
    parts = []
    for name, x in trained.layers.items():
        before = sent.layers[name]
        parts += [_distance(x.A, before.A[: x.rank]), _distance(x.B, before.B[:, : x.rank])]
    return math.hypot(*parts, *(_distance(tensor, sent.dense[name]) for name, tensor in trained.dense.items()))


def reachable(task: Task, examples: float) -> float:
    """The farthest that a task's optimizer can move what it trains, as an L2 norm; infinite where nothing bounds it.

        AdamW:    far = sum_t lr * c_t * sqrt(n), and with decay far + steps * lr * weight_decay * (start + far)
                  c_t = (1 - beta_1) / sqrt(1 - beta_2) sqrt((1 - q^t) / (1 - q)) sqrt(1 - beta_2^t) / (1 - beta_1^t)
                  q = beta_1^2 / beta_2
        SGD:      sum_t a * (clip + weight_decay * start) * (1 + a * weight_decay)^t, a = lr / (1 - momentum);
                  with clipping only
        start:    ||what was sent||

    Args:
        task: what the client was sent.
        examples: that it says it trained on, which decide its steps.

    References:
        Kingma and Ba 2015, arXiv:1412.6980.

    Note:
        c_t is the most that |m_t| / sqrt(v_t) can be after bias correction, by Cauchy and Schwarz. The paper's section
        2.1 has c_t <= (1 - beta_1) / sqrt(1 - beta_2) = 3.2 for one gradient after none; a growing one gets up to 7.3.
    """
    local = task.local
    steps = local.steps or local.epochs * math.ceil(examples / (local.batch * local.accumulate))
    trained = list(_trained(task))
    start = math.hypot(*(float(torch.linalg.vector_norm(tensor.double())) for tensor in trained))
    if local.optimizer == "adamw":
        far = local.lr * _adam(steps) * math.sqrt(sum(tensor.numel() for tensor in trained))
        return far + steps * local.lr * local.weight_decay * (start + far)
    if local.clip is None:
        return math.inf
    pace, decay = local.lr / (1 - local.momentum), local.weight_decay
    if not decay:
        return steps * pace * local.clip
    grown = steps * math.log1p(pace * decay)
    return (local.clip / decay + start) * math.expm1(grown) if grown < _GROWN else math.inf


def _adam(steps: int) -> float:
    """The sum of c_t over steps (`reachable`); from where c_t hardly grows any more, of its limit."""
    t, q = np.arange(1, min(steps, _SETTLED) + 1), _BETA_1**2 / _BETA_2
    most = (1 - _BETA_1) / math.sqrt((1 - _BETA_2) * (1 - q))
    early = np.sqrt((1 - q**t) * (1 - _BETA_2**t)) / (1 - _BETA_1**t)
    return most * (float(early.sum()) + max(steps - _SETTLED, 0))


def _trained(task: Task) -> Iterator[Tensor]:
    for x in task.adapter.layers.values():
        yield from (getattr(x, factor) for factor in task.factors)
    yield from task.adapter.dense.values()


def _tensors(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    for name, x in adapter.layers.items():
        yield from ((f"{name}.A", x.A), (f"{name}.B", x.B))
    yield from adapter.dense.items()


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _double(x: LowRank) -> LowRank:
    return LowRank(x.A.double(), x.B.double(), x.scale)


def _equal(x: LowRank, y: LowRank) -> bool:
    return torch.equal(x.A, y.A) and torch.equal(x.B, y.B)


def _distance(one: Tensor, other: Tensor) -> float:
    return float(torch.linalg.vector_norm(one.double() - other.double()))
