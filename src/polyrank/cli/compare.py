"""Studies: ``polyrank compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyrank.cli.app import Json, Quiet, Set, app, embedded, err, mistakes, numbers, out
from polyrank.report.screen import Rows

if TYPE_CHECKING:
    from polyrank.experiment.config import StudyConfig
    from polyrank.experiment.study import Study


@app.command()
def compare(
    file: Annotated[Path | None, typer.Argument(help="An experiment; the embedded digits one if left out.")] = None,
    methods: Annotated[str | None, typer.Option(help="Methods, and any of single, local, zero_shot: m1,m2,...")] = None,
    seeds: Annotated[str | None, typer.Option(help="A run of each: 0,1,2")] = None,
    grid: Annotated[
        list[str] | None, typer.Option("--grid", metavar="KEY=V1,V2", help="Values of a key, all combined. Repeatable.")
    ] = None,
    set_: Set = None,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder of the study; studies/NAME if left out.")] = None,
    jobs: Annotated[int, typer.Option(min=1, max=1024, help="Processes that share the machine.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be run and what it costs.")] = False,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Run methods and baselines on the same split, clients, schedule and seeds; go on where a study stopped."""
    with mistakes():
        from polyrank.experiment.conduct import run_study
        from polyrank.experiment.loading import read
        from polyrank.experiment.study import planned

        path = file or embedded("digits.yaml")
        where = folder or Path("studies", path.stem)
        study = planned(read(path, set_), str(path), path.parent, _asked(methods, seeds, grid), where, jobs=jobs)
        if dry_run:
            _plan(study, json_)
            return
        due, total = len(study.due()), len(study.cells)
        if not (quiet or json_):
            out.say(f"{total} runs in {where}, {total - due} of them done")
        failed = 0
        try:
            for count, (cell, found) in enumerate(run_study(study, jobs), total - due + 1):
                name = cell.folder.relative_to("runs").as_posix()
                if isinstance(found, str):
                    failed += 1
                    err.error(found, before=f"{count}/{total}  {name}: ")
                elif not (quiet or json_):
                    out.say(f"{count}/{total}  {name}: {_reached(found)}")
        except KeyboardInterrupt:
            err.say("interrupted; the same command goes on from here")
            raise typer.Exit(130) from None
        if json_:
            summaries = {cell.folder.as_posix(): study.run_of(cell).summary() for cell in study.cells}
            print(json.dumps({"study": str(where), "runs": summaries}))
        elif not quiet and failed < total:
            _table(where)
        if failed:
            raise typer.Exit(1)


def _asked(methods: str | None, seeds: str | None, grid: list[str] | None) -> StudyConfig:
    from polyrank.experiment.config import ConfigError, StudyConfig
    from polyrank.experiment.loading import assignment

    values: dict[str, list[Any]] = {}
    for option in grid or []:
        name, equals, text = option.partition("=")
        key, found = assignment(f"{name}=[{text}]" if equals else option, "--grid")
        values[key] = found
        if not values[key]:
            raise ConfigError(f"--grid {option}: has no values")
    named = [name.strip() for name in methods.split(",")] if methods else []
    return StudyConfig(
        methods=list(dict.fromkeys(named)),
        seeds=[int(seed) for seed in numbers("--seeds", seeds, None, least=0, most=2**53, whole=True) or []],
        grid=values,
    )


def _reached(summary: dict[str, Any]) -> str:
    from polyrank.report.terminal import reached, size, span

    sent = size(summary["bytes_up"] + summary["bytes_down"])
    return f"{reached(summary['final']['test'])}, {sent} sent, {span(summary['wall_seconds'])}"


def _table(folder: Path) -> None:
    """What the study has shown so far, the best mean first."""
    from polyrank.report.gather import gather
    from polyrank.report.tables import ordering, summarise, title, written

    found = summarise(gather([folder]))
    columns = [column for column in found.columns if column.key in ("final", "selected", "up", "down")]
    table = Rows()
    table.add_column("")
    for name in ("seeds", *map(title, columns)):
        table.add_column(name, justify="right")
    for row in found.rows:
        cells = [written(column.kind, row.values.get(column.key)) for column in columns]
        table.add_row(row.label, row.seeds, *cells)
    out.print(table)
    for sentence in ordering(found):
        out.say(sentence)
    out.say(f"mean ± standard deviation over seeds; the page: polyrank report {folder}")


def _plan(study: Study, json_: bool) -> None:
    """What would be run: a row for each label and setting, with what one run of it costs."""
    from polyrank.experiment.study import cost
    from polyrank.report.terminal import size

    rows: dict[str, dict[str, Any]] = {}
    for cell in study.cells:
        name = cell.folder.parent.relative_to("runs").as_posix()
        row = rows.setdefault(name, {"runs": 0, "done": 0, **cost(cell.experiment)} if name not in rows else {})
        row["runs"] += 1
        row["done"] += study.run_of(cell).summary() is not None
    if json_:
        print(json.dumps({"study": str(study.folder), "cells": rows}))
        return
    table = Rows()
    for name in ("run", "seeds", "done", "up", "down", "largest client"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for name, row in rows.items():
        peak = "-" if row["peak_memory"] is None else size(row["peak_memory"])
        up, down = size(row["bytes_up"]), size(row["bytes_down"])
        table.add_row(name, str(row["runs"]), str(row["done"]), up, down, peak)
    out.print(table)
    due = len(study.due())
    finished = [s["wall_seconds"] for cell in study.cells if (s := study.run_of(cell).summary()) is not None]
    left = f", about {sum(finished) / len(finished) * due:.0f} s of rounds" if finished else ""
    out.say(f"{due} of {len(study.cells)} runs to do{left}; bytes and memory are of one run")
