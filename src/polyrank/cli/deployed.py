"""Across machines: a site's node, and runs. `polyrank.cli.deploy` has the server."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polyrank.cli.app import Json, Quiet, Set, embedded, err, out
from polyrank.cli.deploy import Server, Telemetry, answering, deploy, flower, say, warn

if TYPE_CHECKING:
    from polyrank.deploy.layout import Deployment
    from polyrank.experiment.store import Run


def show(lines: Sequence[tuple[str, str]]) -> None:
    """Prints what a look at a site has found."""
    for what, text in lines:
        say(f"{what}: {text}")


Folder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run of this deployment.")]


@deploy.command()
def join(
    folder: Annotated[Path, typer.Argument(metavar="NODE_DIR", help="The site's folder.")],
    superlink: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="The server; as in node.json if left out.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="The site's configuration; NODE_DIR/site.yaml if left out.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Where the site's data is, instead of as configured.")] = None,
    keep: Annotated[bool, typer.Option(help="Keep the model loaded between messages.")] = True,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay in the foreground, for systemd.")] = False,
    check: Annotated[
        bool, typer.Option(help="Look first whether model and data load; a ClientApp of another package needs none.")
    ] = True,
    wait: Annotated[float, typer.Option(min=0, max=86_400, help="Seconds to wait for the connection.")] = 30,
    telemetry: Telemetry = False,
) -> None:
    """Start a node and keep it running, whatever it or the server ends with."""
    with flower():
        from polyrank.deploy import expiry, layout
        from polyrank.deploy import join as joining
        from polyrank.deploy.operate import tail

        warn(expiry.of_node(layout.Node.open(folder)))
        options = {"site": config, "data": data, "keep": keep, "foreground": foreground, "telemetry": telemetry}
        node = joining.join(folder, superlink, **options, check=check, shown=show)  # type: ignore[arg-type]
        if foreground:
            return
        if joining.connected(node, wait) is None:
            err.print(tail(node.logs / "supernode.log"), soft_wrap=True)
            err.say(f"{node.name}: not connected after {wait:g} s, and goes on trying")
            raise typer.Exit(1)
        say(f"{node.name}: connected to {superlink or node.superlink}")


@deploy.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="NODE_DIR", help="The folder that was handed over.")],
    config: Annotated[
        Path | None, typer.Option(help="The site's configuration; NODE_DIR/site.yaml if left out.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Where the site's data is, instead of as configured.")] = None,
    json_: Json = False,
) -> None:
    """Load a site's model and data, train a step, and say what the site will answer; nobody is dialled."""
    with flower():
        from polyrank.deploy.check import check as look

        lines = look(config or folder / "site.yaml", data)
        if json_:
            print(json.dumps(dict(lines)))
        else:
            show(lines)


@deploy.command()
def keep(
    site: Annotated[Path, typer.Argument(help="The site's configuration.")],
    data: Annotated[Path | None, typer.Option(help="Where its data is, instead of as configured.")] = None,
) -> None:
    """Load a site's data and answer for it, in the foreground, until stopped: `join` starts one."""
    with flower():
        from polyrank.deploy.keeper import keep as answering_with
        from polyrank.deploy.site import Site

        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        answering_with(site.resolve(), Site(site.resolve(), data).answer)


