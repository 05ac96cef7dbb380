"""A run in progress: start or resume, round by round, to the summary. The caller drives it in its own loops."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import torch

from polyrank import __version__
from polyrank.core.compress import compress
from polyrank.core.federate import federate
from polyrank.core.lowrank import Adapter, combine, trim, truncate
from polyrank.core.rng import stream
from polyrank.core.types import RoundRecord, ServerState
from polyrank.data.source import stratified
from polyrank.engines.exchange import Remote
from polyrank.experiment.baselines import run_baselines
from polyrank.experiment.build import World, build
from polyrank.experiment.config import Experiment
from polyrank.experiment.privacy import Spent
from polyrank.experiment.store import Run
from polyrank.files import write_json
from polyrank.local.adapters import read_adapter, write_adapter
from polyrank.local.data import Indices
from polyrank.local.evaluate import evaluate

_LIBRARIES = ("torch", "numpy", "transformers", "peft", "safetensors")


class Session:
    """One run, from its last checkpoint to its end."""

    def __init__(self, run: Run, world: World | None = None) -> None:
        self.run = run
        self.experiment: Experiment = run.experiment()
        self.world: World = world or build(self.experiment)
        self.state: ServerState = run.restore() or self.world.start
        self.records: list[Mapping[str, Any]] = list(run.records())
        self.validation = self._validation_subset()
        e, clients = self.experiment, self.world.clients
        known = clients.known if isinstance(clients, Remote) else clients.profiles
        self.spent = Spent(e.protection(), e.local_training(), known, self.records)

    def rounds(self) -> Iterator[tuple[RoundRecord, float]]:
        """Runs the remaining rounds; after each: record and checkpoint on disk, then the record and its seconds."""
        e, world = self.experiment, self.world
        remote = world.clients if isinstance(world.clients, Remote) else None
        steps = federate(
            world.method,
            self.state,
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
            gate=e.gate(),
            privacy=e.protection(),
            secret=remote is not None,
        )
        started = time.monotonic()
        for state, record in steps:
            self.spent.add(record.bytes_down, record.examples)
            record = replace(record, metrics=self.spent.metrics())
            if state.round % e.evaluate.every == 0 or state.round == e.rounds:
                measured = self.measure([state.folded, state.adapter], "validation")
                validation = {f"validation/{key}": value for key, value in measured.items()}
                record = replace(record, metrics={**record.metrics, **validation})
                if self._improves(record):
                    write_adapter(self.run.best, exported(state), world.info)
            seconds = time.monotonic() - started
            if remote:
                remote.settle(record)
            self.run.append(record, seconds)
            self.run.save(state)
            self.state = state
            self.records.append(asdict(record))
            yield record, seconds
            started = time.monotonic()

    def measure(self, adapters: Sequence[Adapter], split: str) -> dict[str, float]:
        """The base with adapters added, on the validation subset or the whole test split."""
        with self.world.base.attached(combine(adapters)) as model:
            return evaluate(model, self.world.splits[split], self.validation if split == "validation" else None)

    def finish(self) -> dict[str, Any]:
        """Exports the final adapter, evaluates on the test split, trains the baselines, writes the summary."""
        e, world, state = self.experiment, self.world, self.state
        write_adapter(self.run.adapter, exported(state), world.info)
        selected = self.selected()
        best = read_adapter(self.run.best)[0] if selected else exported(state)
        start = world.start
        results: dict[str, Any] = {
            "before": {"test": self.measure([start.folded, start.adapter], "test")},
            "final": {"round": state.round - 1, "test": self.measure([state.folded, state.adapter], "test")},
            "selected": {"round": selected["round"], "test": self.measure([best], "test")} if selected else None,
        }
        if self.experiment.baselines:
            results["baselines"] = run_baselines(self.experiment, world)
        summary = {
            "method": self.experiment.method.name,
            "seed": self.experiment.seed,
            "rounds": state.round,
            **results,
            **({"privacy": self.promised()} if e.protection() else {}),
            "bytes_up": sum(sum(r["bytes_up"].values()) for r in self.records),
            "bytes_down": sum(sum(r["bytes_down"].values()) for r in self.records),
            "wall_seconds": round(self.run.wall_seconds(), 2),
            "environment": environment(),
        }
        write_json(self.run.summary_file, summary)
        return summary

    def promised(self) -> dict[str, dict[str, float]]:
        """Epsilon and delta of the rounds that are done, for what is protected."""
        protection, spent = self.experiment.protection(), self.spent.metrics()
        return {
            kind: {"epsilon": spent[f"privacy/{kind}"], "delta": getattr(protection, kind).delta}
            for kind in ("clients", "examples")
            if getattr(protection, kind) is not None
        }

    def selected(self) -> Mapping[str, Any] | None:
        """The record of the round with the best validation accuracy (the first of equals)."""
        measured = [r for r in self.records if "validation/accuracy" in r["metrics"]]
        return max(measured, key=lambda r: r["metrics"]["validation/accuracy"], default=None)

    def _validation_subset(self) -> Indices | None:
        """The same validation examples for every method and round."""
        labels, samples = self.world.splits["validation"].labels, self.experiment.evaluate.samples
        if samples is None or samples >= len(labels):
            return None
        return stratified(labels, samples, stream(self.experiment.seed, "evaluate"))

    def _improves(self, record: RoundRecord) -> bool:
        best = self.selected()
        key = "validation/accuracy"
        return best is None or record.metrics[key] > best["metrics"][key]


def exported(state: ServerState) -> Adapter:
    """One adapter that computes what the state computes: folds and layers together, no larger than they need be."""
    total = combine([state.folded, state.adapter])
    tight = {name: trim(compress(x) if x.rank > min(x.shape) else x) for name, x in total.layers.items()}
    # PEFT has no layers of rank 0: an untrained one keeps a row.
    return Adapter({name: x if x.rank else truncate(total.layers[name], 1) for name, x in tight.items()}, total.dense)


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
