"""A node: Flower's SuperNode and its SuperExec on a site's machine."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx

from polyrank.deploy import expiry, supervise
from polyrank.deploy.certificates import trust
from polyrank.deploy.control import plain
from polyrank.deploy.layout import ADDRESS, LOOPBACK, DeployError, Node, environment, free_port, program, write_private
from polyrank.deploy.supervise import Service

SUPERNODE, SUPEREXEC, KEEPER = "supernode", "superexec", "keeper"
AHEAD, BEHIND = 5.0, 300.0  # seconds by which the server lets a node's clock differ
_CONNECTED = re.compile(r"SuperNode ID: (\d+)")


def services(node: Node, superlink: str, site: Path, data: Path | None, keep: bool) -> list[Service]:
    """The processes of a node; the SuperExec starts what answers a message, or asks the keeper to.

    The SuperNode hands work out on a port of loopback, to who knows a secret that is made here.
    """
    if not node.secret.exists():
        write_private(node.secret, secrets.token_bytes(48))
    port, secret = str(free_port()), ("--superexec-auth-secret-file", str(node.secret))
    config = f'site="{site}"' + ("" if data is None else f' data="{data}"') + (" keep=true" if keep else "")
    supernode = [
        *(program("flower-supernode"), "--superlink", superlink, "--root-certificates", str(node.authority)),
        *("--auth-supernode-private-key", str(node.key), "--host", LOOPBACK, "--port", port),
        *("--isolation", "process", *secret, "--node-config", config),
    ]
    superexec = [program("flower-superexec"), "--runtime-api-address", f"{LOOPBACK}:{port}", "--insecure", *secret]
    commands = {SUPERNODE: supernode, SUPEREXEC: superexec}
    if keep:
        own = [] if data is None else ["--data", str(data)]
        commands = {KEEPER: [program("polyrank"), "deploy", "keep", str(site), *own], **commands}
    return [
        Service(name, command, str(node.folder / "state"), str(node.logs / f"{name}.log"))
        for name, command in commands.items()
    ]


def join(
    folder: Path,
    superlink: str | None = None,
    *,
    site: Path | None = None,
    data: Path | None = None,
    keep: bool = True,
    foreground: bool = False,
    telemetry: bool = False,
    check: bool = True,
    shown: Callable[[Sequence[tuple[str, str]]], None] | None = None,
) -> Node:
    """Starts a node and keeps it running: in the background, or here until it is told to end.

    Args:
        folder: the node's, with the server's answer in it.
        superlink: ``host:port`` of the server; as the server's operator wrote it if left out.
        site: the site's configuration; site.yaml of the folder if left out.
        data: where the site's data is, instead of where its configuration says.
        keep: whether a process keeps the model loaded. Flower starts another one for every message, which would
            have to load it.
        foreground: supervise in this process, for systemd.
        telemetry: leaves Flower's telemetry and update checks on.
        check: look at the site's file, model and data before anybody is dialled (`polyrank.deploy.check`).
        shown: is told what that has found.

    Raises:
        InputError: naming what of the site is not as it must be.
        DeployError: naming what is missing or over, what of the server's certificate or of the clock is wrong.
    """
    node = Node.open(folder)
    address, config = superlink or node.superlink, (site or node.folder / "site.yaml").resolve()
    if not ADDRESS.fullmatch(address):
        raise DeployError(f"{'--superlink' if superlink else node.about}: {address!r} is not host:port")
    _check(node, config, data)
    if check:
        from polyrank.deploy.check import check as look  # heavy

        lines = look(config, data)
        if shown is not None:
            shown(lines)
    if not foreground:
        preflight(node, address)
    for place in (node.folder / "state", node.home, node.run, node.logs):
        place.mkdir(mode=0o700, exist_ok=True)
    supervise.stop(node.run)  # what a supervisor that was killed has left
    wanted = services(node, address, config, data.resolve() if data else None, keep)
    start = supervise.supervise if foreground else supervise.start
    start(node.run, wanted, environment(node.home, telemetry))
    return node


def connected(node: Node, patience: float) -> str | None:
    """Waits for a node that `join` has started; returns the id Flower knows it by, or None if it is not connected."""
    log, deadline = node.logs / f"{SUPERNODE}.log", time.monotonic() + patience
    while True:
        text = plain(log.read_text(encoding="utf-8", errors="replace")) if log.is_file() else ""
        last = text.rpartition(f" {SUPERNODE} starts\n")[2]
        over = "[supervisor]" in last  # of a process that has ended, and the next one has written nothing yet
        if not over and (found := _CONNECTED.search(last)):
            return found[1]
        if time.monotonic() > deadline:
            return None
        time.sleep(0.3)


def preflight(node: Node, superlink: str) -> bool:
    """Whether the server answers; refuses one that cannot be this node's, and a clock that it would refuse.

    Raises:
        DeployError: if its certificate is not of the node's authority or not for this address, or clocks differ.
    """
    trusted = trust(node.authority)
    try:
        with httpx.Client(verify=trusted, trust_env=True, timeout=10) as client:
            before = time.time()
            answer = client.get(f"https://{superlink}/health")
    except httpx.HTTPError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error) or "WRONG_VERSION_NUMBER" in str(error):
            raise DeployError(
                f"--superlink: {superlink}: not the server that {node.authority} knows: {error}"
            ) from None
        return False
    if "date" in answer.headers:
        ahead = before - parsedate_to_datetime(answer.headers["date"]).timestamp() - 1  # that is in whole seconds
        if not -BEHIND < ahead < AHEAD:
            raise DeployError(
                f"this machine's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's, "
                "which will refuse it: set both by NTP"
            )
    return True


def _check(node: Node, site: Path, data: Path | None) -> None:
    if not site.is_file():
        raise DeployError(f"--config: {site}: no such file")
    if data is not None and not data.exists():
        raise DeployError(f"--data: {data}: no such file or folder")
    for path in (site, data):
        if path is not None and re.search(r"[\"'\\\n]", str(path)):
            raise DeployError(f"{path}: Flower cannot be told a path with quotes or backslashes")
    if node.key.stat().st_mode & 0o077:
        raise DeployError(f"{node.key}: others may read it; chmod 600 {node.key}")
    for deadline in expiry.of_node(node):
        if deadline.level == "error" and deadline.site is not None:
            raise DeployError(str(deadline))
    if pid := supervise.running(node.run, supervise.SUPERVISOR):
        raise DeployError(f"{node.folder}: node {node.name} runs already (pid {pid}); `polyrank deploy down` ends it")
