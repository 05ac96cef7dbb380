"""Clients in one process, on one frozen base model: together where that is faster, else one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace

import numpy as np
import torch

from polyrank.core.architecture import ModelSpec
from polyrank.core.costs import round_seconds
from polyrank.core.rng import stream
from polyrank.core.types import Client, ClientProfile, Query, ServerState, Task, Update
from polyrank.local.base import Base
from polyrank.local.cohort import Job
from polyrank.local.data import Examples, Indices
from polyrank.local.grouping import grouped
from polyrank.local.importance import measured
from polyrank.local.prefix import Prefixes
from polyrank.local.trainer import prepare, train_together

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
        together: most input positions of a step that clients share (`polyrank.local.grouping`); 0: each trains alone.
        holdout: prepared, labelled examples that the server keeps to measure importance on; none of `data`.
        prefixes: keeps what clients need not compute again, of `data`; None: nothing is kept.
        secret: clients draw from the operating system's entropy and not from the run's streams
            (`polyrank.local.trainer.prepare`): runs are not repeatable then.
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
        together: int = 0,
        holdout: Examples | None = None,
        prefixes: Prefixes | None = None,
        secret: bool = False,
    ) -> None:
        self.spec, self.holdout = spec or base.spec, holdout
        self.together, self.prefixes, self.secret = together, prefixes, secret
        self.base, self.data, self.shares = base, data, shares
        self._profiles, self.absent, self.seed, self.clock = profiles, absent, seed, clock

    def profiles(self) -> Mapping[Client, ClientProfile]:
        """What was given."""
        return self._profiles

    def only(self, clients: Sequence[Client]) -> Simulator:
        """The same world with these clients alone, who always answer."""
        profiles = {client: self._profiles[client] for client in clients}
        same = copy(self)
        same._profiles, same.absent = profiles, 0.0
        return same

    def fit(self, tasks: Mapping[Client, Task]) -> Iterator[Update]:
        """Trains the clients; their updates, in order. Absent clients are skipped."""
        due = [client for client in sorted(tasks) if self._answers(client, tasks[client].round)]
        jobs = [prepare(tasks[client], client, self.shares[client], self.data, self.secret) for client in due]
        ready: dict[Client, Update] = {}
        groups = grouped(jobs, self.base, self.data.lengths, self.together, torch.get_num_threads(), self._resumes_at)
        for group in sorted(groups, key=lambda group: min(job.client for job in group)):
            ready |= {update.client: update for update in self._trained(group)}
            while due and due[0] in ready:
                client = due.pop(0)
                yield self._timed(ready.pop(client), tasks[client])

    def _resumes_at(self, job: Job) -> int:
        return 0 if self.prefixes is None else self.prefixes.block(job.task, self.shares[job.client])

    def _trained(self, group: list[Job]) -> list[Update]:
        kept = self.prefixes
        if kept is None or group[0].task.privacy.examples is not None:  # which runs every example whole
            return train_together(self.base, group, self.data)
        found = [kept.of(job.task, job.client, self.shares[job.client]) for job in group]
        prefixes = [prefix for prefix in found if prefix is not None]
        updates = train_together(self.base, group, self.data, prefixes if len(prefixes) == len(group) else None)
        if self.base.device.type != "cuda":
            return updates
        # The allocator's peak counts what is kept of all clients, which is the simulation's and not the client's.
        peaks = [{"memory": u.metrics["memory"] - kept.nbytes} if "memory" in u.metrics else {} for u in updates]
        return [replace(u, metrics={**u.metrics, **peak}) for u, peak in zip(updates, peaks, strict=True)]

    def _timed(self, update: Update, task: Task) -> Update:
        seconds = self.clock(self._profiles[update.client], self.spec, task, update)
        return update if seconds is None else replace(update, metrics={**update.metrics, "seconds": seconds})

    def measure(self, query: Query, state: ServerState) -> dict[str, float]:
        """The importance that `query` asks for, of the state's model: on the hold-out, or on clients' own examples.

            s = sum_k n_k s_k / sum_k n_k    over the clients that answer and have data
            n_k is all that k holds, at most `Query.most`

        A client runs the server's whole adapter for it; what that costs it is on no record.

        Returns:
            A score per module; nothing where no client answers.

        Raises:
            ValueError: if there is no hold-out and the query asks for it.
        """
        if query.on == "holdout":
            if self.holdout is None:
                raise ValueError("there is no hold-out to measure importance on: see data.importance")
            return measured(self.base, query, state, self.holdout, np.arange(len(self.holdout.labels)))
        total: dict[str, float] = {}
        weight = 0.0
        for client in sorted(query.cohort):
            own = self.shares[client]
            if len(own) and self._answers(client, query.round):
                found = measured(self.base, query, state, self.data, own, client)
                counted = min(len(own), query.most)
                total = {name: total.get(name, 0.0) + counted * score for name, score in found.items()}
                weight += counted
        return {name: score / weight for name, score in total.items()}

    def _answers(self, client: Client, round_: int) -> bool:
        return not self.absent or bool(stream(self.seed, "absent", round_, client).random() >= self.absent)
