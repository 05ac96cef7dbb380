"""What an update must satisfy before it touches the model, whoever trained it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median_low

import numpy as np
import torch
from torch import Tensor

from polyrank.core.clipping import change_of, part_way
from polyrank.core.lowrank import Adapter, Factors, LowRank, norm, stack, truncate
from polyrank.core.roster import sizes
from polyrank.core.types import Client, ClientProfile, LocalTraining, Task, Update

Note = Callable[[Client, str], None]
"""Takes note of a client, and why its update is not used, or counts as less."""

_SLACK = 1.25  # for the rounding of messages that are quantised
_BETA_1, _BETA_2 = 0.9, 0.999  # of torch's AdamW
_SETTLED = 10_000  # steps, after which c_t of `reachable` is its limit to five digits
_BEYOND = 1e6
_GROWN = 700.0  # exp of more is no float
_FEW = 3
"""Clients that say what is usual; of two, either may be the liar."""


def _nobody(client: Client, reason: str) -> None:
    pass


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
        size_cap: a client counts as at most this many times the median number of examples that clients state, and is
            asked for as many steps as that takes. None: it counts as what it states.
        clip: hold an update back that pulls the model this many times as far as the cohort's median update: its change,
            of the products and of the factors, times the examples it counts as (`held_back`). None: it counts as it is.
            Holds the cohort, as `norm` does.
    """

    norm: float | None = None
    reach: bool = False
    most_examples: float | None = None
    size_cap: float | None = None
    clip: float | None = None

    def __post_init__(self) -> None:
        for name in ("norm", "most_examples", "size_cap", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"trust.{name}: {value} must be more than 0")

    def most(self, profiles: Mapping[Client, ClientProfile]) -> float:
        """As how many examples any client counts at most: `size_cap` times the median of those that have some."""
        stated = sizes(profiles)
        stated = np.sort(stated[stated > 0])
        if self.size_cap is None or not len(stated):
            return math.inf
        return self.size_cap * int(stated[(len(stated) - 1) // 2])

    def asked(
        self, tasks: Mapping[Client, Task], profiles: Mapping[Client, ClientProfile], most: float
    ) -> dict[Client, Task]:
        """The tasks; who states more than `most` examples is asked for the steps that `most` take.

        Where anything is protected, the steps stay: what is promised was counted for them.
        """
        return {
            client: task if task.privacy or profiles[client].examples <= most else _shortened(task, most)
            for client, task in tasks.items()
        }

    def admitted(
        self,
        tasks: Mapping[Client, Task],
        updates: Iterable[Update],
        refuse: Note,
        bound: Note = _nobody,
        most: float = math.inf,
    ) -> Iterator[Update]:
        """The updates that pass, in the order in which they come, each as what it counts as.

        Args:
            tasks: what was sent.
            updates: what has come.
            refuse: is told who does not pass, and why.
            bound: is told who counts as less than it states or sent, and why.
            most: as how many examples a client counts at most (`most`).
        """
        passed = self._each(tasks, updates, refuse, bound, most)
        if self.norm is None and self.clip is None:
            yield from passed
            return
        held = list(passed)
        if self.norm is not None:
            held = self._near(tasks, held, refuse, self.norm)
        yield from held if self.clip is None else held_back(tasks, held, self.clip, bound)

    def _near(self, tasks: Mapping[Client, Task], held: list[Update], refuse: Note, times: float) -> list[Update]:
        changes = [change(tasks[update.client].adapter, update.adapter) for update in held]
        usual, near = _median(changes), []
        for update, own in zip(held, changes, strict=True):
            if own > times * usual > 0:
                refuse(update.client, f"changes the model by {own:.3g}, over {times:g} times the median {usual:.3g}")
            else:
                near.append(update)
        return near

    def _each(
        self, tasks: Mapping[Client, Task], updates: Iterable[Update], refuse: Note, bound: Note, most: float
    ) -> Iterator[Update]:
        for update in updates:
            fault = self._fault(tasks.get(update.client), update, most)
            if fault is not None:
                refuse(update.client, fault)
            elif update.examples > most:
                assert self.size_cap is not None
                times = f"{self.size_cap:g} times the median of {most / self.size_cap:g}"
                bound(update.client, f"states {update.examples:.5g} examples, and counts as {most:g}: {times}")
                yield replace(update, examples=most)
            else:
                yield update

    def _fault(self, task: Task | None, update: Update, most: float) -> str | None:
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
            far, farthest = moved(task.adapter, update.adapter), _SLACK * reachable(task, min(update.examples, most))
            if far > farthest:
                return f"moves by {far:.3g}, beyond {farthest:.3g}, which {task.local.optimizer} can reach"
        return None


def held_back(tasks: Mapping[Client, Task], held: Sequence[Update], times: float, bound: Note) -> Iterator[Update]:
    """The updates, none of which pulls the model more than so many times as far as is usual.

        (A + t a, B + t b), with the largest t in (0, 1] at which
        w || change of products(t) || <= times * median   and   w || change of factors(t) || <= times * median
        w = max(1, examples / median examples)

    over all layers and dense parameters together, each norm with a median of its own over those that change anything:
    a mean of factors sees another size than a mean of products. Fewer than three updates have no usual size, and stay
    as they are.

    Args:
        tasks: what was sent.
        held: the cohort's updates.
        times: of the median.
        bound: is told who is held back.
    """
    starts = [_at_ranks(tasks[update.client].adapter, update.adapter) for update in held]
    changes = [change_of(s, u.adapter, tasks[u.client].factors) for s, u in zip(starts, held, strict=True)]
    products, factors = [own.product(1.0) for own in changes], [own.factors(1.0) for own in changes]
    few = sum(size > 0 for size in factors) < _FEW
    most = times * _median(products), times * _median(factors)
    usual = _median([update.examples for update in held]) or 1.0
    for update, start, own, *norms in zip(held, starts, changes, products, factors, strict=True):
        weight = max(1.0, update.examples / usual)
        far = max((weight * norm / limit for norm, limit in zip(norms, most, strict=True) if limit), default=0.0)
        if few or far <= 1:
            yield update
            continue
        bound(
            update.client, f"pulls {far * times:.3g} times as far as the median client, and counts as {times:g} times"
        )
        t = own.reach(most[0] / weight, most[1] / weight)
        yield replace(update, adapter=_held(start, update, tasks[update.client].factors, t))


def _held(start: Adapter, update: Update, factors: Factors, t: float) -> Adapter:
    """The update t of the way, in the precision in which it came."""
    far = part_way(start, update.adapter, factors, t)
    layers = {
        name: LowRank(far.layers[name].A.to(x.A.dtype), far.layers[name].B.to(x.B.dtype), x.scale)
        for name, x in update.adapter.layers.items()
    }
    return Adapter(layers, {name: far.dense[name].to(y.dtype) for name, y in update.adapter.dense.items()})


def _at_ranks(sent: Adapter, trained: Adapter) -> Adapter:
    """What was sent, without the rows that a client has pruned."""
    layers = {name: truncate(sent.layers[name], x.rank) for name, x in trained.layers.items()}
    return Adapter(layers, {name: sent.dense[name] for name in trained.dense})


def _median(changes: Sequence[float]) -> float:
    """What is usual; who changes nothing, for example for want of examples, says nothing of it."""
    return median_low([own for own in changes if own > 0] or [0.0])


def _shortened(task: Task, examples: float) -> Task:
    """The task, in as many steps as so many examples take."""
    return replace(task, local=replace(task.local, steps=steps_of(task.local, examples)))


def steps_of(local: LocalTraining, examples: float) -> int:
    """The optimizer steps that a client of so many examples takes in a round."""
    return local.steps or local.epochs * math.ceil(examples / (local.batch * local.accumulate))


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
    steps = steps_of(local, examples)
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
