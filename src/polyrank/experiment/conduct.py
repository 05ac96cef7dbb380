"""Runs a study: cell by cell in this process, or several at once in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from polyrank.engines.workers import variable
from polyrank.errors import InputError, TrainingError
from polyrank.experiment.build import build
from polyrank.experiment.config import Experiment
from polyrank.experiment.loading import parse
from polyrank.experiment.session import Session
from polyrank.experiment.store import Run
from polyrank.experiment.study import Cell, Study, StudyError

Done = tuple[Cell, dict[str, Any] | str]
"""A cell with its summary, or with what went wrong with it."""


def run_study(study: Study, jobs: int = 1, drive: Callable[[Session], dict[str, Any]] | None = None) -> Iterator[Done]:
    """Runs what is due of a study; yields each cell as it ends.

    A cell that cannot be run is told as such, and the others go on. Killed at any moment, the study goes on from there
    when it is run again. A process has one model at a time; weights in safetensors files are mapped, not read, so that
    processes share them.

    Args:
        study: what to run.
        jobs: processes; with 1, this process runs everything.
        drive: runs a session to its end where this process does it, for example showing its rounds.

    Raises:
        StudyError: if another process is at work in the folder, or a process of this one died.
    """
    study.folder.mkdir(parents=True, exist_ok=True)
    with _alone(study.folder):
        study.write()
        due = study.due()
        if jobs == 1 or len(due) < 2:
            for cell in due:
                yield cell, _attempted(partial(_run, study.run_of(cell), cell.experiment, drive or _driven))
            return
        yield from _in_processes(study, due, jobs)


def _in_processes(study: Study, due: Sequence[Cell], jobs: int) -> Iterator[Done]:
    spawn = multiprocessing.get_context("spawn")
    with variable("OMP_NUM_THREADS", str(due[0].experiment.threads)):
        pool = ProcessPoolExecutor(min(jobs, len(due)), mp_context=spawn, initializer=_end_with_parent)
        try:
            running = {
                pool.submit(_run_elsewhere, study.run_of(cell).folder, cell.experiment.resolved()): cell for cell in due
            }
            for finished in as_completed(running):
                yield running[finished], finished.result()
        except BrokenProcessPool:
            raise StudyError(f"{study.folder}: a process died (out of memory?); run the study again to go on") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()


def _run_elsewhere(folder: Path, resolved: dict[str, Any]) -> dict[str, Any] | str:
    return _attempted(partial(_run, Run(folder), parse(resolved, str(folder), folder), _driven))


def _run(run: Run, experiment: Experiment, drive: Callable[[Session], dict[str, Any]]) -> dict[str, Any]:
    if (run.folder / "experiment.yaml").is_file():
        return drive(Session(run))
    world = build(experiment)
    return drive(Session(Run.create(run.folder, experiment), world))


def _driven(session: Session) -> dict[str, Any]:
    with session.logs:
        for _ in session.rounds():
            pass
        return session.finish()


def _attempted(run: Callable[[], dict[str, Any]]) -> dict[str, Any] | str:
    try:
        return run()
    except (InputError, TrainingError, ImportError, OSError) as error:
        return str(error)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Refuses to work where another process does; the lock goes with the process."""
    try:
        import fcntl
    except ImportError:  # no such lock on this system
        yield
        return
    with open(folder / ".lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StudyError(f"{folder}: another process is running this study") from None
        yield


def _end_with_parent() -> None:
    """Ends this process as soon as the one that started it is gone: nobody else would."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
