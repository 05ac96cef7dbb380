"""A server's folder in one file, and back from it, on another machine and under another path, too.

The file is a tar archive: keys and certificates, settings, the registry of nodes, Flower's database, and runs that lie
in the folder. What the processes make anew is not in it (``run``, ``logs``, ``models``), and neither is ``nodes``: a
site's key is the site's.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from typing_extensions import TypedDict

from polyrank import __version__
from polyrank.deploy import provision, registry
from polyrank.deploy.follow import Submission, submitted
from polyrank.deploy.layout import DeployError, Deployment, private_folder, write_private
from polyrank.errors import InputError
from polyrank.experiment import shapes
from polyrank.files import TEMPORARY, from_json, named, whole_folder

LEFT_OUT = ("run", "logs", "models", "nodes")
_DATABASE = "state/superlink.db"
_MANIFEST = "backup.json"  # the last in the archive: one that ends before it is not whole


class Manifest(TypedDict):
    """What a backup says of itself: the folder it is of, when it was made, and by which versions."""

    folder: str
    made: str
    polyrank: str
    flwr: str


@dataclass(frozen=True)
class Backup:
    """What was written.

    Attributes:
        files: how many.
        nbytes: of the archive.
        elsewhere: folders of runs that are not in it, because they are not in the server's folder.
    """

    files: int
    nbytes: int
    elsewhere: tuple[str, ...]


def backup(deployment: Deployment, out: Path) -> Backup:
    """Writes a server's folder into one file that only its owner may read. The server and runs may go on meanwhile.

    Args:
        deployment: the server's.
        out: the archive; must not exist, nor be in the folder.

    Raises:
        DeployError: if it may not be written there.
    """
    if out.exists():
        raise DeployError(f"{out}: is there already; choose another")
    if out.resolve().is_relative_to(deployment.folder):
        raise DeployError(f"{out}: lies in the folder that it is a backup of; choose another place")
    runs = dict.fromkeys(submitted(deployment).values())
    elsewhere = tuple(run for run in runs if not Path(run).is_relative_to(deployment.folder))
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary, count = out.with_name(f".{out.name}.{os.getpid()}.tmp"), 0
    try:
        with named(out), open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            with tarfile.open(fileobj=file, mode="w", encoding="utf-8") as archive:
                for path in _files(deployment.folder):
                    count += _added(archive, path, path.relative_to(deployment.folder).as_posix())
                with registry.locked(deployment):  # the nodes of both are those of one moment
                    count += _added(archive, deployment.registry, deployment.registry.name)
                    count += _database(archive, deployment.folder, out.parent)
                _text(archive, _MANIFEST, json.dumps(_manifest(deployment)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return Backup(count, out.stat().st_size, elsewhere)


def restore(archive: Path, folder: Path) -> Manifest:
    """Makes a server's folder of a backup, with paths, units and the gateway's configuration of this place.

    Args:
        archive: what `backup` has written.
        folder: must be empty or not exist.

    Returns:
        What the backup says of itself.

    Raises:
        DeployError: if it is not a whole backup. Then nothing is left behind.
    """
    provision.check_folder(folder)
    target = folder.resolve()
    manifest: Manifest | None = None
    try:
        with named(archive), tarfile.open(archive, "r:", encoding="utf-8") as opened, whole_folder(target) as making:
            making.chmod(0o700)
            for member in opened:
                if member.name == _MANIFEST:
                    manifest = _read(opened, member, archive)
                else:
                    _extract(opened, member, making, archive)
            if manifest is None:
                raise DeployError(f"{archive}: is not a whole backup: it has no {_MANIFEST} at its end")
            _settle(making, target, manifest["folder"])
    except tarfile.TarError as error:
        raise DeployError(f"{archive}: is not a backup, or not a whole one: {error}") from None
    return manifest


def _files(folder: Path) -> Iterator[Path]:
    """What is copied, in order: records after the checkpoints that they must not be behind of."""
    found = [
        path
        for path in folder.rglob("*")
        if path.relative_to(folder).parts[0] not in LEFT_OUT
        and path.is_file()
        and not path.match(TEMPORARY)
        and not path.relative_to(folder).as_posix().startswith((_DATABASE, "registry."))
    ]
    yield from sorted(found, key=lambda path: (path.suffix == ".jsonl", path))


def _added(archive: tarfile.TarFile, path: Path, name: str) -> bool:
    """Adds a file as long as it is now, also one that grows; whether it was there."""
    try:
        with open(path, "rb") as file:
            archive.addfile(archive.gettarinfo(arcname=name, fileobj=file), file)
    except FileNotFoundError:
        return False
    return True


def _database(archive: tarfile.TarFile, folder: Path, scratch: Path) -> bool:
    """Adds Flower's database as it is at one moment, whoever writes to it."""
    path = folder / _DATABASE
    if not path.is_file():
        return False
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".polyrank-") as inside:
        copy = Path(inside) / "superlink.db"
        try:
            with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(copy)) as target:
                source.backup(target)
        except sqlite3.Error as error:
            raise DeployError(f"{path}: cannot be copied to {scratch}: {error}") from None
        return _added(archive, copy, _DATABASE)


def _text(archive: tarfile.TarFile, name: str, text: str) -> None:
    data = text.encode()
    about = tarfile.TarInfo(name)
    about.size, about.mode = len(data), 0o600
    archive.addfile(about, io.BytesIO(data))


def _manifest(deployment: Deployment) -> Manifest:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"folder": str(deployment.folder), "made": now, "polyrank": __version__, "flwr": flower_version()}


def flower_version() -> str:
    """Of the Flower that is installed: its database is of that version."""
    return importlib.metadata.version("flwr")


def _read(opened: tarfile.TarFile, member: tarfile.TarInfo, archive: Path) -> Manifest:
    file = opened.extractfile(member)
    try:
        value = from_json(file.read() if file else b"")
        shapes.check(Manifest, value, f"{archive}: {_MANIFEST}")
    except (ValueError, InputError) as error:
        raise DeployError(f"{archive}: {_MANIFEST}: not as `polyrank deploy backup` wrote it: {error}") from None
    found: Manifest = value
    return found


def _extract(opened: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, archive: Path) -> None:
    parts = PurePosixPath(member.name)
    if parts.is_absolute() or ".." in parts.parts or not member.isreg():
        raise DeployError(f"{archive}: {member.name!r}: not what `polyrank deploy backup` writes")
    path, source = folder / parts, opened.extractfile(member)
    assert source is not None
    private_folder(path.parent)
    with named(path), open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        shutil.copyfileobj(source, file)


def _settle(making: Path, target: Path, before: str) -> None:
    """Writes paths anew that are of the machine: in the gateway's configuration, in units, in the book of runs."""
    settings = Deployment.open(making).settings
    for name, text in provision.texts(target, settings).items():
        _rewrite(making / name, text)
    for name in ("state", "run", "logs"):
        private_folder(making / name)
    book = making / "state" / "runs.jsonl"
    entries = list(shapes.read_lines(book, Submission, "a run"))
    for entry in entries:
        if Path(entry["folder"]).is_relative_to(before):
            entry["folder"] = str(target / Path(entry["folder"]).relative_to(before))
    if entries:
        _rewrite(book, "".join(json.dumps(entry) + "\n" for entry in entries))


def _rewrite(path: Path, text: str | bytes) -> None:
    path.unlink(missing_ok=True)
    write_private(path, text)
