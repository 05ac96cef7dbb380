"""What an update must satisfy before it touches the model, whoever trained it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median_low

import torch
from torch import Tensor

from polyrank.core.lowrank import Adapter, norm, stack
from polyrank.core.types import Client, LocalTraining, Task, Update

Refuse = Callable[[Client, str], None]
"""Takes note of a client whose update is not used, and why."""

_SLACK = 1.25  # for the rounding of messages that are quantised
_ADAM = 0.1 / math.sqrt(0.001)


@dataclass(frozen=True)
class Gate:
    """Checks of every update against its task and its cohort; one that fails any is dropped, and the round goes on.

    An update with a value that is not finite, or for a task that nobody was given, is always refused.

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

    def admitted(self, tasks: Mapping[Client, Task], updates: Iterable[Update], refuse: Refuse) -> Iterator[Update]:
        """The updates that pass, in the order in which they come."""
        passed = self._each(tasks, updates, refuse)
        if self.norm is None:
            yield from passed
            return
        held = list(passed)
        changes = [change(tasks[update.client].adapter, update.adapter) for update in held]
        usual = median_low(changes) if changes else 0.0
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
        for name, tensor in _tensors(update.adapter):
            if not bool(torch.isfinite(tensor).all()):
                return f"has a value that is not finite in {name}"
        if self.reach:
            far, most = moved(task.adapter, update.adapter), _SLACK * reachable(task, update.examples)
            if far > most:
                return f"moves by {far:.3g}, beyond {most:.3g}, which {task.local.optimizer} can reach"
        return None


def change(sent: Adapter, trained: Adapter) -> float:
    """How far an update moves the model: ||(scale B' A' - scale B A)||_F over all layers, and dense parameters."""
    layers = [stack([x, sent.layers[name]], [1.0, -1.0]) for name, x in trained.layers.items()]
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

        AdamW:    steps * lr * c * sqrt(n) + decay,  c = (1 - beta_1) / sqrt(1 - beta_2)
        SGD:      steps * lr * clip / (1 - momentum) + decay,  with clipping only
        decay:    steps * lr * weight_decay * (||what was sent|| + the bound without decay)

    Args:
        task: what the client was sent.
        examples: that it says it trained on, which decide its steps.

    References:
        Kingma and Ba 2015, arXiv:1412.6980, section 2.1: the bound on a step of Adam.
    """
    local = task.local
    steps = local.steps or local.epochs * math.ceil(examples / (local.batch * local.accumulate))
    tensors = [tensor for _, tensor in _tensors(task.adapter)]
    free = _without_decay(local, steps, sum(tensor.numel() for tensor in tensors))
    start = math.hypot(*(float(torch.linalg.vector_norm(tensor)) for tensor in tensors))
    return free + steps * local.lr * local.weight_decay * (start + free)


def _without_decay(local: LocalTraining, steps: int, values: int) -> float:
    if local.optimizer == "adamw":
        return steps * local.lr * _ADAM * math.sqrt(values)
    return math.inf if local.clip is None else steps * local.lr * local.clip / (1 - local.momentum)


def _tensors(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    for name, x in adapter.layers.items():
        yield from ((f"{name}.A", x.A), (f"{name}.B", x.B))
    yield from adapter.dense.items()


def _distance(one: Tensor, other: Tensor) -> float:
    return float(torch.linalg.vector_norm(one.double() - other.double()))