@deploy.command()
def run(
    folder: Server,
    file: Annotated[Path, typer.Argument(help="An experiment.")],
    set_: Set = None,
    target: Annotated[Path | None, typer.Option("--out", help="Folder of the run; runs/NAME if left out.")] = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Submit a run and follow it to its end; the exit code is 0 only if it completed."""
    with flower():
        from polyrank.experiment.loading import load
        from polyrank.experiment.machine import on_this_machine
        from polyrank.experiment.store import Run, check_free, free_folder

        found = answering(folder)
        if target is not None:
            check_free(target)
        experiment = on_this_machine(load(file, set_), remote=True)
        drive(found, Run.create(target or free_folder(file.stem), experiment), quiet, json_)


@deploy.command()
def resume(folder: Server, target: Folder, quiet: Quiet = False, json_: Json = False) -> None:
    """Follow a run again, or continue it from its last checkpoint if nobody works on it."""
    with flower():
        from polyrank.cli.runs import report
        from polyrank.experiment.store import Run

        stored = Run.open(target)
        finished = stored.summary()
        if finished is None:
            drive(answering(folder), stored, quiet, json_)
        else:
            report(stored, finished, quiet, json_)


@deploy.command()
def stop(folder: Server, target: Folder) -> None:
    """Stop a run; `resume` continues it from its last checkpoint."""
    with flower():
        from polyrank.deploy import follow
        from polyrank.experiment.store import Run

        run_id = follow.stop(answering(folder), Run.open(target))
        say(f"run {run_id} is stopped; `polyrank deploy resume {folder} {target}` continues it")


@deploy.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Folder to make it in.")] = Path("polyrank-demo"),
    nodes: Annotated[int, typer.Option(min=2, max=100, help="How many clients.")] = 3,
    set_: Set = None,
) -> None:
    """Deploy on this machine, over TLS and with a key per node, run the digits, and compare with the simulator."""
    with flower():
        from polyrank.deploy import demo as demonstration
        from polyrank.deploy.layout import DeployError, nginx
        from polyrank.experiment.loading import load
        from polyrank.report.progress import Progress
        from polyrank.report.terminal import results_table

        try:
            gateway = bool(nginx())
        except DeployError:
            gateway = False
        sizes = [f"data.clients={nodes}", f"deployment.clients={nodes}"]
        experiment = load(embedded("deploy.yaml"), [*sizes, *(set_ or [])])
        with Progress(out, experiment.rounds, 0).shown() as progress:
            found = demonstration.demo(folder, experiment, progress, say, gateway=gateway)
        summary = found.run.summary()
        if not found.outcome.completed or summary is None:
            for line in found.outcome.errors:
                err.say(line)
            raise DeployError(f"{found.outcome}; logs are in {folder}/logs and {folder}/nodes/NAME/logs")
        out.print(results_table(summary))
        if not found.equal:
            raise DeployError(f"{found.run.folder}: its adapter is not the simulator's, {found.simulated.folder}")
        say(f"adapter in {found.run.adapter}: byte for byte the simulator's")
        say(f"{found.run.folder}/audit.jsonl says who sent what")


def drive(found: Deployment, stored: Run, quiet: bool, json_: bool) -> None:
    """Follows a run to its end, and ends this command as the run ended."""
    from polyrank.cli.runs import report
    from polyrank.deploy import follow
    from polyrank.deploy.operate import online
    from polyrank.report.progress import Progress

    silent = quiet or json_
    tell = (lambda text: None) if silent else say
    states = online(found)
    tell(f"{sum(state == 'online' for state in states.values())} of {len(states)} nodes online; run in {stored.folder}")
    try:
        done = sum(1 for _ in stored.records())
        with Progress(out, stored.experiment().rounds, done, silent=silent).shown() as progress:
            outcome = follow.drive(found, stored, progress, say=tell, waits=err.say)
    except follow.NotSubmittedError:
        err.say(f"not submitted; `polyrank deploy resume {found.folder} {stored.folder}` puts it into the queue again")
        raise typer.Exit(130) from None
    except KeyboardInterrupt:
        err.say(
            f"no longer followed; the run goes on. `polyrank deploy resume {found.folder} {stored.folder}` follows it "
            f"again, `polyrank deploy stop {found.folder} {stored.folder}` stops it"
        )
        raise typer.Exit(130) from None
    summary = stored.summary()
    if not outcome.completed or summary is None:
        for line in outcome.errors:
            err.say(line)
        again = f"`polyrank deploy resume {found.folder} {stored.folder}` continues it"
        err.error(f"{outcome}; {again}")
        raise typer.Exit(1)
    report(stored, summary, quiet, json_)
