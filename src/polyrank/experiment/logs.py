"""A run's loggers: opened before its first round, told of every round, and never a reason for it to stop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from polyrank.core.types import Client, ClientProfile
from polyrank.errors import InputError
from polyrank.experiment.components import bind
from polyrank.experiment.config import Experiment
from polyrank.experiment.loggers.logger import Logger, Open, Sitting
from polyrank.experiment.tables import LOGGERS

Record = Mapping[str, Any]
"""A record of a round, as a line of ``rounds.jsonl`` has it."""

Profiles = Mapping[Client, ClientProfile]


def openers(experiment: Experiment) -> dict[str, Open]:
    """What opens each of an experiment's loggers.

    Raises:
        ImportError: naming the package that one of them needs.
        InputError: for an option that cannot be used.
    """
    if experiment.log == "auto":
        return {"tensorboard": LOGGERS["tensorboard"]()} if find_spec("tensorboard") else {}
    return {chosen.name: bind(LOGGERS, chosen)() for chosen in experiment.log}


class Logs:
    """The loggers of a session.

    Args:
        folder: the run's.
        experiment: says which.
        modules: how many are adapted.
        known: the clients' profiles.
    """

    def __init__(self, folder: Path, experiment: Experiment, modules: int, known: Callable[[], Profiles]) -> None:
        self.folder, self.experiment, self.modules, self.known = folder, experiment, modules, known
        self.loggers: dict[str, Logger] = {}

    def __enter__(self) -> Logs:
        return self

    def __exit__(self, *_: object) -> None:
        self._tell_all("finish", None)
        self.loggers = {}

    def open(self, records: Sequence[Record], seconds: Mapping[int, float]) -> None:
        """Opens the loggers and tells them of the rounds that are done and that they have not got.

        Raises:
            ImportError: if a package is missing.
            InputError: if a log cannot be opened.
        """
        took = tuple(seconds.get(record["round"], 0.0) for record in records)
        sitting = Sitting(self.folder, self.experiment.resolved(), took)
        for name, opener in openers(self.experiment).items():
            try:
                self.loggers[name] = logger = opener(sitting)
                for record in records:
                    if record["round"] >= logger.first:
                        values = scalars(record, took[record["round"]], self.modules, self.known())
                        logger.scalars(record["round"], values)
            except Exception as error:
                raise InputError(f"log: {name}: cannot be opened: {error}") from error

    def add(self, record: Record, seconds: float) -> None:
        """One more round."""
        if self.loggers:
            self._tell_all("scalars", record["round"], scalars(record, seconds, self.modules, self.known()))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The end of the run."""
        self._tell_all("finish", summary)
        self.loggers = {}

    def _tell_all(self, what: str, *arguments: Any) -> None:
        for name, logger in list(self.loggers.items()):
            try:
                getattr(logger, what)(*arguments)
            except Exception as error:
                del self.loggers[name]
                text = f"log: {name}: {type(error).__name__}: {error}; the run goes on without it"
                warnings.warn(text, RuntimeWarning, stacklevel=3)


def scalars(record: Record, seconds: float, modules: int, profiles: Profiles) -> dict[str, float]:
    """The figures of a round by name; those that only some rounds have are left out of the others.

    Args:
        record: of the round.
        seconds: that it took.
        modules: how many are adapted: a client's mean rank is over all of them.
        profiles: name the clients' device groups.
    """
    up, down, losses = record["bytes_up"], record["bytes_down"], record["losses"]
    found: dict[str, float | None] = {
        **record["metrics"],
        "loss/mean": _mean(losses.values()),
        "bytes/up": sum(up.values()),
        "bytes/down": sum(down.values()),
        "seconds/wall": seconds,
        "seconds/simulated": record["seconds"],
        "clients/answered": len(up),
        "clients/dropped": len(record["dropped"]),
        "clients/refused": len(record["refused"]),
        "aggregation/error": record["aggregation_error"],
        "lr": record["lr"],
    }
    accuracy = {client: own["accuracy"] for client, own in record.get("client_metrics", {}).items()}
    if accuracy:
        found |= {"client_accuracy/mean": _mean(accuracy.values()), "client_accuracy/worst": min(accuracy.values())}
    if accuracy and "validation/perplexity" in record["metrics"]:  # what language models are compared by
        nats = [own["loss"] for own in record["client_metrics"].values()]
        found |= {"client_loss/mean": _mean(nats), "client_loss/worst": max(nats)}
    ranks = {client: sum(own.values()) / modules for client, own in record["ranks"].items()}
    by_client = {"loss": losses, "bytes_up": up, "bytes_down": down, "rank": ranks, "accuracy": accuracy}
    for name, values in by_client.items():
        groups: dict[str, list[float]] = {}
        for client, value in values.items():
            profile = profiles.get(client)
            groups.setdefault((profile and profile.group) or "all", []).append(value)
        total = sum if name.startswith("bytes") else _mean
        found |= {f"group_{name}/{group}": total(own) for group, own in sorted(groups.items())}
    return {name: float(value) for name, value in found.items() if value is not None}


def _mean(values: Any) -> float | None:
    numbers = list(values)
    return float(np.mean(numbers)) if numbers else None
