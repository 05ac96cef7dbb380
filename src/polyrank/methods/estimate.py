"""What can each client afford? Estimators turn profiles into rank budgets, and say which limit binds.

A budget is the sum of ranks over the adapted modules, so rank r on all of m modules is a budget of r * m. A module with
less room than r takes what it has, and counts as r. All estimators but `fixed` look for the largest rank that fits:

    memory      base + adapter + gradients + optimizer + activations + overhead <= what the device has
    upload      bytes of the update <= uplink * seconds / 8
    download    bytes of the adapter <= downlink * seconds / 8

What a profile does not state is no limit. HRALoRA is `least` with its published targets of one second.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Annotated

from annotated_types import Gt

from polyrank.core.costs import download_bytes, memory, remedies, upload_bytes
from polyrank.core.lowrank import Factors
from polyrank.core.method import Estimate, Positive
from polyrank.core.roster import PerKind, kinds
from polyrank.core.types import Budget, Client, ClientProfile, Limit, LocalTraining, ModelSpec

Profiles = Mapping[Client, ClientProfile]
Budgets = PerKind[Budget]
Seconds = Annotated[float, Gt(0)]


def fixed(profiles: Profiles, spec: ModelSpec, local: LocalTraining, *, rank: Positive | None = None) -> Budgets:
    """The rank each client states, or one rank for all, on every module.

    Args:
        profiles: what the clients report.
        spec: the adapted modules.
        local: how clients train.
        rank: rank per module for every client; None takes each profile's own `rank`.

    Raises:
        ValueError: if a client states no rank and `rank` is None.
    """
    alike, budgets = kinds(profiles), []
    for kind, profile in enumerate(alike.each):
        own = profile.rank if rank is None else rank
        if own is None:
            raise ValueError(
                f"client {alike.first(kind)!r} states no rank; give fleet[].rank or method.estimate.rank, "
                "or derive it: method.estimate=least"
            )
        budgets.append(Budget(own * len(spec.modules), own, "stated"))
    return PerKind(alike.names, alike.kind, budgets)


def by_memory(profiles: Profiles, spec: ModelSpec, local: LocalTraining, *, factors: Factors = "AB") -> Budgets:
    """The largest rank whose training fits the client's memory (after HRALoRA's rank estimator).

    Args:
        profiles: what the clients report; each must state its memory.
        spec: the model, with its architecture.
        local: how clients train.
        factors: the factors that are trained; ``AB`` is enough for every schedule.

    References:
        HRALoRA (github.com/UIUC-Cloud-Computing-Capstone/hralora).

    Note:
        The released estimator counts the activations of the low-rank factors twice, never subtracts the overhead it
        measures, and takes every module for a square one. Here they count once, the overhead is reserved, and a
        module costs d_in + d_out per rank.
    """
    needs = _needs(spec, local, factors)
    return _each(profiles, spec, lambda profile: [_memory(profile, spec, local, factors, needs)], "memory")


def by_network(
    profiles: Profiles,
    spec: ModelSpec,
    local: LocalTraining,
    *,
    upload: Seconds | None = 1.0,
    download: Seconds | None = 1.0,
    factors: Factors = "AB",
) -> Budgets:
    """The largest rank that travels in the target seconds (after HRALoRA's rank estimator).

    Args:
        profiles: what the clients report; each must state a link that has a target.
        spec: the adapted modules, and the head if it travels.
        local: how clients train.
        upload: seconds for the update; None: upload is no limit.
        download: seconds for the adapter; None: download is no limit.
        factors: the factors that are sent up; ``AB`` is enough for every schedule.

    References:
        HRALoRA (github.com/UIUC-Cloud-Computing-Capstone/hralora).
    """
    return _each(profiles, spec, lambda p: _links(p, spec, upload, download, factors), "uplink or downlink")


def least(
    profiles: Profiles,
    spec: ModelSpec,
    local: LocalTraining,
    *,
    upload: Seconds | None = 1.0,
    download: Seconds | None = 1.0,
    factors: Factors = "AB",
) -> Budgets:
    """The largest rank that all of a client's limits allow: its memory, its links, the rank it states (HRALoRA).

    Args:
        profiles: what the clients report; each must state at least one limit.
        spec: the model, with its architecture where a client states its memory.
        local: how clients train.
        upload: seconds for the update; None: upload is no limit.
        download: seconds for the adapter; None: download is no limit.
        factors: the factors that are trained and sent up; ``AB`` is enough for every schedule.

    References:
        HRALoRA (github.com/UIUC-Cloud-Computing-Capstone/hralora).
    """

    needs = _needs(spec, local, factors)

    def limits(profile: ClientProfile) -> list[Limit | None]:
        stated = None if profile.rank is None else Limit("stated", profile.rank)
        return [
            _memory(profile, spec, local, factors, needs),
            *_links(profile, spec, upload, download, factors),
            stated,
        ]

    return _each(profiles, spec, limits, "memory, uplink, downlink or rank")


def straggler(
    profiles: Profiles,
    spec: ModelSpec,
    local: LocalTraining,
    *,
    upload: Seconds | None = 1.0,
    download: Seconds | None = 1.0,
    factors: Factors = "AB",
) -> Budgets:
    """The weakest client's budget for everybody: a baseline (HRALoRA).

    Args:
        profiles, spec, local, upload, download, factors: as for `least`.

    References:
        HRALoRA (github.com/UIUC-Cloud-Computing-Capstone/hralora).
    """
    own = least(profiles, spec, local, upload=upload, download=download, factors=factors)
    weakest = min(own.each, key=lambda budget: budget.total, default=None)
    return own.map(
        lambda budget: (
            budget if weakest is None or budget.total == weakest.total else _held_to(weakest, budget, "straggler")
        )
    )


def exclusive(
    profiles: Profiles,
    spec: ModelSpec,
    local: LocalTraining,
    *,
    rank: Positive | None = None,
    upload: Seconds | None = 1.0,
    download: Seconds | None = 1.0,
    factors: Factors = "AB",
) -> Budgets:
    """The full rank for those who can afford it, nothing for the rest: a baseline (HRALoRA).

    Args:
        rank: the full rank; None: the largest that any client can afford.
        profiles, spec, local, upload, download, factors: as for `least`.

    References:
        HRALoRA (github.com/UIUC-Cloud-Computing-Capstone/hralora).
    """
    own = least(profiles, spec, local, upload=upload, download=download, factors=factors)
    full = rank or max((budget.rank for budget in own.each), default=0)
    target = Budget(full * len(spec.modules), full, "exclusive")
    nothing = Budget(0, 0, "exclusive")
    return own.map(lambda budget: _held_to(target if budget.rank >= full else nothing, budget, "exclusive"))


def _held_to(target: Budget, own: Budget, limit: str) -> Budget:
    """A client's budget, replaced by another for a reason that is none of its own."""
    return replace(own, total=target.total, rank=target.rank, limit=limit)


def _each(
    profiles: Profiles, spec: ModelSpec, limits: Callable[[ClientProfile], list[Limit | None]], needs: str
) -> Budgets:
    """Each client's budget; clients of a kind are looked at once."""
    alike = kinds(profiles)
    budgets = []
    for kind, profile in enumerate(alike.each):
        found = [limit for limit in limits(profile) if limit is not None]
        if not found:
            raise ValueError(f"client {alike.first(kind)!r} states no {needs}, so its rank cannot be derived")
        budgets.append(_least(found, spec))
    return PerKind(alike.names, alike.kind, budgets)


def _least(limits: list[Limit], spec: ModelSpec) -> Budget:
    """The budget that all limits allow; the first of those that allow the least is the one that binds."""
    binding = min(limits, key=lambda limit: limit.rank)
    rank = binding.rank
    name = binding.name if rank < spec.full_rank or binding.name == "stated" else "full rank"
    return Budget(rank * len(spec.modules), rank, name, tuple(limits))


def _needs(spec: ModelSpec, local: LocalTraining, factors: Factors) -> Callable[[int], float]:
    """The memory that a rank on every module needs; clients of a fleet ask for the same ranks."""

    @cache
    def needs(rank: int) -> float:
        return memory(spec, local, spec.at(rank), factors).total

    return needs


def _memory(
    profile: ClientProfile, spec: ModelSpec, local: LocalTraining, factors: Factors, needs: Callable[[int], float]
) -> Limit | None:
    if profile.memory is None:
        return None
    limit = _limit("memory", "B", profile.memory, spec.full_rank, needs)
    return limit if limit.rank else replace(limit, advice=remedies(spec, local, factors, profile.memory))


def _links(
    profile: ClientProfile, spec: ModelSpec, upload: float | None, download: float | None, factors: Factors
) -> list[Limit | None]:
    """The limits of the links, as the speed that a rank needs to travel in its seconds."""

    def link(
        name: str, speed: float | None, seconds: float | None, size: Callable[[Mapping[str, int]], int]
    ) -> Limit | None:
        if speed is None or seconds is None:
            return None
        limit = _limit(name, "bit/s", speed, spec.full_rank, lambda rank: 8 * size(spec.at(rank)) / seconds)
        if limit.rank or limit.more is None or not speed:
            return limit
        return replace(limit, advice=(f"{limit.more * seconds / speed:.3g} seconds for the {name} of rank 1",))

    return [
        link("upload", profile.uplink, upload, lambda ranks: upload_bytes(spec, ranks, factors)),
        link("download", profile.downlink, download, lambda ranks: download_bytes(spec, ranks)),
    ]


def _limit(name: str, unit: str, have: float, full: int, cost: Callable[[int], float]) -> Limit:
    """The largest rank up to `full` whose cost is at most `have`; costs never fall as the rank rises."""
    rank = bisect_right(range(1, full + 1), have, key=cost)
    return Limit(name, rank, unit, have, cost(rank) if rank else None, cost(rank + 1) if rank < full else None)


ESTIMATORS: dict[str, Estimate] = {
    "by_memory": by_memory,
    "by_network": by_network,
    "exclusive": exclusive,
    "fixed": fixed,
    "least": least,
    "straggler": straggler,
}
