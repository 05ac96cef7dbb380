"""MLflow. The only file that knows it; it is an extra."""

from __future__ import annotations

import logging
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from polyrank.errors import InputError
from polyrank.experiment.loggers.logger import Open, Sitting, last_step, results
from polyrank.files import write_text

_BATCH = 100  # parameters in a request, by MLflow's rules; of metrics, ten times as many
_LONGEST = 500  # characters of a parameter


def mlflow(*, uri: str | None = None, experiment: str = "polyrank", run: str | None = None) -> Open:
    """MLflow: a database in ``RUN/mlflow``, or any tracking server, database or folder.

    Args:
        uri: where to: ``http://HOST:PORT``, ``sqlite:////FOLDER/mlflow.db`` or ``file:///FOLDER``; if not given, the
            database ``RUN/mlflow/mlflow.db``. MLflow's own variable MLFLOW_TRACKING_URI is not read.
        experiment: the experiment's name there.
        run: its name there; the folder's if not given.
    """
    _library()
    if uri is not None and not urlsplit(uri).scheme:
        raise InputError(
            f"log: mlflow: uri: {uri!r} must be an address: http://HOST:PORT, sqlite:////FOLDER/mlflow.db, "
            "or file:///FOLDER"
        )
    return partial(_MlflowRun, uri=uri, experiment=experiment, run=run)


class _MlflowRun:
    """A run under the id that is kept in ``RUN/mlflow/id``; a run that goes on is told of what the store has not got.

    The metric ``round`` is the last of a step, so that a step that has it is whole.
    """

    def __init__(self, sitting: Sitting, *, uri: str | None, experiment: str, run: str | None) -> None:
        folder = sitting.folder.resolve() / "mlflow"
        folder.mkdir(exist_ok=True)
        self.library, self.known = _library(), folder / "id"
        artifacts = None if uri else (folder / "artifacts").as_uri()
        with warnings.catch_warnings():
            # Of what MLflow asks of SQLAlchemy.
            warnings.filterwarnings("ignore", message="The ``noload`` loader strategy")
            self.client = self.library.MlflowClient(tracking_uri=uri or f"sqlite:///{folder / 'mlflow.db'}")
            found = self.client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self.client.create_experiment(experiment, artifacts)
        self.first = 0
        if self.known.is_file():
            self.id = self.known.read_text(encoding="utf-8")
            self.client.update_run(self.id, status="RUNNING")
            done = self.client.get_metric_history(self.id, "round")
            self.first = max((int(metric.step) + 1 for metric in done), default=0)
        else:
            self._create(number, run or sitting.folder.resolve().name, sitting.experiment)

    def _create(self, experiment: str, name: str, config: Mapping[str, Any]) -> None:
        self.id = self.client.create_run(experiment, run_name=name).info.run_id
        entities = self.library.entities
        params = [entities.Param(_clean(key), str(value)[:_LONGEST]) for key, value in _flat(config)]
        for start in range(0, len(params), _BATCH):
            self.client.log_batch(self.id, params=params[start : start + _BATCH])
        write_text(self.known, self.id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, {**values, "round": float(step)})

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            held = self.client.get_run(self.id).data.metrics
            self._log(last_step(summary), {name: x for name, x in results(summary).items() if name not in held})
        self.client.set_terminated(self.id, "FINISHED" if summary is not None else "KILLED")

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [self.library.entities.Metric(_clean(name), x, now, step) for name, x in values.items()]
        for start in range(0, len(metrics), 10 * _BATCH):
            self.client.log_batch(self.id, metrics=metrics[start : start + 10 * _BATCH])


def _clean(name: str) -> str:
    """A name as MLflow allows it."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers and words of a configuration by their dotted keys."""
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        yield name, value
    for key, part in pairs or ():
        yield from _flat(part, f"{name}.{key}" if name else str(key))


def _library() -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 refuses folders without, and keeps them as is
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # a server that is gone holds up no round for minutes
    try:
        import mlflow as library
        import mlflow.entities
    except ImportError:
        what = "mlflow-skinny sqlalchemy alembic (the extra 'mlflow')"
        raise ImportError(f"log: mlflow: needs MLflow: pip install {what}") from None
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # that it makes a database's tables
    return library
