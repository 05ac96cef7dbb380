"""Runs: ``polyrank run``, ``resume`` and ``evaluate``."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyrank.cli.app import Json, Quiet, Set, app, err, mistakes, out

if TYPE_CHECKING:
    from polyrank.experiment.session import Session
    from polyrank.experiment.store import Run


@app.command()
def run(
    file: Annotated[Path | None, typer.Argument(help="An experiment; the embedded digits one if left out.")] = None,
    set_: Set = None,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder of the run; runs/NAME if left out.")] = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Run an experiment and write its adapter, records and summary to a folder."""
    with mistakes():
        from polyrank.experiment.results import begin

        _drive(begin(file, set_ or (), folder), quiet, json_)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of an interrupted run.")],
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Continue an interrupted run; the result is the same as without the interruption."""
    with mistakes():
        from polyrank.experiment.session import Session
        from polyrank.experiment.store import Run

        stored = Run.open(folder)
        finished = stored.summary()
        if finished is None:
            with stored.resumable():
                session = Session(stored)
            _drive(session, quiet, json_)
        else:
            report(stored, finished, quiet, json_)


def _drive(session: Session, quiet: bool, json_: bool) -> None:
    """Runs a session to its end, showing rounds as they end."""
    from polyrank.report.progress import Progress
    from polyrank.report.terminal import headline

    silent = quiet or json_
    try:
        if not silent:
            out.say(headline(session))
        rounds, done = session.course.rounds, session.state.round
        with session.run.resumable(), Progress(out, rounds, done, silent=silent).shown() as progress, session.logs:
            session.listeners.append(progress.told)
            for record, seconds in session.rounds():
                progress.add(asdict(record), seconds)
            if session.experiment.baselines:
                progress.note(f"training the baselines: {', '.join(session.experiment.baselines)}")
            summary = session.finish()
    except KeyboardInterrupt:
        done, folder = session.state.round, session.run.folder
        err.say(f"interrupted after round {done}; continue with: polyrank resume {shlex.quote(str(folder))}")
        raise typer.Exit(130) from None
    report(session.run, summary, quiet, json_)


def report(stored: Run, summary: dict[str, Any], quiet: bool, json_: bool) -> None:
    """Prints what a finished run reached."""
    from polyrank.report.terminal import outcome, results_table

    if json_:
        print(json.dumps({"run": str(stored.folder), **summary}))
    elif not quiet:
        out.print(results_table(summary))
        out.say(outcome(summary, stored.adapter))


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    best: Annotated[
        bool, typer.Option("--best", help="The validation-selected adapter instead of the final one.")
    ] = False,
    choices: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Questions with choices, instead of a split.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="With --choices: a key of evaluate.choices, such as question=input. Repeatable."),
    ] = None,
    json_: Json = False,
) -> None:
    """Evaluate a run's exported adapter, loaded onto the base model by PEFT itself."""
    if choices is not None:
        from polyrank.cli.language import choose

        choose(folder, choices, set_ or [], best, json_)
        return
    with mistakes():
        from polyrank.experiment.build import build
        from polyrank.experiment.components import did_you_mean
        from polyrank.experiment.config import ConfigError
        from polyrank.experiment.store import Run, RunError
        from polyrank.local.adapters import AdapterError, adapted, read_adapter
        from polyrank.local.evaluate import evaluate as measure
        from polyrank.local.hf import load_exported

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
            shown = f"accuracy {metrics['accuracy']:.2%}, loss {metrics['loss']:.4f}"
            if "perplexity" in metrics:
                shown = f"{metrics['loss']:.4f} nats per token, perplexity {metrics['perplexity']:.2f}"
            out.say(f"{split} {shown} ({adapter})")
