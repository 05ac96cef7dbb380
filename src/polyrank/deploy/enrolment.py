"""How a site gets into a federation: its request, which it signs, and the server's answer. Both hold public things.

A request is a JSON file of about 600 bytes. Its signature is made with the private key of the public key inside, over
all that it says: so whoever made it has the key, and meant this name, this federation and this time.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from polyrank.deploy import certificates
from polyrank.deploy.layout import ADDRESS, DeployError
from polyrank.errors import InputError, shortened
from polyrank.files import decoded, from_json

DAYS = 365  # for which a node's key is valid
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
FEDERATION = re.compile(r"[0-9a-f]{16}")
REQUEST, ANSWER = "polyrank node request 1", "polyrank node answer 1"
_NONCE = re.compile(r"[0-9a-f]{32}")
_AHEAD = timedelta(days=1)  # by which a site's clock may differ from the server's
_MOST_BYTES = 100_000


@dataclass(frozen=True)
class Request:
    """What a site asks for.

    Attributes:
        name: of the node.
        federation: id of the deployment, which `polyrank deploy init` has made.
        key: the public key, as OpenSSH writes it, without a comment.
        since: from when the key is valid, for example ``2026-01-02T03:04:05+00:00``.
        until: when it ends.
        nonce: a word of chance, so that no two requests have the same signature.
    """

    name: str
    federation: str
    key: str
    since: str
    until: str
    nonce: str

    @property
    def fingerprint(self) -> str:
        """Of the key, as ``ssh-keygen -l`` shows it."""
        return certificates.fingerprint(self.key)


@dataclass(frozen=True)
class Answer:
    """What the server's operator hands back.

    Attributes:
        name: of the node.
        federation: id of the deployment.
        fingerprint: of the key that was added.
        until: when that ends.
        superlink: ``host:port`` of the server.
        authority: certificates that the site is to trust, PEM: one, or two while the authority changes.
    """

    name: str
    federation: str
    fingerprint: str
    until: str
    superlink: str
    authority: str

    def written(self) -> str:
        """As the text of a file."""
        return json.dumps({"format": ANSWER, **asdict(self)}, indent=2) + "\n"


def check_name(name: str) -> None:
    """Refuses a name that cannot be a node's.

    Raises:
        DeployError: saying what can.
    """
    if not NAME.fullmatch(name):
        raise DeployError(f"node {shortened(name)}: a name is up to 64 letters, digits, - and _")


def check_federation(federation: str) -> None:
    """Refuses what is not the id of a federation.

    Raises:
        DeployError: saying where to find it.
    """
    if not FEDERATION.fullmatch(federation):
        raise DeployError(
            f"--federation: {shortened(federation)}: not an id of 16 digits and letters a to f; "
            "`polyrank deploy status` on the server shows it"
        )


def signed(private: bytes, name: str, federation: str, days: int = DAYS, now: datetime | None = None) -> str:
    """The text of a request.

    Args:
        private: the node's key, in OpenSSH's format.
        name: of the node.
        federation: id of the deployment.
        days: for which the key is to be valid.
        now: from when; the present if left out.

    Raises:
        DeployError: if the name or the id cannot be one.
    """
    check_name(name)
    check_federation(federation)
    start = now or datetime.now(UTC)
    request = Request(
        name=name,
        federation=federation,
        key=certificates.public_key(private),
        since=instant(start),
        until=instant(start + timedelta(days=days)),
        nonce=secrets.token_hex(16),
    )
    signature = base64.b64encode(certificates.signature(private, _message(request))).decode()
    return json.dumps({"format": REQUEST, **asdict(request), "signature": signature}, indent=2) + "\n"


def read_request(path: Path) -> Request:
    """The request in a file. Whether it may be added is for `polyrank.deploy.registry` to say.

    Raises:
        DeployError: if it is none, or its signature does not fit.
    """
    value = _read(path, REQUEST, Request, ("signature",))
    signature = value.pop("signature")
    request = Request(**value)
    checks = (("name", NAME), ("federation", FEDERATION), ("nonce", _NONCE))
    for key, pattern in checks:
        if not pattern.fullmatch(value[key]):
            raise DeployError(f"{path}: {key}: {shortened(value[key])}: not as `polyrank deploy request` writes it")
    for key in ("since", "until"):
        moment(value[key], f"{path}: {key}")
    try:
        given = base64.b64decode(signature, validate=True)
        written = base64.b64encode(given).decode() == signature  # in the one way, so that nothing can be changed
        fits = written and certificates.signed_by(request.key, given, _message(request))
    except InputError as error:
        raise DeployError(f"{path}: key: {error}") from None
    except ValueError:
        fits = False
    if not fits:
        raise DeployError(
            f"{path}: signature: does not fit what the file says; it was changed on its way, or its key belongs to "
            "somebody else. Ask the site for it again"
        )
    return request


def check_time(request: Request, path: Path, now: datetime) -> None:
    """Refuses a request that is not valid now.

    Raises:
        DeployError: naming the date.
    """
    since, until = moment(request.since, f"{path}: since"), moment(request.until, f"{path}: until")
    if until <= now:
        raise DeployError(f"{path}: until: {request.until}: is over; the site makes another request")
    if since > now + _AHEAD:
        raise DeployError(f"{path}: since: {request.since}: is still to come; set the clocks of both machines by NTP")


def read_answer(path: Path) -> Answer:
    """The answer in a file.

    Raises:
        DeployError: if it is none.
    """
    answer = Answer(**_read(path, ANSWER, Answer))
    for key, pattern in (("name", NAME), ("federation", FEDERATION), ("superlink", ADDRESS)):
        if not pattern.fullmatch(getattr(answer, key)):
            raise DeployError(
                f"{path}: {key}: {shortened(getattr(answer, key))}: not as `polyrank deploy add` writes it"
            )
    moment(answer.until, f"{path}: until")
    try:
        certificates.authorities(answer.authority.encode())
    except ValueError as error:
        raise DeployError(f"{path}: authority: {error}") from None
    return answer


def instant(when: datetime) -> str:
    """A time as the text that files have, in whole seconds."""
    return when.astimezone(UTC).isoformat(timespec="seconds")


def moment(text: str, where: str) -> datetime:
    """The time that `instant` wrote.

    Raises:
        DeployError: if it is written otherwise; the message begins with `where`.
    """
    try:
        when = datetime.fromisoformat(text)
        if when.tzinfo is not None and instant(when) == text:
            return when
    except (ValueError, OverflowError):
        pass
    raise DeployError(f"{where}: {shortened(text)}: not a time such as 2026-01-02T03:04:05+00:00")


def _message(request: Request) -> bytes:
    """The bytes that are signed: one text for all that a request says."""
    return json.dumps({"format": REQUEST, **asdict(request)}, sort_keys=True).encode()


def _read(path: Path, kind: str, shape: type, more: tuple[str, ...] = ()) -> dict[str, str]:
    """The keys of a file, all of them texts, without its format."""
    command = "request" if kind == REQUEST else "add"
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"has more than {_MOST_BYTES:,} bytes")
        value: Any = from_json(decoded(path.read_bytes()))
        if not isinstance(value, dict) or value.get("format") != kind:
            raise ValueError(f"its format is not {kind!r}")
        keys = ["format", *(each.name for each in fields(shape)), *more]
        if wrong := sorted(value.keys() ^ set(keys)):
            raise ValueError(f"{shortened(wrong[0])}: {'missing' if wrong[0] in keys else 'is not a key of it'}")
        for key in keys:
            if not isinstance(value[key], str):
                raise ValueError(f"{key}: {shortened(value[key])}: not a text")
    except ValueError as error:
        raise DeployError(f"{path}: not as `polyrank deploy {command}` writes it: {error}") from None
    return {key: value[key] for key in keys[1:]}
