"""Clients in one process, one after another, on one frozen base model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from polyrank.core.architecture import ModelSpec
from polyrank.core.costs import round_seconds
from polyrank.core.rng import stream
from polyrank.core.types import Client, ClientProfile, Task, Update
from polyrank.local.base import Base
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
    ) -> None:
        self.spec = spec or base.spec
        self.base, self.data, self.shares = base, data, shares
        self._profiles, self.absent, self.seed, self.clock = dict(profiles), absent, seed, clock

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
            if self.absent and stream(self.seed, "absent", task.round, client).random() < self.absent:
                continue
            update = train(self.base, task, client, self.data, self.shares[client])
            seconds = self.clock(self._profiles[client], self.spec, task, update)
            if seconds is not None:
                update = replace(update, metrics={**update.metrics, "seconds": seconds})
            yield update
