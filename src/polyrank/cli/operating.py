"""Across machines: what monitoring and containers run. `polyrank.cli.deploy` has the rest of the server."""

from __future__ import annotations

import signal
import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from polyrank.cli.app import err, mistakes
from polyrank.cli.deploy import Place, Server, deploy, flower, opened, say


@deploy.command()
def health(folder: Place) -> None:
    """Say whether a server answers, or a node's processes run, by the exit code: 0 or 1. For a container's check."""
    with flower():
        from polyrank.deploy import layout, operate

        if fault := operate.fault(layout.opened(folder)):
            err.say(fault)
            raise typer.Exit(1)
        say("healthy")


@deploy.command()
def backup(
    folder: Server,
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write; must not exist.")],
) -> None:
    """Write the server's keys, settings, nodes, database and runs into one file; the server may run meanwhile."""
    with flower():
        from polyrank.deploy import backup as backups

        archive = backups.backup(opened(folder), out)
        size = f"{archive.files} files, {archive.nbytes} bytes"
        say(f"{out}: {size}, with the server's keys: keep it where nobody reads it")
        for run in archive.elsewhere:
            say(f"not in it, because it is not in {folder}: {run}")


@deploy.command()
def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `backup` has written.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make; must be empty or not exist.")],
) -> None:
    """Make a server's folder of a backup, here or elsewhere. The server that it is of must not run any more."""
    with flower():
        from polyrank.deploy import backup as backups

        about = backups.restore(file, folder)
        say(f"{folder}: as {about['folder']} was at {about['made']}, with polyrank {about['polyrank']}")
        if about["flwr"] != (here := backups.flower_version()):
            say(f"made with Flower {about['flwr']}, and here is {here}, which may not read its database")
        say(f"next: polyrank deploy up {folder}")


@deploy.command()
def metrics(folder: Server) -> None:
    """Serve the server's metrics for Prometheus, in the foreground: `up` starts one where `metrics_port` is set."""
    with flower():
        from polyrank.deploy.metrics import serve

        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        serve(opened(folder))


@deploy.command()
def alerts(
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write; must not exist.")] = Path("polyrank.yml"),
) -> None:
    """Write alerts for Prometheus: no round, refusals, certificates, sites' keys, disks."""
    with mistakes():
        from polyrank.deploy.layout import DeployError
        from polyrank.files import write_bytes

        if out.exists():
            raise DeployError(f"--out: {out}: is there already; choose another")
        write_bytes(out, (files("polyrank.deploy") / "alerts.yaml").read_bytes())
        say(f"{out}: name it under `rule_files` in prometheus.yml")
