"""A round over a transport that loses, delays and repeats: who is waited for, and what is noted."""

import json
import time
import zlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from polyrank.core.federate import federate, plan
from polyrank.core.gate import change
from polyrank.core.lowrank import Adapter, LowRank
from polyrank.core.types import Client, ClientProfile, LocalTraining, ModelSpec, Query, ServerState, Task, Update
from polyrank.engines.audit import Audit
from polyrank.engines.encodings import Encoding
from polyrank.engines.exchange import Remote, Terms, TooFewError
from polyrank.engines.letters import (
    answer_to_another_version,
    decode_query,
    encode_profile,
    encode_refusal,
    encode_scores,
)
from polyrank.engines.post import Kind, Reply
from polyrank.engines.wire import VersionError, decode_task, digest, encode_update, opened
from polyrank.methods import METHODS
from polyrank.version import __version__

SPEC = ModelSpec({"q": (6, 5), "v": (4, 5)})
FAST = Terms(clients=1, wait=0.3, deadline=0.3, poll=0.001, quorum=1.0, grace=0.0)
LOCAL = LocalTraining(lr=0.1)
FAKE = Adapter(
    {name: LowRank(torch.ones(4, d_in), torch.ones(d_out, 4)) for name, (d_out, d_in) in SPEC.modules.items()}
)


class Site:
    """A client that moves every value by a tenth of its number; `faults` are what becomes of its next answers.

    What it `declines` it does not answer.
    """

    def __init__(self, number: int) -> None:
        self.number, self.faults = number, []  # type: int, list[str]
        self.declines: set[Kind] = set()
        self.claims: float | None = None
        self.examples, self.rank, self.measured = 10 * number, number, 10 * number
        self.answered: list[bytes] = []

    def answer(self, kind: Kind, blob: bytes) -> bytes:
        if kind == "profile":
            return encode_profile(ClientProfile(self.examples, rank=self.rank), "base", blob)
        if kind == "measure":
            query, state, _ = decode_query(blob)
            assert query.on == "clients"
            return encode_scores(dict.fromkeys(state.adapter.layers, float(self.number)), self.measured, blob)
        task, header = decode_task(blob)
        by, sent = self.number / 10, task.adapter.layers
        layers = {name: replace(x, A=x.A + by, B=x.B - by) for name, x in sent.items()}
        update = Update(header["client"], Adapter(layers), self.claims or self.examples, task.factors, {"steps": 1.0})
        self.answered.append(encode_update(update, task, digest(blob), header["reply"]))
        return self.answered[-1]


class Lines:
    """A transport in memory."""

    def __init__(self, count: int) -> None:
        self.clients = {f"c{number}": Site(number) for number in range(1, count + 1)}
        self.away: set[Client] = set()
        self.mute: set[Client] = set()
        self.sent: list[tuple[str, Kind, Client, bytes]] = []
        self.waiting: dict[str, Reply] = {}

    def sites(self) -> dict[Client, int]:
        return {client: site.number for client, site in self.clients.items() if client not in self.away}

    def send(self, kind: Kind, letters: Mapping[Client, bytes], seconds: float) -> dict[str, Client]:
        ids = {}
        for client, blob in letters.items():
            name = f"m{len(self.sent)}"
            self.sent.append((name, kind, client, blob))
            ids[name] = client
            if client in self.mute:
                continue
            site = self.clients[client]
            fault = site.faults.pop(0) if kind == "fit" and site.faults else "decline" if kind in site.declines else ""
            if fault == "crash":
                self.waiting[name] = Reply(name, None, "error 2: out of memory")
            elif fault == "decline":
                self.waiting[name] = Reply(name, encode_refusal("no\x1b]0;pwned\x07\n\u202eesrever<b>", blob))
            elif fault == "silence":
                self.clients[client].answer(kind, blob)
            elif fault == "garbage":
                self.waiting[name] = Reply(name, b"PRNK" + bytes(40))
            elif fault == "old":
                self.waiting[name] = Reply(name, self.clients[client].answered[-1])
            else:
                self.waiting[name] = Reply(name, self.clients[client].answer(kind, blob))
        return ids

    def receive(self, messages: Collection[str]) -> list[Reply]:
        return [self.waiting.pop(name) for name in list(self.waiting) if name in messages]


