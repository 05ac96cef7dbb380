"""How far an update may move the model, and noise on how far it did: client-level differential privacy.

A client that was sent (A, B) and trained (A + a, B + b) sends (A + t a, B + t b) with t in (0, 1]. Everything is in
float64 until the noise is on, so that no bound is lost to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from polyrank.core.lowrank import Adapter, Factors, LowRank, inner
from polyrank.core.noise import Noise
from polyrank.core.privacy import ClientPrivacy
from polyrank.core.types import Client, Task, Update

_HALVINGS = 80


@dataclass(frozen=True)
class Change:
    """The inner products that say how long a client's change is, over all layers and dense parameters together.

        product(t)^2 = t^2 xx + 2 t^3 xy + t^4 yy,   factors(t)^2 = t^2 raw

    with X = s (b A + B a) and Y = s b a per layer, since s (B + t b) (A + t a) - s B A = t X + t^2 Y. Dense parameters
    change by t d, which counts in `xx` and in `raw`.
    """

    xx: float
    xy: float
    yy: float
    raw: float

    def product(self, t: float) -> float:
        """The norm of the change of all products (and dense parameters), t of the way."""
        return t * math.sqrt(max(self.xx + 2 * t * self.xy + t * t * self.yy, 0.0))

    def factors(self, t: float) -> float:
        """The norm of the change of all factors (and dense parameters), t of the way."""
        return t * math.sqrt(self.raw)

    def reach(self, product: float, factors: float) -> float:
        """The largest t in (0, 1] at which the norms of the products and of the factors are within these bounds.

        The product's norm need not grow with t: between the points where it turns it is monotone, so the last crossing
        is in the last stretch that begins within the bound, and is found by halving.
        """
        last = 1.0 if self.factors(1.0) <= factors else factors / math.sqrt(self.raw)
        while self.factors(last) > factors:
            last = math.nextafter(last, 0.0)
        if self.product(last) <= product:
            return last
        stops = [0.0, *(t for t in self._turns() if 0 < t < last), last]
        start = max(i for i, t in enumerate(stops) if self.product(t) <= product)
        low, high = stops[start], stops[start + 1]
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.product(middle) <= product else (low, middle)
        return low

    def _turns(self) -> list[float]:
        """Where ``d/dt product(t)^2 = 2 t (xx + 3 t xy + 2 t^2 yy)`` is 0, but for t = 0."""
        root = 9 * self.xy**2 - 8 * self.xx * self.yy
        if root <= 0 or self.yy == 0:  # Y = 0 has no inner product with X either
            return []
        return sorted((-3 * self.xy + sign * math.sqrt(root)) / (4 * self.yy) for sign in (-1, 1))


def change_of(sent: Adapter, trained: Adapter, factors: Factors) -> Change:
    """How an adapter was changed, from Gram matrices of the factors; no d_out x d_in matrix is formed.

    Args:
        sent: the adapter before.
        trained: after, of the same layers, ranks and dense parameters.
        factors: those that were trained; the others count as unchanged.
    """
    xx = xy = yy = raw = 0.0
    for name, x in trained.layers.items():
        before = sent.layers[name]
        a = _moved(before.A, x.A) if "A" in factors else torch.zeros_like(x.A, dtype=torch.float64)
        b = _moved(before.B, x.B) if "B" in factors else torch.zeros_like(x.B, dtype=torch.float64)
        X = LowRank(torch.cat([before.A.double(), a]), torch.cat([b, before.B.double()], dim=1), before.scale)
        Y = LowRank(a, b, before.scale)
        xx, xy, yy = xx + inner(X, X), xy + inner(X, Y), yy + inner(Y, Y)
        raw += float(a.square().sum() + b.square().sum())
    for name, tensor in trained.dense.items():
        moved = float(_moved(sent.dense[name], tensor).square().sum())
        xx, raw = xx + moved, raw + moved
    return Change(xx, xy, yy, raw)


def clipped(sent: Adapter, update: Update, clip: float) -> Update:
    """The update as far towards what was trained as the bound allows, in float64. It weighs as much as any other.

        || change of products(t) || <= clip   and   || change of factors(t) || <= clip

    over all layers and dense parameters together, with the largest such t in (0, 1]. Factors that were not trained are
    those that were sent. The number of examples becomes 1 and metrics are dropped: neither is covered by the noise.

    Args:
        sent: the adapter that the client was sent.
        update: what it trained.
        clip: the bound.

    Raises:
        ValueError: if the update is not of the shapes that were sent, or not finite.
    """
    _check(sent, update)
    change = change_of(sent, update.adapter, update.factors)
    if not math.isfinite(change.xx + change.yy + change.raw):
        raise ValueError(f"client {update.client!r}: its update is not finite")
    adapter = part_way(sent, update.adapter, update.factors, change.reach(clip, clip))
    return replace(update, adapter=adapter, examples=1.0, metrics={})


def part_way(sent: Adapter, trained: Adapter, factors: Factors, t: float) -> Adapter:
    """What was trained, t of the way from what was sent: (A + t a, B + t b), in float64.

    Args:
        sent: the adapter before.
        trained: after, of the same layers, ranks and dense parameters.
        factors: those that were trained; the others are those that were sent.
        t: from 0 to 1.
    """
    layers = {
        name: LowRank(
            _between(sent.layers[name].A, x.A, t) if "A" in factors else sent.layers[name].A,
            _between(sent.layers[name].B, x.B, t) if "B" in factors else sent.layers[name].B,
            x.scale,
        )
        for name, x in trained.layers.items()
    }
    return Adapter(layers, {name: _between(sent.dense[name], tensor, t) for name, tensor in trained.dense.items()})


def privately(sent: Adapter, update: Update, settings: ClientPrivacy, noise: Noise) -> Update:
    """What a client sends under ``where: client``: clipped, with noise on every number it trained.

        sent + t change + z C N(0, I),   one Gaussian mechanism of sensitivity 2 C

    Args:
        sent: the adapter that the client was sent.
        update: what it trained.
        settings: C and z.
        noise: draws.
    """
    bounded = clipped(sent, update, settings.clip)
    loud = _Noised(settings.deviation, noise).add(bounded)
    layers = {
        name: LowRank(x.A.to(update.adapter.layers[name].A.dtype), x.B.to(update.adapter.layers[name].B.dtype), x.scale)
        for name, x in loud.adapter.layers.items()
    }
    dense = {name: tensor.to(update.adapter.dense[name].dtype) for name, tensor in loud.adapter.dense.items()}
    return replace(loud, adapter=Adapter(layers, dense))


def privately_summed(
    updates: Iterable[Update], tasks: Mapping[Client, Task], settings: ClientPrivacy, noise: Noise
) -> Iterator[Update]:
    """The updates under ``where: central``: clipped, with noise on their sum, once for every number in it.

        sum_i t_i change_i + z C N(0, I),   one Gaussian mechanism of sensitivity C

    A rule that is linear in the factors and weighs all clients alike makes of noise on the sum what it makes of the
    sum, so the noise may come with any one update that holds the number: with the first. Clients hold the first rows
    of a layer, so what has its noise already is a number of rows.

    Args:
        updates: of a round, in order; held one at a time.
        tasks: what was sent.
        settings: C and z.
        noise: draws.
    """
    noised = _Noised(settings.deviation, noise)
    for update in updates:
        task = tasks[update.client]
        yield noised.add(clipped(task.adapter, replace(update, factors=task.factors), settings.clip))


@dataclass
class _Noised:
    """Adds noise to numbers that have none yet."""

    deviation: float
    noise: Noise
    rows: dict[tuple[str, str], int] = field(default_factory=dict)
    dense: set[str] = field(default_factory=set)

    def add(self, update: Update) -> Update:
        layers = {name: self._layer(name, x, update.factors) for name, x in update.adapter.layers.items()}
        dense = {name: self._parameter(name, tensor) for name, tensor in update.adapter.dense.items()}
        return replace(update, adapter=Adapter(layers, dense))

    def _layer(self, name: str, x: LowRank, factors: Factors) -> LowRank:
        A = self._beyond(x.A, (name, "A")) if "A" in factors else x.A
        B = self._beyond(x.B.T, (name, "B")).T if "B" in factors else x.B
        return LowRank(A, B.contiguous(), x.scale)

    def _beyond(self, rows: Tensor, key: tuple[str, str]) -> Tensor:
        done = self.rows.get(key, 0)
        self.rows[key] = max(done, len(rows))
        loud = rows[done:] + self.deviation * self.noise(rows[done:].shape).to(rows.device)
        return torch.cat([rows[:done], loud])

    def _parameter(self, name: str, tensor: Tensor) -> Tensor:
        if name in self.dense:
            return tensor
        self.dense.add(name)
        return tensor + self.deviation * self.noise(tensor.shape).to(tensor.device)


def _check(sent: Adapter, update: Update) -> None:
    for name, x in update.adapter.layers.items():
        due = sent.layers.get(name)
        if due is None or (due.A.shape, due.B.shape, due.scale) != (x.A.shape, x.B.shape, x.scale):
            raise ValueError(f"client {update.client!r}, layer {name!r}: is not of the shape and scale that was sent")
    for name, tensor in update.adapter.dense.items():
        if name not in sent.dense or sent.dense[name].shape != tensor.shape:
            raise ValueError(f"client {update.client!r}, parameter {name!r}: is not of the shape that was sent")


def _moved(before: Tensor, after: Tensor) -> Tensor:
    return after.double() - before.double()


def _between(before: Tensor, after: Tensor, t: float) -> Tensor:
    return before.double() + t * _moved(before, after)
