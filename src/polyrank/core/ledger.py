"""The books of a round: who was asked for what, and what came back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from polyrank.core.costs import NoFormulaError, task_memory
from polyrank.core.lowrank import Factors
from polyrank.core.types import Client, LocalTraining, ModelSpec, RoundRecord, Task, Update


class Ledger:
    """Keeps the books of a round while its updates stream past."""

    def __init__(
        self, round_: int, factors: Factors, local: LocalTraining, tasks: Mapping[Client, Task], spec: ModelSpec
    ) -> None:
        self.round, self.factors, self.local, self.tasks, self.spec = round_, factors, local, tasks, spec
        self.down = {client: task.nbytes for client, task in tasks.items()}
        self.up: dict[Client, int] = {}
        self.losses: dict[Client, float] = {}
        self.examples: dict[Client, float] = {}
        self.seconds: list[float] = []
        self.memory: dict[Client, float] = {}
        self.refused: dict[Client, str] = {}
        self.bounded: dict[Client, str] = {}

    def watch(self, updates: Iterable[Update]) -> Iterator[Update]:
        """The updates, each noted as it passes."""
        for update in updates:
            self.up[update.client] = int(update.metrics.get("bytes_up", update.nbytes))
            if "bytes_down" in update.metrics:
                self.down[update.client] = int(update.metrics["bytes_down"])
            self.examples[update.client] = update.examples
            if "loss" in update.metrics:
                self.losses[update.client] = float(update.metrics["loss"])
            if "seconds" in update.metrics:
                self.seconds.append(float(update.metrics["seconds"]))
            if "memory" in update.metrics:
                self.memory[update.client] = float(update.metrics["memory"])
            yield update

    def refuse(self, client: Client, reason: str) -> None:
        """Notes a client whose update is not used."""
        self.refused[client] = reason

    def bound(self, client: Client, reason: str) -> None:
        """Notes a client that counts as less than it states or sent; there may be several reasons."""
        self.bounded[client] = "; ".join([*filter(None, [self.bounded.get(client)]), reason])

    def record(self, error: float | None) -> RoundRecord:
        """What happened in the round, once all updates have passed; `error` is its aggregation error, if measured."""
        return RoundRecord(
            round=self.round,
            factors=self.factors,
            lr=self.local.lr,
            ranks={c: {name: x.rank for name, x in task.adapter.layers.items()} for c, task in self.tasks.items()},
            bytes_down=self.down,
            bytes_up=self.up,
            losses=self.losses,
            examples=self.examples,
            dropped=tuple(c for c in self.tasks if c not in self.up and c not in self.refused),
            refused=self.refused,
            bounded=self.bounded,
            seconds=max(self.seconds) if self.seconds else None,
            predicted_memory=self._predicted(),
            measured_memory=self.memory,
            aggregation_error=error,
        )

    def _predicted(self) -> dict[Client, float]:
        if self.spec.architecture is None:
            return {}
        try:
            return {client: task_memory(self.spec, task).total for client, task in self.tasks.items()}
        except NoFormulaError:
            return {}
