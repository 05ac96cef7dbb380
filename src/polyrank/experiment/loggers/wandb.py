"""Weights & Biases. The only file that knows it; it is an extra."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from polyrank.experiment.loggers.logger import Open, Sitting, results
from polyrank.files import write_text


def wandb(
    *,
    project: str = "polyrank",
    entity: str | None = None,
    run: str | None = None,
    group: str | None = None,
    mode: Literal["offline", "online"] = "offline",
) -> Open:
    """Weights & Biases: in ``RUN/wandb`` for ``wandb sync``, or to its server.

    What is logged is the experiment and the figures; not the console, the machine, the code or the repository.

    Args:
        project: the project's name there.
        entity: the user or team; that of the login if not given.
        run: its name there; the folder's if not given.
        group: of runs.
        mode: ``offline``: nothing is sent anywhere; ``online``: to the server, which needs a login.
    """
    _library()
    return partial(_WandbRun, project=project, entity=entity, run=run, group=group, mode=mode)


class _WandbRun:
    """A run under the id that is kept in ``RUN/wandb/id``.

    Offline, a run that goes on writes all its steps again, and what earlier sittings have written is removed: what a
    kill has lost is there then, and one folder is all there is to sync.
    """

    def __init__(self, sitting: Sitting, *, run: str | None, mode: str, **where: str | None) -> None:
        library, folder = _library(), sitting.folder / "wandb"
        known = folder / "id"
        if not known.is_file():
            write_text(known, secrets.token_hex(4))
        id_ = known.read_text(encoding="utf-8")
        if mode == "offline":
            for old in folder.glob(f"offline-run-*-{id_}"):
                shutil.rmtree(old)
        settings = library.Settings(
            console="off",
            silent=True,
            save_code=False,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
            finish_timeout=300,
        )
        self.run = library.init(
            id=id_,
            name=run or sitting.folder.resolve().name,
            dir=str(sitting.folder),
            config=dict(sitting.experiment),
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=settings,
            **where,
        )
        self.first = int(self.run.step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step, commit=True)

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            self.run.summary.update(results(summary))
        self.run.finish(exit_code=0 if summary is not None else 1)


def _library() -> Any:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # to its makers
    try:
        import wandb as library
    except ImportError:
        raise ImportError("log: wandb: needs Weights & Biases: pip install wandb (the extra 'wandb')") from None
    return library
