"""The server of a deployment: its processes, its nodes."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from polyrank.deploy import control, expiry, registry, supervise
from polyrank.deploy.certificates import trust
from polyrank.deploy.layout import LOOPBACK, DeployError, Deployment, Node, Place, environment, nginx, program
from polyrank.deploy.registrar import keep, register
from polyrank.deploy.supervise import Service

SUPERLINK, SUPEREXEC, REGISTRAR, GATEWAY, METRICS = "superlink", "superexec", "registrar", "gateway", "metrics"


def services(deployment: Deployment, gateway: bool) -> list[Service]:
    """The processes of a server.

    The ServerApp runs under a SuperExec of its own rather than under the SuperLink, so that a run survives the
    SuperLink's restart (it ends with its SuperExec), and nobody takes work from the SuperLink without the secret.
    """
    state, server, ca = deployment.folder / "state", deployment.folder / "server", str(deployment.authority)
    superlink = [
        *(program("flower-superlink"), "--host", LOOPBACK, "--port", str(deployment.settings.superlink_port)),
        *("--ssl-certfile", str(server / "server.crt"), "--ssl-keyfile", str(server / "server.key")),
        *("--ssl-ca-certfile", ca, "--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        *("--database", str(state / "superlink.db"), "--isolation", "process"),
        *("--superexec-auth-secret-file", str(deployment.secret)),
    ]
    superexec = [
        *(program("flower-superexec"), "--runtime-api-address", deployment.superlink, "--root-certificates", ca),
        *("--superexec-auth-secret-file", str(deployment.secret)),
    ]
    registrar = [program("polyrank"), "deploy", "serve", str(deployment.folder), REGISTRAR]
    commands = {SUPERLINK: superlink, SUPEREXEC: superexec, REGISTRAR: registrar}
    if gateway:
        commands[GATEWAY] = [nginx(), "-p", str(deployment.run), "-c", str(deployment.folder / "nginx.conf")]
    if deployment.settings.metrics_port is not None:
        commands[METRICS] = [program("polyrank"), "deploy", "metrics", str(deployment.folder)]
    return [
        Service(name, command, str(state), str(deployment.logs / f"{name}.log")) for name, command in commands.items()
    ]


def up(
    deployment: Deployment, *, gateway: bool = False, telemetry: bool = False, patience: float = 90.0
) -> dict[str, str]:
    """Starts what of a server does not run, waits until it answers, and registers its nodes.

    Args:
        deployment: the server's.
        gateway: whether nginx runs as well; without it, only this machine can reach the server.
        telemetry: leaves Flower's telemetry and update checks on.
        patience: seconds to wait for the SuperLink.

    Returns:
        Ids of the nodes, by name.

    Raises:
        DeployError: if its certificate or its authority has ended, or if it does not come up, with the end of its log.
    """
    _check_certificates(deployment)
    if supervise.running(deployment.run, supervise.SUPERVISOR):
        if gateway and not (deployment.run / f"{GATEWAY}.pid").exists():
            raise DeployError(f"{deployment.folder}: runs without a gateway; `polyrank deploy down` it first")
    else:
        ready = _ready(deployment, gateway)
        supervise.start(deployment.run, ready, environment(deployment.home, telemetry))
    return _answering(deployment, gateway, patience)


def stay(deployment: Deployment, say: Callable[[str], None], *, gateway: bool = False, telemetry: bool = False) -> None:
    """Runs a server in this process until it is told to end, for a container; registers nodes when it answers.

    Args:
        deployment: the server's.
        say: is told when the server answers, and why it does not.
        gateway: see `up`.
        telemetry: see `up`.

    Raises:
        DeployError: if its certificate or its authority has ended, if it runs already, or a port is taken.
    """
    _check_certificates(deployment)
    if pid := supervise.running(deployment.run, supervise.SUPERVISOR):
        raise DeployError(f"{deployment.folder}: runs already (pid {pid}); `polyrank deploy down` ends it")
    ready = _ready(deployment, gateway)

    def register_nodes() -> None:
        while True:
            try:
                say(f"SuperLink answers; {len(_answering(deployment, gateway, 90.0))} nodes registered")
                return
            except (DeployError, OSError) as error:
                say(str(error))
                time.sleep(10)

    threading.Thread(target=register_nodes, daemon=True).start()
    supervise.supervise(deployment.run, ready, environment(deployment.home, telemetry))


def _check_certificates(deployment: Deployment) -> None:
    for deadline in expiry.of_server(deployment):
        if deadline.level == "error" and deadline.site is None:
            raise DeployError(str(deadline))


def _ready(deployment: Deployment, gateway: bool) -> list[Service]:
    """The processes of a server, after a look for what would keep them from starting."""
    supervise.stop(deployment.run)  # what a supervisor that was killed has left
    for place in (deployment.home, deployment.run, deployment.logs):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    settings = deployment.settings
    ready = services(deployment, gateway)
    _check_free("--superlink-port", LOOPBACK, settings.superlink_port)
    if settings.metrics_port is not None:
        _check_free("--metrics-port", LOOPBACK, settings.metrics_port)
    if gateway:
        _check_free("--port", settings.listen, settings.port)
    return ready


def _answering(deployment: Deployment, gateway: bool, patience: float) -> dict[str, str]:
    """Waits until a server answers, and registers its nodes; returns their ids, by name."""
    wait_healthy(deployment, deployment.settings.superlink_port, patience, SUPERLINK)
    if gateway and deployment.settings.listen in (LOOPBACK, "0.0.0.0"):
        wait_healthy(deployment, deployment.settings.port, patience, GATEWAY)
    return register(deployment)


def serve(deployment: Deployment, name: str, say: Callable[[str], None], telemetry: bool = False) -> None:
    """Becomes one process of a server, for systemd to supervise; the registrar says what it does.

    Raises:
        DeployError: if there is no such process.
    """
    known = {service.name: service for service in services(deployment, name == GATEWAY)}
    if name not in known:
        raise DeployError(f"{name!r}: a server's processes are {', '.join(known)} and {GATEWAY}")
    if name == REGISTRAR:
        keep(deployment, lambda: healthy(deployment, deployment.settings.superlink_port), say)
        return
    service = known[name]
    os.umask(0o077)
    os.chdir(service.cwd)
    os.execve(service.command[0], list(service.command), environment(deployment.home, telemetry))


def remove(deployment: Deployment, name: str) -> bool:
    """Makes a node's key refused for ever, and forgets the node; returns whether the SuperLink has been told.

    It has not if it does not run; the registrar tells it when it does.

    Raises:
        DeployError: if there is no such node.
    """
    with registry.changing(deployment) as book:
        registry.leave(book, name, datetime.now(UTC))
    deployment.answer(name).unlink(missing_ok=True)
    return settle(deployment)


def settle(deployment: Deployment) -> bool:
    """Tells the SuperLink of the registry, if it runs; whether it does."""
    runs = healthy(deployment, deployment.settings.superlink_port)
    if runs:
        register(deployment)
    return runs


def node_ids(deployment: Deployment) -> dict[str, str]:
    """Flower's ids of the nodes that were registered, by name."""
    return {name: member["id"] for name, member in registry.read(deployment)["nodes"].items() if member["id"]}


