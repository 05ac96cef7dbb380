"""A method is six answers. A published method is a composition of them; an ablation replaces one.

    estimate    profiles, model spec, local        -> {client: rank budget}
    score       model spec, state                  -> {layer: importance}
    allocate    budget, caps, scores, spec, rng    -> {layer: rank}
    dispatch    state, ranks, rng                  -> (trained layers, frozen layers)
    factors     round                              -> "A", "B" or "AB"
    aggregate   state, updates, rng                -> state

Each answer is a plain function whose keyword-only parameters are its options. `penalty`, `dense`, `form` and `rank` are
data: the terms a client adds to its loss, what becomes of the head, and what the adapter is made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    ServerState,
    TailPenalty,
    Update,
)

Ranks = Mapping[str, int]
Dense = Literal["size", "uniform", "freeze"]
Form = Literal["lora", "lokr"]

Positive = Annotated[int, Ge(1)]
"""An option that counts: at least 1."""


class Estimate(Protocol):
    """What can each client afford? Its rank budget, with the limit that binds."""

    def __call__(
        self, profiles: Mapping[Client, ClientProfile], spec: ModelSpec, local: LocalTraining
    ) -> dict[Client, Budget]: ...


class Score(Protocol):
    """Which layers matter? A non-negative importance per layer."""

    def __call__(self, spec: ModelSpec, state: ServerState) -> dict[str, float]: ...


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
    """How do updates become one adapter? Updates come in order of client and may be consumed one by one."""

    def __call__(self, state: ServerState, updates: Iterable[Update], rng: np.random.Generator) -> ServerState: ...


@dataclass(frozen=True)
class Method:
    """The six answers.

    Attributes:
        estimate, score, allocate, dispatch, factors, aggregate: see the module's docstring.
        penalty: terms a client adds to its loss (HetLoRA), or None.
        dense: the head is trained and averaged by ``size`` or ``uniform``ly, or ``freeze``: it stays as it started.
            Other dense parameters are trained whatever becomes of the head.
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
    form: Form = "lora"
    rank: int | None = None
