"""A run on disk, and its checkpoints: safetensors and JSON, written whole or not at all.

    experiment.yaml   the resolved experiment         rounds.jsonl   one RoundRecord a line
    summary.json      results, versions, hardware     timings.jsonl  seconds and memory as measured
    setting.json      what rounds do not change       confusion.json of the final adapter, on the test split
    samples.json      what a language model answers, before and after
    adapter/          the final adapter, PEFT format  best/          the validation-selected one
    state/            what `polyrank resume` needs    tensorboard/ wandb/ mlflow/   what loggers write

Everything but timings.jsonl, summary.json and the folders of loggers is the same, byte for byte, whenever the same
experiment runs on the same machine.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from polyrank.core.lowrank import Adapter, LowRank
from polyrank.core.types import RoundRecord, ServerState
from polyrank.errors import InputError, TrainingError
from polyrank.experiment import shapes
from polyrank.experiment.config import ConfigError, Experiment
from polyrank.experiment.loading import parse
from polyrank.files import TEMPORARY, append_line, from_json, from_yaml, sweep, write_bytes, write_text

_NO_RANK = -1  # of a layer that a client has not pruned


class RunError(InputError):
    """A folder that holds no run, or holds one already."""


class Run:
    """The folder of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rounds_file, self.timings_file = folder / "rounds.jsonl", folder / "timings.jsonl"
        self.checkpoint, self.summary_file = folder / "state" / "checkpoint.safetensors", folder / "summary.json"
        self.setting_file, self.confusion_file = folder / "setting.json", folder / "confusion.json"
        self.samples_file = folder / "samples.json"
        self.adapter, self.best = folder / "adapter", folder / "best"

    @classmethod
    def create(cls, folder: Path, experiment: Experiment) -> Run:
        """A new run. Refuses a folder with anything in it."""
        check_free(folder)
        run = cls(folder)
        write_text(folder / "experiment.yaml", yaml.safe_dump(experiment.resolved(), sort_keys=False))
        return run

    @classmethod
    def open(cls, folder: Path) -> Run:
        """An existing run."""
        if not (folder / "experiment.yaml").is_file():
            raise RunError(f"{folder}: no run here (a run's folder has experiment.yaml)")
        return cls(folder)

    @contextmanager
    def resumable(self) -> Iterator[None]:
        """Lets errors inside that more room on a disk or in memory would mend say how the run goes on."""
        try:
            yield
        except (OSError, MemoryError, RuntimeError) as error:
            if not isinstance(error, TrainingError):
                again = f"polyrank resume {shlex.quote(str(self.folder))}"
                error.add_note(f"what is done is kept; when there is room, continue with: {again}")
            raise

    def experiment(self) -> Experiment:
        """The resolved experiment."""
        path = self.folder / "experiment.yaml"
        try:
            raw = from_yaml(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path}: not YAML: {error}") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: not an experiment")
        return parse(raw, str(path), self.folder)

    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run; it is the last thing written."""
        found: dict[str, Any] | None = shapes.read(self.summary_file, shapes.Summary, shapes.SUMMARY_KEYS)
        return found

    def setting(self) -> dict[str, Any] | None:
        """What rounds do not change; None where the run has not written it."""
        found: dict[str, Any] | None = shapes.read(self.setting_file, shapes.Setting, shapes.SETTING_KEYS)
        return found

    def append(self, record: RoundRecord, wall_seconds: float) -> None:
        """One line per file. A record may outlive its round's checkpoint; `restore` drops it then."""
        plain = asdict(record)
        if not record.bounded:
            del plain["bounded"]
        measured = {
            "round": record.round,
            "wall_seconds": round(wall_seconds, 3),
            "measured_memory": plain.pop("measured_memory"),
        }
        for path, value in ((self.rounds_file, plain), (self.timings_file, measured)):
            append_line(path, json.dumps(value))

    def records(self) -> Iterator[dict[str, Any]]:
        """The records of complete lines, in order."""
        yield from shapes.read_lines(self.rounds_file, shapes.Round, "the record of a round", shapes.ROUND_KEYS)

    def timings(self) -> Iterator[dict[str, Any]]:
        """What was measured of each round, in order: ``round``, ``wall_seconds``, ``measured_memory``."""
        yield from shapes.read_lines(self.timings_file, shapes.Timing, "the timing of a round")

    def wall_seconds(self) -> float:
        """Seconds spent in rounds, over all sittings."""
        return float(sum(line["wall_seconds"] for line in self.timings()))

    def secret(self) -> bytes:
        """32 random bytes of the run's own, made when they are first asked for."""
        path = self.folder / "state" / "secret"
        if not path.is_file():
            write_bytes(path, os.urandom(32))
            path.chmod(0o600)
        return path.read_bytes()

    def save(self, state: ServerState) -> None:
        """The checkpoint after a round, replacing the one before."""
        write_bytes(self.checkpoint, pack(state))

    def scores(self) -> dict[str, float]:
        """Importance per layer as last measured.

        Raises:
            RunError: if the run has not measured any.
        """
        state = self._checkpoint()
        found = dict(state.scores) if state else {}
        if not found:
            raise RunError(f"{self.folder}: has measured no importance yet")
        return found

    def _checkpoint(self) -> ServerState | None:
        """The state of the last checkpoint, or None before the first."""
        try:
            return unpack(self.checkpoint) if self.checkpoint.is_file() else None
        except (SafetensorError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise RunError(f"{self.checkpoint}: damaged, so the run cannot be resumed: {error}") from None

    def restore(self) -> ServerState | None:
        """The last checkpoint, or None before the first; records of later rounds and half-written files are dropped."""
        sweep(self.folder)
        state = self._checkpoint()
        done = state.round if state else 0
        for path, lines in ((self.rounds_file, self.records()), (self.timings_file, self.timings())):
            kept = [value for value in lines if value["round"] < done]
            if [value["round"] for value in kept] != list(range(done)):
                raise RunError(
                    f"{path}: does not have the {done} rounds of the checkpoint, so the run cannot be resumed"
                )
            write_text(path, "".join(json.dumps(value) + "\n" for value in kept))
        return state


def check_free(folder: Path) -> None:
    """Refuses an output folder with anything in it but what a run left that died while it made the first of its files.

    Raises:
        RunError: saying what is there, and how to go on.
    """
    if (folder / "experiment.yaml").is_file():
        raise RunError(
            f"{folder}: already holds a run; `polyrank resume {folder}` continues it, or choose another --out"
        )
    if folder.exists() and (not folder.is_dir() or not all(path.match(TEMPORARY) for path in folder.iterdir())):
        raise RunError(f"{folder}: is not an empty folder; choose another --out")


def free_folder(name: str, parent: Path = Path("runs")) -> Path:
    """``runs/name``, or the first of ``runs/name-2``, ``-3``, ... that is not taken."""
    folder, number = parent / name, 2
    while folder.exists():
        folder, number = parent / f"{name}-{number}", number + 1
    return folder


def pack(state: ServerState) -> bytes:
    """A state as one safetensors file; what is not a tensor is JSON in its header.

    Ranks that clients have pruned to are a table, clients x layers: they grow with every client that takes part, and
    written out by name they would outgrow the header.
    """
    tensors: dict[str, torch.Tensor] = {}
    scales: dict[str, dict[str, float]] = {}
    for part in ("adapter", "folded"):
        adapter: Adapter = getattr(state, part)
        scales[part] = {name: x.scale for name, x in adapter.layers.items()}
        for name, x in adapter.layers.items():
            tensors |= {f"{part}/A/{name}": x.A.contiguous(), f"{part}/B/{name}": x.B.contiguous()}
        tensors |= {f"{part}/dense/{name}": tensor.contiguous() for name, tensor in adapter.dense.items()}
    memory = dict(state.memory)
    ranks: dict[str, dict[str, int]] = memory.pop("ranks", {})
    layers = list(dict.fromkeys(layer for own in ranks.values() for layer in own))
    if ranks:
        table = [[own.get(layer, _NO_RANK) for layer in layers] for own in ranks.values()]
        tensors["memory/ranks"] = torch.tensor(table, dtype=torch.int32)
    plain = {
        "round": state.round,
        "scales": scales,
        "dense": {part: list(getattr(state, part).dense) for part in scales},
        "scores": dict(state.scores),
        "memory": memory,
        "ranks": {"clients": list(ranks), "layers": layers},
    }
    return save(tensors, metadata={"state": json.dumps(plain)})


def unpack(path: Path) -> ServerState:
    """The state in a file that `pack` made."""
    with safe_open(path, "pt") as file:
        plain = from_json(file.metadata()["state"])

        def part(name: str) -> Adapter:
            layers = {
                layer: LowRank(file.get_tensor(f"{name}/A/{layer}"), file.get_tensor(f"{name}/B/{layer}"), scale)
                for layer, scale in plain["scales"][name].items()
            }
            return Adapter(layers, {key: file.get_tensor(f"{name}/dense/{key}") for key in plain["dense"][name]})

        memory, keys = plain["memory"], plain["ranks"]
        if keys["clients"]:
            table = file.get_tensor("memory/ranks").tolist()
            memory["ranks"] = {
                client: {layer: rank for layer, rank in zip(keys["layers"], row, strict=True) if rank != _NO_RANK}
                for client, row in zip(keys["clients"], table, strict=True)
            }
        return ServerState(plain["round"], part("adapter"), part("folded"), plain["scores"], memory)
