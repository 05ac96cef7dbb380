"""Who takes part in a deployment: what clients say of themselves, and who of them is left out, and why."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from polyrank.core.types import Client, ClientProfile
from polyrank.engines.announcement import Announcement
from polyrank.engines.audit import Audit
from polyrank.engines.letters import MOST_PROFILE, ask_profile, decode_profile, refusal_of
from polyrank.engines.post import Post, Reply
from polyrank.engines.wire import WireError, digest
from polyrank.text import REASON, one_line

PATIENCE = 60.0
"""Seconds for which a newcomer is waited for, and after which one that does not take part is asked again."""
_AWAY = -1
"""The address of nobody."""

Plannable = Callable[[ClientProfile], ClientProfile]
"""A profile as it is planned with; a ValueError says why none can be."""


class _Hello(NamedTuple):
    """A client that has been asked what it is, and until when it may answer."""

    client: Client
    address: int
    asked: bytes
    expires: float


@dataclass(frozen=True)
class _Met:
    """A client that has said what it is.

    Attributes:
        address: where it was.
        stated: what it said.
        planned: what it is planned with; None if it cannot be.
    """

    address: int
    stated: ClientProfile
    planned: ClientProfile | None


class Present(NamedTuple):
    """Who is connected.

    Attributes:
        clients: what those who take part are planned with.
        out: who does not take part, and why.
        known: how many have a profile, and could take part.
    """

    clients: dict[Client, ClientProfile]
    out: dict[Client, str]
    known: int


class Attendance:
    """The clients of a deployment.

    One that is connected is asked what it is. It is left out if nothing can be planned with what it says, or if it has
    failed too many rounds in a row, and is asked again from time to time: with another profile it is a newcomer.

    Args:
        post: carries messages.
        model: what a client must know to load the model.
        base: fingerprint of the server's base model; a client with another one is refused.
        plannable: see there.
        failures: so many rounds in a row may a client fail.
        wait: seconds that a client may take to say what it is.
        poll: seconds between looks for answers.
        audit: where everything that arrives is noted.
        run: what clients are told of the run before they take part in it.
    """

    def __init__(
        self,
        post: Post,
        model: Mapping[str, Any],
        base: str,
        plannable: Plannable,
        failures: int,
        wait: float,
        poll: float,
        audit: Audit,
        run: Announcement | None = None,
    ) -> None:
        self.post, self.model, self.base, self.plannable = post, model, base, plannable
        self.failures, self.wait, self.poll, self.audit, self.run = failures, wait, poll, audit, run
        self._met: dict[Client, _Met] = {}
        self._hellos: dict[str, _Hello] = {}
        self._not_before: dict[Client, float] = {}
        self._failed: Counter[Client] = Counter()
        self._left_out: dict[Client, str] = {}
        self._refused: dict[Client, str] = {}

    def known(self) -> dict[Client, ClientProfile]:
        """What all that have ever been connected are planned with."""
        return {client: met.planned for client, met in self._met.items() if met.planned is not None}

    def examples(self, client: Client) -> int:
        """How many examples a client has said that it holds; none where it has said nothing."""
        return self._met[client].stated.examples if client in self._met else 0

    def present(self) -> Present:
        """Who is connected now. Newcomers are given some time to say what they are."""
        there, now = self.post.sites(), time.monotonic()
        self._hellos = {message: hello for message, hello in self._hellos.items() if hello.expires > now}
        busy = {hello.client for hello in self._hellos.values()}
        settled = {c for c, address in there.items() if self._here(c, address) and c not in self._left_out}
        fresh = [c for c in sorted(there) if c not in settled | busy and self._not_before.get(c, 0.0) <= now]
        if fresh:
            asked = ask_profile(self.model, self.run)
            sent = self.post.send("profile", dict.fromkeys(fresh, asked), self.wait)
            self._hellos |= {m: _Hello(c, there[c], asked, now + self.wait) for m, c in sent.items()}
        patience = now + min(PATIENCE, self.wait) if fresh else now
        self._greet()
        while self._newcomers() and time.monotonic() < patience:
            time.sleep(self.poll)
            self._greet()
        here = {c: self._met[c] for c, address in sorted(there.items()) if self._here(c, address)}
        out = {c: reason for c in sorted(there) if (reason := self._left_out.get(c) or self._refused.get(c))}
        clients = {c: met.planned for c, met in here.items() if c not in out and met.planned is not None}
        return Present(clients, out, len(here))

    def note_failure(self, client: Client, round_: int, reason: str) -> None:
        """A client has not done its part of a round."""
        self._failed[client] += 1
        if self._failed[client] >= self.failures:
            times = f"{self._failed[client]} rounds" if self._failed[client] > 1 else "a round"
            self._leave_out(client, round_, f"has failed {times} in a row, the last time because: {reason}")

    def note_success(self, client: Client) -> None:
        """A client has done its part of a round."""
        del self._failed[client]

    def note_refusal(self, client: Client, round_: int, reason: str) -> None:
        """A client does not take part; it is asked again later whether it does."""
        if client in self._met:
            self._met[client] = replace(self._met[client], address=_AWAY)
        self._not_before[client] = time.monotonic() + PATIENCE
        self._refused[client] = f"declines: {reason}"
        self.audit.note("declined", round_, client, reason=reason)

    def _here(self, client: Client, address: int) -> bool:
        return client in self._met and self._met[client].address == address

    def _newcomers(self) -> bool:
        """Whether anybody is asked that is not left out: nobody waits for those."""
        return any(hello.client not in self._left_out for hello in self._hellos.values())

    def _leave_out(self, client: Client, round_: int, reason: str) -> None:
        self._left_out[client] = f"left out until its profile changes: {reason}"
        self._not_before[client] = time.monotonic() + PATIENCE
        self.audit.note("left out", round_, client, reason=reason[:1000])

    def _greet(self) -> None:
        """Takes what clients have said of themselves; who is refused, or fails, is asked again later."""
        due = dict.fromkeys(self._hellos, MOST_PROFILE)
        for reply in self.post.receive(due) if due else ():
            hello = self._hellos.pop(reply.message, None)
            if hello is None:
                continue
            self._not_before[hello.client] = time.monotonic() + PATIENCE
            try:
                self._admit(hello, reply)
            except WireError as error:
                blob, self._refused[hello.client] = reply.blob or b"", f"not let in: {error}"
                reason = one_line(str(error), REASON)
                self.audit.note("refused", -1, hello.client, hash=digest(blob), bytes=len(blob), reason=reason)

    def _admit(self, hello: _Hello, reply: Reply) -> None:
        client, error = hello.client, one_line(reply.error, REASON)
        if reply.blob is None and reply.refused:
            raise WireError(error)
        if reply.blob is None:
            self._refused[client] = f"not let in: {error}"
            self.audit.note("failed", -1, client, reason=error)
            return
        if (reason := refusal_of(reply.blob, digest(hello.asked))) is not None:
            self.note_refusal(client, -1, reason)
            return
        stated, before = decode_profile(reply.blob, hello.asked, self.base), self._met.get(client)
        if before is not None and before.stated == stated and client in self._left_out:
            self._met[client] = _Met(hello.address, stated, before.planned)
            return
        for held in (self._failed, self._left_out, self._refused):
            held.pop(client, None)
        try:
            self._met[client] = _Met(hello.address, stated, self.plannable(stated))
        except ValueError as error:
            self._met[client] = _Met(hello.address, stated, None)
            self._leave_out(client, -1, str(error))
        else:
            del self._not_before[client]
            self.audit.note("joined", -1, client, examples=stated.examples)
