"""Messages: what is encoded is what is read, in the bytes that the cost model predicts."""

import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyrank.core.costs import download_bytes, upload_bytes
from polyrank.core.lowrank import Adapter, LowRank, truncate
from polyrank.core.rng import stream, torch_generator
from polyrank.core.types import LocalTraining, ModelSpec, Query, ServerState, TailPenalty, Task, Update
from polyrank.engines.encodings import CODECS, Encoding
from polyrank.engines.letters import ask_scores, decode_query
from polyrank.engines.wire import (
    Sent,
    WireError,
    decode_task,
    decode_update,
    digest,
    encode_task,
    encode_update,
    most_bytes,
    opened,
)
from polyrank.version import __version__

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
SIZE = st.integers(1, 9)
LAYER = st.tuples(SIZE, SIZE, SIZE, st.sampled_from([0.5, 1.0, 1 / 3, 2**0.5]))
DENSE = st.one_of(st.just(()), st.tuples(st.integers(0, 9)), st.tuples(SIZE, SIZE))
ENCODING = st.sampled_from(sorted(CODECS))
FACTORS = st.sampled_from(["A", "B", "AB"])


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    """Layers of unequal shapes, ranks and scales, dense parameters of any dimension; perhaps none of either."""
    generator = torch_generator(stream(draw(st.integers(0, 999)), "wire"))
    layers = {
        name: LowRank(normal(generator, rank, d_in), normal(generator, d_out, rank), scale)
        for name, (d_out, d_in, rank, scale) in draw(st.dictionaries(NAMES, LAYER, max_size=4)).items()
    }
    dense = draw(st.dictionaries(NAMES, DENSE, max_size=3))
    return Adapter(layers, {name: normal(generator, *shape) for name, shape in dense.items()})


@st.composite
def tasks(draw: st.DrawFn) -> Task:
    local = LocalTraining(
        steps=draw(st.none() | st.integers(1, 9)),
        lr=draw(st.floats(1e-6, 1.0)),
        clip=draw(st.none() | st.floats(0.1, 10)),
        optimizer=draw(st.sampled_from(["adamw", "sgd"])),
    )
    penalty = draw(st.none() | st.builds(TailPenalty, st.floats(0, 1), st.floats(0.1, 0.99), st.booleans()))
    round_, seed = draw(st.integers(0, 99)), draw(st.integers(0, 2**40))
    return Task(round_, draw(adapters()), draw(adapters()), draw(FACTORS), local, penalty, seed)


