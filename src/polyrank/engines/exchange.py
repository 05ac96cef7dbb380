"""Clients on other machines, over any transport that carries bytes.

A round's tasks are sent and its answers collected until enough have come or the time is up. Every answer is compared
with the task it answers before anything is made of it (`polyrank.engines.wire`), and what becomes of it is noted.
"""

from __future__ import annotations

import hmac
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from polyrank.core.types import Client, ClientProfile, Query, RoundRecord, ServerState, Task, Update
from polyrank.engines.announcement import Announcement
from polyrank.engines.attendance import Attendance, Plannable
from polyrank.engines.audit import Audit
from polyrank.engines.encodings import Encoding
from polyrank.engines.letters import ask_scores, decode_scores, most_scores, refusal_of
from polyrank.engines.post import Post, Reply
from polyrank.engines.wire import Sent, WireError, decode_update, digest, encode_task, most_bytes
from polyrank.text import REASON, one_line

_YEAR = 31_536_000  # seconds


class TooFewError(RuntimeError):
    """Not enough clients are there, or have answered; the run can be resumed."""


@dataclass(frozen=True)
class Terms:
    """How long and for how many a server waits.

    Attributes:
        clients: as many must be connected before a round begins.
        wait: seconds to wait for them.
        deadline: seconds that a round's clients have to answer.
        quorum: share of a cohort that must have answered by then, or the run stops.
        grace: seconds for which a round that has its quorum, and nobody at work, waits for those who are away.
        attempts: how often a client that fails is asked in a round.
        failures: after so many rounds in a row in which it fails, a client is left out until its profile changes.
        oversample: share of a cohort that is asked on top; the round ends when as many as the cohort have answered.
        down: encoding of tasks.
        up: encoding of updates.
        poll: seconds between looks for answers.
    """

    clients: int = 1
    wait: float = 600.0
    deadline: float = 3600.0
    quorum: float = 0.5
    grace: float = 120.0
    attempts: int = 3
    failures: int = 3
    oversample: float = 0.0
    down: Encoding = "float32"
    up: Encoding = "float32"
    poll: float = 0.5

    def __post_init__(self) -> None:
        least = {"clients": 1, "wait": 0, "deadline": 0.001, "quorum": 0, "attempts": 1, "oversample": 0, "poll": 0}
        most = {"wait": _YEAR, "deadline": _YEAR, "quorum": 1, "oversample": 100, "poll": 3600}
        for name, low in least.items():
            value, high = getattr(self, name), most.get(name, math.inf)
            if not low <= value <= high:
                bound = f"between {low} and {high}" if name in most else f"at least {low}"
                raise ValueError(f"deployment.{name}: {value} must be {bound}")

    def asked(self, cohort: int | None) -> int | None:
        """How many clients a round asks."""
        return None if cohort is None else math.ceil(cohort * (1 + self.oversample))

    def needed(self, asked: int) -> int:
        """How many answers end a round early."""
        return math.ceil(asked / (1 + self.oversample) - 1e-9)

    def enough(self, needed: int) -> int:
        """How many of these answers a round can do with."""
        return max(1, math.ceil(self.quorum * needed - 1e-9))


@dataclass
class _Round:
    """A round in flight.

    Attributes:
        number: the round.
        sent: what everybody is asked.
        updates: accepted so far.
        seen: hash and bytes of the messages they came in.
        needed: answers that end the round.
        out: clients whose answer was refused, or who decline; they are not asked again.
        declined: how many decline.
        faults: why the last message of a client was no update.
        tries: how often each has been asked.
        waiting: messages without an answer.
    """

    number: int
    sent: dict[Client, Sent]
    needed: int
    updates: dict[Client, Update] = field(default_factory=dict)
    seen: dict[Client, tuple[str, int]] = field(default_factory=dict)
    out: set[Client] = field(default_factory=set)
    declined: int = 0
    faults: dict[Client, str] = field(default_factory=dict)
    tries: Counter[Client] = field(default_factory=Counter)
    waiting: dict[str, Client] = field(default_factory=dict)

    def idle(self, attempts: int) -> list[Client]:
        """Who can be asked: those who owe an update, are not at it, and have not failed too often."""
        busy = {*self.updates, *self.waiting.values(), *self.out}
        return [client for client in self.sent if client not in busy and self.tries[client] < attempts]