def return_after(lines: Lines, looks: int) -> None:
    """All clients are back once the server has looked so often for answers."""
    receive, left = lines.receive, iter(range(looks - 1, -1, -1))

    def returning(messages: Collection[str]) -> list[Reply]:
        if next(left, None) == 0:
            lines.away = set()
        return receive(messages)

    lines.receive = returning  # type: ignore[method-assign]


def remote(lines: Lines, folder: Path, terms: Terms = FAST, secret: bytes = b"s", **more: Any) -> Remote:
    audit = Audit(folder / "audit.jsonl")
    return Remote(lines, {"kind": "text"}, "base", terms, audit, lambda query, state: {"q": 1.0}, secret, **more)


def tasks_of(clients: Remote, state: ServerState) -> dict[Client, Task]:
    method = METHODS["fedit"]()
    profiles = clients.profiles()
    budgets = method.estimate(profiles, SPEC, LOCAL)
    return plan(method, state, budgets, sorted(profiles), SPEC, LOCAL, 0)


@pytest.fixture
def state(random_adapter) -> ServerState:  # type: ignore[no-untyped-def]
    return ServerState(0, random_adapter(SPEC, (4,), seed=1))


def events(clients: Remote) -> list[tuple[str, str]]:
    return [(line["event"], line["client"]) for line in clients.audit.lines() if line["round"] >= 0]


def test_answers_come_in_order_and_are_the_clients_own(tmp_path: Path, state: ServerState) -> None:
    clients = remote(Lines(3), tmp_path)
    tasks = tasks_of(clients, state)
    found = list(clients.fit(tasks))
    assert [update.client for update in found] == ["c1", "c2", "c3"]
    for number, update in enumerate(found, 1):
        sent = tasks[update.client].adapter.layers["q"]
        assert torch.equal(update.adapter.layers["q"].A, sent.A + number / 10)
        assert update.examples == 10 * number
        assert update.metrics["bytes_up"] > 4 * 2 * number * (6 + 5)
    assert clients.profiles() is clients.profiles()


def test_a_client_that_fails_is_asked_again_but_not_for_ever(tmp_path: Path, state: ServerState) -> None:
    lines = Lines(3)
    lines.clients["c2"].faults = ["crash"]
    lines.clients["c3"].faults = ["crash"] * 9
    clients = remote(lines, tmp_path, replace(FAST, quorum=0.6, attempts=3))
    tasks = tasks_of(clients, state)
    # Two of three are enough, so nobody is asked again once they are there; c2 is, while one is missing.
    assert [update.client for update in clients.fit(tasks)] == ["c1", "c2"]
    strict = remote(lines, tmp_path, replace(FAST, attempts=3))
    strict.profiles()
    with pytest.raises(TooFewError, match=r"round 0: 2 of 3 clients have answered .* 3 must"):
        list(strict.fit(tasks))
    asked = [client for _, kind, client, _ in lines.sent if kind == "fit"]
    assert asked.count("c3") <= 2 + 3


def test_a_round_goes_on_without_who_declines(tmp_path: Path, state: ServerState) -> None:
    lines = Lines(3)
    clients = remote(lines, tmp_path)
    tasks = tasks_of(clients, state)
    lines.clients["c2"].declines = {"profile", "fit"}
    assert [update.client for update in clients.fit(tasks)] == ["c1", "c3"]  # of a quorum of all that take part
    assert sorted(clients.profiles()) == ["c1", "c3"]
    assert sorted(clients.known()) == ["c1", "c2", "c3"]
    (line,) = (line for line in clients.audit.lines() if line["event"] == "declined")
    assert line["reason"] == r"no\x1b]0;pwned\x07\n\u202eesrever<b>"  # as it can be shown
    assert [client for _, kind, client, _ in lines.sent if kind == "fit"].count("c2") == 1
    clients.attendance._not_before.clear()  # a minute later it is asked again, and again declines
    assert sorted(clients.profiles()) == ["c1", "c3"]
    clients.attendance._not_before.clear()
    lines.clients["c2"].declines = set()
    assert sorted(clients.profiles()) == ["c1", "c2", "c3"]
    for site in lines.clients.values():
        site.declines = {"fit"}
    with pytest.raises(TooFewError):
        list(clients.fit(tasks))


