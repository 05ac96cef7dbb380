"""A run in progress: start or resume, round by round, to the summary. The caller drives it in its own loops."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from polyrank import __version__
from polyrank.core.rng import stream
from polyrank.core.types import Client, RoundRecord, ServerState
from polyrank.data.source import stratified
from polyrank.engines.events import Phase, Tell, tell_all
from polyrank.engines.exchange import Remote
from polyrank.engines.watched import Watched
from polyrank.experiment.build import World, build
from polyrank.experiment.config import Experiment
from polyrank.experiment.exported import read_models, write_models
from polyrank.experiment.language import flat
from polyrank.experiment.logs import Logs
from polyrank.experiment.measuring import averaged, clients_evaluated, on_own_data, run_baselines, said
from polyrank.experiment.privacy import Spent
from polyrank.experiment.regimes import EVERYBODY, Models, course
from polyrank.experiment.setting import setting
from polyrank.experiment.store import Run
from polyrank.files import write_json
from polyrank.local.data import Indices
from polyrank.local.evaluate import Predictions, worth

_LIBRARIES = ("torch", "numpy", "transformers", "peft", "safetensors")


class Session:
    """One run, from its last checkpoint to its end.

    Attributes:
        listeners: are told what the run is doing.
        logs: where its figures go besides its own files: a context manager, which closes them.
    """

    def __init__(self, run: Run, world: World | None = None) -> None:
        self.run = run
        self.experiment: Experiment = run.experiment()
        self.world: World = world or build(self.experiment)
        self.listeners: list[Tell] = []
        self.tell: Tell = partial(tell_all, self.listeners)
        self.course = course(self.experiment, self._watched())
        self.state: ServerState = run.restore() or self.course.start
        self.records: list[Mapping[str, Any]] = list(run.records())
        self.validation = self._validation_subset()
        self.evaluated = clients_evaluated(self.experiment, self.world)
        e, clients = self.experiment, self.world.clients
        known = clients.known if isinstance(clients, Remote) else clients.profiles
        self.logs = Logs(run.folder, e, len(self.world.spec.modules), known)
        self.spent = Spent(e.protection(), e.local_training(), known, self.records)

    def rounds(self) -> Iterator[tuple[RoundRecord, float]]:
        """Runs the remaining rounds; after each: record and checkpoint on disk, then the record and its seconds."""
        e, remote = self.experiment, self.world.clients if isinstance(self.world.clients, Remote) else None
        if not remote:
            self._write_setting()
        self.logs.open(self.records, {line["round"]: line["wall_seconds"] for line in self.run.timings()})
        started = time.monotonic()
        for state, record in self.course.steps(self.state):
            self.spent.add(record.bytes_down, record.examples)
            record = replace(record, metrics=self.spent.metrics())
            if state.round % e.evaluate.every == 0 or state.round == self.course.rounds:
                record = self._evaluated(record, self.course.models(state))
            record = self._asked(record, state)
            seconds = time.monotonic() - started
            if remote:
                record = replace(record, refused={**remote.left_out(), **record.refused})
                remote.settle(record)
            self.run.append(record, seconds)
            self.records.append(asdict(record))
            self.logs.add(self.records[-1], seconds)  # before the checkpoint: what a kill loses is run and told again
            self.run.save(state)
            self.state = state
            yield record, seconds
            started = time.monotonic()
        if remote:
            self._write_setting()

    def _watched(self) -> World:
        """The world, with clients that tell what they do where they are here."""
        clients = self.world.clients
        return self.world if isinstance(clients, Remote) else replace(self.world, clients=Watched(clients, self.tell))

    def _evaluated(self, record: RoundRecord, models: Models) -> RoundRecord:
        """The record with what models are worth; the best on validation so far are written."""
        self.tell(Phase("evaluation"))
        measured = self.measure(models, "validation")
        metrics = {**record.metrics, **{f"validation/{key}": value for key, value in measured.items()}}
        own = on_own_data(self.world, models, self.evaluated) if self.evaluated else {}
        record = replace(record, metrics=metrics, client_metrics=own)
        best = self.selected()
        if best is None or worth(metrics, "validation/") > worth(best["metrics"], "validation/"):
            write_models(self.run.best, models, self.world.info)
        return record

    def measure(self, models: Models, split: str) -> dict[str, float]:
        """The base with adapters added, on the validation subset or the whole test split; the mean over models."""
        indices = self.validation if split == "validation" else None
        return averaged([said.metrics() for said in self._said(models, split, indices).values()])

    def _said(self, models: Models, split: str, indices: Indices | None = None) -> dict[Client, Predictions]:
        return {client: said(self.world, parts, split, indices) for client, parts in models.items()}

    def _asked(self, record: RoundRecord, state: ServerState) -> RoundRecord:
        """The record with what a language model is asked after this round, if anything."""
        asked = self.world.language and self.world.language.due(state.round)
        if not asked or not (asked.choices or asked.prompts):
            return record
        self.tell(Phase("evaluation"))
        found, _ = asked.of(self.world.base, self.course.models(state))
        return replace(record, metrics={**record.metrics, **flat(found)})

    def _language(self, summary: dict[str, Any], models: Mapping[str, Models]) -> None:
        """Adds what a language model is asked to the parts of the summary; what it answers is written.

        Args:
            summary: with ``before``, ``final`` and ``selected``.
            models: of these parts.
        """
        asked = self.world.language
        if asked is None:
            return
        answers = {}
        for part, own in models.items():
            found, answers[part] = asked.of(self.world.base, own)
            summary[part].update(found)
        if asked.prompts:
            samples = [
                {"prompt": prompt.text, "reference": prompt.reference}
                | {part: own[number] for part, own in answers.items()}
                for number, prompt in enumerate(asked.prompts)
            ]
            write_json(self.run.samples_file, {"samples": samples})

    def finish(self) -> dict[str, Any]:
        """Exports the final adapter, evaluates on the test split, trains the baselines, writes the summary."""
        e, world, state = self.experiment, self.world, self.state
        models, start = self.course.models(state), world.start
        self.tell(Phase("test"))
        write_models(self.run.adapter, models, world.info)
        selected = self.selected()
        best = read_models(self.run.best, models) if selected else models
        summary = {
            "method": e.label,
            "seed": e.seed,
            "rounds": state.round,
            "before": {"test": self.measure({EVERYBODY: [start.folded, start.adapter]}, "test")},
            "final": {"round": state.round - 1 if state.round else None, **self._final(models)},
            "selected": {"round": selected["round"], "test": self.measure(best, "test")} if selected else None,
            **({"baselines": run_baselines(e, world, self.tell)} if e.baselines else {}),
            **({"privacy": self.promised()} if e.protection() else {}),
            "bytes_up": sum(sum(r["bytes_up"].values()) for r in self.records),
            "bytes_down": sum(sum(r["bytes_down"].values()) for r in self.records),
            "wall_seconds": round(self.run.wall_seconds(), 2),
            "environment": environment(),
        }
        others = {"selected": best} if selected else {}
        self._language(summary, {"before": {EVERYBODY: [start.folded, start.adapter]}, "final": models, **others})
        self.logs.finish(summary)
        write_json(self.run.summary_file, summary)
        return summary

    def _final(self, models: Models) -> dict[str, Any]:
        """What the last models say of the test split; how often they take which class for which is written."""
        found = self._said(models, "test")
        classes = list(self.world.classes)
        counts = [c for p in found.values() if (c := p.confusion(len(classes))) is not None]
        if counts:
            write_json(self.run.confusion_file, {"classes": classes, "counts": sum(counts[1:], counts[0]).tolist()})
        alone = {client: p.metrics() for client, p in found.items()}
        own = self.records[-1]["client_metrics"] if self.records else {}
        return {
            "test": averaged(list(alone.values())),
            **({"alone": alone} if EVERYBODY not in alone else {}),
            **({"clients": own} if own else {}),
        }

    def promised(self) -> dict[str, dict[str, float]]:
        """Epsilon and delta of the rounds that are done, for what is protected."""
        protection, spent = self.experiment.protection(), self.spent.metrics()
        return {
            kind: {"epsilon": spent[f"privacy/{kind}"], "delta": getattr(protection, kind).delta}
            for kind in ("clients", "examples")
            if getattr(protection, kind) is not None
        }

    def selected(self) -> Mapping[str, Any] | None:
        """The record of the round that was best on validation (the first of equals)."""
        measured = [r for r in self.records if "validation/accuracy" in r["metrics"]]
        return max(measured, key=lambda r: worth(r["metrics"], "validation/"), default=None)

    def _validation_subset(self) -> Indices | None:
        """The same validation examples for every method and round."""
        labels, samples = self.world.splits["validation"].labels, self.experiment.evaluate.samples
        if samples is None or samples >= len(labels):
            return None
        return stratified(labels, samples, stream(self.experiment.seed, "evaluate"))

    def _write_setting(self) -> None:
        clients = self.world.clients
        profiles = clients.known() if isinstance(clients, Remote) else clients.profiles()
        write_json(self.run.setting_file, setting(self.experiment, self.world, profiles))


def environment() -> dict[str, Any]:
    """What the figures were made with."""
    return {
        "polyrank": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor()
