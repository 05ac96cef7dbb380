"""A deployment's folder: made by `init`, with nodes that `add` lets in."""

from __future__ import annotations

import getpass
import ipaddress
import json
import os
import re
import secrets
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from string import Template

from polyrank import __version__
from polyrank.deploy import certificates, enrolment, identity, registry, templates
from polyrank.deploy.layout import DeployError, Deployment, Node, Settings, free_port, write_private
from polyrank.files import write_text

PORT, SUPERLINK_PORT = 8443, 18000
_HOST = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*"
)
_COMPONENT = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def init(
    folder: Path,
    names: Sequence[str],
    hosts: Sequence[str],
    *,
    port: int = PORT,
    superlink_port: int = SUPERLINK_PORT,
    listen: str = "0.0.0.0",
    serverapp: str = Settings.serverapp,
    clientapp: str = Settings.clientapp,
    metrics_port: int | None = None,
) -> Deployment:
    """Makes a deployment's folder: its authority, its server's key and certificate, configuration.

    Args:
        folder: of the deployment; must be empty or not exist.
        names: of sites that are made as well, on this machine, for a rehearsal: see `rehearse`. Sites elsewhere are
            added when they have asked: see `add`.
        hosts: names and addresses of the server; nodes dial the first.
        port: of the gateway; 0: one that is free now.
        superlink_port: of the SuperLink, on loopback; 0: one that is free now.
        listen: the address the gateway listens on.
        serverapp: ``module:attribute`` of an installed ServerApp.
        clientapp: ``module:attribute`` of an installed ClientApp.
        metrics_port: of the metrics, on loopback; 0: one that is free now; None: there are none.

    Raises:
        DeployError: naming what cannot be, before anything is written.
    """
    ports = {"--port": port, "--superlink-port": superlink_port}
    ports |= {} if metrics_port is None else {"--metrics-port": metrics_port}
    _check(folder, names, hosts, ports, listen, (serverapp, clientapp))
    settings = Settings(
        federation=secrets.token_hex(8),
        hosts=tuple(hosts),
        port=port or free_port(),
        listen=listen,
        superlink_port=superlink_port or free_port(),
        serverapp=serverapp,
        clientapp=clientapp,
        metrics_port=free_port() if metrics_port == 0 else metrics_port,
    )
    ca_key, ca_certificate = certificates.authority()
    key, certificate = certificates.server_certificate(ca_key, ca_certificate, hosts)
    deployment = Deployment(folder.resolve())
    files: dict[str, str | bytes] = {
        "ca/ca.key": ca_key,
        "ca/ca.crt": ca_certificate,
        "server/server.key": key,
        "server/server.crt": certificate,
        "server/superexec.secret": secrets.token_bytes(48),
        **texts(deployment.folder, settings),
        "registry.json": json.dumps({"nodes": {}, "past": []}) + "\n",
        "deploy.json": settings.written(),
    }
    for path, content in files.items():
        write_private(deployment.folder / path, content)
    for name in ("state", "run", "logs", "answers"):
        (deployment.folder / name).mkdir(mode=0o700)
    for name in names:
        rehearse(deployment, name)
    return deployment


def rehearse(deployment: Deployment, name: str) -> Node:
    """Makes a site on this machine, in nodes/NAME, and adds it: for tests and for trying things out.

    The site's private key is made here. A site elsewhere makes its own, and nobody else has it.
    """
    node = deployment.node(name)
    identity.request(node.folder, name, deployment.settings.federation)
    add(deployment, node.request)
    return identity.accept(node.folder, enrolment.read_answer(deployment.answer(name)))


def add(deployment: Deployment, path: Path, *, replace: bool = False, now: datetime | None = None) -> str:
    """Lets a site in that has sent a request, and writes the answer that it gets; may be repeated.

    `polyrank.deploy.registrar.register` makes the SuperLink know it.

    Args:
        deployment: the server's.
        path: of the request.
        replace: whether a node of this name that is there gets the request's key in place of its own.
        now: the present.

    Returns:
        What was done, for people.

    Raises:
        DeployError: if the request is for another federation, is not valid, or cannot be met.
    """
    request = enrolment.read_request(path)
    if request.federation != deployment.settings.federation:
        raise DeployError(
            f"{path}: federation: {request.federation}: this one is {deployment.settings.federation}; the site makes "
            "another request, with this id"
        )
    with registry.changing(deployment) as book:
        done = registry.enter(book, request, path, now or datetime.now(UTC), replace=replace)
    write_answers(deployment, [request.name])
    return done


