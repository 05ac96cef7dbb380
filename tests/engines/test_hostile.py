"""Messages from who means harm: each is refused for a reason, or is what an honest client could have sent."""

import json
import math
import resource
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from polyrank.core.federate import federate
from polyrank.core.gate import Gate
from polyrank.core.lowrank import Adapter, Factors, LowRank, truncate
from polyrank.core.rng import stream, torch_generator
from polyrank.core.types import (
    Client,
    ClientProfile,
    LocalTraining,
    ModelSpec,
    Query,
    RoundRecord,
    ServerState,
    TailPenalty,
    Task,
    Update,
)
from polyrank.engines.audit import Audit
from polyrank.engines.encodings import CODECS, Encoding
from polyrank.engines.exchange import Remote, Terms
from polyrank.engines.letters import (
    ask_profile,
    ask_scores,
    decode_profile,
    decode_query,
    decode_scores,
    encode_profile,
    encode_scores,
)
from polyrank.engines.post import Kind, Reply
from polyrank.engines.wire import (
    Sent,
    WireError,
    decode_task,
    decode_update,
    digest,
    encode_task,
    encode_update,
    frame,
    most_bytes,
)
from polyrank.methods import METHODS

SPEC = ModelSpec({"q": (48, 32), "v": (24, 48), "up": (96, 32)}, {"head": 60, "scale": 1})
FRAME = struct.Struct(">4sBI")
Edit = Callable[[dict[str, Any]], None]
Hostile = Callable[[Kind, bytes, bytes], list[bytes | None]]
TRUST = Gate(norm=10.0, reach=True, size_cap=3.0, clip=3.0)


def adapter_of(seed: int, rank: int = 4) -> Adapter:
    generator = torch_generator(stream(seed, "hostile"))
    layers = {
        name: LowRank(torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator), 2.0)
        for name, (d_out, d_in) in SPEC.modules.items()
    }
    return Adapter(layers, {"head": torch.randn(6, 10, generator=generator), "scale": torch.ones(())})


def sent_of(reply: Encoding = "float32", factors: Any = "AB", prune: bool = False, seed: int = 0) -> Sent:
    penalty = TailPenalty() if prune else None
    task = Task(3, adapter_of(seed), Adapter(), factors, LocalTraining(), penalty, seed)
    return encode_task(task, "me", reply=reply, model={"kind": "text"})


def honest(sent: Sent, client: Client = "me") -> bytes:
    task = sent.task
    layers = {name: replace(x, A=x.A + 0.1, B=x.B - 0.1) for name, x in task.adapter.layers.items()}
    if task.factors == "B":
        layers = {name: replace(x, A=task.adapter.layers[name].A) for name, x in layers.items()}
    if task.penalty is not None:
        layers = {name: truncate(x, 2 if name == "v" else 4) for name, x in layers.items()}
    dense = {name: tensor + 0.1 for name, tensor in task.adapter.dense.items()}
    update = Update(client, Adapter(layers, dense), 12, task.factors, {"loss": 0.5, "steps": 3.0})
    return encode_update(update, task, sent.digest, sent.reply)


SENT = {
    "float32": sent_of(),
    "int8": sent_of("int8"),
    "nf4": sent_of("nf4"),
    "bfloat16": sent_of("bfloat16"),
    "only B": sent_of(factors="B"),
    "pruned": sent_of(prune=True),
    "pruned int8": sent_of("int8", prune=True),
}


# --- what an attacker writes


def torn(blob: bytes) -> tuple[dict[str, Any], bytes]:
    """A message's header and its body."""
    _, _, length = FRAME.unpack_from(blob)
    return json.loads(zlib.decompress(blob[9 : 9 + length])), blob[9 + length :]


def sewn(text: bytes, body: bytes = b"", *, length: int | None = None, head: tuple[bytes, int] = (b"PRNK", 1)) -> bytes:
    packed = zlib.compress(text)
    return FRAME.pack(*head, len(packed) if length is None else length) + packed + body


def edited(blob: bytes, edit: Edit) -> bytes:
    header, body = torn(blob)
    edit(header)
    return sewn(json.dumps(header).encode(), body)


