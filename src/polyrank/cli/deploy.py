"""Across machines: ``polyrank deploy ...``. What needs Flower is imported by the commands."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyrank.cli.app import Json, app, err, mistakes, out
from polyrank.report.screen import Rows

if TYPE_CHECKING:
    from polyrank.deploy.expiry import Deadline
    from polyrank.deploy.layout import Deployment

deploy = typer.Typer(
    name="deploy",
    help="Run a federation across machines, on Flower: `init`, `up` and `run` on the server, `join` at each site.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(deploy)

Server = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the deployment.")]
Place = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the deployment, or of a node.")]
Telemetry = Annotated[
    bool, typer.Option("--telemetry", help="Leave Flower's telemetry and update checks on; they are off otherwise.")
]


@contextmanager
def flower() -> Iterator[None]:
    """`mistakes`, after a look for Flower."""
    with mistakes():
        from polyrank.deploy.layout import require_flower

        require_flower()
        yield


@deploy.command()
def init(
    folder: Server,
    host: Annotated[
        str, typer.Option(help="Name or address of this server; others after commas. Nodes dial the first.")
    ],
    nodes: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="For tests: make sites here, too: site-1, site-2, ...")
    ] = None,
    names: Annotated[str | None, typer.Option(help="For tests: make sites of these names here, too: a,b,c.")] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65_535, help="Of the gateway, which the sites reach; 0: a free one.")
    ] = 8443,
    superlink_port: Annotated[
        int, typer.Option(min=0, max=65_535, help="Of the SuperLink, on loopback; 0: a free one.")
    ] = 18000,
    listen: Annotated[str, typer.Option(help="Address the gateway listens on.")] = "0.0.0.0",
    serverapp: Annotated[str | None, typer.Option(help="ServerApp, module:attribute; polyrank's if left out.")] = None,
    clientapp: Annotated[str | None, typer.Option(help="ClientApp, module:attribute; polyrank's if left out.")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65_535, help="Serve metrics on this port of loopback; 0: a free one.")
    ] = None,
) -> None:
    """Make a deployment's folder: an authority, the server's certificate, configuration. Sites are added later."""
    with flower():
        from polyrank.deploy import provision
        from polyrank.deploy.layout import DeployError, Settings

        if nodes is not None and names is not None:
            raise DeployError("give either --nodes N or --names a,b,c")
        chosen = [part.strip() for part in names.split(",")] if names else [f"site-{i + 1}" for i in range(nodes or 0)]
        made = provision.init(
            folder,
            chosen,
            [part.strip() for part in host.split(",")],
            port=port,
            superlink_port=superlink_port,
            listen=listen,
            serverapp=serverapp or Settings.serverapp,
            clientapp=clientapp or Settings.clientapp,
            metrics_port=metrics_port,
        )
        say(f"{folder}: federation {made.settings.federation}, dialled as {made.settings.public}")
        if chosen:
            count = f"{len(chosen)} site{'s' * (len(chosen) > 1)}"
            say(f"{count} in {folder}/nodes/, for tests on this machine alone: their private keys were made here")
        else:
            say(f"at each site: polyrank deploy request NAME --federation {made.settings.federation}")
            say(f"then, here:   polyrank deploy add {folder} request.json")
        say(f"next: polyrank deploy up {folder}; {folder}/README.md has all commands")


@deploy.command()
def up(
    folder: Server,
    gateway: Annotated[bool, typer.Option("--gateway", help="Run nginx as well, which other machines reach.")] = False,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay in the foreground, for a container.")] = False,
    telemetry: Telemetry = False,
) -> None:
    """Start the server in the background, wait until it answers, and register the nodes. May be repeated."""
    with flower():
        from polyrank.deploy import expiry, operate

        deployment = opened(folder)
        warn(expiry.of_server(deployment))
        if foreground:
            operate.stay(deployment, say, gateway=gateway, telemetry=telemetry)
            return
        ids = operate.up(deployment, gateway=gateway, telemetry=telemetry)
        reached = deployment.settings.public if gateway else f"{deployment.superlink}, from this machine alone"
        say(f"SuperLink answers; {len(ids)} nodes registered; reached as {reached}")


@deploy.command()
def register(folder: Server) -> None:
    """Register the nodes' keys at a server that runs already, for example under systemd."""
    with flower():
        from polyrank.deploy import operate

        for name, node_id in operate.register(opened(folder)).items():
            say(f"{name}: {node_id}")


