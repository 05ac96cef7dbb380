"""One run, from its folder to plain, frozen values.

Nothing is required of a run but `experiment.yaml`: what an older or unfinished run lacks is None or empty, and the
charts and tables that need it leave it out.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from polyrank.errors import InputError
from polyrank.experiment import shapes
from polyrank.report.goal import Goal, goal_of

_FINITE = {"parse_constant": lambda _: None}

REGIMES = ("single", "local", "zero_shot")
"""What is run instead of federation; in tables they stand beside the methods."""


@dataclass(frozen=True, eq=False)
class Round:
    """One line of rounds.jsonl, reduced to what is drawn.

    Attributes:
        number: of the round, from 1.
        factors: which were trained: ``A``, ``B`` or ``AB``.
        asked: the clients of the round.
        ranks: asked clients x `Recorded.modules`; 0: not trained.
        loss: mean local training loss over the clients that reported one.
        bytes_up, bytes_down: over all clients.
        seconds: simulated.
        metrics: as recorded, for example ``validation/accuracy``.
        dropped, refused: clients that did not answer, and those whose update was not used, and why.
        memory: largest predicted peak of a client, in bytes.
        error: of the aggregation.
        scores: importance by module, where it was measured in this round.
        clients: client -> accuracy on its own held-out data; of a language model, nats per token.
    """

    number: int
    factors: str
    asked: tuple[str, ...]
    ranks: np.ndarray
    loss: float | None
    bytes_up: int
    bytes_down: int
    seconds: float | None
    metrics: Mapping[str, float]
    dropped: frozenset[str]
    refused: Mapping[str, str]
    memory: float | None
    error: float | None
    scores: Mapping[str, float]
    clients: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Recorded:
    """A run, as its folder tells it.

    Attributes:
        folder: where it lies.
        method: its label: the method's name or the regime's.
        setting: what tells it from other runs of its method, for example ``lr=0.001``; empty if nothing does.
        varied: the same by full key: what is meant to differ between runs.
        seed: of the run.
        experiment: the resolved experiment.
        facts: setting.json, or empty.
        modules: the adapted modules, in the model's order where setting.json tells it.
        rounds: as recorded.
        measured_memory: largest measured peak of a client, in bytes; None unless every client that took part was
            measured.
        summary: of a finished run, or None.
        confusion: confusion.json, or None.
        samples: what a language model was asked and answered (samples.json): prompt, reference, before, final.
    """

    folder: Path
    method: str
    setting: str
    varied: Mapping[str, Any]
    seed: int
    experiment: Mapping[str, Any]
    facts: Mapping[str, Any]
    modules: tuple[str, ...]
    rounds: tuple[Round, ...]
    measured_memory: float | None
    summary: Mapping[str, Any] | None
    confusion: Mapping[str, Any] | None
    samples: tuple[Mapping[str, str], ...] = ()

    @property
    def goal(self) -> Goal:
        """What it is compared by."""
        if self.summary:
            return goal_of((self.summary.get("final") or {}).get("test"))
        return goal_of(next((r.metrics for r in self.rounds if "validation/loss" in r.metrics), None), "validation/")

    @property
    def federated(self) -> bool:
        """Whether clients send anything at all."""
        return self.method not in REGIMES and self.experiment.get("regime", "federated") == "federated"


def read_run(folder: Path) -> Recorded:
    """The run in a folder.

    Raises:
        InputError: naming the file that cannot be read.
    """
    path = folder / "experiment.yaml"
    experiment = shapes.read_plan(path, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    method = experiment["method"] if isinstance(experiment["method"], str) else experiment["method"]["name"]
    regime = experiment.get("regime", "federated")
    facts = _read(folder / "setting.json", shapes.Setting) or {}
    rounds, modules = _rounds(folder / "rounds.jsonl", facts)
    summary, confusion = _read(folder / "summary.json", shapes.Summary), _confusion(folder / "confusion.json")
    return Recorded(
        folder,
        method if regime == "federated" else regime,
        "",
        {},
        experiment.get("seed", 0),
        experiment,
        facts,
        modules,
        rounds,
        _measured(folder / "timings.jsonl", {client for r in rounds for client in r.asked}),
        summary or None,
        confusion or None,
        tuple((_read(folder / "samples.json", shapes.Samples) or {"samples": ()})["samples"]),
    )


def _rounds(path: Path, facts: Mapping[str, Any]) -> tuple[tuple[Round, ...], tuple[str, ...]]:
    index = {name: place for place, name in enumerate(facts.get("modules") or {})}
    known: dict[tuple[str, ...], np.ndarray] = {}
    rounds: list[Round] = []
    for line in shapes.read_lines(path, shapes.Round, "the record of a round", shapes.ROUND_KEYS, **_FINITE):
        rounds.append(_round(line, index, known))
    wide = [replace(r, ranks=np.pad(r.ranks, ((0, 0), (0, len(index) - r.ranks.shape[1])))) for r in rounds]
    return tuple(wide), tuple(index)


def _round(line: Mapping[str, Any], index: dict[str, int], known: dict[tuple[str, ...], np.ndarray]) -> Round:
    asked = tuple(map(sys.intern, line["ranks"]))  # names come again in every line
    columns = []
    for own in line["ranks"].values():
        names = tuple(own)
        if names not in known:
            known[names] = np.array([index.setdefault(name, len(index)) for name in names], np.intp)
        columns.append(known[names])
    scores = dict(line.get("scores") or {})
    for name in scores:
        index.setdefault(name, len(index))
    ranks = np.zeros((len(asked), len(index)), np.int32)
    for row, places, own in zip(ranks, columns, line["ranks"].values(), strict=True):
        row[places] = list(own.values())
    losses = [value for value in line["losses"].values() if value is not None]
    return Round(
        number=line["round"] + 1,
        factors=line["factors"],
        asked=asked,
        ranks=ranks,
        loss=float(np.mean(losses)) if losses else None,
        bytes_up=sum(line["bytes_up"].values()),
        bytes_down=sum(line["bytes_down"].values()),
        seconds=line.get("seconds"),
        metrics={key: value for key, value in (line.get("metrics") or {}).items() if value is not None},
        dropped=frozenset(line.get("dropped") or ()),
        refused=dict(line.get("refused") or {}),
        memory=max((line.get("predicted_memory") or {}).values(), default=None),
        error=line.get("aggregation_error"),
        scores=scores,
        clients=of_clients(line.get("client_metrics"), goal_of(line.get("metrics"), "validation/")),
    )


def _measured(path: Path, clients: Set[str]) -> float | None:
    peaks: dict[str, float] = {}
    for line in shapes.read_lines(path, shapes.Timing, "the timing of a round", **_FINITE):
        for client, value in (line.get("measured_memory") or {}).items():
            peaks[client] = max(value, peaks.get(client, 0.0))
    return max(peaks.values()) if peaks and peaks.keys() >= clients else None


def of_clients(own: Mapping[str, Mapping[str, float]] | None, goal: Goal) -> dict[str, float]:
    """Client -> what it is compared by, of those that have it."""
    found = {sys.intern(name): metrics.get(goal.key) for name, metrics in (own or {}).items()}
    return {name: value for name, value in found.items() if value is not None}


def _read(path: Path, shape: Any) -> Any:
    """The value of a file, None where there is none. What is not finite is None."""
    return shapes.read(path, shape, **_FINITE)


def _confusion(path: Path) -> Any:
    found = _read(path, shapes.Confusion)
    if found and any(len(found["classes"]) != len(row) for row in (found["counts"], *found["counts"])):
        raise InputError(f"{path}: counts: must be as many rows and columns as there are classes")
    return found