def bodied(blob: bytes, body: bytes) -> bytes:
    return sewn(json.dumps(torn(blob)[0]).encode(), body)


def nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


JUNK: list[Any] = [
    *(None, True, False, -1, 0, -0.0, 1, 1.0, 3.0, 1.5, 1e308, -1e308, 2**53 + 1, 2**63, 10**400, -(10**4000)),
    *("", "x", "1", "me", "\ud800", "x" * 5000, [], [1], [[]], {}, {"a": 1}, nested(400), {"a": nested(300)}),
    *([4, 4, 4], [4, 2, 4], [0, 4, 4], [5, 4, 4], [4, True, 4], [4.0, 4, 4], [4, 4], [4, 4, 4, 4], [10**9] * 3),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all that a header holds."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def put(path: tuple[Any, ...], value: Any) -> Edit:
    def edit(header: dict[str, Any]) -> None:
        inner: Any = header
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return edit


def without(path: tuple[Any, ...]) -> Edit:
    def edit(header: dict[str, Any]) -> None:
        inner: Any = header
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]

    return edit


def headers(blob: bytes, more: Collection[tuple[str, ...]] = ()) -> Iterator[bytes]:
    """Every part of a header replaced by what it must not be, or missing."""
    there = list(places(torn(blob)[0]))
    for path in [*there, *more]:
        yield from (edited(blob, put(path, value)) for value in JUNK)
    for path in there:
        yield edited(blob, without(path))


def texts(blob: bytes) -> Iterator[bytes]:
    """Headers that no JSON writer would write."""
    header, body = torn(blob)
    text = json.dumps(header)
    for word in ("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1" * 5000, "00", "'x'", "", "\x00", "nul"):
        for key in [key for key, value in header.items() if type(value) in (int, float)]:
            yield sewn(text.replace(f'"{key}": {header[key]}', f'"{key}": {word}', 1).encode(), body)
        yield sewn(text.replace("0.5", word, 1).encode(), body)
    for depth in (100, 950, 1000, 3000, 8000, 200_000):
        for opening, closing in (("[", "]"), ('{"a":', "}")):
            yield sewn((opening * depth + "1" + closing * depth).encode(), body)
            yield sewn((text[:-1] + ', "metrics": ' + opening * depth + "1" + closing * depth + "}").encode(), body)
    yield from (sewn(bad, body) for bad in (b"", b"1", b"[]", b'"x"', b"null", b"{", text.encode()[:-1], b"\xff\xfe"))
    yield from (sewn(text.encode(coding), body) for coding in ("utf-16", "utf-32", "utf-8-sig"))
    yield sewn((text[:-1] + ', "round": 4}').encode(), body)
    yield sewn((text[:-1] + "," + ",".join(f'"k{i}": []' for i in range(100_000)) + "}").encode(), body)
    yield sewn((text[:-1] + ', "metrics": [' + "[]," * 300_000 + "[]]}").encode(), body)


def frames(blob: bytes) -> Iterator[bytes]:
    """Lies of the frame: lengths, bombs, other messages."""
    header, body = torn(blob)
    text = json.dumps(header).encode()
    packed = zlib.compress(text)
    for length in (
        0,
        1,
        len(packed) - 1,
        len(packed) + 1,
        len(packed) + len(body),
        len(packed) + len(body) + 1,
        2**32 - 1,
    ):
        yield sewn(text, body, length=length)
    for head in ((b"PRNX", 1), (b"\x80\x04\x95\x00", 1), (b"PRNK", 0), (b"PRNK", 2), (b"PRNK", 255)):
        yield sewn(text, body, head=head)
    for filler in (b" ", b"[", b"\x00"):
        bomb = zlib.compress(text[:-1] + filler * 100_000_000 + b"}", 9)
        yield FRAME.pack(b"PRNK", 1, len(bomb)) + bomb + body
    for strange in (packed + packed, packed + b"x", packed[:-4], text, zlib.compress(packed), b""):
        yield FRAME.pack(b"PRNK", 1, len(strange)) + strange + body
    yield from (b"", b"P", blob[:8], blob[:9], blob * 2, blob + b"\x00", bytes(100_000), blob + bytes(60_000_000))


