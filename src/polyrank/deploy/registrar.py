"""Makes the SuperLink be as the registry says, and ends keys whose time is over.

Flower has no dates for keys, and a key that it has once made unknown it never takes again, under no name. So a node
that was removed comes back with another key, and the registry refuses the one before by its fingerprint.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from datetime import UTC, datetime

from polyrank.deploy import control, expiry, registry
from polyrank.deploy.layout import DeployError, Deployment, write_private

_PAUSE = 2.0  # seconds between looks at the registry
_AGAIN = 60.0  # seconds after which something that failed is tried again


class RefusedKeyError(DeployError):
    """A key of the registry that Flower has once refused, and never takes again."""


def register(deployment: Deployment, now: datetime | None = None) -> dict[str, str]:
    """Makes the SuperLink know the registry's nodes and nobody else; returns Flower's ids by name. May be repeated.

    What was done is written down at once: whenever this is interrupted, the next call goes on.

    Raises:
        DeployError: if the SuperLink does not do it.
    """
    control.connect(deployment)
    with registry.locked(deployment):
        book = registry.read(deployment)
        registry.expire(book, now or datetime.now(UTC))
        registry.write(deployment, book)
        known = set(control.nodes(deployment))
        for past in book["past"]:
            if past["id"]:
                if past["id"] in known:
                    control.unregister(deployment, past["id"])
                    known.discard(past["id"])
                past["id"] = ""
                registry.write(deployment, book)
        refused: list[RefusedKeyError] = []
        for name, member in book["nodes"].items():
            if member["id"] not in known:
                ids = {other["id"] for other in book["nodes"].values()}
                try:
                    member["id"] = _registered(deployment, name, member["key"], known - ids)
                except RefusedKeyError as error:  # keeps nobody else out
                    refused.append(error)
                    continue
                known.add(member["id"])
                registry.write(deployment, book)
        if refused:
            raise refused[0]
        ids = {name: member["id"] for name, member in book["nodes"].items()}
        for stranger in known - set(ids.values()):  # of an `add` that was interrupted, and then taken back
            control.unregister(deployment, stranger)
        return ids


def keep(deployment: Deployment, healthy: Callable[[], bool], say: Callable[[str], None]) -> None:
    """Tells the SuperLink of what the registry has not told it yet, and of keys that end, until this process is ended.

    Args:
        deployment: the server's.
        healthy: whether the SuperLink answers.
        say: is told what happens.
    """
    ended, wait, warned, told = threading.Event(), 0.0, "", False
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    while not ended.wait(wait):
        wait = _PAUSE
        try:
            now = datetime.now(UTC)
            if now.date().isoformat() != warned:
                for deadline in expiry.of_server(deployment, now):
                    if deadline.level != "ok":
                        say(str(deadline))
                warned = now.date().isoformat()
            if (not told or registry.unsettled(registry.read(deployment), now)) and healthy():
                register(deployment)
                told = True
                say("the SuperLink knows the nodes of the registry")
        except (DeployError, OSError, ValueError) as error:
            say(f"{error}; tries again in {_AGAIN:.0f} s")
            wait = _AGAIN


def _registered(deployment: Deployment, name: str, key: str, strangers: set[str]) -> str:
    """Flower's id of a node that it is told now, or was told before this was interrupted."""
    path = deployment.folder / "state" / f"{name}.pub"
    path.unlink(missing_ok=True)
    write_private(path, f"{key} {name}\n")
    try:
        return control.register(deployment, path, name)
    except control.ControlError as error:
        if "already in use" not in str(error):
            raise
        if len(strangers) == 1:  # its id was not written down: the one that nobody has is its
            return strangers.pop()
        raise RefusedKeyError(
            f"node {name}: Flower has refused this key before, and never takes it again; the site makes another "
            f"(`polyrank deploy request {name} --rotate`), and `polyrank deploy add --replace` adds it"
        ) from None
    finally:
        path.unlink(missing_ok=True)