def parts(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    for name, x in adapter.layers.items():
        yield from ((f"{name}/A", x.A), (f"{name}/B", x.B))
    yield from adapter.dense.items()


def assert_same(one: Adapter, other: Adapter) -> None:
    """To the byte, in the same order, under the same scales."""
    assert [(n, x.scale) for n, x in one.layers.items()] == [(n, x.scale) for n, x in other.layers.items()]
    assert list(one.dense) == list(other.dense)
    for (_, x), (_, y) in zip(parts(one), parts(other), strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        assert x.contiguous().numpy().tobytes() == y.contiguous().numpy().tobytes()


def trained(task: Task, by: float, prune: Mapping[str, int] | None = None) -> Adapter:
    """What a client makes of a task: the factors it trains moved, rows beyond its ranks dropped."""
    generator = torch_generator(stream(1, "trained"))
    layers = {}
    for name, x in task.adapter.layers.items():
        A = x.A + by * normal(generator, *x.A.shape) if "A" in task.factors else x.A
        B = x.B + by * normal(generator, *x.B.shape) if "B" in task.factors else x.B
        layers[name] = truncate(LowRank(A, B, x.scale), (prune or {}).get(name, x.rank))
    dense = {name: x + by * normal(generator, *x.shape) for name, x in task.adapter.dense.items()}
    return Adapter(layers, dense)


# --- laws


@settings(max_examples=150, deadline=None)
@given(task=tasks(), client=NAMES, down=ENCODING, up=ENCODING)
def test_a_task_is_read_as_it_was_written(task: Task, client: str, down: Encoding, up: Encoding) -> None:
    sent = encode_task(task, client, down, up, model={"kind": "text"})
    read, header = decode_task(sent.blob)
    assert (header["client"], header["reply"], header["model"]) == (client, up, {"kind": "text"})
    assert replace(read, adapter=task.adapter, frozen=task.frozen) == task
    assert_same(read.adapter, sent.read.adapter)
    assert_same(read.frozen, sent.read.frozen)
    assert sent.task is task
    assert sent.digest == digest(sent.blob)
    if down == "float32":
        assert sent.read is task
        assert_same(read.adapter, task.adapter)
        assert_same(read.frozen, task.frozen)


@settings(max_examples=200, deadline=None)
@given(task=tasks(), down=ENCODING, up=ENCODING, by=st.sampled_from([0.0, 1e-3, 1.0]), data=st.data())
def test_an_update_is_read_as_it_was_written(
    task: Task, down: Encoding, up: Encoding, by: float, data: st.DataObject
) -> None:
    sent = encode_task(task, "me", down, up)
    read, _ = decode_task(sent.blob)
    prune = {}
    if task.penalty is not None and task.penalty.prune:
        prune = {name: data.draw(st.integers(1, x.rank)) for name, x in task.adapter.layers.items()}
    metrics = {"loss": 0.25, "steps": 3.0, "seconds": 1.5, "of its own": 4.0}
    update = Update("me", trained(read, by, prune), 12, task.factors, metrics)
    blob = encode_update(update, read, digest(sent.blob), up)
    assert len(blob) <= most_bytes(sent)
    found, lost = decode_update(blob, sent, "me")
    assert (found.client, found.examples, found.factors) == ("me", 12.0, task.factors)
    assert found.metrics == {"loss": 0.25, "steps": 3.0, "seconds": 1.5}
    assert [x.rank for x in found.adapter.layers.values()] == [x.rank for x in update.adapter.layers.values()]
    for name, x in found.adapter.layers.items():
        was = sent.task.adapter.layers[name]
        for factor, start in (("A", was.A[: x.rank]), ("B", was.B[:, : x.rank])):
            if factor not in task.factors:
                assert torch.equal(getattr(x, factor), start)
    header, _ = opened(blob, "update")
    if up == "float32":
        assert lost == 0
        assert "error" not in header
    else:
        assert lost == header["error"]
    if up == down == "float32":
        assert_same(found.adapter, update.adapter)
        return
    # What moved is what the client moved from what it read, and is added to what the server sent.
    starts = trained(read, 0.0, prune), trained(task, 0.0, prune)
    four = zip(*map(parts, (update.adapter, found.adapter, *starts)), strict=True)
    moves = [(x - r, y - s) for (_, x), (_, y), (_, r), (_, s) in four]
    went = math.hypot(*(float(torch.linalg.vector_norm(x)) for x, _ in moves))
    off = math.hypot(*(float(torch.linalg.vector_norm(x - y)) for x, y in moves))
    # What was sent is added to the movement in float32, which rounds once more.
    rounding = 1e-6 * math.hypot(*(float(torch.linalg.vector_norm(x)) for _, x in parts(update.adapter)))
    assert off == pytest.approx(lost * went, abs=rounding + 1e-12)
    assert (
        lost <= {"float32": 0.0, "bfloat16": 2.0**-8, "int8": 8 * 0.5 / 127, "nf4": 1.0}[up]
    )  # 64 values, each off by half a step


@settings(max_examples=60, deadline=None)
@given(task=tasks(), up=ENCODING)
def test_only_what_was_trained_travels(task: Task, up: Encoding) -> None:
    sent = encode_task(task, "me", reply=up)
    blob = encode_update(Update("me", trained(task, 1.0), 3, task.factors), task, sent.digest, up)
    _, body = opened(blob, "update")
    layers = task.adapter.layers.values()
    sizes = [getattr(x, factor).numel() for x in layers for factor in task.factors]
    sizes += [x.numel() for x in task.adapter.dense.values()]
    assert int.from_bytes(body[:8], "little") + 8 + CODECS[up].nbytes(sizes) == len(body)


@pytest.mark.parametrize(
    ("name", "figure"),
    [
        *(("loss", x) for x in (1e308, 1.1e9, -1.0, math.nan, math.inf)),
        ("seconds", 1e308),
        ("memory", 1e17),
        ("steps", -1.0),
    ],
)
def test_figures_of_a_client_are_bounded(name: str, figure: float, random_adapter: Any) -> None:
    task = Task(0, random_adapter(ModelSpec({"q": (6, 5)}), (2,)), Adapter(), "AB", LocalTraining(), None, 0)
    sent = encode_task(task, "me")
    blob = encode_update(Update("me", task.adapter, 3, metrics={name: 1.0}), task, sent.digest)
    header, body = opened(blob, "update")
    text = json.dumps({**header, "polyrank": __version__, "metrics": {name: figure}}).encode()
    packed = zlib.compress(text)
    forged = struct.pack(">4sBI", b"PRNK", 1, len(packed)) + packed + body
    with pytest.raises(WireError, match=f"metrics: {name}: .* is not a finite number from 0|is not JSON") as caught:
        decode_update(forged, sent, "me")
    assert len(str(caught.value)) < 200


@settings(max_examples=60, deadline=None)
@given(adapter=adapters(), folded=adapters(), seed=st.integers(0, 2**31), samples=st.none() | st.integers(1, 99))
def test_a_question_of_importance_is_read_as_it_was_written(
    adapter: Adapter, folded: Adapter, seed: int, samples: int | None
) -> None:
    state = ServerState(3, adapter, folded)
    asked = Query("fisher", "clients", samples, "sampled", "squared", "logit", 3, seed, ("a", "b"))
    query, read, _ = decode_query(ask_scores(asked, state, "a", {"kind": "text"}))
    assert query == replace(asked, cohort=())
    assert_same(read.adapter, adapter)
    assert_same(read.folded, folded)


def test_the_same_message_is_written_the_same(random_adapter: Any) -> None:
    task = Task(1, random_adapter(ModelSpec({"q": (6, 5)})), Adapter(), "AB", LocalTraining(), None, 0)
    assert encode_task(task, "a").blob == encode_task(task, "a").blob
    assert encode_task(task, "a").digest != encode_task(task, "b").digest


def test_what_is_not_trained_on_the_cpu_in_float32_arrives_as_if_it_were() -> None:
    adapter = Adapter({"q": LowRank(torch.randn(2, 3).double(), torch.randn(2, 4).T.requires_grad_(), 1.0)})
    task = Task(0, adapter, Adapter(), "AB", LocalTraining(), None, 0)
    read, _ = decode_task(encode_task(task, "a").blob)
    assert torch.equal(read.adapter.layers["q"].A, adapter.layers["q"].A.float())
    assert torch.equal(read.adapter.layers["q"].B, adapter.layers["q"].B)
    assert not read.adapter.layers["q"].B.requires_grad


# --- sizes


def minilm() -> ModelSpec:
    """384 wide, 6 layers, adapted throughout, with a head for two classes."""
    shapes = {"query": (384, 384), "key": (384, 384), "value": (384, 384), "out": (384, 384)}
    shapes |= {"up": (1536, 384), "down": (384, 1536)}
    modules = {f"bert.encoder.layer.{i}.{name}": shape for i in range(6) for name, shape in shapes.items()}
    return ModelSpec(modules, {"classifier.weight": 768, "classifier.bias": 2})


def digits() -> ModelSpec:
    """64 wide, 4 layers, likewise, with a head for ten."""
    shapes = {f"attention.{name}_proj": (64, 64) for name in "qkvo"} | {"mlp.fc1": (128, 64), "mlp.fc2": (64, 128)}
    modules = {f"layers.{i}.{name}": shape for i in range(4) for name, shape in shapes.items()}
    return ModelSpec(modules, {"classifier.weight": 640, "classifier.bias": 10})


@pytest.mark.parametrize("factors", ["A", "B", "AB"])
@pytest.mark.parametrize("rank", [4, 8, 16])
def test_messages_are_as_long_as_the_cost_model_says(rank: int, factors: Any) -> None:
    for spec in (minilm(), digits()):
        ranks = dict.fromkeys(spec.modules, rank)
        generator = torch_generator(stream(rank, "sizes"))
        layers = {
            name: LowRank(normal(generator, rank, d_in), normal(generator, d_out, rank), 2.0)
            for name, (d_out, d_in) in spec.modules.items()
        }
        dense = {name: normal(generator, size) for name, size in spec.head.items()}
        task = Task(7, Adapter(layers, dense), Adapter(), factors, LocalTraining(), None, 0)
        sent = encode_task(task, "client_00012", model={"kind": "text", "classes": ["negative", "positive"]})
        metrics = {"loss": 0.6931471805599453, "steps": 120.0}
        blob = encode_update(Update("client_00012", task.adapter, 1234, factors, metrics), task, sent.digest)
        assert 1 < len(sent.blob) / download_bytes(spec, ranks) < 1.02
        assert 1 < len(blob) / upload_bytes(spec, ranks, factors) < 1.02
        small = encode_update(Update("client_00012", task.adapter, 1234, factors, metrics), task, sent.digest, "int8")
        assert len(small) < 0.3 * upload_bytes(spec, ranks, factors)
    whole = Sent(sent.blob, task, task, "float32")
    assert most_bytes(whole) < len(blob) + 25_000
