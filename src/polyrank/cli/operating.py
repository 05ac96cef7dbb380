"""Across machines: what monitoring and containers run. `polyrank.cli.deploy` has the rest of the server."""

from __future__ import annotations

import signal
import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from polyrank.cli.app import mistakes
from polyrank.cli.deploy import Server, deploy, flower, opened, say


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
    """Write alerts for Prometheus: no round, refusals, certificates, disks."""
    with mistakes():
        from polyrank.deploy.layout import DeployError
        from polyrank.files import write_bytes

        if out.exists():
            raise DeployError(f"--out: {out}: is there already; choose another")
        write_bytes(out, (files("polyrank.deploy") / "alerts.yaml").read_bytes())
        say(f"{out}: name it under `rule_files` in prometheus.yml")
