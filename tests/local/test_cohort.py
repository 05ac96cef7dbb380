"""Training together is training alone: every method, everything unequal at once, and who trains with whom."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from polyrank.core.federate import federate
from polyrank.core.lowrank import Adapter, fresh, truncate
from polyrank.core.rng import stream
from polyrank.core.types import ClientProfile, LocalTraining, ServerState, TailPenalty, Task, Update
from polyrank.data import ImageSplit, TextSplit
from polyrank.engines.simulator import Simulator
from polyrank.errors import TrainingError
from polyrank.local import lokr
from polyrank.local.base import Base
from polyrank.local.cohort import Job
from polyrank.local.data import Examples
from polyrank.local.grouping import Load, cheapest, cost, grouped, key
from polyrank.local.trainer import prepare, train, train_together
from polyrank.methods import METHODS

Models = Callable[[str], nn.Module]
Adapters = Callable[..., Adapter]
FAMILIES = ["bert", "bloom", "gpt2", "llama", "vit"]
SHARES = {"a": np.arange(0, 11), "b": np.arange(11, 30), "c": np.arange(30, 35), "d": np.arange(35, 48)}
# SGD: its steps are the gradients, where AdamW's first ones are signs, which rounding of a small gradient turns.
LOCAL = LocalTraining(epochs=2, batch=4, optimizer="sgd", lr=0.1, momentum=0.5, clip=1.0)


def data_of(family: str, texts: TextSplit) -> Examples:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 1, 8, 8), np.uint8)
    return ImageSplit(pixels, texts.labels, (0.5,), (0.5,)) if family == "vit" else texts


def tasks_of(base: Base, random_adapter: Adapters, local: LocalTraining = LOCAL) -> dict[str, Task]:
    """Ranks, layers, factors, rates, decay, clipping and steps of each client's own; a fold that all run."""
    head, names = base.initial_head(), list(base.spec.modules)
    fold = random_adapter(base.spec, (2,), seed=9)
    ranks = {"a": (3, 1, 4), "b": (1,), "c": (5, 2), "d": (2, 0, 3)}
    tasks = {}
    for at, (client, own) in enumerate(ranks.items()):
        adapter = random_adapter(base.spec, own, seed=at, head=head)
        layers = {name: x for name, x in adapter.layers.items() if client != "b" or name in names[len(names) // 2 :]}
        tasks[client] = Task(0, Adapter(layers, head), fold, "AB", local, None, 0)
    unequal = {
        "b": {"lr": 0.05, "weight_decay": 0.1, "clip": 0.05},
        "c": {"epochs": 1},
        "d": {"steps": 3, "clip": None},
    }
    tasks = {c: replace(task, local=replace(local, **unequal.get(c, {}))) for c, task in tasks.items()}
    return tasks | {"c": replace(tasks["c"], factors="B"), "d": replace(tasks["d"], factors="A")}


def tensors(adapter: Adapter) -> dict[str, Tensor]:
    factors = {f"{name}.{f}": getattr(x, f) for name, x in adapter.layers.items() for f in ("A", "B")}
    return {**factors, **adapter.dense}


def jobs_of(tasks: dict[str, Task], data: Examples) -> list[Job]:
    jobs = [prepare(task, client, SHARES[client], data) for client, task in tasks.items()]
    return sorted(jobs, key=lambda job: (-len(job.steps), job.client))


def assert_close(one: Update, other: Update, sent: Task) -> None:
    """Close beside how far the client has moved."""
    assert one.client == other.client
    assert one.factors == other.factors
    assert one.examples == other.examples
    assert one.metrics["steps"] == other.metrics["steps"]
    assert one.metrics["loss"] == pytest.approx(other.metrics["loss"], rel=1e-5)
    assert tensors(one.adapter).keys() == tensors(other.adapter).keys()
    for name, tensor in tensors(one.adapter).items():
        expected, before = tensors(other.adapter)[name], tensors(sent.adapter)[name]
        assert tensor.shape == expected.shape, name
        moved = float((expected - before[tuple(slice(n) for n in expected.shape)]).abs().max())
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-4 * moved + 1e-7, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_everything_unequal_at_once(
    family: str, dropout: float, tiny_model: Models, toy_texts: TextSplit, random_adapter: Adapters
) -> None:
    base, data = Base(tiny_model(family), "all-linear", name="tiny"), data_of(family, toy_texts)
    tasks = tasks_of(base, random_adapter, replace(LOCAL, dropout=dropout, accumulate=2))
    together = {update.client: update for update in train_together(base, jobs_of(tasks, data), data)}
    assert len({job.task.local.lr for job in jobs_of(tasks, data)}) > 1
    assert len({len(job.steps) for job in jobs_of(tasks, data)}) > 1
    for client, task in tasks.items():
        assert_close(together[client], train(base, task, client, data, SHARES[client]), task)


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_with_checkpointing_and_adamw(
    family: str, tiny_model: Models, toy_texts: TextSplit, random_adapter: Adapters
) -> None:
    base, data = Base(tiny_model(family), "attention", name="tiny"), data_of(family, toy_texts)
    local = replace(LOCAL, optimizer="adamw", momentum=0.0, lr=1e-3, checkpointing=True, weight_decay=0.1, dropout=0.2)
    tasks = tasks_of(base, random_adapter, local)
    for update in train_together(base, jobs_of(tasks, data), data):
        alone = train(base, tasks[update.client], update.client, data, SHARES[update.client])
        for name, tensor in tensors(update.adapter).items():
            torch.testing.assert_close(tensor, tensors(alone.adapter)[name], rtol=0, atol=2e-5, msg=name)


def test_padding_stays_zero_and_a_frozen_factor_is_the_one_that_was_sent(
    tiny_model: Models, toy_texts: TextSplit, random_adapter: Adapters
) -> None:
    base = Base(tiny_model("bert"), "attention", name="tiny")
    tasks = tasks_of(base, random_adapter)
    for update in train_together(base, jobs_of(tasks, toy_texts), toy_texts):
        sent = tasks[update.client].adapter.layers
        for name, x in update.adapter.layers.items():
            assert x.rank == sent[name].rank
            if "A" not in update.factors:
                assert x.A is sent[name].A
            if "B" not in update.factors:
                assert x.B is sent[name].B


def test_a_penalty_prunes_as_alone(tiny_model: Models, toy_texts: TextSplit, random_adapter: Adapters) -> None:
    base = Base(tiny_model("bert"), "attention", name="tiny")
    penalty = TailPenalty(weight=0.5, decay=0.6)
    tasks = {c: replace(task, penalty=penalty) for c, task in tasks_of(base, random_adapter).items()}
    pruned = 0
    for update in train_together(base, jobs_of(tasks, toy_texts), toy_texts):
        task = tasks[update.client]
        assert_close(update, train(base, task, update.client, toy_texts, SHARES[update.client]), task)
        pruned += sum(x.rank < task.adapter.layers[name].rank for name, x in update.adapter.layers.items())
    assert pruned


def test_lokr_factors_train_together(tiny_model: Models, toy_texts: TextSplit) -> None:
    base = Base(tiny_model("bert"), "attention", name="tiny")
    for rank in (2, 64):  # factored, and whole
        factors = lokr.fresh(base.spec.modules, rank, stream(0, "adapter"))
        fixed = lokr.scales(base.spec.modules, 1.5)
        task = Task(0, Adapter({}, {**base.initial_head(), **factors}), Adapter({}, fixed), "AB", LOCAL, None, 0)
        tasks = dict.fromkeys(SHARES, task)
        assert len({key(job, base) for job in jobs_of(tasks, toy_texts)}) == 1
        for update in train_together(base, jobs_of(tasks, toy_texts), toy_texts):
            assert_close(update, train(base, task, update.client, toy_texts, SHARES[update.client]), task)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_gives_the_same_run(
    name: str, tiny_model: Models, toy_texts: TextSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, method = Base(tiny_model("bert"), "attention", name="tiny"), METHODS[name]()
    head = base.initial_head()
    if method.form == "lokr":
        start = ServerState(0, Adapter({}, {**head, **lokr.fresh(base.spec.modules, 2, stream(0, "adapter"))}))
    else:
        layers = {n: fresh(shape, 4, 2.0, stream(0, n)) for n, shape in base.spec.modules.items()}
        start = ServerState(0, Adapter(layers, head))
    profiles = {c: ClientProfile(len(SHARES[c]), rank=rank) for c, rank in zip(SHARES, (1, 2, 3, 4), strict=True)}
    sizes: list[int] = []

    def counted(base: Base, jobs: list[Job], data: Examples) -> list[Update]:
        sizes.append(len(jobs))
        return train_together(base, jobs, data)

    monkeypatch.setattr("polyrank.engines.simulator.train_together", counted)

    def run(together: int) -> tuple[ServerState, Any]:
        clients = Simulator(base, toy_texts, SHARES, profiles, together=together, holdout=toy_texts)
        rounds = federate(method, start, clients, base.spec, LOCAL, rounds=3, measure=clients.measure)
        return list(rounds)[-1]

    alone, of_alone = run(0)
    assert set(sizes) <= {1}
    sizes.clear()
    found, record = run(10**6)
    # Who can afford the whole model trains alone in `exclusive`; everybody else has company.
    assert max(sizes) > 1 or name == "exclusive"
    assert record.bytes_up == of_alone.bytes_up
    assert record.ranks == of_alone.ranks
    for key_, tensor in tensors(found.adapter).items():
        expected = tensors(alone.adapter)[key_]
        torch.testing.assert_close(
            tensor, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()) + 1e-7, msg=key_
        )


def test_who_diverges_is_named(tiny_model: Models, toy_texts: TextSplit, random_adapter: Adapters) -> None:
    base = Base(tiny_model("bert"), "attention", name="tiny")
    tasks = tasks_of(base, random_adapter)
    wild = replace(tasks["b"].local, lr=1e30, clip=None)
    tasks["b"] = replace(tasks["b"], local=wild)
    with pytest.raises(TrainingError, match="client 'b'"):
        train_together(base, jobs_of(tasks, toy_texts), toy_texts)


# --- who trains with whom


def test_where_the_overhead_is_small_everybody_trains_alone() -> None:
    loads = [Load(5, 8, 30.0 + 10 * i, 1.0, 0.05) for i in range(4)]
    assert cheapest(loads, 0.0, 1e9) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert cheapest(loads, 1e6, 1e9) == [(0, 4)]


def test_the_cuts_are_the_cheapest_there_are() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        sizes = rng.integers(1, 6, (6, 2))
        loads = [Load(int(s), int(b), float(rng.uniform(5, 40)), float(rng.uniform(0.5, 1)), 0.1) for s, b in sizes]

        def every(start: int, loads: list[Load] = loads) -> list[list[tuple[int, int]]]:
            if start == len(loads):
                return [[]]
            return [[(start, stop), *rest] for stop in range(start + 1, len(loads) + 1) for rest in every(stop)]

        def total(cuts: list[tuple[int, int]], loads: list[Load] = loads) -> float:
            return sum(cost(loads[a:b], 40.0) for a, b in cuts)

        assert total(cheapest(loads, 40.0, 1e9)) == pytest.approx(min(map(total, every(0))))


def test_a_step_is_no_larger_than_it_may_be() -> None:
    loads = [Load(3, 2, 10.0, 1.0, 0.0)] * 7
    assert all(stop - start <= 3 for start, stop in cheapest(loads, 1e6, 60.0))
    assert cheapest([Load(3, 50, 10.0, 1.0, 0.0)], 1e6, 60.0) == [(0, 1)]


def test_clients_who_cannot_train_together_do_not(
    tiny_model: Models, toy_texts: TextSplit, random_adapter: Adapters
) -> None:
    base = Base(tiny_model("bert"), "attention", name="tiny")
    tasks = tasks_of(base, random_adapter)
    tasks["b"] = replace(tasks["b"], local=replace(tasks["b"].local, batch=5))
    tasks["c"] = replace(tasks["c"], local=replace(tasks["c"].local, optimizer="adamw"))
    groups = grouped(jobs_of(tasks, toy_texts), base, toy_texts.lengths, 10**6, 1000)
    assert sorted(sorted(job.client for job in group) for group in groups) == [["a", "d"], ["b"], ["c"]]
    assert len(grouped(jobs_of(tasks, toy_texts), base, toy_texts.lengths, 0, 1000)) == 4


def test_clients_without_data_or_layers(tiny_model: Models, toy_texts: TextSplit, random_adapter: Adapters) -> None:
    base = Base(tiny_model("bert"), "attention", name="tiny")
    tasks = tasks_of(base, random_adapter)
    tasks["a"] = replace(tasks["a"], adapter=Adapter())
    jobs = [prepare(task, c, SHARES[c] if c != "b" else SHARES[c][:0], toy_texts) for c, task in tasks.items()]
    found = {}
    for group in grouped(jobs, base, toy_texts.lengths, 10**6, 1000):
        found |= {update.client: update for update in train_together(base, group, toy_texts)}
    assert found["a"].metrics == {"steps": 0.0}
    assert found["b"].metrics == {"steps": 0.0}
    assert found["b"].examples == 0
    assert truncate(next(iter(found["b"].adapter.layers.values())), 1).rank == 1
    assert found["c"].metrics["steps"] > 0