def test_importance_is_measured_by_who_does_not_decline(tmp_path: Path, state: ServerState) -> None:
    lines = Lines(2)
    clients = remote(lines, tmp_path)
    cohort = tuple(clients.profiles())
    lines.clients["c1"].declines = {"measure"}
    query = Query("gradient", "clients", cohort=cohort)
    assert clients.measure(query, state) == {"q": 2.0, "v": 2.0}
    lines.clients["c2"].declines = {"measure"}
    with pytest.raises(TooFewError, match="no client has measured importance"):
        clients.measure(query, state)


def test_a_straggler_is_left_behind_and_its_answer_is_late(tmp_path: Path, state: ServerState) -> None:
    lines = Lines(3)
    lines.clients["c3"].faults = ["silence"]
    clients = remote(lines, tmp_path, replace(FAST, quorum=0.5))
    tasks = tasks_of(clients, state)
    assert [update.client for update in clients.fit(tasks)] == ["c1", "c2"]
    assert ("unanswered", "c3") in events(clients)
    message = next(name for name, kind, client, _ in lines.sent if kind == "fit" and client == "c3")
    lines.waiting[message] = Reply(message, lines.clients["c3"].answered[0])
    later = tasks_of(clients, replace(state, round=1))
    assert [update.client for update in clients.fit(later)] == ["c1", "c2", "c3"]
    assert ("late", "c3") in events(clients)


def test_who_is_asked_on_top_ends_a_round_early(tmp_path: Path, state: ServerState) -> None:
    lines = Lines(4)
    lines.clients["c1"].faults = ["silence"]
    clients = remote(lines, tmp_path, replace(FAST, deadline=60, oversample=1 / 3))
    assert clients.terms.asked(3) == 4
    assert len(list(clients.fit(tasks_of(clients, state)))) == 3


def test_a_client_that_is_away_is_waited_for_and_may_return_elsewhere(tmp_path: Path, state: ServerState) -> None:
    lines = Lines(2)
    clients = remote(lines, tmp_path, replace(FAST, deadline=30))
    tasks = tasks_of(clients, state)
    lines.away = {"c2"}
    assert list(clients.profiles()) == ["c1"]
    return_after(lines, looks=3)
    assert [update.client for update in clients.fit(tasks)] == ["c1", "c2"]
    before = len(lines.sent)
    lines.clients["c2"] = Site(7)  # restarted: another address, so it is asked anew what it is
    assert clients.profiles()["c2"].examples == 70
    assert [kind for _, kind, *_ in lines.sent[before:]] == ["profile"]


def test_what_is_no_answer_to_the_task_is_refused_and_not_asked_again(tmp_path: Path, state: ServerState) -> None:
    lines = Lines(3)
    clients = remote(lines, tmp_path, replace(FAST, quorum=0.3))
    honest = {update.client: update for update in clients.fit(tasks_of(clients, state))}
    assert len(honest) == 3
    lines.clients["c2"].faults, lines.clients["c3"].faults = ["garbage"], ["old"]
    tasks = tasks_of(clients, replace(state, round=1))
    assert [update.client for update in clients.fit(tasks)] == ["c1"]
    refused = [line for line in clients.audit.lines() if line["event"] == "refused"]
    assert {line["client"] for line in refused} == {"c2", "c3"}
    assert all(len(line["hash"]) == 64 and line["bytes"] > 0 for line in refused)
    assert any("round: 0, not 1" in line["reason"] or "round: '0', not 1" in line["reason"] for line in refused)


def test_another_base_model_is_not_let_in(tmp_path: Path) -> None:
    lines = Lines(2)
    lines.clients["c2"].answer = lambda kind, blob: encode_profile(ClientProfile(5), "other", blob)  # type: ignore[method-assign]
    clients = remote(lines, tmp_path)
    assert list(clients.profiles()) == ["c1"]
    (line,) = [line for line in clients.audit.lines() if line["event"] == "refused"]
    assert "base model is 'other'" in line["reason"]
    waiting = remote(lines, tmp_path, replace(FAST, clients=2))
    with pytest.raises(TooFewError, match="2 clients are needed, and these are connected: c1"):
        waiting.profiles()