def bodies(blob: bytes) -> Iterator[bytes]:
    """Tensors of other names, types, shapes and sizes, and files that lie about them."""
    _, body = torn(blob)
    length = int.from_bytes(body[:8], "little")
    listing, data = json.loads(body[8 : 8 + length]), body[8 + length :]
    name = next(iter(listing))

    def lies(change: Mapping[str, Any], held: bytes = data) -> bytes:
        text = json.dumps({**listing, name: {**listing[name], **change}}).encode()
        return bodied(blob, len(text).to_bytes(8, "little") + text + held)

    for size in (0, 1, 7, length - 1, length + 1, 4096, 4097, len(body), 2**31, 2**63, 2**64 - 1):
        yield bodied(blob, size.to_bytes(8, "little") + body[8:])
    for shape in ([], [0], [-1], [1], [2**40], [2**62, 4], [2**63], [2**64], [0, 2**60], [1.5], "x", None, nested(500)):
        yield lies({"shape": shape})
    for offsets in ([0, 0], [0, 2**60], [4, 2], [-4, 0], [0], [], "x", [0, 2**64]):
        yield lies({"data_offsets": offsets})
    for dtype in ("F64", "F16", "BF16", "I8", "U8", "I64", "BOOL", "F32", "X9", None, 3):
        yield lies({"dtype": dtype})
    count = len(data) // 4
    values = torch.frombuffer(bytearray(data[: 4 * count]), dtype=torch.float32)
    for kind in (torch.float64, torch.float16, torch.int64, torch.bool, torch.int8, torch.uint8, torch.bfloat16):
        yield bodied(blob, save({name: values.to(kind)}))
    for tensors in (
        {"other": values},
        {name: values, "extra": torch.zeros(1)},
        {name: values, **{f"e{i}": torch.zeros(0) for i in range(20_000)}},
        {name: values[:-1]},
        {name: torch.cat([values, values])},
        {name: values.view(1, -1)},
        {name: values[:0]},
        {"codes": torch.zeros(count, dtype=torch.int8), "scales": torch.zeros(count)},
    ):
        yield bodied(blob, save(tensors))
    yield bodied(blob, save({name: values}, metadata={"x": "y" * 3000}))
    yield from (bodied(blob, junk) for junk in (b"", b"\x00", bytes(8), bytes(len(body)), b"\x80\x04" + body))
    for value in (math.nan, math.inf, -math.inf, 1e30, -1e30, 3e38, 1e-45):
        for width in (1, count):
            poisoned = bytearray(data)
            poisoned[: 4 * width] = struct.pack("<f", value) * width
            yield bodied(blob, body[: 8 + length] + bytes(poisoned))
            yield bodied(blob, body[: 8 + length] + bytes(data[: len(data) - 4 * width]) + bytes(poisoned[: 4 * width]))


