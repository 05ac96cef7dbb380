"""Every family of the table: clients side by side, examples side by side, and kept rows, against each by itself."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny
from families import FAMILIES, RATE, RATES
from polyrank.core.lowrank import Adapter, LowRank
from polyrank.core.rng import stream, torch_generator
from polyrank.core.types import LocalTraining, Task, Update
from polyrank.data import CausalSplit, ImageSplit, TextSplit
from polyrank.data.causal import IGNORED
from polyrank.errors import InputError
from polyrank.local.attach import hooked
from polyrank.local.base import Base
from polyrank.local.cohort import Job
from polyrank.local.data import Examples
from polyrank.local.dpsgd import _Trained, refuse_unsound
from polyrank.local.grouping import OVERHEAD
from polyrank.local.heads import stackable
from polyrank.local.padding import filled_up
from polyrank.local.prefix import Prefixes
from polyrank.local.probe import side_by_side
from polyrank.local.trainer import prepare, train, train_together

WIDTH = 16  # positions of the longest text there can be
SHARES = {"a": np.arange(5), "b": np.arange(5, 9), "c": np.arange(9, 15)}
LENGTHS = {"a": (2, 5), "b": (7, 11), "c": (2, 11)}  # words of a text, from and below
RANKS = {"a": 1, "b": 4, "c": 2}
LOCAL = LocalTraining(steps=2, batch=3, optimizer="sgd", lr=RATE, precision="fp32")
TOGETHER, EXAMPLES = 1e-4, 1e-5
LEAST = 1e-4  # norm of what is compared: much smaller, and rounding would hide what is wrong


@dataclass(frozen=True)
class World:
    """A family's model, data that suit it, and tasks of unequal ranks.

    Attributes:
        reason: why adapters do not go side by side, without dropout; None where they do.
    """

    base: Base
    data: Examples
    reason: str | None

    @cached_property
    def trains_head(self) -> bool:
        return stackable(self.base.modules, self.base.head)

    def adapter(self, rank: int, seed: int, blocks: int = 99) -> Adapter:
        """Random layers of the last so many blocks, and the head where a stack of it runs."""
        draws = torch_generator(stream(seed, "families"))
        top = self.base.blocks[-blocks:]
        names = [n for n in self.base.spec.modules if blocks == 99 or any(n.startswith(f"{block}.") for block in top)]
        layers = {}
        for name in names:
            d_out, d_in = self.base.spec.modules[name]
            r = min(rank, d_out, d_in)
            A, B = torch.randn(r, d_in, generator=draws), torch.randn(d_out, r, generator=draws)
            layers[name] = LowRank(A / d_in**0.5, 0.2 * B / r**0.5, 0.5)
        return Adapter(layers, self.base.initial_head() if self.trains_head else {})

    def jobs(self, count: int, **local: object) -> list[Job]:
        """Of the first clients."""
        settings = replace(LOCAL, **{"lr": RATES.get(str(self.base.info.base), RATE), **local})
        tasks = {
            c: Task(0, self.adapter(RANKS[c], i), Adapter(), "AB", settings, None, 7) for i, c in enumerate(SHARES)
        }
        return [prepare(tasks[c], c, SHARES[c], self.data) for c in list(SHARES)[:count]]


def split(kind: str) -> Examples:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 15)
    if kind == "image":
        return ImageSplit(rng.integers(0, 256, (15, 3, 32, 32), dtype=np.uint8), labels, (0.5,) * 3, (0.5,) * 3)
    texts = [[2, *rng.integers(5, 45, rng.integers(*LENGTHS[c])).tolist(), 3] for c, own in SHARES.items() for _ in own]
    ids, offsets = np.concatenate(texts).astype(np.int32), np.cumsum([0, *map(len, texts)])
    if kind == "causal":
        return CausalSplit(ids, offsets, np.ones(15, np.int64), labels, 0)
    return TextSplit(ids, offsets, labels, 0)


@pytest.fixture(scope="module", params=FAMILIES)
def world(request: pytest.FixtureRequest) -> World:
    family = FAMILIES[request.param]
    base = Base(family.model("cpu"), "all-linear", name=request.param, tokens=WIDTH, kind=family.kind, image_size=32)
    data = filled_up(base, {"train": split(family.kind)}, WIDTH)["train"]
    return World(base, data, side_by_side(base, data))


@pytest.fixture
def steep(world: World) -> World:
    """A family whose layers a step moves by more than rounding: not MobileViT, through whose untrained convolutions
    hardly any gradient comes; `side_by_side` has compared its gradients themselves."""
    if world.base.info.base == "mobilevit":
        pytest.skip("a step of an untrained mobilevit moves its layers by rounding alone")
    return world


def changes(job: Job, update: Update) -> dict[str, Tensor]:
    """What training has changed, by tensor."""
    sent, now = job.task.adapter, update.adapter
    found = {f"{n}.{f}": getattr(now.layers[n], f) - getattr(x, f) for n, x in sent.layers.items() for f in "AB"}
    return found | {n: now.dense[n] - tensor for n, tensor in sent.dense.items()}


def gap(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest relative difference of a layer's factor, or of a dense parameter.

    One that hardly counts is held against a tenth of the largest of its kind.
    """
    assert found.keys() == expected.keys()
    gaps = []
    for kind in (True, False):
        own = {n: t for n, t in expected.items() if n.endswith((".A", ".B")) == kind}
        least = 0.1 * max((float(t.norm()) for t in own.values()), default=1.0)
        assert least > LEAST
        gaps += [float((found[n] - t).norm()) / max(float(t.norm()), least) for n, t in own.items()]
    return max(gaps)