def test_the_mean_of_scores_weighs_by_examples(tmp_path: Path, state: ServerState) -> None:
    clients = remote(Lines(2), tmp_path)
    clients.profiles()
    found = clients.measure(Query("fisher", on="clients", cohort=("c1", "c2")), state)
    assert found == pytest.approx(dict.fromkeys(SPEC.modules, (10 * 1 + 20 * 2) / 30))
    assert clients.measure(Query("fisher", on="holdout"), state) == {"q": 1.0}


def test_a_late_joiner_gets_a_budget(tmp_path: Path, state: ServerState) -> None:
    lines = Lines(3)
    lines.away = {"c3"}
    clients = remote(lines, tmp_path)
    rounds = federate(METHODS["fedit"](), state, clients, SPEC, LOCAL, rounds=3)
    _, record = next(rounds)
    assert sorted(record.bytes_up) == ["c1", "c2"]
    lines.away = set()
    _, record = next(rounds)
    assert sorted(record.bytes_up) == ["c1", "c2", "c3"]
    assert record.ranks["c3"] == {"q": 3, "v": 3}
    clients.settle(record)
    lines.away = {"c1"}
    state, record = next(rounds)
    assert sorted(record.bytes_up) == ["c2", "c3"]
    assert [e for e in events(clients) if e[0] == "accepted"] == [("accepted", c) for c in ("c1", "c2", "c3")]


