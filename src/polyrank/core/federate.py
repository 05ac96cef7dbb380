"""A round, top to bottom: two pure functions around one exchange, once the layers are scored.

    state   = scored(method, state, ...)         # which layers matter by now
    tasks   = plan(method, state, ...)
    updates = clients.fit(tasks)
    state   = absorb(method, state, updates)

`federate` repeats it and yields after every round; logging, checkpoints and early stopping are what the caller
does in its own ``for`` loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from polyrank.core.clipping import privately_summed
from polyrank.core.exactness import aggregation_error
from polyrank.core.gate import Gate
from polyrank.core.ledger import Ledger
from polyrank.core.lowrank import Adapter, LowRank, combine, precision
from polyrank.core.method import Method
from polyrank.core.noise import noise_of
from polyrank.core.privacy import UNPROTECTED, Privacy
from polyrank.core.rng import stream
from polyrank.core.roster import Listed, ascending
from polyrank.core.types import (
    Budget,
    Client,
    ClientProfile,
    Clients,
    LocalTraining,
    ModelSpec,
    Query,
    RoundRecord,
    ServerState,
    Task,
    Update,
)

Measurement = Callable[[Query, ServerState], Mapping[str, float]]
"""Computes the importance that a query asks for, of a state's model."""


def sample(everybody: Listed, size: int | None, round_: int, seed: int) -> list[Client]:
    """The cohort of a round: `size` clients drawn uniformly without replacement (None: everybody), ascending.

    Args:
        everybody: all clients, in ascending order: a draw then costs no more with more of them.
        size: of the cohort.
        round_: the round.
        seed: the run's seed.
    """
    if size is None or size >= len(everybody):
        return list(everybody)
    chosen = stream(seed, "cohort", round_).choice(len(everybody), size=size, replace=False)
    return [everybody[i] for i in sorted(chosen.tolist())]


def scored(
    method: Method,
    state: ServerState,
    cohort: Sequence[Client],
    spec: ModelSpec,
    seed: int,
    measure: Measurement | None = None,
    most: float = math.inf,
) -> ServerState:
    """The state with the importance of every layer, as the method scores it in this round.

    ``memory["scored"]`` is the round in which the scores were last made anew, for `Method.hold`.

    Args:
        method: the six answers.
        state: the server's state.
        cohort: the clients of this round, whom a scorer may ask.
        spec: the adapted modules.
        seed: the run's seed.
        measure: computes an importance on real data; a scorer that needs one fails without.
        most: examples that a client weighs as at most.
    """

    def ask(query: Query) -> Mapping[str, float]:
        assert measure is not None
        return measure(replace(query, round=state.round, seed=seed, cohort=tuple(cohort), most=most), state)

    scores = method.score(spec, state, None if measure is None else ask)
    if scores is state.scores:
        return state
    return replace(state, scores=scores, memory={**state.memory, "scored": state.round})


def plan(
    method: Method,
    state: ServerState,
    budgets: Mapping[Client, Budget],
    cohort: Sequence[Client],
    spec: ModelSpec,
    local: LocalTraining,
    seed: int,
    privacy: Privacy = UNPROTECTED,
) -> dict[Client, Task]:
    """The tasks of a round: where each client's budget goes, and what is sent.

    A layer's rank is at most the server's rank of that layer, and at most what the client has pruned itself to
    (``state.memory["ranks"]``). A layer without a score in `state` counts as one of score 1. A client that can afford
    nothing gets no task; one whose budget is allocated nowhere still trains the dense parameters:
    the head, if there is one and it is not frozen, and LoKr's factors.

    Args:
        method: the six answers.
        state: the server's state.
        budgets: what the clients of the cohort can afford (``method.estimate``).
        cohort: the clients of this round.
        spec: the adapted modules and their shapes.
        local: how clients train in this round (see `LocalTraining.at`).
        seed: the run's seed.
        privacy: what clients must protect.
    """
    scores = dict.fromkeys(spec.modules, 1.0) | dict(state.scores)
    drawn = int(state.memory.get("scored", state.round)) if method.hold else state.round
    factors = method.factors(state.round)
    dense, frozen_dense = dict(state.adapter.dense), dict(state.folded.dense)
    if method.dense == "freeze":
        frozen_dense = {name: dense.pop(name) for name in spec.head if name in dense} | frozen_dense
    tasks = {}
    for client in sorted(client for client in cohort if budgets[client].total > 0):
        pruned = state.memory.get("ranks", {}).get(client, {})
        caps = {name: min(x.rank, pruned.get(name, x.rank)) for name, x in state.adapter.layers.items()}
        rng = stream(seed, "allocate", drawn, client)
        ranks = method.allocate(budgets[client].total, caps, scores, spec, rng)
        ranks = method.boost.of(ranks, caps, state.round) if method.boost else ranks
        ranks = {name: rank for name, rank in ranks.items() if rank > 0}
        trained, carried = method.dispatch(state, ranks, stream(seed, "dispatch", state.round, client))
        frozen = combine([Adapter(state.folded.layers, frozen_dense), Adapter(carried)])
        adapter = Adapter(trained, dense)
        tasks[client] = Task(state.round, adapter, frozen, factors, local, method.penalty, seed, privacy)
    return tasks


