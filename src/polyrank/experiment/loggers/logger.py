"""What a logger is. `polyrank.experiment.logs` opens and tells them; the files beside this one are some."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Sitting:
    """What a logger is told when a run starts or goes on.

    Attributes:
        folder: the run's; a logger keeps what it needs in a folder of its own name there.
        experiment: as resolved.
        seconds: those that each of the rounds took that are done already.
    """

    folder: Path
    experiment: Mapping[str, Any]
    seconds: tuple[float, ...] = ()


class Logger(Protocol):
    """The open log of one run.

    Attributes:
        first: the first step that it has not got. A run that goes on tells it of all steps from there on.
    """

    first: int

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """The figures of a round by name, such as ``validation/accuracy``; steps ascend by one."""
        ...

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """The last call: with the run's summary at its end, with None where it stops before."""
        ...


Open = Callable[[Sitting], Logger]
"""Opens a run's log; what a table's entry returns when it is called with its options."""


def results(summary: Mapping[str, Any]) -> dict[str, float]:
    """The test metrics of a summary by name: ``before/accuracy``, ``test/accuracy``, ``selected/accuracy`` ..."""
    found = {"before": summary["before"], "test": summary["final"], "selected": summary["selected"]}
    found |= {f"baseline_{name}": of for name, of in summary.get("baselines", {}).items()}
    return {f"{name}/{key}": value for name, of in found.items() if of for key, value in of["test"].items()}


def last_step(summary: Mapping[str, Any]) -> int:
    """The step that the results belong to: the last round's."""
    return max(int(summary["rounds"]) - 1, 0)