def test_the_audit_survives_a_line_cut_short(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.jsonl")
    audit.note("received", 0, "a", hash="x", bytes=3)
    whole = audit.path.read_bytes()
    audit.path.write_bytes(whole + whole[:20])
    audit.note("refused", 0, "b", reason="\n\u2028")
    assert [line["client"] for line in audit.lines()] == ["a", "b"]
    assert audit.path.read_bytes().startswith(whole)
    assert json.loads(whole)["hash"] == "x"


def test_a_silent_newcomer_holds_up_nobody_for_long_and_is_let_in_when_it_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polyrank.engines.attendance.PATIENCE", 0.1)
    lines = Lines(2)
    lines.mute = {"c2"}
    clients = remote(lines, tmp_path, replace(FAST, deadline=3600, wait=3600))
    begun = time.monotonic()
    assert list(clients.profiles()) == ["c1"]
    assert time.monotonic() - begun < 30
    hello = next(name for name, kind, client, _ in lines.sent if kind == "profile" and client == "c2")
    lines.mute = set()
    lines.waiting[hello] = Reply(hello, lines.clients["c2"].answer("profile", lines.sent[0][3]))
    assert list(clients.profiles()) == ["c1", "c2"]
    assert sum(kind == "profile" for _, kind, *_ in lines.sent) == 2


def test_who_is_refused_is_not_asked_at_every_look(tmp_path: Path) -> None:
    lines = Lines(2)
    lines.clients["c2"].answer = lambda kind, blob: encode_profile(ClientProfile(5), "other", blob)  # type: ignore[method-assign]
    clients = remote(lines, tmp_path, replace(FAST, clients=2, wait=0.2))
    with pytest.raises(TooFewError):
        clients.profiles()
    assert sum(line["event"] == "refused" for line in clients.audit.lines()) <= 2


def test_a_client_cannot_claim_more_examples_than_it_has_said_to_hold(tmp_path: Path, state: ServerState) -> None:
    lines = Lines(3)
    clients = remote(lines, tmp_path, replace(FAST, quorum=0.5))
    tasks = tasks_of(clients, state)
    lines.clients["c2"].claims = 1e9
    assert [update.client for update in clients.fit(tasks)] == ["c1", "c3"]
    (line,) = [line for line in clients.audit.lines() if line["event"] == "refused"]
    assert line["client"] == "c2"
    assert "claims 1e+09 examples, and has said that it holds 20" in line["reason"]


@pytest.mark.parametrize("up", ["float32", "int8"])
@pytest.mark.parametrize("down", ["bfloat16", "int8", "nf4"])
def test_what_a_lossy_task_lost_is_not_taken_for_training(
    tmp_path: Path, state: ServerState, down: Encoding, up: Encoding
) -> None:
    clients = remote(Lines(2), tmp_path, replace(FAST, down=down, up=up))
    tasks = {client: replace(task, factors="B") for client, task in tasks_of(clients, state).items()}
    for update in clients.fit(tasks):
        number = int(update.client[1:])
        for name, x in update.adapter.layers.items():
            sent = tasks[update.client].adapter.layers[name]
            assert torch.equal(x.A, sent.A)  # a factor that is not trained is the server's own
            assert torch.allclose(x.B, sent.B - number / 10, atol=1e-3)
        assert change(tasks[update.client].adapter, update.adapter) > 0


def test_nobody_else_knows_what_an_answer_must_name(tmp_path: Path, state: ServerState) -> None:
    def blobs(secret: bytes) -> dict[Client, bytes]:
        lines = Lines(2)
        clients = remote(lines, tmp_path, secret=secret)
        list(clients.fit(tasks_of(clients, state)))
        return {client: blob for _, kind, client, blob in lines.sent if kind == "fit"}

    first, again, other = blobs(b"a"), blobs(b"a"), blobs(b"b")
    assert first == again  # also after a restart, so that a site answers as before
    words = {opened(blob, "task")[0]["word"] for found in (first, other) for blob in found.values()}
    assert len(words) == 4


def test_lossy_messages_move_the_values_they_were_sent(tmp_path: Path, state: ServerState) -> None:
    clients = remote(Lines(2), tmp_path, replace(FAST, down="int8", up="int8"))
    tasks = tasks_of(clients, state)
    for update, number in zip(clients.fit(tasks), (1, 2), strict=True):
        sent = tasks[update.client].adapter.layers["q"]
        assert torch.allclose(update.adapter.layers["q"].A, sent.A + number / 10, atol=float(sent.A.abs().max()) / 100)
    lost = [line["lost"] for line in clients.audit.lines() if line["event"] == "received"]
    assert all(0 <= value < 0.01 for value in lost)
    blob = next(blob for _, kind, _, blob in clients.post.sent if kind == "fit")  # type: ignore[attr-defined]
    assert opened(blob, "task")[0]["reply"] == "int8"


# --- one client, and everybody's run


def test_who_is_away_is_given_time_to_come_back_where_the_quorum_is_there(tmp_path: Path, state: ServerState) -> None:
    lines = Lines(2)
    clients = remote(lines, tmp_path, replace(FAST, deadline=30, quorum=0.5, grace=30))
    tasks = tasks_of(clients, state)
    lines.away = {"c2"}
    return_after(lines, looks=3)
    assert [update.client for update in clients.fit(tasks)] == ["c1", "c2"]


@pytest.mark.parametrize("fault", ["crash", "garbage", "silence"])
def test_a_client_that_always_fails_ends_no_run_and_is_left_out_until_its_profile_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr("polyrank.engines.attendance.PATIENCE", 0.0)
    lines = Lines(3)
    lines.clients["c2"].faults = [fault] * 999
    clients = remote(lines, tmp_path, Terms(clients=3, wait=0.3, deadline=0.1, grace=0.0, poll=0.001))
    state = ServerState(0, FAKE)
    rounds = federate(METHODS["fedit"](), state, clients, SPEC, LOCAL, rounds=9)
    for number in range(3):
        _, record = next(rounds)
        assert "c2" in record.dropped, number
        assert not clients.left_out()
    _, record = next(rounds)
    assert sorted(record.ranks) == sorted(record.bytes_up) == ["c1", "c3"]
    assert list(clients.left_out()) == ["c2"]
    assert clients.left_out()["c2"].startswith("left out until its profile changes: has failed 3 rounds in a row")
    (line,) = [line for line in clients.audit.lines() if line["event"] == "left out"]
    assert line["client"] == "c2"
    assert line["round"] == 2
    _, record = next(rounds)
    assert sorted(record.ranks) == ["c1", "c3"]
    lines.clients["c2"].faults = []
    lines.clients["c2"].examples = 21  # its operator has changed something
    _, record = next(rounds)
    assert sorted(record.bytes_up) == ["c1", "c2", "c3"]
    assert not clients.left_out()


def test_a_client_that_fails_now_and_then_is_not_left_out(tmp_path: Path) -> None:
    lines = Lines(2)
    terms = Terms(wait=0.3, deadline=0.1, grace=0.0, poll=0.001, attempts=1)
    clients = remote(lines, tmp_path, terms)
    rounds = federate(METHODS["fedit"](), ServerState(0, FAKE), clients, SPEC, LOCAL, rounds=9)
    for fault in ("crash", "crash", "", "crash", "crash", ""):
        lines.clients["c2"].faults = [fault] * bool(fault)
        _, record = next(rounds)
        assert ("c2" in record.dropped) == bool(fault)
    assert not clients.left_out()


def plannable(profile: ClientProfile) -> ClientProfile:
    if not profile.rank:
        raise ValueError(f"states rank {profile.rank}")
    return replace(profile, rank=min(profile.rank, 4))


def test_a_client_with_which_nothing_can_be_planned_is_left_out_and_the_round_goes_on(tmp_path: Path) -> None:
    lines = Lines(3)
    lines.clients["c2"].rank, lines.clients["c3"].rank = 0, 2**53
    clients = remote(lines, tmp_path, replace(FAST, clients=3), plannable=plannable)
    method = replace(METHODS["fedit"](), estimate=METHODS["straggler"]().estimate)
    (_, record), *_ = federate(method, ServerState(0, FAKE), clients, SPEC, LOCAL, rounds=1)
    assert sorted(record.ranks) == ["c1", "c3"]
    assert clients.left_out() == {"c2": "left out until its profile changes: states rank 0"}
    (line,) = [line for line in clients.audit.lines() if line["event"] == "left out"]
    assert (line["client"], line["reason"]) == ("c2", "states rank 0")
    assert list(clients.known()) == ["c1", "c3"]
    assert clients.known()["c3"].rank == 4
    alone = remote(lines, tmp_path, replace(FAST, wait=0.1), plannable=plannable)
    lines.away = {"c1", "c3"}
    with pytest.raises(TooFewError, match="c2: left out until its profile changes: states rank 0"):
        alone.profiles()


def test_who_measures_more_examples_than_it_has_said_to_hold_is_refused_and_nobody_weighs_more_than_counts(
    tmp_path: Path, state: ServerState
) -> None:
    lines = Lines(3)
    clients = remote(lines, tmp_path)
    clients.profiles()
    query = Query("fisher", on="clients", cohort=("c1", "c2", "c3"))
    assert clients.measure(query, state) == pytest.approx(dict.fromkeys(SPEC.modules, (10 + 40 + 90) / 60))
    capped = clients.measure(replace(query, most=20), state)
    assert capped == pytest.approx(dict.fromkeys(SPEC.modules, (10 * 1 + 20 * 2 + 20 * 3) / 50))
    lines.clients["c3"].measured = 2**53
    found = clients.measure(query, state)
    assert found == pytest.approx(dict.fromkeys(SPEC.modules, (10 * 1 + 20 * 2) / 30))
    (line,) = [line for line in clients.audit.lines() if line["event"] == "refused"]
    assert "and has said that it holds 30" in line["reason"]


def test_a_site_of_another_version_is_not_let_in_and_both_versions_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = Lines(2)

    def older(kind: Kind, blob: bytes) -> bytes:
        with monkeypatch.context() as patch:
            patch.setattr("polyrank.engines.wire.__version__", "0.0.9")
            with pytest.raises(VersionError, match=rf"is of polyrank '{__version__}', and this side has '0.0.9'"):
                opened(blob, "hello")
            return answer_to_another_version()

    lines.clients["c2"].answer = older  # type: ignore[method-assign]
    clients = remote(lines, tmp_path)
    assert list(clients.profiles()) == ["c1"]
    reason = f"is of polyrank '0.0.9', and this side has '{__version__}': server and sites need the same version"
    (line,) = [line for line in clients.audit.lines() if line["event"] == "refused"]
    assert (line["client"], line["reason"]) == ("c2", reason)
    assert clients.left_out() == {"c2": f"not let in: {reason}"}
    waiting = remote(lines, tmp_path, replace(FAST, clients=2))
    with pytest.raises(TooFewError, match=r"connected: c1; c2: not let in: is of polyrank '0\.0\.9'"):
        waiting.profiles()


def test_a_message_from_before_versions_were_stated_is_of_none(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = zlib.compress(b'{"kind": "hello", "model": {}}')
    with pytest.raises(VersionError, match="is of no stated version of polyrank"):
        opened(b"PRNK\x01" + len(packed).to_bytes(4, "big") + packed, "hello")
