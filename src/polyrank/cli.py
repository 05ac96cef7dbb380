"""The command line, ``polyrank``: one function a command."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from polyrank import __version__

if TYPE_CHECKING:
    from polyrank.experiment.session import Session
    from polyrank.experiment.store import Run

app = typer.Typer(
    name="polyrank",
    help="Fine-tune one Hugging Face model across clients that cannot afford the same LoRA.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out, err = Console(), Console(stderr=True)

Set = Annotated[list[str] | None, typer.Option("--set", help="Override a key, for example --set rounds=5. Repeatable.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]


def main() -> None:
    """The entry point. Mistakes in the input end in one message and exit code 2, an interrupt in 130."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    app()


@contextmanager
def _mistakes() -> Iterator[None]:
    """Turns errors that the user can mend into a message and exit code 2."""
    from polyrank.errors import InputError, TrainingError

    try:
        yield
    except (InputError, TrainingError, ImportError, OSError) as error:
        err.print(f"[red]error:[/] {_plain(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1 if isinstance(error, TrainingError) else 2) from None


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def run(
    file: Annotated[Path | None, typer.Argument(help="An experiment; the embedded digits one if left out.")] = None,
    set_: Set = None,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder of the run; runs/NAME if left out.")] = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Run an experiment and write its adapter, records and summary to a folder."""
    with _mistakes():
        from polyrank.experiment.build import build, on_this_machine
        from polyrank.experiment.loading import load
        from polyrank.experiment.session import Session
        from polyrank.experiment.store import Run, check_free, free_folder

        path = file or embedded("digits.yaml")
        if folder is not None:
            check_free(folder)
        experiment = on_this_machine(load(path, set_))
        world = build(experiment)  # all that the file asks for has been found to work before a folder is made
        stored = Run.create(folder or free_folder(path.stem), experiment)
        _drive(Session(stored, world), quiet, json_)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of an interrupted run.")],
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Continue an interrupted run; the result is the same as without the interruption."""
    with _mistakes():
        from polyrank.experiment.session import Session
        from polyrank.experiment.store import Run

        stored = Run.open(folder)
        finished = stored.summary()
        if finished is None:
            _drive(Session(stored), quiet, json_)
        else:
            _report(stored, finished, quiet, json_)


def _drive(session: Session, quiet: bool, json_: bool) -> None:
    """Runs a session to its end, showing rounds as they end."""
    from polyrank.report.terminal import Progress, headline

    silent = quiet or json_
    try:
        if not silent:
            out.print(headline(session), highlight=False, soft_wrap=True)
        rounds, done = session.experiment.rounds, session.state.round
        with Progress(out, rounds, done, silent=silent).shown() as progress:
            for record, seconds in session.rounds():
                progress.add(asdict(record), seconds)
        if not silent and session.experiment.baselines:
            out.print(f"training the baselines: {', '.join(session.experiment.baselines)}", highlight=False)
        summary = session.finish()
    except KeyboardInterrupt:
        done, folder = session.state.round, session.run.folder
        err.print(f"interrupted after round {done}; continue with: polyrank resume {folder}", soft_wrap=True)
        raise typer.Exit(130) from None
    _report(session.run, summary, quiet, json_)


def _report(stored: Run, summary: dict[str, Any], quiet: bool, json_: bool) -> None:
    """Prints what a finished run reached."""
    from polyrank.report.terminal import outcome, results_table

    if json_:
        print(json.dumps({"run": str(stored.folder), **summary}))
    elif not quiet:
        out.print(results_table(summary))
        out.print(outcome(summary, stored.adapter), highlight=False, soft_wrap=True)


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    best: Annotated[
        bool, typer.Option("--best", help="The validation-selected adapter instead of the final one.")
    ] = False,
    json_: Json = False,
) -> None:
    """Evaluate a run's exported adapter, loaded onto the base model by PEFT itself."""
    with _mistakes():
        from polyrank.experiment.build import build
        from polyrank.experiment.components import did_you_mean
        from polyrank.experiment.config import ConfigError
        from polyrank.experiment.store import Run, RunError
        from polyrank.local.adapters import AdapterError, adapted, read_adapter
        from polyrank.local.hf import load_exported
        from polyrank.local.trainer import evaluate as measure

        stored = Run.open(folder)
        splits = ("train", "validation", "test")
        if split not in splits:
            raise ConfigError(f"--split: {split!r} is unknown.{did_you_mean(split, splits)}")
        adapter = stored.best if best else stored.adapter
        if not adapter.is_dir():
            raise RunError(f"{folder}: has no {adapter.name}/ yet; `polyrank resume {folder}` finishes the run")
        layers = set(adapted(read_adapter(adapter)[0]))
        world = build(stored.experiment())
        for name in sorted(layers - world.base.modules.keys()):
            raise AdapterError(f"{adapter}: layer {name} is none of the model's modules: another model?")
        metrics = measure(load_exported(world.base, adapter), world.splits[split])
        if json_:
            print(json.dumps({"run": str(folder), "adapter": str(adapter), "split": split, **metrics}))
        else:
            out.print(
                f"{split} accuracy {metrics['accuracy']:.2%}, loss {metrics['loss']:.4f} ({adapter})", highlight=False
            )


@app.command()
def plan(
    file: Annotated[Path | None, typer.Argument(help="An experiment; the embedded digits one if left out.")] = None,
    set_: Set = None,
    here: Annotated[
        bool, typer.Option("--here", help="Plan for this machine alone, with the memory that is free on it.")
    ] = False,
    png: Annotated[Path | None, typer.Option(help="Also draw budgets and memory into this PNG.")] = None,
    json_: Json = False,
) -> None:
    """Show what each client can afford and why, and what a round costs it. Nothing is downloaded but a config."""
    with _mistakes():
        from polyrank.experiment.forecast import forecast
        from polyrank.experiment.loading import load
        from polyrank.report.figures import plan_figure
        from polyrank.report.plan import plan_report

        path = file or embedded("digits.yaml")
        alone = ["fleet=[{name: this machine, memory: detect}]", "method.estimate=least"] if here else []
        planned = forecast(load(path, [*alone, *(set_ or [])]))
        if png is not None:
            plan_figure(png, planned, path.stem)
        if json_:
            print(json.dumps(planned))
            return
        for part in plan_report(planned):
            out.print(part, highlight=False, soft_wrap=isinstance(part, str))
        if png is not None:
            out.print(f"picture: {png}", highlight=False)


@app.command()
def profile(
    file: Annotated[Path | None, typer.Argument(help="An experiment; the embedded digits one if left out.")] = None,
    set_: Set = None,
    ranks: Annotated[str | None, typer.Option(help="Ranks to measure, for example 4,8,16.")] = None,
    path: Annotated[Path | None, typer.Option("--out", help="Also write the calibration to this file.")] = None,
    json_: Json = False,
) -> None:
    """Measure training steps on this device, print predicted against measured memory, write a calibration."""
    with _mistakes():
        from polyrank.experiment.calibrate import calibrate
        from polyrank.experiment.loading import load
        from polyrank.files import write_json
        from polyrank.report.plan import profile_report

        if path is not None and path.exists():
            raise FileExistsError(f"{path}: exists already; choose another --out")
        chosen = [int(rank) for rank in _numbers("--ranks", ranks, None, least=1, whole=True) or []]
        measured = calibrate(load(file or embedded("digits.yaml"), set_), chosen)
        if path is not None:
            write_json(path, measured)
        if json_:
            print(json.dumps(measured))
            return
        for part in profile_report(measured):
            out.print(part, highlight=False, soft_wrap=isinstance(part, str))
        if path is not None:
            out.print(f"calibration: {path}; plans use it with --set costs.calibration={path}", highlight=False)


@app.command()
def merge(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help="PEFT adapter folders of one model.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder for the merged adapter.")],
    method: Annotated[str, typer.Option(help="A method of `polyrank list methods`.")] = "rb_lora",
    weights: Annotated[str | None, typer.Option(help="Examples behind each adapter: n1,n2,...")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Compress to this rank; lossless if left out.")] = None,
    client_ranks: Annotated[
        str | None, typer.Option(help="One adapter per rank r1,r2,... instead: OUT/client_0, ... (with --rank, both).")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override an option of the rule, for example --set layers=zero.")
    ] = None,
    json_: Json = False,
) -> None:
    """Merge adapters of unequal ranks into one, by the rule of a method. No base model is needed."""
    with _mistakes():
        from polyrank.experiment.loading import method_with
        from polyrank.experiment.merging import merge as merge_adapters
        from polyrank.experiment.store import check_free
        from polyrank.local.adapters import write_adapter

        check_free(folder)
        counts = _numbers("--weights", weights, len(adapters), least=0)
        ranks = [int(r) for r in _numbers("--client-ranks", client_ranks, None, least=1, whole=True) or []]
        merged = merge_adapters(adapters, method_with(method, set_ or []), counts)
        written = [(folder / f"client_{index}", merged.client(r)) for index, r in enumerate(ranks)]
        if not ranks or rank is not None:
            written.insert(0, (folder, merged.whole(rank)))
        for path, adapter in written:
            write_adapter(path, adapter, merged.info)
        report = [
            {"folder": str(path), "ranks": {name: x.rank for name, x in adapter.layers.items()}}
            for path, adapter in written
        ]
        if json_:
            print(json.dumps(report))
        else:
            for entry in report:
                found = sorted(set(entry["ranks"].values()))  # type: ignore[attr-defined]
                out.print(
                    f"{entry['folder']}: {len(entry['ranks'])} layers of rank {', '.join(map(str, found))}",
                    highlight=False,
                )


@app.command()
def data(
    file: Annotated[Path | None, typer.Argument(help="An experiment; the embedded one if left out.")] = None,
    set_: Set = None,
    png: Annotated[Path | None, typer.Option(help="Also draw the split into this PNG.")] = None,
    json_: Json = False,
) -> None:
    """Show how an experiment's training data is split among its clients."""
    with _mistakes():
        from polyrank.experiment.loading import load
        from polyrank.experiment.shares import fleet_profiles, share_data
        from polyrank.report.figures import split_heat_map
        from polyrank.report.terminal import heat_map

        path = file or embedded("digits.yaml")
        experiment = load(path, set_)
        shares = share_data(experiment)
        profiles = fleet_profiles(experiment.fleet, shares)
        dataset, clients = shares.dataset, list(shares.clients)
        counts = shares.partition.counts(dataset.train.labels, len(dataset.classes))
        if png is not None:
            title = f"{path.stem}: {experiment.data.partition.name}"
            split_heat_map(png, counts, clients, list(dataset.classes), title)
        if json_:
            rows = [
                {"client": c, "group": profiles[c].group, "examples": int(row.sum()), "classes": row.tolist()}
                for c, row in zip(clients, counts, strict=True)
            ]
            sizes = {name: len(getattr(dataset, name)) for name in ("train", "validation", "test")}
            print(json.dumps({"name": dataset.name, "sizes": sizes, "classes": list(dataset.classes), "clients": rows}))
            return
        out.print(heat_map(counts, clients, [profiles[c].group for c in clients], dataset.classes, out.width))
        out.print(
            f"{int(counts.sum())} of {len(dataset.train)} training examples held by {len(clients)} clients, "
            f"{len(dataset.validation)} validation, {len(dataset.test)} test",
            highlight=False,
            soft_wrap=True,
        )
        if png is not None:
            out.print(f"picture: {png}", highlight=False)


@app.command("list")
def list_(
    table: Annotated[
        str, typer.Argument(help="A table: methods, aggregators, partitioners, datasets, ...")
    ] = "methods",
    json_: Json = False,
) -> None:
    """List the entries of a table, each with a line and its source."""
    with _mistakes():
        from polyrank.experiment.catalogue import entries

        found = entries(table)
        if json_:
            print(json.dumps(found))
            return
        from rich.table import Table

        shown = Table(box=None, padding=(0, 2, 0, 0))
        shown.add_column(table)
        shown.add_column("")
        for entry in found:
            source = "" if entry["reference"] in entry["description"] else f"\n[dim]{_plain(entry['reference'])}[/]"
            shown.add_row(entry["name"], _plain(entry["description"]) + source)
        out.print(shown)


@app.command()
def schema() -> None:
    """Print the JSON schema of experiment files, for editors."""
    from polyrank.experiment.config import json_schema

    print(json.dumps(json_schema(), indent=2))


def embedded(name: str) -> Path:
    """An experiment that ships with polyrank, in an installed package or in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "experiments", here.parents[1] / "experiments"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"polyrank was installed without {name}")


def _numbers(
    option: str, text: str | None, count: int | None, *, least: float, whole: bool = False
) -> list[float] | None:
    from polyrank.experiment.config import ConfigError

    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option}: {text!r} is not a list of numbers such as 10,20,30") from None
    if whole and not all(value.is_integer() for value in values):
        raise ConfigError(f"{option}: {text!r}: every number must be whole")
    if any(not least <= value < float("inf") for value in values):
        raise ConfigError(f"{option}: {text!r}: every number must be finite and at least {least:g}")
    if count is not None and len(values) != count:
        raise ConfigError(f"{option}: {len(values)} numbers for {count} adapters")
    return values


def _plain(text: str) -> str:
    return text.replace("[", "\\[")


if __name__ == "__main__":
    sys.exit(main())
