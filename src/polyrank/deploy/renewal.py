"""New certificates: the server's, of the same authority; and another authority, with a time in which both are trusted.

ca/ca.crt holds what is trusted. ca/ca.key signs; while a new authority waits for the sites, its key is ca/next.key.
"""

from __future__ import annotations

import os
from pathlib import Path

from polyrank.deploy import certificates, provision
from polyrank.deploy.layout import DeployError, Deployment, write_private
from polyrank.files import write_bytes


def renew(deployment: Deployment, days: int = certificates.SERVER_DAYS) -> None:
    """A new key and certificate for the server, from the same authority: nodes need nothing new.

    Raises:
        DeployError: if the authority's key is not in the folder.
    """
    key = _key(deployment, "ca.key")
    signer = certificates.signer(key)
    for authority in _authorities(deployment):
        if certificates.signs(signer, authority):
            break
    else:
        raise DeployError(f"{key}: is not the key of {deployment.authority}; put the authority's key back")
    private, certificate = certificates.server_certificate(signer, authority, deployment.settings.hosts, days=days)
    for path, content in ((deployment.certificate.with_suffix(".key"), private), (deployment.certificate, certificate)):
        _write(path, content)


def new_authority(deployment: Deployment) -> list[Path]:
    """Makes another authority, which is trusted beside the present one; returns the answers that sites are to accept.

    The server goes on with its certificate of the present authority.

    Raises:
        DeployError: if the authority is being changed already.
    """
    held = _authorities(deployment)
    if len(held) > 1 or _next(deployment).exists():
        raise DeployError(
            f"{deployment.authority}: two authorities are trusted already; `--authority use`, then `--authority drop`"
        )
    key, certificate = certificates.authority()
    _write(deployment.authority, held[0] + certificate)  # first: without its key, `drop_authority` takes it back
    write_private(_next(deployment), key)
    return provision.write_answers(deployment)


def use_authority(deployment: Deployment, days: int = certificates.SERVER_DAYS) -> None:
    """The server's next certificate is of the new authority. Sites that have not accepted it trust the server no more.

    Raises:
        DeployError: if there is no new authority.
    """
    signer = certificates.signer(_key(deployment, "next.key"))
    if not any(certificates.signs(signer, authority) for authority in _authorities(deployment)):
        raise DeployError(f"{_next(deployment)}: is not the key of {deployment.authority}; put the right one back")
    os.replace(_next(deployment), deployment.folder / "ca" / "ca.key")
    renew(deployment, days)


def drop_authority(deployment: Deployment) -> list[Path]:
    """Trusts no longer what has not signed the server's certificate; returns the answers that sites are to accept.

    Raises:
        DeployError: if only one authority is trusted, or the new one is not in use.
    """
    held = _authorities(deployment)
    if len(held) == 1:
        raise DeployError(f"{deployment.authority}: one authority is trusted; `--authority new` makes another")
    if _next(deployment).exists():
        raise DeployError(f"{_next(deployment)}: the new authority is not in use; `--authority use` comes first")
    certificate = certificates.certificate(deployment.certificate)
    kept = [pem for pem in held if certificates.issued(pem, certificate)]
    if not kept:
        raise DeployError(f"{deployment.certificate}: is of no authority in {deployment.authority}; renew it first")
    _write(deployment.authority, b"".join(kept))
    return provision.write_answers(deployment)


def _authorities(deployment: Deployment) -> list[bytes]:
    try:
        return certificates.authorities(deployment.authority.read_bytes())
    except ValueError as error:
        raise DeployError(f"{deployment.authority}: {error}") from None


def _next(deployment: Deployment) -> Path:
    return deployment.folder / "ca" / "next.key"


def _key(deployment: Deployment, name: str) -> Path:
    path = deployment.folder / "ca" / name
    if path.is_file():
        return path
    if name == "next.key":
        raise DeployError(f"{path}: is not there; `--authority new` makes a new authority first")
    raise DeployError(f"{path}: is not there; put the authority's key back for as long as this takes")


def _write(path: Path, content: bytes) -> None:
    write_bytes(path, content)
    path.chmod(0o600)
