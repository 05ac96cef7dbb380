"""A deployment's folder: made by `init`, extended by `add`, kept valid by `renew`."""

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
from dataclasses import replace
from pathlib import Path
from string import Template

from polyrank import __version__
from polyrank.deploy import certificates, templates
from polyrank.deploy.layout import DeployError, Deployment, Node, Settings, free_port, write_private
from polyrank.files import write_bytes, write_text

PORT, SUPERLINK_PORT = 8443, 18000
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
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
    """Makes a deployment's folder: keys, certificates, configuration, and a folder per node to hand over.

    Args:
        folder: of the deployment; must be empty or not exist.
        names: of the nodes: letters, digits, - and _.
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
        hosts=tuple(hosts),
        port=port or free_port(),
        listen=listen,
        superlink_port=superlink_port or free_port(),
        names=tuple(names),
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
    }
    for name in names:
        files |= _node_files(name, settings, ca_certificate)
    for path, content in (files | {"deploy.json": settings.written()}).items():
        write_private(deployment.folder / path, content)
    for name in ("state", "run", "logs"):
        (deployment.folder / name).mkdir(mode=0o700)
    return deployment


def add(deployment: Deployment, names: Sequence[str]) -> list[Node]:
    """Makes keys and folders for more nodes; `polyrank.deploy.operate.register` makes them known to the SuperLink.

    Raises:
        DeployError: if a name is taken or cannot be one.
    """
    settings = deployment.settings
    check_names([*settings.names, *names])
    for name in names:
        for path, content in _node_files(name, settings, deployment.authority.read_bytes()).items():
            write_private(deployment.folder / path, content)
    write_text(deployment.folder / "deploy.json", replace(settings, names=(*settings.names, *names)).written())
    return [deployment.node(name) for name in names]


def renew(deployment: Deployment, days: int = certificates.SERVER_DAYS) -> None:
    """A new key and certificate for the server, from the same authority: nodes need nothing new.

    Raises:
        DeployError: if the authority's key is not in the folder.
    """
    ca_key = deployment.folder / "ca" / "ca.key"
    if not ca_key.is_file():
        raise DeployError(f"{ca_key}: is not there; put the authority's key back for as long as this takes")
    signer, authority = certificates.signer(ca_key), certificates.certificate(deployment.authority)
    key, certificate = certificates.server_certificate(signer, authority, deployment.settings.hosts, days=days)
    for name, content in (("server.key", key), ("server.crt", certificate)):
        path = deployment.folder / "server" / name
        write_bytes(path, content)
        path.chmod(0o600)


def check_names(names: Sequence[str]) -> None:
    """Refuses names that cannot be those of nodes.

    Raises:
        DeployError: naming the first.
    """
    if not names:
        raise DeployError("no nodes: give --nodes N or --names a,b,c")
    for name in names:
        if not _NAME.fullmatch(name):
            raise DeployError(f"node {name!r}: a name is up to 64 letters, digits, - and _")
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


def _node_files(name: str, settings: Settings, ca_certificate: bytes) -> dict[str, str | bytes]:
    """What is made for a node: its folder, and its public key for the server."""
    private, public = certificates.node_keys(name)
    values = {"name": name, "superlink": settings.public}
    return {
        f"keys/{name}.pub": public,
        f"nodes/{name}/node.key": private,
        f"nodes/{name}/ca.crt": ca_certificate,
        f"nodes/{name}/node.json": json.dumps(values, indent=2) + "\n",
        f"nodes/{name}/site.yaml": _filled(templates.SITE, **values),
        f"nodes/{name}/README.md": _filled(templates.NODE_README, **values),
        f"nodes/{name}/polyrank-node@.service": _filled(templates.NODE_UNIT, **values),
    }


def texts(folder: Path, settings: Settings) -> dict[str, str | bytes]:
    """The text files of a server, by their path in its folder; they name the folder."""
    listen = f"[{settings.listen}]" if ":" in settings.listen else settings.listen
    common = {"folder": str(folder), "public": settings.public}
    sites = "".join(_filled(templates.README_SITE, name=name, **common) for name in settings.names)
    count = "1 node" if len(settings.names) == 1 else f"{len(settings.names)} nodes"
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
            count=count,
            names=", ".join(settings.names),
            port=str(settings.port),
            superlink_port=str(settings.superlink_port),
            sites=sites,
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
