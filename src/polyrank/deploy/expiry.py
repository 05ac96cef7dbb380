"""What of a server or a node ends when: certificates and keys. 30 days before, and from then on, it is said."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, TypedDict

from polyrank.deploy import certificates, registry
from polyrank.deploy.enrolment import moment
from polyrank.deploy.layout import Deployment, Node

WARNING_DAYS = 30
Level = Literal["ok", "warning", "error"]


class Shown(TypedDict):
    """A deadline, as JSON shows it."""

    what: str
    until: str
    days: int
    level: Level
    remedy: str


@dataclass(frozen=True)
class Deadline:
    """When something ends.

    Attributes:
        what: ends, for example ``server certificate``.
        until: when.
        now: the present.
        remedy: what to do before.
        site: the node whose key it is; None for a certificate.
    """

    what: str
    until: datetime
    now: datetime
    remedy: str
    site: str | None = None

    @property
    def days(self) -> int:
        """Whole days that are left; negative once it is over."""
        return (self.until - self.now).days

    @property
    def level(self) -> Level:
        if self.until <= self.now:
            return "error"
        return "warning" if self.days < WARNING_DAYS else "ok"

    def __str__(self) -> str:
        day = f"{self.until:%Y-%m-%d}"
        if self.level == "error":
            return f"{self.what}: ended on {day}; {self.remedy}"
        left = f"{self.what}: {self.days} days left, until {day}"
        return left if self.level == "ok" else f"{left}; {self.remedy}"

    def plain(self) -> Shown:
        """As JSON shows it."""
        until = self.until.isoformat(timespec="seconds")
        return Shown(what=self.what, until=until, days=self.days, level=self.level, remedy=self.remedy)


def of_server(deployment: Deployment, now: datetime | None = None) -> list[Deadline]:
    """The server's certificate, the authority's, every node's key, and keys that have ended."""
    now, book = now or datetime.now(UTC), registry.read(deployment)
    folder = deployment.folder
    until = certificates.expires(certificates.certificate(deployment.certificate))
    found = [Deadline("server certificate", until, now, f"`polyrank deploy renew {folder}`")]
    found += _authorities(deployment, now, f"`polyrank deploy renew {folder} --authority new`")
    remedy = "the site runs `polyrank deploy request {} --renew`, the server `polyrank deploy add`"
    for name, member in book["nodes"].items():
        until = moment(member["until"], f"{deployment.registry}: nodes.{name}.until")
        found.append(Deadline(f"key of {name}", until, now, remedy.format(name), name))
    rotated = "the site runs `polyrank deploy request {} --rotate`, the server `polyrank deploy add`"
    for past in book["past"]:
        if past["why"] == "expired" and past["name"] not in book["nodes"]:
            until = moment(past["at"], f"{deployment.registry}: past.at")
            found.append(Deadline(f"key of {past['name']}", until, now, rotated.format(past["name"]), past["name"]))
    return found


def of_node(node: Node, now: datetime | None = None) -> list[Deadline]:
    """A node's key, where its end is known, and the authorities that it trusts."""
    now = now or datetime.now(UTC)
    found = _authorities(node, now, "ask the server's operator for a new answer, then `polyrank deploy accept`")
    if node.until is None:
        return found
    until = moment(node.until, f"{node.about}: until")
    how = "--rotate" if until <= now else "--renew"  # Flower takes no key again that has ended
    remedy = f"`polyrank deploy request {node.name} {how} --out {node.folder}`"
    return [Deadline(f"key of {node.name}", until, now, remedy, node.name), *found]


def _authorities(place: Deployment | Node, now: datetime, remedy: str) -> list[Deadline]:
    try:
        held = certificates.authorities(place.authority.read_bytes())
    except ValueError as error:
        raise type(error)(f"{place.authority}: {error}") from None
    numbers = [""] if len(held) == 1 else [f" {number + 1}" for number in range(len(held))]
    return [
        Deadline(f"authority{number}", certificates.expires(pem), now, remedy)
        for number, pem in zip(numbers, held, strict=True)
    ]