def absorb(
    method: Method, state: ServerState, updates: Iterable[Update], seed: int, device: str | torch.device | None = None
) -> ServerState:
    """The next state. Updates are taken one by one, in ascending order of client.

    A rule answers for the low-rank layers, and for the dense parameters that it returns as new tensors: a robust rule
    for all of them. The others are averaged here, by the rule that ``method.dense`` names, over the clients that sent
    them; what `plan` froze nobody sends. With no updates at all, only the round advances.

    With a `device`, the low-rank layers are moved there as they come, the rule computes there, and its result comes
    back to the CPU: a GPU decomposes all layers of a shape at once. The rules need float64.

    Raises:
        ValueError: if updates are not in strictly ascending order of client, or carry unknown or misshapen layers.
    """
    dense = _DenseMean(state.adapter.dense, uniform=method.dense == "uniform")
    rng = stream(seed, "aggregate", state.round)
    watched = dense.watch(_checked(state, updates))
    if device is None:
        absorbed = method.aggregate(state, watched, rng)
    else:
        there = method.aggregate(_state_on(state, device), (_update_on(update, device) for update in watched), rng)
        absorbed = _state_on(there, "cpu")
    answered = {n: t for n, t in absorbed.adapter.dense.items() if t is not state.adapter.dense.get(n)}
    adapter = Adapter(absorbed.adapter.layers, {**state.adapter.dense, **dense.finish(), **answered})
    return replace(absorbed, round=state.round + 1, adapter=adapter)


def federate(
    method: Method,
    state: ServerState,
    clients: Clients,
    spec: ModelSpec,
    local: LocalTraining,
    *,
    rounds: int,
    cohort: int | None = None,
    errors: bool = False,
    device: str | torch.device | None = None,
    seed: int = 0,
    measure: Measurement | None = None,
    gate: Gate = Gate(),  # noqa: B008 (a value)
    privacy: Privacy = UNPROTECTED,
    secret: bool = False,
) -> Iterator[tuple[ServerState, RoundRecord]]:
    """Runs rounds ``state.round`` to ``rounds - 1`` and yields the state and the record after each.

    Who takes part is asked anew in every round; budgets are estimated again when the answer has changed. What does not
    pass the `gate` is not used, and what passes counts as what the gate makes of it. With `errors`, records say how
    exact each aggregate is (`aggregation_error`), for which the low-rank layers of the cohort are kept until the round
    ends, also where the rule streams. `device` is where the rule computes (`absorb`).

    With `privacy` on the server, the rule gets clipped updates with noise on their sum (`privately_summed`); it must be
    linear in the factors and weigh all clients alike. The noise is of the run's streams, or of the operating system's
    entropy if it is to be `secret`, as outside of a simulation it must.

    Raises:
        ValueError: if there are no clients, or the method's scorer needs a `measure` and there is none.
    """
    known: Mapping[Client, ClientProfile] | None = None
    while state.round < rounds:
        if (profiles := clients.profiles()) is not known:
            if not profiles:
                raise ValueError("there are no clients to federate")
            known, budgets, everybody = profiles, method.estimate(profiles, spec, local), ascending(profiles)
            most = gate.most(profiles)
        now = local.at(state.round, rounds)
        chosen = [c for c in sample(everybody, cohort, state.round, seed) if budgets[c].total > 0]
        state = scored(method, state, chosen, spec, seed, measure, most)
        tasks = gate.asked(plan(method, state, budgets, chosen, spec, now, seed, privacy), known, most)
        ledger = Ledger(state.round, method.factors(state.round), now, tasks, spec)
        kept: list[Update] = []
        updates = ledger.watch(gate.admitted(tasks, clients.fit(tasks), ledger.refuse, ledger.bound, most))
        if privacy.on_server is not None:
            noise = noise_of(secret, seed, "privacy", state.round)
            updates = privately_summed(updates, tasks, privacy.on_server, noise)
        absorbed = absorb(method, state, _keeping(kept, updates) if errors else updates, seed, device)
        record = ledger.record(aggregation_error(state, absorbed, tasks, kept) if errors else None)
        record = replace(record, scores=_anew(state))
        state = absorbed
        yield state, record