@deploy.command()
def serve(
    folder: Server,
    name: Annotated[str, typer.Argument(help="superlink, superexec, registrar, gateway or metrics.")],
    telemetry: Telemetry = False,
) -> None:
    """Become one process of the server, in the foreground: what the systemd units run."""
    with flower():
        from polyrank.deploy import operate

        operate.serve(opened(folder), name, say, telemetry)


@deploy.command()
def status(folder: Place, json_: Json = False) -> None:
    """Show what runs, which nodes are connected, all runs, and until when certificates and keys are valid."""
    with flower():
        from polyrank.deploy import expiry, layout, operate

        place = layout.opened(folder)
        report = operate.status(place) if isinstance(place, layout.Deployment) else operate.status_of_node(place)
        if json_:
            print(json.dumps(report))
            return
        shown = Rows(show_header=False)
        for name, pid in report["processes"].items():
            shown.add_row("process", name, f"pid {pid}" if pid else "does not run")
        for name, state in report.get("nodes", {}).items():
            shown.add_row("node", name, state)
        for entry in report.get("runs", []):
            shown.add_row("run", entry["id"], entry["status"], entry["folder"])
        if "healthy" in report:
            shown.add_row("server", "answers" if report["healthy"] else "does not answer")
            shown.add_row("federation", report["federation"])
        for deadline in report["expiry"]:
            state = f"valid for {deadline['days']} days" if deadline["level"] != "error" else "ended"
            shown.add_row("expiry", deadline["what"], state, deadline["until"][:10])
        out.print(shown)
        warn(expiry.of_server(place) if isinstance(place, layout.Deployment) else expiry.of_node(place))


@deploy.command()
def logs(
    folder: Place,
    who: Annotated[str | None, typer.Argument(help="A process, or the id of a run; all processes if left out.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on as it is written.")] = False,
    lines: Annotated[int, typer.Option(min=0, max=10**9, help="How many lines from the end.")] = 40,
) -> None:
    """Show the end of logs."""
    with flower():
        from polyrank.deploy import layout
        from polyrank.deploy.logs import last, lines_of_run, written

        place = layout.opened(folder)
        try:
            if who is not None and who.isdigit() and isinstance(place, layout.Deployment):
                shown: Any = lines_of_run(place, who)[-lines:] if lines else []
            else:
                shown = written(place, who, lines) if follow else last(place, who, lines)
            for line in shown:
                out.say(line)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


@deploy.command()
def down(folder: Place) -> None:
    """End all processes that were started from a folder. Runs can be resumed after the next `up`."""
    with flower():
        from polyrank.deploy import layout, operate

        ended = operate.down(layout.opened(folder))
        say(f"ended: {', '.join(ended)}" if ended else "nothing ran")


def opened(folder: Path) -> Deployment:
    """A deployment's folder."""
    from polyrank.deploy.layout import Deployment

    return Deployment.open(folder)


def answering(folder: Path) -> Deployment:
    """A deployment whose server answers."""
    from polyrank.deploy.layout import DeployError
    from polyrank.deploy.operate import healthy

    deployment = opened(folder)
    if not healthy(deployment, deployment.settings.superlink_port):
        raise DeployError(f"{folder}: the server does not answer; `polyrank deploy up {folder}` starts it")
    return deployment


def say(text: str) -> None:
    """Prints a line as it is."""
    out.say(text)


def warn(deadlines: Iterable[Deadline]) -> None:
    """Says what ends soon, or has ended, on standard error."""
    for deadline in deadlines:
        if deadline.level == "error":
            err.error(str(deadline))
        elif deadline.level == "warning":
            err.say(f"warning: {deadline}")