def online(deployment: Deployment) -> dict[str, str]:
    """The state of every node, by name: ``online``, ``offline``, ``registered`` or ``unknown``."""
    states, ids = control.nodes(deployment), node_ids(deployment)
    return {name: states.get(ids.get(name, ""), "unknown") for name in registry.names(deployment)}


def status(deployment: Deployment) -> dict[str, Any]:
    """What runs, who is connected, and until when certificates and keys are valid."""
    from polyrank.deploy.follow import submitted

    deadlines = expiry.of_server(deployment)
    found: dict[str, Any] = {
        "federation": deployment.settings.federation,
        "processes": processes(deployment),
        "healthy": healthy(deployment, deployment.settings.superlink_port),
        "certificate_days": deadlines[0].days,
        "expiry": [deadline.plain() for deadline in deadlines],
        "nodes": dict.fromkeys(registry.names(deployment), "unknown"),
        "runs": [],
    }
    if found["healthy"]:
        known, folders = control.statuses(deployment), submitted(deployment)
        found["nodes"] = online(deployment)
        found["runs"] = [{"id": i, "status": state, "folder": folders.get(i, "")} for i, state in known.items()]
    return found


def status_of_node(node: Node) -> dict[str, Any]:
    """What runs of a node, and until when its key and the authorities that it trusts are valid."""
    return {"processes": processes(node), "expiry": [deadline.plain() for deadline in expiry.of_node(node)]}


