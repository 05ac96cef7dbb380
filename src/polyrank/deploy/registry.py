"""The nodes of a federation: who may take part, with which key, until when; and keys that may never again.

registry.json is what is true. `polyrank.deploy.registrar` makes the SuperLink be like it, at any time and any number of
times. A node that Flower knows has its id here, and a past key has it until Flower has refused that key.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Literal

from typing_extensions import TypedDict

from polyrank.deploy import certificates
from polyrank.deploy.enrolment import Request, check_name, check_time, instant, moment
from polyrank.deploy.layout import DeployError, Deployment
from polyrank.errors import InputError
from polyrank.experiment import shapes
from polyrank.files import write_json

Why = Literal["removed", "replaced", "expired"]


class Member(TypedDict):
    """A node: its public key, from when and until when that is valid, and Flower's id of it, or no letters."""

    key: str
    since: str
    until: str
    id: str


class Past(TypedDict):
    """A key that is refused for ever: whose it was, when and why it ended, and Flower's id while that has to end."""

    name: str
    fingerprint: str
    at: str
    why: Why
    id: str


class Registry(TypedDict):
    """All of registry.json."""

    nodes: dict[str, Member]
    past: list[Past]


def read(deployment: Deployment) -> Registry:
    """The registry as it is now.

    Raises:
        DeployError: if it is not there, or broken.
    """
    registry: Registry | None = shapes.read(deployment.registry, Registry)
    if registry is None:
        raise DeployError(f"{deployment.registry}: is not there; `polyrank deploy init` made it: put it back")
    for name, member in registry["nodes"].items():
        where = f"{deployment.registry}: nodes.{name}"
        try:
            check_name(name)
            certificates.fingerprint(member["key"])
        except InputError as error:
            raise DeployError(f"{where}: {error}") from None
        moment(member["until"], f"{where}.until")
    return registry


def names(deployment: Deployment) -> list[str]:
    """The nodes, in the order in which they were added."""
    return list(read(deployment)["nodes"])


@contextmanager
def changing(deployment: Deployment) -> Iterator[Registry]:
    """The registry, which nobody else changes meanwhile; it is written when the context ends well."""
    with locked(deployment):
        registry = read(deployment)
        yield registry
        write(deployment, registry)


@contextmanager
def locked(deployment: Deployment) -> Iterator[None]:
    """Waits until nobody else works on the registry. Not to be nested."""
    path = deployment.registry.with_suffix(".lock")
    with open(path, "ab") as file:
        path.chmod(0o600)
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write(deployment: Deployment, registry: Registry) -> None:
    """Stores the registry."""
    write_json(deployment.registry, registry)
    deployment.registry.chmod(0o600)


def enter(registry: Registry, request: Request, path: Path, now: datetime, *, replace: bool = False) -> str:
    """Adds a node, gives a known key more time, or gives a node another key; returns what was done, for people.

    Args:
        registry: is changed.
        request: of a site.
        path: of the request, for messages.
        now: the present.
        replace: whether a node that is there gets the key of the request in place of its own.

    Raises:
        DeployError: if the request is not valid now, the name is taken, or the key was refused before.
    """
    check_time(request, path, now)
    for past in registry["past"]:
        if past["fingerprint"] == request.fingerprint:
            how = "expired" if past["why"] == "expired" else f"was {past['why']}"
            raise DeployError(
                f"{path}: key {request.fingerprint} of node {past['name']} {how} on {past['at'][:10]} and is never "
                "taken again; the site makes another: `polyrank deploy request NAME --rotate`"
            )
    for name, member in registry["nodes"].items():
        if member["key"] == request.key and name != request.name:
            raise DeployError(f"{path}: its key is that of node {name}; every node has a key of its own")
        if name != request.name and name.casefold() == request.name.casefold():
            raise DeployError(
                f"{path}: name {request.name!r}: there is {name!r}; names must differ in more than capitals"
            )
    member_now = registry["nodes"].get(request.name)
    entry = Member(key=request.key, since=request.since, until=request.until, id="")
    if member_now is None:
        registry["nodes"][request.name] = entry
        return "added"
    if member_now["key"] == request.key:
        later = moment(request.until, str(path)) > moment(member_now["until"], str(path))
        registry["nodes"][request.name] = {**entry, "id": member_now["id"]} if later else member_now
        return f"its key is valid until {request.until[:10]}" if later else "is there with this key already"
    if not replace:
        raise DeployError(
            f"{path}: name {request.name!r}: is taken by key {certificates.fingerprint(member_now['key'])}; "
            "`polyrank deploy add --replace` refuses that key and takes this one"
        )
    _end(registry, request.name, "replaced", now)
    registry["nodes"][request.name] = entry
    return "its key is replaced"


def leave(registry: Registry, name: str, now: datetime) -> None:
    """Removes a node, or forgets one whose key has expired.

    Raises:
        DeployError: if there is none of that name.
    """
    over = [past for past in registry["past"] if past["name"] == name and past["why"] == "expired"]
    for past in over:
        past["why"] = "removed"
    if name not in registry["nodes"]:
        if over:
            return
        raise DeployError(f"node {name!r}: not one of {', '.join(registry['nodes']) or 'the nodes: there are none'}")
    _end(registry, name, "removed", now)


def expire(registry: Registry, now: datetime) -> list[str]:
    """Ends the keys whose time is over; returns the names of their nodes."""
    over = [name for name, member in registry["nodes"].items() if moment(member["until"], name) <= now]
    for name in over:
        _end(registry, name, "expired", now)
    return over


def unsettled(registry: Registry, now: datetime) -> bool:
    """Whether the SuperLink has something to be told, as far as the registry says."""
    return any(past["id"] for past in registry["past"]) or any(
        not member["id"] or moment(member["until"], name) <= now for name, member in registry["nodes"].items()
    )


def _end(registry: Registry, name: str, why: Why, now: datetime) -> None:
    member = registry["nodes"].pop(name)
    fingerprint = certificates.fingerprint(member["key"])
    registry["past"].append(Past(name=name, fingerprint=fingerprint, at=instant(now), why=why, id=member["id"]))
