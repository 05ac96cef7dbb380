"""Clients without a model, to test server logic: each answers a task by a function of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch

from polyrank.core.lowrank import Adapter, LowRank
from polyrank.core.rng import stream, torch_generator
from polyrank.core.types import Client, ClientProfile, Task, Update

Answer = Callable[[Client, Task], Adapter]


def echo(client: Client, task: Task) -> Adapter:
    """Returns what was sent."""
    return task.adapter


def perturb(client: Client, task: Task) -> Adapter:
    """Adds unit normal noise to whatever the task trains, from the client's own stream."""
    generator = torch_generator(stream(task.seed, "fit", task.round, client))

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

    def step(x: LowRank) -> LowRank:
        A = moved(x.A) if "A" in task.factors else x.A
        B = moved(x.B) if "B" in task.factors else x.B
        return replace(x, A=A, B=B)

    layers = {name: step(x) for name, x in task.adapter.layers.items()}
    return Adapter(layers, {name: moved(tensor) for name, tensor in task.adapter.dense.items()})


class FakeClients:
    """A `Clients` whose members answer by `answer`; those named in `absent` never do."""

    def __init__(
        self,
        profiles: Mapping[Client, ClientProfile],
        answer: Answer = perturb,
        absent: frozenset[Client] = frozenset(),
    ) -> None:
        self._profiles, self.answer, self.absent = profiles, answer, absent

    def profiles(self) -> Mapping[Client, ClientProfile]:
        """What was given."""
        return self._profiles

    def fit(self, tasks: Mapping[Client, Task]) -> Iterator[Update]:
        """One update per present client, in order."""
        for client in sorted(tasks):
            if client not in self.absent:
                task = tasks[client]
                examples = self._profiles[client].examples
                yield Update(client, self.answer(client, task), examples, task.factors)