def _anew(state: ServerState) -> dict[str, float]:
    """Scores that were made for this round, unless they tell no layer from another."""
    made_now = state.memory.get("scored") == state.round and len(set(state.scores.values())) > 1
    return dict(state.scores) if made_now else {}


def _keeping(kept: list[Update], updates: Iterable[Update]) -> Iterator[Update]:
    """The updates; their low-rank layers are noted in `kept`."""
    for update in updates:
        kept.append(replace(update, adapter=Adapter(update.adapter.layers)))
        yield update


def _layers_on(adapter: Adapter, device: str | torch.device) -> Adapter:
    layers = {name: LowRank(x.A.to(device), x.B.to(device), x.scale) for name, x in adapter.layers.items()}
    return replace(adapter, layers=layers)


def _state_on(state: ServerState, device: str | torch.device) -> ServerState:
    return replace(state, adapter=_layers_on(state.adapter, device), folded=_layers_on(state.folded, device))


def _update_on(update: Update, device: str | torch.device) -> Update:
    return replace(update, adapter=_layers_on(update.adapter, device))


def _checked(state: ServerState, updates: Iterable[Update]) -> Iterator[Update]:
    last: Client | None = None
    for update in updates:
        if last is not None and update.client <= last:
            raise ValueError(f"updates must come in ascending order of client: {update.client!r} after {last!r}")
        last = update.client
        for name, x in update.adapter.layers.items():
            held = state.adapter.layers.get(name)
            if held is None:
                raise ValueError(f"client {update.client!r} sent layer {name!r}, which the server does not hold")
            if held.shape != x.shape:
                raise ValueError(f"client {update.client!r}, layer {name!r}: shape {x.shape}, not {held.shape}")
        for name, tensor in update.adapter.dense.items():
            if name in state.adapter.dense and tensor.shape != (due := state.adapter.dense[name].shape):
                shapes = f"shape {tuple(tensor.shape)}, not {tuple(due)}"
                raise ValueError(f"client {update.client!r}, parameter {name!r}: {shapes}")
        yield update


class _DenseMean:
    """Averages dense parameters as updates stream past, over the clients that sent each of them."""

    def __init__(self, server: Mapping[str, Tensor], uniform: bool) -> None:
        self.server, self.uniform = server, uniform
        self.sums: dict[str, Tensor] = {}
        self.weights: dict[str, float] = {}
        self.sized: set[str] = set()

    def watch(self, updates: Iterable[Update]) -> Iterator[Update]:
        for update in updates:
            for name, tensor in update.adapter.dense.items():
                if name in self.server:
                    self._add(name, tensor, update.examples)
            yield update

    def _add(self, name: str, tensor: Tensor, examples: float) -> None:
        if not self.uniform and examples == 0 and name in self.sized:
            return  # no data, no weight, once somebody has some
        if not self.uniform and examples > 0 and name not in self.sized:
            self.sized.add(name)
            self.sums.pop(name, None)
            self.weights.pop(name, None)
        weight = 1.0 if self.uniform or examples == 0 else float(examples)
        value = tensor.to(precision(tensor)) * weight
        self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.weights[name] = self.weights.get(name, 0.0) + weight

    def finish(self) -> dict[str, Tensor]:
        return {
            name: (self.sums[name] / self.weights[name]).to(held.dtype) if name in self.sums else held
            for name, held in self.server.items()
        }