def write_answers(deployment: Deployment, names: Sequence[str] | None = None) -> list[Path]:
    """Writes what is handed back to sites, to all of them if no names are given."""
    nodes, authority = registry.read(deployment)["nodes"], deployment.authority.read_text(encoding="utf-8")
    paths = []
    for name in nodes if names is None else names:
        answer = enrolment.Answer(
            name=name,
            federation=deployment.settings.federation,
            fingerprint=certificates.fingerprint(nodes[name]["key"]),
            until=nodes[name]["until"],
            superlink=deployment.settings.public,
            authority=authority,
        )
        path = deployment.answer(name)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        write_text(path, answer.written())
        path.chmod(0o600)
        paths.append(path)
    return paths


def check_names(names: Sequence[str]) -> None:
    """Refuses names that cannot be those of nodes.

    Raises:
        DeployError: naming the first.
    """
    for name in names:
        enrolment.check_name(name)
    folded = [name.casefold() for name in names]
    for name in names:
        if folded.count(name.casefold()) > 1:
            raise DeployError(f"node {name!r}: is there twice, in capitals or not; names must differ")


def check_folder(folder: Path) -> None:
    """Refuses a folder that cannot become a server's.

    Raises:
        DeployError: saying why.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DeployError(f"{folder}: is not an empty folder; choose another")
    if re.search(r"[\s\"'$;{}%\\]", str(folder.resolve())):
        raise DeployError(f"{folder}: the path goes into configuration files: no spaces, quotes, or $ ; {{ }} % \\")


def _check(
    folder: Path,
    names: Sequence[str],
    hosts: Sequence[str],
    ports: Mapping[str, int],
    listen: str,
    components: Iterable[str],
) -> None:
    check_folder(folder)
    check_names(names)
    if not hosts:
        raise DeployError("--host: missing: the name or address under which the sites reach this machine")
    for host in hosts:
        if not (_HOST.fullmatch(host) or _is_address(host)):
            raise DeployError(f"--host: {host!r} is neither a host name nor an address")
    for option, port in ports.items():
        if not 0 <= port < 65536:
            raise DeployError(f"{option}: {port} must be between 1 and 65535, or 0 for one that is free")
    given = [port for port in ports.values() if port]
    if len(set(given)) < len(given):
        raise DeployError(f"{', '.join(ports)} must differ")
    if not _is_address(listen):
        raise DeployError(f"--listen: {listen!r} is not an address of this machine, for example 0.0.0.0")
    for component in components:
        if not _COMPONENT.fullmatch(component):
            raise DeployError(f"{component!r}: an app is named as package.module:attribute")


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def texts(folder: Path, settings: Settings) -> dict[str, str | bytes]:
    """The text files of a server, by their path in its folder; they name the folder."""
    listen = f"[{settings.listen}]" if ":" in settings.listen else settings.listen
    common = {"folder": str(folder), "public": settings.public}
    return {
        "app/pyproject.toml": _filled(
            templates.APP, version=__version__, serverapp=settings.serverapp, clientapp=settings.clientapp
        ),
        "nginx.conf": _filled(
            templates.NGINX,
            listen=f"{listen}:{settings.port}",
            superlink=f"127.0.0.1:{settings.superlink_port}",
            **common,
        ),
        "README.md": _filled(
            templates.README,
            federation=settings.federation,
            port=str(settings.port),
            superlink_port=str(settings.superlink_port),
            **common,
        ),
        **_units(folder, settings),
    }


def _units(folder: Path, settings: Settings) -> dict[str, str | bytes]:
    """systemd units of the server: each runs one process, as `polyrank deploy serve` says it is run."""
    polyrank = str(Path(sys.executable).parent / "polyrank")
    cores = os.cpu_count() or 1
    described = {  # what it is, and the most memory and processor time that it may take
        "superlink": ("SuperLink", "40%", "200%"),
        "superexec": ("SuperExec", "75%", f"{90 * cores}%"),
        "registrar": ("registrar", "512M", "100%"),
        "gateway": ("gateway", "1G", "100%"),
    }
    if settings.metrics_port is not None:
        described["metrics"] = ("metrics", "512M", "50%")
    return {
        f"systemd/polyrank-{name}.service": _filled(
            templates.SERVER_UNIT,
            description=f"polyrank {text}",
            memory=memory,
            cpu=cpu,
            after="" if name == "superlink" else " polyrank-superlink.service",
            user=getpass.getuser(),
            folder=str(folder),
            command=shlex.join([polyrank, "deploy", "serve", str(folder), name]),
        )
        for name, (text, memory, cpu) in described.items()
    }


def _filled(template: str, **values: str) -> str:
    return Template(template).substitute(values)