def mutations(blob: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Bytes flipped, cut, doubled, moved and added anywhere; half the time in the header, before it is deflated."""
    rng = stream(seed, "mutations")
    header, body = torn(blob)
    text = json.dumps(header).encode()
    for number in range(count):
        data = np.frombuffer(text if number % 2 else blob, np.uint8).copy()
        # Most of a message is values, so that half of what is done is done at its beginning.
        top = len(data) if number % 4 < 2 else min(len(data), 200)
        at, to = sorted(int(x) for x in rng.integers(0, top, 2))
        way = int(rng.integers(7))
        if way < 2:
            spots = rng.integers(0, top, int(rng.integers(1, 9)))
            data[spots] ^= rng.integers(1, 256, len(spots)).astype(np.uint8)
        elif way == 2:
            data = data[:at]
        elif way == 3:
            data = np.concatenate([data, rng.integers(0, 256, int(rng.integers(1, 5000))).astype(np.uint8)])
        elif way == 4:
            data = np.concatenate([data[:at], data[to:]])
        elif way == 5:
            data = np.concatenate([data[:to], data[at:]])
        else:
            data[at:to] = data[at:to][::-1]
        yield sewn(data.tobytes(), body) if number % 2 else data.tobytes()


def others(sent: Sent) -> Iterator[bytes]:
    """Honest answers, to something else."""
    blob = honest(sent)
    yield honest(sent, "you")
    yield sent.blob
    yield ask_profile({"kind": "text"})
    yield encode_profile(ClientProfile(3), "base", sent.blob)
    another = encode_task(replace(sent.task, round=4), "me", reply=sent.reply)
    yield honest(another)
    yield honest(encode_task(sent.task, "you", reply=sent.reply), "me")
    yield honest(encode_task(replace(sent.task, seed=9), "me", reply=sent.reply))
    for reply in CODECS:
        if reply != sent.reply:
            yield encode_update(Update("me", sent.task.adapter, 3, sent.task.factors), sent.task, sent.digest, reply)
    trained: tuple[Factors, ...] = ("A", "B", "AB")
    for factors in trained:
        if factors != sent.task.factors:
            yield honest(sent._replace(task=replace(sent.task, factors=factors)))
    yield bodied(blob, torn(honest(SENT["only B"] if sent is not SENT["only B"] else SENT["float32"]))[1])
    yield frame({"kind": "update"})


MORE = [("ranks",), ("error",), ("metrics", "bytes_up"), ("metrics", "memory"), ("unknown",), ("__proto__",)]


def attacks(sent: Sent, seed: int) -> Iterator[bytes]:
    blob = honest(sent)
    yield from headers(blob, MORE)
    yield from texts(blob)
    yield from frames(blob)
    yield from bodies(blob)
    yield from others(sent)
    yield from mutations(blob, 300, seed)


# --- what becomes of it


def told(error: WireError) -> str:
    assert 0 < len(str(error)) < 1000
    return str(error)


def verdict(blob: bytes, sent: Sent) -> str:
    """Why a message is refused; nothing where it is used, and then it is what an honest client could have sent."""
    try:
        update, lost = decode_update(blob, sent, "me")
    except WireError as error:
        return told(error)
    task = sent.task
    assert update.client == "me"
    assert update.factors == task.factors
    assert type(update.examples) is float
    assert 0 < update.examples <= 2**53
    assert update.metrics.keys() <= {"loss", "steps", "seconds", "memory", "epsilon"}
    assert all(type(value) is float and 0 <= value < math.inf for value in (*update.metrics.values(), lost))
    assert list(update.adapter.layers) == list(task.adapter.layers)
    for name, x in update.adapter.layers.items():
        was = task.adapter.layers[name]
        assert (x.shape, x.scale, x.A.dtype, x.B.dtype) == (was.shape, was.scale, torch.float32, torch.float32)
        assert 1 <= x.rank <= was.rank
        assert x.rank == was.rank or (task.penalty is not None and task.penalty.prune)
        if task.factors == "B":
            assert torch.equal(x.A, was.A[: x.rank])
    assert [(n, y.shape) for n, y in update.adapter.dense.items()] == [
        (n, y.shape) for n, y in task.adapter.dense.items()
    ]
    # An honest client that trained to these values would be read the same.
    again, _ = decode_update(encode_update(update, task, sent.digest), sent._replace(reply="float32"), "me")
    assert (again.examples, again.metrics) == (update.examples, update.metrics)
    assert torch.equal(flat(again.adapter).view(torch.int32), flat(update.adapter).view(torch.int32))
    refused: dict[str, str] = {}
    passed = list(Gate().admitted({"me": task}, [update], refused.__setitem__))
    finite = bool(torch.isfinite(flat(update.adapter)).all())
    assert passed or refused
    assert finite or not passed
    return refused.get("me", "")


def flat(adapter: Adapter) -> torch.Tensor:
    values = [y.flatten() for x in adapter.layers.values() for y in (x.A, x.B)]
    return torch.cat([*values, *(y.flatten() for y in adapter.dense.values())])


@pytest.mark.parametrize("name", SENT)
def test_every_hostile_update_is_refused_or_is_honest(name: str) -> None:
    sent = SENT[name]
    assert verdict(honest(sent), sent) == ""
    reasons = [verdict(blob, sent) for blob in attacks(sent, list(SENT).index(name))]
    assert len(reasons) > 1000
    assert sum(reason != "" for reason in reasons) > 0.7 * len(reasons)
    # So that it is known that the attacks get past each other's checks.
    said = " ".join(reasons)
    for word in (
        "cut short",
        "cannot be read",
        "examples",
        "metrics",
        "round",
        "task",
        "client",
        "unknown parts",
        "is due",
    ):
        assert word in said, word


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(SENT)),
    key=st.sampled_from(["kind", "round", "client", "task", "examples", "metrics", "ranks", "error", "more"]),
    value=VALUES | st.dictionaries(st.sampled_from(["loss", "steps", "memory", "epsilon"]), VALUES),
)
def test_a_header_may_hold_anything(name: str, key: str, value: Any) -> None:
    sent = SENT[name]
    verdict(edited(honest(sent), put((key,), value)), sent)


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(sorted(SENT)), data=st.binary(max_size=400), keep=st.integers(0, 9))
def test_bytes_may_be_anything(name: str, data: bytes, keep: int) -> None:
    sent = SENT[name]
    for blob in (honest(sent)[:keep] + data, sewn(data), bodied(honest(sent), data)):
        assert verdict(blob, sent)


def test_memory_stays_within_a_few_honest_messages() -> None:
    """Of a message of 1 MB, so that what an attack costs is seen beside what any message does."""
    wide = Adapter({"q": LowRank(torch.ones(64, 2048), torch.ones(2048, 64))})
    task = Task(0, wide, Adapter(), "AB", LocalTraining(), None, 0)
    sent = encode_task(task, "me")
    blob = encode_update(Update("me", task.adapter, 3), task, sent.digest)
    allowed, worst = 4 * len(blob), (0, b"")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = [*texts(blob), *bodies(blob), *frames(blob)]
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        for attack in made:
            tracemalloc.reset_peak()
            start, _ = tracemalloc.get_traced_memory()
            with suppress(WireError):
                decode_update(attack, sent, "me")
            worst = max(worst, (tracemalloc.get_traced_memory()[1] - start, attack[:200]))
    finally:
        tracemalloc.stop()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert worst[0] < allowed, worst
    assert after - max(before, held) < 4 * allowed / 1024
    assert most_bytes(sent) < len(blob) + 30_000


# --- the other messages


ASKED = ask_profile({"kind": "text", "classes": ["a", "b"]})
PROFILE = encode_profile(ClientProfile(10, rank=4, memory=1e9, uplink=1e6, downlink=2.5e6, flops=1e12), "base", ASKED)
STATE = ServerState(3, adapter_of(0), adapter_of(1))
QUESTION = ask_scores(Query("fisher", "clients", 8, round=3, seed=1), STATE, "me", {"kind": "text"})
SCORES = encode_scores(dict.fromkeys(SPEC.modules, 0.5), 10, QUESTION)


def as_profile(blob: bytes) -> None:
    found = decode_profile(blob, ASKED, "base")
    values = [value for value in vars(found).values() if value not in (None, "")]
    assert type(found.examples) is int
    assert found.rank is None or type(found.rank) is int
    assert all(type(value) in (int, float) and 0 <= value <= 2**53 for value in values)


def as_scores(blob: bytes) -> None:
    scores, examples = decode_scores(blob, QUESTION, STATE.adapter, "me")
    assert scores.keys() == SPEC.modules.keys()
    assert type(examples) is int
    assert math.isfinite(examples * sum(scores.values()))
    assert all(value >= 0 for value in scores.values())


def as_task(blob: bytes) -> None:
    task, header = decode_task(blob)
    assert isinstance(header["client"], str)
    assert task.factors in ("A", "B", "AB")
    assert header["reply"] in CODECS
    assert task.round >= 0


def as_query(blob: bytes) -> None:
    query, state, _ = decode_query(blob)
    assert query.kind in ("fisher", "gradient")
    assert query.samples is None or query.samples >= 0
    assert state.round >= 0


@pytest.mark.parametrize(
    ("decode", "blob", "most"),
    [
        (as_profile, PROFILE, 1 << 20),
        (as_scores, SCORES, 1 << 20),
        (as_task, encode_task(SENT["pruned"].task, "me", model={"kind": "text"}).blob, None),
        (as_task, encode_task(SENT["pruned"].task, "me", "nf4", "int8").blob, None),
        (as_query, QUESTION, None),
    ],
    ids=["profile", "scores", "task", "lossy task", "query"],
)
def test_every_other_message_is_read_or_refused(decode: Callable[[bytes], None], blob: bytes, most: int | None) -> None:
    decode(blob)
    made = [*headers(blob, [("unknown",)]), *texts(blob), *frames(blob), *mutations(blob, 300, 9)]
    made += bodies(blob) if decode is not as_profile and decode is not as_scores else [blob + b"x"]
    refused, worst = 0, (0, b"")
    for attack in made:
        if most:
            tracemalloc.start()
        try:
            decode(attack)
        except WireError as error:
            refused += bool(told(error))
        if most:
            worst = max(worst, (tracemalloc.get_traced_memory()[1], attack[:99]))
            tracemalloc.stop()
    assert refused > len(made) / 3
    # The longest attacks are copied once, to be cut in two.
    assert worst[0] < (most or math.inf) + max(map(len, made)), worst


# --- through a round


class Post:
    """A transport to three clients in memory; `hostile` is what becomes of c's answers, None is silence."""

    def __init__(self, hostile: Hostile) -> None:
        self.hostile, self.count, self.waiting = hostile, 0, []  # type: Any, int, list[Reply]

    def sites(self) -> dict[Client, int]:
        return {"a": 1, "b": 2, "c": 3}

    def answer(self, kind: Kind, client: Client, blob: bytes) -> bytes:
        if kind == "profile":
            return encode_profile(ClientProfile(10, rank=4), "base", blob)
        if kind == "measure":
            return encode_scores(dict.fromkeys(SPEC.modules, 0.5 + (client == "c")), 10, blob)
        task, header = decode_task(blob)
        layers = {n: replace(x, A=x.A + 0.1, B=x.B - 0.1) for n, x in task.adapter.layers.items()}
        dense = {n: y + 0.1 for n, y in task.adapter.dense.items()}
        update = Update(client, Adapter(layers, dense), 10, task.factors, {"loss": 0.5, "steps": 3.0})
        return encode_update(update, task, digest(blob), header["reply"])

    def send(self, kind: Kind, letters: Mapping[Client, bytes], seconds: float) -> dict[str, Client]:
        ids = {}
        for client, blob in letters.items():
            self.count += 1
            name = f"m{self.count}"
            ids[name] = client
            own = self.answer(kind, client, blob)
            replies = self.hostile(kind, own, blob) if client == "c" else [own]
            self.waiting += [Reply(name, reply) for reply in replies if reply is not None]
        return ids

    def receive(self, messages: Collection[str]) -> list[Reply]:
        found, self.waiting = self.waiting, []
        return found  # also what nobody waits for


def one_round(folder: Path, hostile: Hostile) -> tuple[ServerState, RoundRecord, Remote]:
    folder.mkdir()
    terms = Terms(clients=2, wait=0.05, deadline=0.05, quorum=0.6, poll=0.001)
    clients = Remote(
        Post(hostile), {"kind": "text"}, "base", terms, Audit(folder / "audit.jsonl"), lambda q, s: {}, b"s"
    )
    state = ServerState(0, adapter_of(0))
    rounds = federate(METHODS["flexlora"](), state, clients, SPEC, LocalTraining(lr=0.1), rounds=1, gate=TRUST)
    state, record = next(rounds)
    clients.settle(record)
    return state, record, clients


def in_a_round(blob: bytes, sent: bytes) -> list[bytes | None]:
    """A few attacks of every kind on an honest answer, each alone."""
    kinds = [headers(blob, MORE), texts(blob), frames(blob), bodies(blob), mutations(blob, 60, 1)]
    found: list[bytes | None] = [attack for kind in kinds for attack in list(kind)[::9]]
    return [*found, sent, ASKED]


def test_a_round_with_a_hostile_client_is_the_round_without_it(tmp_path: Path) -> None:
    def silent(kind: Kind, own: bytes, sent: bytes) -> list[bytes | None]:
        return [own if kind == "profile" else None]

    without, record, _ = one_round(tmp_path / "without", silent)
    assert sorted(record.bytes_up) == ["a", "b"]
    seen: list[bytes | None] = []

    def watched(kind: Kind, own: bytes, sent: bytes) -> list[bytes | None]:
        if kind == "fit":
            seen.extend(in_a_round(own, sent))
        return [own]

    together, _, _ = one_round(tmp_path / "together", watched)
    assert not torch.equal(flat(together.adapter), flat(without.adapter))
    refused = 0
    for number, attack in enumerate(seen):

        def hostile(kind: Kind, own: bytes, sent: bytes, attack: bytes | None = attack) -> list[bytes | None]:
            return [attack if kind == "fit" else own]

        state, record, clients = one_round(tmp_path / str(number), hostile)
        lines = [line for line in clients.audit.lines() if line["client"] == "c" and line["round"] == 0]
        if "c" in record.bytes_up:
            assert [line["event"] for line in lines] == ["received", "accepted"]
            continue
        refused += 1
        assert torch.equal(flat(state.adapter), flat(without.adapter))
        assert sorted(record.bytes_up) == ["a", "b"]
        assert lines[-1]["event"] == "refused"
        assert lines[-1]["reason"]
        assert lines[-1]["hash"] == digest(attack or b"")
    assert refused > 80


def test_answers_that_nobody_waits_for_change_nothing(tmp_path: Path) -> None:
    """Twice the same, to another's message, and after what was refused."""
    honest_, _, _ = one_round(tmp_path / "honest", lambda kind, own, sent: [own])

    def twice(kind: Kind, own: bytes, sent: bytes) -> list[bytes | None]:
        return [own, own, b"", sent] if kind == "fit" else [own, own]

    state, record, clients = one_round(tmp_path / "twice", twice)
    assert torch.equal(flat(state.adapter), flat(honest_.adapter))
    assert sorted(record.bytes_up) == ["a", "b", "c"]
    reasons = [line["reason"] for line in clients.audit.lines() if line["event"] == "refused"]
    assert reasons.count("answers a message that nobody waits for") == 3


def test_hostile_profiles_and_scores_leave_the_others(tmp_path: Path) -> None:
    def measured(name: str, hostile: Hostile) -> tuple[Any, Any, Remote]:
        folder = tmp_path / name
        folder.mkdir()
        terms = Terms(clients=2, wait=0.05, deadline=0.02, poll=0.001)
        clients = Remote(
            Post(hostile), {"kind": "text"}, "base", terms, Audit(folder / "audit.jsonl"), lambda q, s: {}, b"s"
        )
        found = clients.profiles()
        scores = clients.measure(Query("fisher", "clients", cohort=("a", "b", "c")), STATE)
        return found, scores, clients

    attacks_: dict[Kind, list[bytes]] = {"profile": [], "measure": []}

    def watched(kind: Kind, own: bytes, sent: bytes) -> list[bytes | None]:
        made = [*headers(own), *texts(own), *list(frames(own))[:-1], *mutations(own, 40, 2)]
        attacks_[kind] = made[::23]
        return [own]

    profiles, scores, _ = measured("honest", watched)
    assert sorted(profiles) == ["a", "b", "c"]
    assert scores["q"] == pytest.approx((0.5 + 0.5 + 1.5) / 3)
    _, without, _ = measured("without", lambda kind, own, sent: [own if kind == "profile" else None])
    refused = 0
    for which, made in attacks_.items():
        for number, attack in enumerate(made):

            def hostile(
                kind: Kind, own: bytes, sent: bytes, attack: bytes = attack, which: Kind = which
            ) -> list[bytes | None]:
                return [attack if kind == which else own]

            profiles, scores, clients = measured(f"{which}{number}", hostile)
            lines = [line for line in clients.audit.lines() if line["client"] == "c" and line["event"] == "refused"]
            if lines:
                refused += 1
                assert lines[0]["reason"]
                assert sorted(profiles) == (["a", "b"] if which == "profile" else ["a", "b", "c"])
                assert which == "profile" or scores == without
    assert refused > 20