def test_clients_side_by_side_train_as_each_alone(steep: World) -> None:
    alone = [changes(job, train_together(steep.base, [job], steep.data)[0]) for job in steep.jobs(3)]
    if steep.reason is not None:
        assert steep.reason.startswith(tuple(steep.base.modules))
        return
    for count in (2, 3):
        jobs = steep.jobs(count)
        for job, update, expected in zip(jobs, train_together(steep.base, jobs, steep.data), alone, strict=False):
            assert gap(changes(job, update), expected) < TOGETHER


def test_with_dropout_and_blocks_that_run_again(steep: World) -> None:
    """Blocks that run again in the backward pass, and clients beside one another, meet the masks of each alone."""
    jobs, again = steep.jobs(3, dropout=0.2), steep.jobs(3, dropout=0.2, checkpointing=True)
    alone = [changes(job, train_together(steep.base, [job], steep.data)[0]) for job in jobs]
    together = side_by_side(steep.base, steep.data, 0.2) is None
    updates = train_together(steep.base, again, steep.data) if together else []
    first = train_together(steep.base, again[:1], steep.data)
    for job, update, expected in zip(again[:1] + again, first + updates, alone[:1] + alone, strict=False):
        assert gap(changes(job, update), expected) < TOGETHER
    plain = train_together(steep.base, steep.jobs(1), steep.data)[0]
    assert gap(changes(jobs[0], plain), alone[0]) > 10 * TOGETHER


def test_gradients_of_examples_are_those_of_one_by_one(world: World) -> None:
    chosen = np.array([0, 6, 10, 14])
    adapter = world.adapter(2, 5)
    expected = [one_by_one(world, adapter, example) for example in chosen]
    task = Task(0, adapter, Adapter(), "AB", LOCAL, None, 0)
    if any(isinstance(module, nn.BatchNorm2d) for module in world.base.modules.values()):
        with pytest.raises(InputError, match="batch normalisation"):
            refuse_unsound(world.base, adapter.dense)
        return
    at_once = [chosen] if world.reason is None else [chosen[i : i + 1] for i in range(len(chosen))]
    trained = _Trained(world.base, task, 0, len(chosen))

    with hooked(trained.live, world.base.modules):
        parts = [dict(zip(trained.tensors, trained.gradients(part, world.data), strict=True)) for part in at_once]
    for i, gradients in enumerate(expected):
        part, row = (parts[0], i) if len(parts) == 1 else (parts[i], 0)
        found = {f"{n}.{k}" if k != "dense" else n: g[row] for (k, n), g in part.items()}
        assert gap(found, gradients) < EXAMPLES


def one_by_one(world: World, adapter: Adapter, example: int) -> dict[str, Tensor]:
    """The gradients of an example's mean loss, by a plain call of the model."""
    batch = world.data.batch(np.array([example]))
    with world.base.attached(adapter, None, "AB") as model:
        logits, labels = model(batch), batch["labels"]
        if labels.ndim == 2:
            logits, labels = logits[0, :-1], labels[0, 1:]
        F.cross_entropy(logits, labels, ignore_index=IGNORED).backward()
        named = {f"{n}.{f}": getattr(model, f)[n] for n in model.A for f in "AB"} | model.dense
        return {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in named.items()}


def test_kept_rows_change_nothing(world: World) -> None:
    task = Task(0, world.adapter(2, 5, blocks=1), Adapter(), "AB", LOCAL, None, 7)
    prefix = Prefixes(world.base, world.data, 1e9).of(task, "c", SHARES["c"])
    if prefix is None:
        return
    with_rows, without = (train(world.base, task, "c", world.data, SHARES["c"], p) for p in (prefix, None))
    job = prepare(task, "c", SHARES["c"], world.data)
    assert gap(changes(job, with_rows), changes(job, without)) < TOGETHER


@pytest.mark.parametrize(("family", "kind"), [("deberta-v2", "text"), ("swinv2", "image")])
def test_a_run_of_a_model_that_is_asked_and_says_no_trains_clients_alone(
    family: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FAMILIES[family].model("cpu").save_pretrained(tmp_path / "model")
    if kind == "text":
        tiny.tokenizer(tmp_path / "model")
    file = tiny.experiment(tmp_path, tmp_path / "model", kind, **({"image_size": 32} if kind == "image" else {}))
    written = json.loads(file.read_text())
    written["model"]["targets"] = "all-linear"
    sizes: list[int] = []

    def counted(base: Base, jobs: list[Job], *others: Any) -> list[Update]:
        sizes.append(len(jobs))
        return train_together(base, jobs, *others)

    monkeypatch.setattr("polyrank.engines.simulator.train_together", counted)
    monkeypatch.setitem(OVERHEAD, "cpu", 1e15)  # a pass that is shared is always the cheaper one
    file.write_text(json.dumps(written))
    assert tiny.polyrank("run", file, "--out", tmp_path / "run").exit_code == 0
    assert sizes == [1, 1]
    file.write_text(json.dumps(written | {"simulation": {"together": 4096}}))
    message = tiny.refused(file, "run")
    assert "simulation.together: 4096: clients cannot share a pass of this model" in message
    assert "its input does not depend on the batch" in message
