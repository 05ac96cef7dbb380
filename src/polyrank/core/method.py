"""A method is six answers. A published method is a composition of them; an ablation replaces one.

    estimate    profiles, model spec, local        -> {client: rank budget}
    score       model spec, state, measure         -> {layer: importance}
    allocate    budget, caps, scores, spec, rng    -> {layer: rank}
    dispatch    state, ranks, rng                  -> (trained layers, frozen layers)
    factors     round                              -> "A", "B" or "AB"
    aggregate   state, updates, rng                -> state

Each answer is a plain function whose keyword-only parameters are its options. `penalty`, `dense`, `hold`, `boost`,
`form` and `rank` are data: the terms a client adds to its loss, what becomes of the head, how long a draw of layers
lasts, a warm-up beyond the budget, and what the adapter is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import numpy as np
from annotated_types import Ge

from polyrank.core.lowrank import Factors, LowRank
from polyrank.core.types import (
    Budget,
    Client,
    ClientProfile,
    LocalTraining,
    ModelSpec,
    Query,
    ServerState,
    TailPenalty,
    Update,
)

Ranks = Mapping[str, int]
Dense = Literal["size", "uniform", "freeze"]
Form = Literal["lora", "lokr"]

Positive = Annotated[int, Ge(1)]
"""An option that counts: at least 1."""

Measure = Callable[[Query], Mapping[str, float]]
"""Has an importance computed on real data; empty where nobody could answer."""


class Estimate(Protocol):
    """What can each client afford? Its rank budget, with the limit that binds.

    It is asked once a run, for everybody. Where profiles differ in their examples only, `polyrank.core.roster.kinds`
    saves looking at every client.
    """

    def __call__(
        self, profiles: Mapping[Client, ClientProfile], spec: ModelSpec, local: LocalTraining
    ) -> Mapping[Client, Budget]: ...


class Score(Protocol):
    """Which layers matter? A non-negative importance per layer.

    A scorer that keeps the scores of an earlier round returns `state.scores` itself; anything else counts as new.
    """

    def __call__(self, spec: ModelSpec, state: ServerState, measure: Measure | None) -> Mapping[str, float]: ...


class Allocate(Protocol):
    """Where does a budget go? A rank per layer, at most the layer's cap; layers of rank 0 may be left out."""

    def __call__(
        self, budget: int, caps: Ranks, scores: Mapping[str, float], spec: ModelSpec, rng: np.random.Generator
    ) -> dict[str, int]: ...


class Dispatch(Protocol):
    """What does the client receive? The layers it trains, at `ranks`, and layers it only runs."""

    def __call__(
        self, state: ServerState, ranks: Ranks, rng: np.random.Generator
    ) -> tuple[dict[str, LowRank], dict[str, LowRank]]: ...


class Schedule(Protocol):
    """What does it train this round?"""

    def __call__(self, round_: int) -> Factors: ...


class Aggregate(Protocol):
    """How do updates become one adapter? Updates come in order of client and may be consumed one by one.

    Dense parameters that a rule returns as new tensors are its answer too; those it leaves as the state's, as most
    rules do with all of them, `absorb` averages as `Method.dense` says.
    """

    def __call__(self, state: ServerState, updates: Iterable[Update], rng: np.random.Generator) -> ServerState: ...


@dataclass(frozen=True)
class Boost:
    """A warm-up at a multiple of the ranks that the allocator gives (HRALoRA's doubled ranks, CCGrid 2026).

        r_l <- min(cap_l, factor * r_l)   in rounds 0 to rounds - 1

    It overspends the estimated budget on purpose: what a client trains, sends and keeps in memory in those rounds is
    up to `factor` times what its limits allow. `polyrank plan` says so.
    """

    rounds: int
    factor: int

    def __post_init__(self) -> None:
        if self.rounds < 0 or self.factor < 1:
            raise ValueError(f"a boost needs rounds >= 0 and a factor >= 1, got {self.rounds} and {self.factor}")

    def of(self, ranks: Ranks, caps: Ranks, round_: int) -> dict[str, int]:
        """The ranks of a round."""
        factor = self.factor if round_ < self.rounds else 1
        return {name: min(caps[name], rank * factor) for name, rank in ranks.items()}


@dataclass(frozen=True)
class Method:
    """The six answers.

    Attributes:
        estimate, score, allocate, dispatch, factors, aggregate: see the module's docstring.
        penalty: terms a client adds to its loss (HetLoRA), or None.
        dense: the head is trained and averaged by ``size`` or ``uniform``ly, or ``freeze``: it stays as it started.
            Other dense parameters are trained whatever becomes of the head. A rule that answers for dense parameters
            itself, as the robust ones do, averages a trained head in its own way.
        hold: whether an allocator's random draws are kept until the scores are made anew, rather than drawn every
            round. Where every round has new scores, as in a warm-up, every round has new draws.
        boost: a warm-up beyond the budget, or None.
        form: what the first state is made of: ``lora``, low-rank layers that budgets are spent on, or ``lokr``,
            Kronecker factors among the dense parameters, which every client that can afford anything trains whole.
        rank: LoKr's r; None with ``lora``.
    """

    estimate: Estimate
    score: Score
    allocate: Allocate
    dispatch: Dispatch
    factors: Schedule
    aggregate: Aggregate
    penalty: TailPenalty | None = None
    dense: Dense = "size"
    hold: bool = False
    boost: Boost | None = None
    form: Form = "lora"
    rank: int | None = None
