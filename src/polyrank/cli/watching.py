"""Runs that somebody else works on: ``polyrank watch``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyrank.cli.app import Json, app, mistakes, out

if TYPE_CHECKING:
    from polyrank.experiment.following import Following
    from polyrank.report.progress import Progress


@app.command()
def watch(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, of a copy of one, or of a study.")],
    once: Annotated[bool, typer.Option("--once", help="Print the present state and end.")] = False,
    every: Annotated[float, typer.Option(min=0.1, max=86_400, help="Seconds between looks.")] = 1.0,
    json_: Json = False,
) -> None:
    """Follow a run or a study by its files, whoever works on it, until it is done."""
    with mistakes():
        from polyrank.errors import InputError
        from polyrank.experiment.following import Following, study

        found = study(folder)
        if found is None and not (folder / "experiment.yaml").is_file():
            raise InputError(f"{folder}: neither a run (experiment.yaml) nor a study (study.json)")
        try:
            if found is not None:
                _study(folder, found, once, every, json_)
            elif once or json_:
                _state(Following(folder), json_)
            else:
                _run(Following(folder), every)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


def _state(run: Following, json_: bool) -> None:
    from polyrank.experiment.following import described
    from polyrank.report.watching import standing

    run.read()
    found = described(run)
    if json_:
        print(json.dumps(found))
        return
    out.say(f"{found['method']}: {standing(found)}")
    _outcome(run)


def _run(run: Following, every: float) -> None:
    """Rounds as they end, until the summary is there."""
    from polyrank.report.progress import Progress

    out.say(f"{run.method()}, {run.rounds()} rounds, in {run.folder}")
    with Progress(out, run.rounds(), 0).shown() as progress:
        told = False
        while True:
            finished = run.summary() is not None  # before the rounds: the summary is the last thing written
            for record, seconds in run.ended():
                progress.add(record, seconds)
            if finished:
                break
            progress.began(max(time.time() - run.heard(), 0.0))
            told = _silent(run, progress, told)
            time.sleep(every)
    _outcome(run)


def _silent(run: Following, progress: Progress, told: bool) -> bool:
    """Says, once, that nothing new has come for too long; whether it has been said."""
    from polyrank.engines.events import Phase
    from polyrank.report.watching import silence

    now = time.time()
    if run.state(now) != "silent":
        if told:
            progress.told(Phase(""))
        return False
    words = silence(run, now)
    progress.told(Phase(words))
    if not told:
        progress.note(words)
    return True


def _outcome(run: Following) -> None:
    from polyrank.experiment.shapes import SUMMARY_KEYS
    from polyrank.report.terminal import outcome, results_table

    summary = run.summary(SUMMARY_KEYS)
    if summary is not None:
        out.print(results_table(summary))
        out.say(outcome(summary, run.folder / "adapter"))


def _study(folder: Path, found: dict[str, Any], once: bool, every: float, json_: bool) -> None:
    """A line a cell, until all are done; where there is no terminal, a line whenever a cell's state has changed."""
    from rich.live import Live

    from polyrank.report.watching import cells, changed

    looks = _looks(folder, found, every)
    states = next(looks)
    if json_:
        print(json.dumps({"study": found.get("name", folder.name), "cells": states}))
    elif once:
        out.print(cells(states))
    elif out.is_terminal:
        with Live(cells(states), console=out, auto_refresh=False) as live:
            live.refresh()
            for states in looks:
                live.update(cells(states), refresh=True)
    else:
        before: list[dict[str, Any]] = []
        for now in chain([states], looks):
            for line in changed(before, now):
                out.say(line)
            before = now


def _looks(folder: Path, found: dict[str, Any], every: float) -> Iterator[list[dict[str, Any]]]:
    """The states of a study's cells, again and again, until all are done. Cells may be added meanwhile."""
    from polyrank.experiment.following import Following, described, study

    runs: dict[str, Following] = {}
    while True:
        cells = (study(folder) or found)["cells"]
        for cell in cells:
            runs.setdefault(cell["run"], Following(folder / cell["run"])).read()
        states = [described(runs[cell["run"]], cell) for cell in cells]
        yield states
        if all(state["state"] == "finished" for state in states):
            return
        time.sleep(every)
