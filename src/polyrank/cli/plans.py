"""Before a run: ``polyrank plan``, ``profile`` and ``data``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from polyrank.cli.app import Json, Set, app, embedded, mistakes, numbers, out


@app.command()
def plan(
    file: Annotated[Path | None, typer.Argument(help="An experiment; the embedded digits one if left out.")] = None,
    set_: Set = None,
    here: Annotated[
        bool, typer.Option("--here", help="Plan for this machine alone, with the memory that is free on it.")
    ] = False,
    scores: Annotated[
        Path | None, typer.Option(metavar="RUN", help="A run whose measured importance is planned with.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Also draw budgets, memory and ranks into this PNG.")] = None,
    json_: Json = False,
) -> None:
    """Show what each client can afford and why, and what a round costs it. Nothing is downloaded but a config."""
    with mistakes():
        from polyrank.experiment.forecast import forecast
        from polyrank.experiment.loading import load
        from polyrank.experiment.store import Run
        from polyrank.report.figures import plan_figure
        from polyrank.report.plan import plan_report

        check_png(png)
        path = file or embedded("digits.yaml")
        alone = ["fleet=[{name: this machine, memory: detect}]", "method.estimate=least"] if here else []
        measured = None if scores is None else Run.open(scores).scores()
        planned = forecast(load(path, [*alone, *(set_ or [])]), measured)
        if png is not None:
            plan_figure(png, planned, path.stem)
        if json_:
            print(json.dumps(planned))
            return
        for part in plan_report(planned):
            out.say(part) if isinstance(part, str) else out.print(part)
        if png is not None:
            out.say(f"picture: {png}")


def check_png(path: Path | None) -> None:
    """Refuses a picture of another format, before anything is computed."""
    from polyrank.experiment.config import ConfigError

    if path is not None and path.suffix.lower() != ".png":
        raise ConfigError(f"--png: {path}: the name of a PNG must end in .png")


@app.command()
def profile(
    file: Annotated[Path | None, typer.Argument(help="An experiment; the embedded digits one if left out.")] = None,
    set_: Set = None,
    ranks: Annotated[str | None, typer.Option(help="Ranks to measure, for example 4,8,16.")] = None,
    path: Annotated[Path | None, typer.Option("--out", help="Also write the calibration to this file.")] = None,
    json_: Json = False,
) -> None:
    """Measure training steps on this device, print predicted against measured memory, write a calibration."""
    with mistakes():
        from polyrank.experiment.calibrate import calibrate
        from polyrank.experiment.loading import load
        from polyrank.files import write_json
        from polyrank.report.plan import profile_report

        if path is not None and path.exists():
            raise FileExistsError(f"{path}: exists already; choose another --out")
        chosen = [int(rank) for rank in numbers("--ranks", ranks, None, least=1, most=2**31 - 1, whole=True) or []]
        measured = calibrate(load(file or embedded("digits.yaml"), set_), chosen)
        if path is not None:
            write_json(path, measured)
        if json_:
            print(json.dumps(measured))
            return
        for part in profile_report(measured):
            out.say(part) if isinstance(part, str) else out.print(part)
        if path is not None:
            out.say(f"calibration: {path}; plans use it with --set costs.calibration={path}")


@app.command()
def data(
    file: Annotated[Path | None, typer.Argument(help="An experiment; the embedded one if left out.")] = None,
    set_: Set = None,
    png: Annotated[Path | None, typer.Option(help="Also draw the split into this PNG.")] = None,
    export: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write a file for each client, and the server's, to DIR.")
    ] = None,
    json_: Json = False,
) -> None:
    """Show how an experiment's training data is split among its clients; write each one's to a file of its own."""
    with mistakes():
        from polyrank.data import refuse_used
        from polyrank.experiment.loading import load
        from polyrank.experiment.shares import export_shares, fleet_profiles, share_data
        from polyrank.report.figures import split_heat_map
        from polyrank.report.terminal import heat_map

        check_png(png)
        path = file or embedded("digits.yaml")
        experiment = load(path, set_)
        if export is not None:
            refuse_used(export)
        shares = share_data(experiment)
        profiles = fleet_profiles(experiment.fleet, shares)
        dataset, clients = shares.dataset, list(shares.clients)
        counts = shares.partition.counts(dataset.train.labels, len(dataset.classes))
        if png is not None:
            title = f"{path.stem}: {experiment.data.partition.name}"
            split_heat_map(png, counts, clients, list(dataset.classes), title)
        if export is not None:
            export_shares(export, experiment, shares)
        if json_:
            rows = [
                {"client": c, "group": profiles[c].group, "examples": int(row.sum()), "classes": row.tolist()}
                for c, row in zip(clients, counts, strict=True)
            ]
            splits = ("train", "validation", "test", "importance")
            sizes = {name: len(split) for name in splits if (split := getattr(dataset, name)) is not None}
            print(json.dumps({"name": dataset.name, "sizes": sizes, "classes": list(dataset.classes), "clients": rows}))
            return
        out.print(heat_map(counts, clients, [profiles[c].group for c in clients], dataset.classes, out.width))
        out.say(
            f"{int(counts.sum())} of {len(dataset.train)} training examples held by {len(clients)} clients, "
            f"{len(dataset.validation)} validation, {len(dataset.test)} test"
            + (f", {len(dataset.importance)} kept by the server" if dataset.importance else "")
        )
        if png is not None:
            out.say(f"picture: {png}")
        if export is not None:
            out.say(f"files: {export}; read back with data: {{name: per_client, folder: {export}}}")
