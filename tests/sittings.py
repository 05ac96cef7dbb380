"""Runs from a configuration, and what is in their folders; for tests of several files."""

from pathlib import Path
from typing import Any

from polyrank.experiment.config import Experiment
from polyrank.experiment.loading import parse
from polyrank.experiment.session import Session
from polyrank.experiment.store import Run

Config = dict[str, Any]
OF_THE_MACHINE = {"timings.jsonl", "summary.json"}  # the files that differ from sitting to sitting
LOGS = {"mlflow", "tensorboard", "wandb"}  # and the folders


def experiment_of(config: Config, **changes: Any) -> Experiment:
    return parse({**config, **changes}, "test", Path())


def started(folder: Path, config: Config, **changes: Any) -> Session:
    return Session(Run.create(folder, experiment_of(config, **changes)))


def finished(session: Session) -> dict[str, Any]:
    for _ in session.rounds():
        pass
    return session.finish()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run that must not depend on how it came about."""
    files = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    kept = {name: path for name, path in files.items() if str(name) not in OF_THE_MACHINE and name.parts[0] not in LOGS}
    return {str(name): path.read_bytes() for name, path in kept.items()}


def records(folder: Path) -> list[dict[str, Any]]:
    return list(Run.open(folder).records())
