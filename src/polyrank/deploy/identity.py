"""A site's folder: its key, which is made here and never leaves, the request to the server, and the server's answer."""

from __future__ import annotations

import os
from pathlib import Path
from string import Template

from polyrank.deploy import certificates, enrolment, templates
from polyrank.deploy.enrolment import DAYS, Answer, Request
from polyrank.deploy.layout import DeployError, Node, write_private
from polyrank.errors import InputError
from polyrank.files import write_json, write_text


def request(folder: Path, name: str, federation: str, days: int = DAYS) -> Request:
    """Makes a site's folder, with a key pair and the request to be sent to the server's operator.

    Args:
        folder: must be empty or not exist.
        name: of the node.
        federation: id of the deployment.
        days: for which the key is to be valid.

    Raises:
        DeployError: naming what cannot be, before anything is written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DeployError(
            f"{folder}: is not an empty folder; choose another, or `--renew` or `--rotate` the key that it has"
        )
    private, _ = certificates.node_keys(name)
    text = enrolment.signed(private, name, federation, days)
    values = {"name": name, "federation": federation}
    files = {
        "node.key": private,
        "request.json": text,
        "site.yaml": _filled(templates.SITE, **values),
        "README.md": _filled(templates.NODE_README, **values),
        "polyrank-node@.service": _filled(templates.NODE_UNIT, **values),
    }
    for path, content in files.items():
        write_private(folder.resolve() / path, content)
    return enrolment.read_request(folder / "request.json")


def renew(folder: Path, name: str, days: int = DAYS) -> Request:
    """Another request for the key that a site has, so that it is valid for longer.

    Raises:
        DeployError: if the folder is not a site's, or another's.
    """
    node, before = _before(folder, name)
    if node.next_key.is_file():
        raise DeployError(f"{node.next_key}: the site waits for the answer to a new key; `--rotate` asks for it again")
    _write_request(node, _private(node.key), before, days)
    return enrolment.read_request(node.request)


def rotate(folder: Path, name: str, days: int = DAYS) -> Request:
    """A request for another key. The present one is in use until the server's answer is accepted.

    Raises:
        DeployError: if the folder is not a site's, or another's.
    """
    node, before = _before(folder, name)
    if not node.next_key.is_file():
        write_private(node.next_key, certificates.node_keys(name)[0])
    _write_request(node, _private(node.next_key), before, days)
    return enrolment.read_request(node.request)


def accept(folder: Path, answer: Answer) -> Node:
    """Puts the server's answer into a site's folder; a new key that it is for takes the old one's place.

    Raises:
        DeployError: if the answer is for another node, federation or key.
    """
    node, before = _before(folder, answer.name)
    if answer.federation != before.federation:
        raise DeployError(f"{folder}: asked federation {before.federation}, and the answer is of {answer.federation}")
    keys = {key: certificates.fingerprint(certificates.public_key(_private(key))) for key in _keys(node)}
    used = next((key for key, fingerprint in keys.items() if fingerprint == answer.fingerprint), None)
    if used is None:
        raise DeployError(
            f"{folder}: has key {' and '.join(keys.values())}, and the answer is for {answer.fingerprint}: "
            "send request.json once more"
        )
    write_text(node.authority, answer.authority)
    write_json(node.about, {"name": answer.name, "superlink": answer.superlink, "until": answer.until})
    for path in (node.authority, node.about):
        path.chmod(0o600)
    if used == node.next_key:
        os.replace(node.next_key, node.key)
    return Node.open(folder)


def strangers(folder: Path, answer: Answer) -> list[str]:
    """Fingerprints of the answer's authorities that the site does not trust yet."""
    path = folder / "ca.crt"
    known = certificates.authorities(path.read_bytes()) if path.is_file() else []
    given = certificates.authorities(answer.authority.encode())
    return [certificates.authority_fingerprint(pem) for pem in given if pem not in known]


def _before(folder: Path, name: str) -> tuple[Node, Request]:
    """A site's folder and the request that is in it."""
    path = folder / "request.json"
    if not path.is_file():
        raise DeployError(f"{folder}: has no request.json; `polyrank deploy request NAME` makes a site's folder")
    before = enrolment.read_request(path)
    if before.name != name:
        raise DeployError(f"{folder}: is of node {before.name!r}, not {name!r}")
    return Node(folder.resolve()), before


def _keys(node: Node) -> list[Path]:
    return [path for path in (node.next_key, node.key) if path.is_file()]


def _private(path: Path) -> bytes:
    """The private key in a file, which nobody else may read."""
    if path.stat().st_mode & 0o077:
        raise DeployError(f"{path}: others may read it; chmod 600 {path}")
    private = path.read_bytes()
    try:
        certificates.public_key(private)
    except InputError as error:
        raise DeployError(f"{path}: {error}") from None
    return private


def _write_request(node: Node, private: bytes, before: Request, days: int) -> None:
    write_text(node.request, enrolment.signed(private, before.name, before.federation, days))
    node.request.chmod(0o600)


def _filled(template: str, **values: str) -> str:
    return Template(template).substitute(values)