class Remote:
    """The `Clients` of a deployment.

    Args:
        post: carries messages.
        model: what a client must know to load the model; goes with every message.
        base: fingerprint of the server's base model; a client with another one is refused.
        terms: how long and for how many to wait.
        audit: where everything that arrives is noted.
        measure: computes importance on what the server holds.
        run: what clients are told of the run before they take part in it.
        secret: of the run. A word made of it is in each task, so that no other client can know the hash that an answer
            must name, and a task that is sent again after a restart is the same.
        plannable: what a client is planned with, of what it says of itself (`polyrank.engines.attendance`).
    """

    def __init__(
        self,
        post: Post,
        model: Mapping[str, Any],
        base: str,
        terms: Terms,
        audit: Audit,
        measure: Callable[[Query, ServerState], Mapping[str, float]],
        secret: bytes,
        run: Announcement | None = None,
        plannable: Plannable = lambda profile: profile,
    ) -> None:
        self._secret, self.run = secret, run
        self._about = {"model": model, **({"run": run.id} if run else {})}
        self.post, self.model, self.terms, self.audit = post, model, terms, audit
        self.attendance = Attendance(post, model, base, plannable, terms.failures, terms.wait, terms.poll, audit, run)
        self._measure_here = measure
        self._profiles: Mapping[Client, ClientProfile] = {}
        self._left_out: Mapping[Client, str] = {}
        self._overdue: dict[str, tuple[int, Client, float]] = {}
        self._received: dict[Client, tuple[str, int]] = {}

    def profiles(self) -> Mapping[Client, ClientProfile]:
        """Those of the clients that are connected now and take part; who has come since the last time is asked first.

        Raises:
            TooFewError: if fewer than `Terms.clients` come in time, or nobody of them can take part.
        """
        ends = time.monotonic() + self.terms.wait
        while True:
            found, self._left_out, known = self.attendance.present()
            if found and known >= self.terms.clients:
                break
            if time.monotonic() > ends:
                there = ", ".join(sorted(found)) or "none"
                out = "".join(f"; {client}: {reason}" for client, reason in self._left_out.items())
                raise TooFewError(f"{self.terms.clients} clients are needed, and these are connected: {there}{out}")
            time.sleep(self.terms.poll)
        if found != self._profiles:
            self._profiles = found
        return self._profiles

    def known(self) -> Mapping[Client, ClientProfile]:
        """Those of all that have ever been connected; asks and waits for nobody."""
        return self.attendance.known()

    def fit(self, tasks: Mapping[Client, Task]) -> Iterator[Update]:
        """Has the clients train; accepted updates, in order of client.

        Raises:
            TooFewError: if fewer than the quorum have answered in time.
        """
        if not tasks:
            return
        terms, round_ = self.terms, next(iter(tasks.values())).round
        sent = {
            client: encode_task(task, client, terms.down, terms.up, **self._about, word=self._word(round_, client))
            for client, task in tasks.items()
        }
        flight = _Round(round_, sent, terms.needed(len(tasks)))
        self._collect(flight)
        for client in flight.updates:
            self.attendance.note_success(client)
        for client, reason in flight.faults.items():
            self.attendance.note_failure(client, round_, reason)
        if len(flight.updates) < (enough := terms.enough(flight.needed)):
            raise TooFewError(
                f"round {round_}: {len(flight.updates)} of {flight.needed} clients have answered within "
                f"{terms.deadline:g} s, and {enough} must; {self.audit.path} says what became of the others"
            )
        self._received = flight.seen
        for client in sorted(flight.updates):
            yield flight.updates[client]

    def measure(self, query: Query, state: ServerState) -> Mapping[str, float]:
        """The importance that `query` asks for: on what the server holds, or by the clients of the round.

            s = sum_k n_k s_k / sum_k n_k    over the clients that answer and have data, n_k at most `Query.most`

        A client runs the server's whole adapter for it.
        """
        if query.on == "holdout":
            return self._measure_here(query, state)
        asked = {client: ask_scores(query, state, client, **self._about) for client in sorted(query.cohort)}
        waiting = self.post.send("measure", asked, self.terms.deadline)
        answers: dict[Client, tuple[dict[str, float], float]] = {}
        for client, blob in self._answers(waiting, state.round, most_scores(state.adapter)):
            if (reason := refusal_of(blob, digest(asked[client]))) is not None:
                self.audit.note("declined", state.round, client, reason=reason)
                continue
            try:
                scores, examples = decode_scores(blob, asked[client], state.adapter, client)
                self._check_claim(client, examples)
            except WireError as error:
                self._refuse(state.round, client, blob, str(error))
            else:
                answers[client] = scores, min(examples, query.most)
        if not answers:
            raise TooFewError(
                f"round {state.round}: no client has measured importance; {self.audit.path} says what became of them"
            )
        total: dict[str, float] = {}
        weight = 0.0
        for client in sorted(answers):
            scores, examples = answers[client]
            if examples:
                total = {name: total.get(name, 0.0) + examples * score for name, score in scores.items()}
                weight += examples
        return {name: score / weight for name, score in total.items()}

    def left_out(self) -> Mapping[Client, str]:
        """Who was connected when the round began and was left out, and why."""
        return self._left_out

    def settle(self, record: RoundRecord) -> None:
        """Notes which of a round's updates were used."""
        for client, (hash_, nbytes) in sorted(self._received.items()):
            if client in record.refused:
                reason = record.refused[client]
                self.audit.note("refused", record.round, client, hash=hash_, bytes=nbytes, reason=reason)
            elif client in record.bytes_up:
                self.audit.note("accepted", record.round, client, hash=hash_, bytes=nbytes)
        self._received = {}

    def _word(self, round_: int, client: Client) -> str:
        return hmac.new(self._secret, f"{round_} {client}".encode(), "sha256").hexdigest()[:32]

    def _answers(self, waiting: dict[str, Client], round_: int, most: int) -> Iterator[tuple[Client, bytes]]:
        """Answers to messages, until all have come or a deadline has passed."""
        ends = time.monotonic() + self.terms.deadline
        while waiting and time.monotonic() < ends:
            for reply in self.post.receive(dict.fromkeys(waiting, most)):
                client = waiting.pop(reply.message, None)
                if client is None:
                    continue
                if reply.blob is None:
                    self.attendance.note_failure(client, round_, self._note_failure(round_, client, reply))
                else:
                    yield client, reply.blob
            if waiting:
                time.sleep(self.terms.poll)
        for client in waiting.values():
            self.audit.note("unanswered", round_, client)
            self.attendance.note_failure(client, round_, f"no answer within {self.terms.deadline:g} s")

    def _collect(self, flight: _Round) -> None:
        """Asks, and asks again those who failed, until enough have answered or the time is up."""
        ends, at_rest = time.monotonic() + self.terms.deadline, math.inf
        self._overdue = {message: late for message, late in self._overdue.items() if late[2] > time.monotonic()}
        while len(flight.updates) < flight.needed and time.monotonic() < ends:
            idle = flight.idle(self.terms.attempts)
            resting = not flight.waiting and len(flight.updates) >= self.terms.enough(flight.needed)
            at_rest = min(at_rest, time.monotonic()) if resting else math.inf
            if not flight.waiting and (not idle or time.monotonic() >= at_rest + self.terms.grace):
                break
            if idle:
                self._ask(flight, idle, ends)
            due = {message: most_bytes(flight.sent[client]) for message, client in flight.waiting.items()}
            for reply in self.post.receive(due | dict.fromkeys(self._overdue, 0)):
                self._take(flight, reply)
            if len(flight.updates) < flight.needed:
                time.sleep(self.terms.poll)
        late = time.monotonic() >= ends
        for message, client in flight.waiting.items():
            self.audit.note("unanswered", flight.number, client)
            if late:
                flight.faults[client] = f"no answer within {self.terms.deadline:g} s"
            self._overdue[message] = (flight.number, client, ends + self.terms.deadline)

    def _ask(self, flight: _Round, idle: Sequence[Client], ends: float) -> None:
        there = self.post.sites()
        letters = {client: flight.sent[client].blob for client in idle if client in there}
        if letters:
            asked = self.post.send("fit", letters, max(ends - time.monotonic(), 1.0))
            flight.waiting |= asked
            flight.tries.update(asked.values())

    def _take(self, flight: _Round, reply: Reply) -> None:
        """One reply: an update of this round, one that comes too late, or neither."""
        if reply.message in self._overdue:
            then, client, _ = self._overdue.pop(reply.message)
            self.audit.note("late", then, client, reason="the round is closed")
            return
        client = flight.waiting.pop(reply.message, "")
        if not client:
            self.audit.note("refused", flight.number, "", reason="answers a message that nobody waits for")
        elif reply.blob is None:
            flight.faults[client] = self._note_failure(flight.number, client, reply)
            flight.out |= {client} if reply.refused else set()
        elif (reason := refusal_of(reply.blob, flight.sent[client].digest)) is not None:
            self._release(flight, client, reason)
        else:
            self._accept(flight, client, reply.blob)

    def _release(self, flight: _Round, client: Client, reason: str) -> None:
        """Goes on without a client that declines; it is asked again later whether it takes part."""
        flight.out.add(client)
        flight.declined += 1
        flight.needed = min(flight.needed, len(flight.sent) - flight.declined)
        self.attendance.note_refusal(client, flight.number, reason)

    def _accept(self, flight: _Round, client: Client, blob: bytes) -> None:
        sent = flight.sent[client]
        try:
            update, lost = decode_update(blob, sent, client)
            self._check_claim(client, update.examples)
        except WireError as error:
            flight.out.add(client)
            flight.faults[client] = str(error)
            self._refuse(flight.number, client, blob, str(error))
            return
        hash_, nbytes = digest(blob), len(blob)
        self.audit.note("received", flight.number, client, hash=hash_, bytes=nbytes, **({"lost": lost} if lost else {}))
        carried = {"bytes_down": float(len(sent.blob)), "bytes_up": float(nbytes)}
        flight.updates[client] = replace(update, metrics={**update.metrics, **carried})
        flight.seen[client] = (hash_, nbytes)
        flight.faults.pop(client, None)

    def _check_claim(self, client: Client, examples: float) -> None:
        held = self.attendance.examples(client)
        if examples > held:
            raise WireError(f"claims {examples:g} examples, and has said that it holds {held}")

    def _refuse(self, round_: int, client: Client, blob: bytes, reason: str) -> None:
        reason = one_line(reason, REASON)
        self.audit.note("refused", round_, client, hash=digest(blob), bytes=len(blob), reason=reason)

    def _note_failure(self, round_: int, client: Client, reply: Reply) -> str:
        reason = one_line(reply.error, REASON)
        self.audit.note("refused" if reply.refused else "failed", round_, client, reason=reason)
        return reason