def processes(place: Place) -> dict[str, int | None]:
    """Pids of a server's or node's processes by name; None of one that does not run."""
    return {name: supervise.running(place.run, name) for name in supervise.names(place.run)}


def down(place: Place) -> list[str]:
    """Ends all processes of a server or a node that were started from its folder; returns their names."""
    return supervise.stop(place.run)


def restart(deployment: Deployment, names: Sequence[str], patience: float = 90.0) -> list[str]:
    """Ends processes of a server, which its supervisor starts again, and waits until the server answers.

    Returns:
        The names of those that ran; none without a supervisor, as under systemd.

    Raises:
        DeployError: if the server does not answer in time.
    """
    if not supervise.running(deployment.run, supervise.SUPERVISOR):
        return []
    before = {name: pid for name in names if (pid := supervise.running(deployment.run, name))}
    for pid in before.values():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + patience
    while any(supervise.running(deployment.run, name) in (None, pid) for name, pid in before.items()):
        if time.monotonic() > deadline:
            raise DeployError(
                f"{' and '.join(before)}: not started again after {patience:.0f} s; see {deployment.logs}"
            )
        time.sleep(0.1)
    if SUPERLINK in before:
        wait_healthy(deployment, deployment.settings.superlink_port, patience, SUPERLINK)
    return list(before)


def healthy(deployment: Deployment, port: int) -> bool:
    """Whether the server answers on a port, with a certificate of the deployment's authority."""
    trusted = trust(deployment.authority)
    try:
        with httpx.Client(verify=trusted, trust_env=False, timeout=5) as client:
            return client.get(f"https://{LOOPBACK}:{port}/health").status_code == 200
    except httpx.HTTPError:
        return False


def fault(place: Deployment | Node) -> str | None:
    """What keeps a server or a node from working, as far as its machine knows; None if nothing does."""
    found = processes(place)
    if isinstance(place, Node) and not found:
        return f"{place.folder}: nothing runs; `polyrank deploy join` starts it"
    for name, pid in found.items():
        if pid is None:
            return f"{name} does not run; see {place.logs / name}.log"
    if isinstance(place, Deployment):
        doors = {SUPERLINK: place.settings.superlink_port, GATEWAY: place.settings.port}
        for name, port in doors.items():
            if (name == SUPERLINK or name in found) and not healthy(place, port):
                return f"{name} does not answer on port {port}"
    return None


def wait_healthy(deployment: Deployment, port: int, patience: float, name: str) -> None:
    """Waits until the server answers on a port.

    Raises:
        DeployError: if it does not in time, with the end of the log of the process called `name`.
    """
    deadline = time.monotonic() + patience
    while not healthy(deployment, port):
        if time.monotonic() > deadline:
            log = deployment.logs / f"{name}.log"
            raise DeployError(f"{name} does not answer on port {port} after {patience:.0f} s; {log} ends:\n{tail(log)}")
        time.sleep(0.3)


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log, without colours."""
    if not log.is_file():
        return ""
    with open(log, "rb") as file:
        file.seek(max(log.stat().st_size - 400 * lines, 0))
        return "\n".join(control.plain(file.read().decode(errors="replace")).splitlines()[-lines:])


def _check_free(option: str, address: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise DeployError(f"{option}: port {port} of {address} cannot be listened on: {error.strerror}") from None
