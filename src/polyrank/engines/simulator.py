"""Clients in one process, one after another, on one frozen base model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from polyrank.core.architecture import ModelSpec
from polyrank.core.costs import round_seconds
from polyrank.core.rng import stream
from polyrank.core.types import Client, ClientProfile, Query, ServerState, Task, Update
from polyrank.local.base import Base
from polyrank.local.importance import importance
from polyrank.local.trainer import Examples, Indices, train

Clock = Callable[[ClientProfile, ModelSpec, Task, Update], float | None]


def simulated_seconds(profile: ClientProfile, spec: ModelSpec, task: Task, update: Update) -> float | None:
    """A client's round on the simulated clock: its messages on its links, its training at its speed."""
    ranks = {name: x.rank for name, x in task.adapter.layers.items()}
    return round_seconds(profile, spec, task.local, ranks, task.factors, task.nbytes, update.nbytes).total


class Simulator:
    """The `Clients` of a simulation.

    Args:
        base: the frozen model all clients share.
        data: prepared training examples of all clients.
        shares: each client's indices into `data`.
        profiles: each client's profile.
        spec: the base's, where more is known of it.
        absent: probability that a client asked in a round does not answer.
        seed: the run's seed; absences have their own stream.
        clock: simulated seconds of a client's round.
        holdout: prepared, labelled examples that the server keeps to measure importance on; none of `data`.
    """

    def __init__(
        self,
        base: Base,
        data: Examples,
        shares: Mapping[Client, Indices],
        profiles: Mapping[Client, ClientProfile],
        *,
        spec: ModelSpec | None = None,
        absent: float = 0.0,
        seed: int = 0,
        clock: Clock = simulated_seconds,
        holdout: Examples | None = None,
    ) -> None:
        self.spec, self.holdout = spec or base.spec, holdout
        self.base, self.data, self.shares = base, data, shares
        self._profiles, self.absent, self.seed, self.clock = profiles, absent, seed, clock

    def profiles(self) -> Mapping[Client, ClientProfile]:
        """What was given."""
        return self._profiles

    def only(self, clients: Sequence[Client]) -> Simulator:
        """The same world with these clients alone, who always answer."""
        profiles = {client: self._profiles[client] for client in clients}
        return Simulator(self.base, self.data, self.shares, profiles, spec=self.spec, seed=self.seed, clock=self.clock)

    def fit(self, tasks: Mapping[Client, Task]) -> Iterator[Update]:
        """Trains client after client, in order; absent clients are skipped."""
        for client in sorted(tasks):
            task = tasks[client]
            if not self._answers(client, task.round):
                continue
            update = train(self.base, task, client, self.data, self.shares[client])
            seconds = self.clock(self._profiles[client], self.spec, task, update)
            if seconds is not None:
                update = replace(update, metrics={**update.metrics, "seconds": seconds})
            yield update

    def measure(self, query: Query, state: ServerState) -> dict[str, float]:
        """The importance that `query` asks for, of the state's model: on the hold-out, or on clients' own examples.

            s = sum_k n_k s_k / sum_k n_k    over the clients that answer and have data; n_k is all that k holds

        A client runs the server's whole adapter for it; what that costs it is on no record.

        Returns:
            A score per module; nothing where no client answers.

        Raises:
            ValueError: if there is no hold-out and the query asks for it.
        """
        if query.on == "holdout":
            if self.holdout is None:
                raise ValueError("there is no hold-out to measure importance on: see data.importance")
            return self._measured(query, state, self.holdout, np.arange(len(self.holdout.labels)))
        total: dict[str, float] = {}
        weight = 0
        for client in sorted(query.cohort):
            own = self.shares[client]
            if len(own) and self._answers(client, query.round):
                found = self._measured(query, state, self.data, own, client)
                total = {name: total.get(name, 0.0) + len(own) * score for name, score in found.items()}
                weight += len(own)
        return {name: score / weight for name, score in total.items()}

    def _measured(
        self, query: Query, state: ServerState, data: Examples, indices: Indices, *who: Client
    ) -> dict[str, float]:
        rng = stream(query.seed, "importance", query.round, *who)
        if query.samples is not None and query.samples < len(indices):
            indices = rng.choice(indices, query.samples, replace=False)
        return importance(self.base, state, data, indices, query, rng)

    def _answers(self, client: Client, round_: int) -> bool:
        return not self.absent or bool(stream(self.seed, "absent", round_, client).random() >= self.absent)
