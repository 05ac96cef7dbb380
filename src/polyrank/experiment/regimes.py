"""What a run does round by round: federation, or what it is held against.

    federated   the method
    single      one adapter on everybody's data, at the server's rank, in as many optimizer steps as the cohorts take
                together: the ceiling
    local       every client alone, at the rank that it can afford, in the rounds in which it would be asked: the floor
    zero_shot   nothing: the model as it starts

All have the same data, seeds, schedule and evaluation. Only in a federation does anything travel, or take simulated
seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from torch import Tensor

from polyrank.core.federate import absorb, federate, plan, sample
from polyrank.core.ledger import Ledger
from polyrank.core.lowrank import Adapter, LowRank
from polyrank.core.roster import ascending
from polyrank.core.types import Client, ClientProfile, LocalTraining, RoundRecord, ServerState, Task
from polyrank.engines.exchange import Remote
from polyrank.engines.simulator import Simulator
from polyrank.experiment.build import World
from polyrank.experiment.config import ConfigError, Experiment, Regime
from polyrank.methods.named import fedit

Round = tuple[ServerState, RoundRecord]
Models = Mapping[Client, Sequence[Adapter]]
"""Adapters whose sum is a model: of each client, where every client has one of its own, or else of ``EVERYBODY``."""

EVERYBODY = ""


@dataclass(frozen=True)
class Course:
    """What a run does.

    Attributes:
        start: the state before round 0.
        rounds: how many there are.
        steps: runs those from a state on, and yields after each.
        models: those that a state holds.
    """

    start: ServerState
    rounds: int
    steps: Callable[[ServerState], Iterator[Round]]
    models: Callable[[ServerState], Models]


def course(experiment: Experiment, world: World, regime: Regime | None = None) -> Course:
    """The course of an experiment, or of another regime in its place.

    Raises:
        ConfigError: for a regime that needs the clients' data, if that is not here.
    """
    chosen = regime or experiment.regime
    if chosen != "federated" and isinstance(world.clients, Remote):
        raise ConfigError(f"regime: {chosen!r} needs the clients' data here, and it stays with them")
    if chosen == "local":
        nobody = ServerState(0, Adapter(), world.start.folded)
        return Course(nobody, experiment.rounds, partial(_local, experiment, world), partial(_of_each, world))
    steps = {"federated": _federated, "single": _single, "zero_shot": _nothing}[chosen]
    rounds = 0 if chosen == "zero_shot" else experiment.rounds
    return Course(world.start, rounds, partial(steps, experiment, world), _of_everybody)


def _of_everybody(state: ServerState) -> Models:
    return {EVERYBODY: [state.folded, state.adapter]}


def _federated(experiment: Experiment, world: World, state: ServerState) -> Iterator[Round]:
    e, remote = experiment, world.clients if isinstance(world.clients, Remote) else None
    return federate(
        world.method,
        state,
        world.clients,
        world.spec,
        e.local_training(),
        rounds=e.rounds,
        cohort=remote.terms.asked(e.cohort) if remote else e.cohort,
        # Of single updates, which noise on their sum does not cover.
        errors=e.evaluate.aggregation and e.protection().on_server is None,
        device=e.device if e.device.startswith("cuda") else None,  # others have no float64, or are the CPU
        seed=e.seed,
        measure=world.clients.measure,
        gate=e.gate(remote=remote is not None),
        privacy=e.protection(),
        secret=remote is not None,
    )


def _nothing(experiment: Experiment, world: World, state: ServerState) -> Iterator[Round]:
    return iter(())


def _single(experiment: Experiment, world: World, state: ServerState) -> Iterator[Round]:
    """FedIT with one client that holds everybody's examples."""
    assert not isinstance(world.clients, Remote)
    everything = np.sort(np.concatenate(list(world.clients.shares.values())))
    profile = ClientProfile(len(everything), rank=world.rank)
    pooled = Simulator(
        world.base,
        world.splits["train"],
        {"pooled": everything},
        {"pooled": profile},
        spec=world.spec,
        seed=experiment.seed,
    )
    local = _same_steps(experiment, len(world.clients.profiles()), len(everything))
    steps = federate(fedit(), state, pooled, world.spec, local, rounds=experiment.rounds, seed=experiment.seed)
    return ((state, _unsent(record)) for state, record in steps)


def _same_steps(experiment: Experiment, clients: int, examples: int) -> LocalTraining:
    """Local settings under which the pooled run takes the steps that an average cohort takes together."""
    local = experiment.local_training()
    share = min(experiment.cohort or clients, clients) / clients
    if local.steps is not None:
        return replace(local, steps=max(1, round(local.steps * share * clients)))
    if share == 1:
        return local
    seen = local.epochs * (examples * share)
    return replace(local, steps=max(1, math.ceil(seen / (local.batch * local.accumulate))))


def _local(experiment: Experiment, world: World, state: ServerState) -> Iterator[Round]:
    """The cohorts of a federation, in which everybody goes on from what it has itself."""
    e, clients, spec = experiment, world.clients, world.spec
    method = replace(fedit(), estimate=world.method.estimate)
    profiles = clients.profiles()
    budgets = method.estimate(profiles, spec, e.local_training())
    own = _apart(state)
    for round_ in range(state.round, e.rounds):
        now = e.local_training().at(round_, e.rounds)
        states = {
            client: ServerState(round_, own.get(client, world.start.adapter), state.folded)
            for client in sample(ascending(profiles), e.cohort, round_, e.seed)
        }
        tasks: dict[Client, Task] = {}
        for client, held in states.items():
            tasks |= plan(method, held, budgets, [client], spec, now, e.seed)
        ledger = Ledger(round_, "AB", now, tasks, spec)
        for update in ledger.watch(clients.fit(tasks)):
            own[update.client] = absorb(method, states[update.client], [update], e.seed).adapter
        yield _together(round_ + 1, own, state.folded), _unsent(ledger.record(None))


def _unsent(record: RoundRecord) -> RoundRecord:
    """The record of a round in which nothing travelled."""
    down, up = dict.fromkeys(record.bytes_down, 0), dict.fromkeys(record.bytes_up, 0)
    return replace(record, bytes_down=down, bytes_up=up, seconds=None, aggregation_error=None)


def _together(round_: int, own: Mapping[Client, Adapter], folded: Adapter) -> ServerState:
    """Everybody's adapter as one state, so that it is saved and restored as any: ``CLIENT/LAYER``."""
    layers = {f"{client}/{name}": x for client, adapter in own.items() for name, x in adapter.layers.items()}
    dense = {f"{client}/{name}": x for client, adapter in own.items() for name, x in adapter.dense.items()}
    return ServerState(round_, Adapter(layers, dense), folded)


def _apart(state: ServerState) -> dict[Client, Adapter]:
    """Everybody's adapter: `_together`, undone. No layer's name has a slash."""
    layers: dict[Client, dict[str, LowRank]] = {}
    dense: dict[Client, dict[str, Tensor]] = {}
    for key, x in state.adapter.layers.items():
        client, _, name = key.rpartition("/")
        layers.setdefault(client, {})[name] = x
    for key, tensor in state.adapter.dense.items():
        client, _, name = key.rpartition("/")
        dense.setdefault(client, {})[name] = tensor
    return {client: Adapter(layers.get(client, {}), dense.get(client, {})) for client in {**layers, **dense}}


def _of_each(world: World, state: ServerState) -> Models:
    own = _apart(state)
    return {
        client: [state.folded, own.get(client, world.start.adapter)] for client in ascending(world.clients.profiles())
    }
