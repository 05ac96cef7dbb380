"""A client's round on a real, tiny model: what is trained, what stays, and what it costs."""

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyrank.core.federate import federate
from polyrank.core.lowrank import Adapter, LowRank, fresh, nbytes
from polyrank.core.rng import stream
from polyrank.core.types import ClientProfile, LocalTraining, ServerState, TailPenalty, Task, Update
from polyrank.data import TextSplit
from polyrank.engines.simulator import Simulator
from polyrank.errors import TrainingError
from polyrank.local.base import Base
from polyrank.local.data import shuffled
from polyrank.local.evaluate import evaluate
from polyrank.local.trainer import prepare, train
from polyrank.methods import METHODS

Adapters = Callable[..., Adapter]
ALL = np.arange(48)
PLAIN = LocalTraining(batch=48, clip=None, optimizer="sgd", lr=0.1)


@pytest.fixture(scope="module")
def base(tiny_model: Callable[[str], nn.Module]) -> Base:
    return Base(tiny_model("bert"), "attention", name="tiny")


@pytest.fixture
def adapter(base: Base, random_adapter: Adapters) -> Adapter:
    return random_adapter(base.spec, (3, 1, 4), head=base.initial_head())


def task_of(adapter: Adapter, local: LocalTraining = PLAIN, **changes: Any) -> Task:
    plain = Task(round=0, adapter=adapter, frozen=Adapter(), factors="AB", local=local, penalty=None, seed=0)
    return replace(plain, **changes)


def tensors(adapter: Adapter) -> dict[str, Tensor]:
    factors = {f"{name}.{f}": getattr(x, f) for name, x in adapter.layers.items() for f in ("A", "B")}
    return {**factors, **adapter.dense}


def moves(before: Adapter, after: Adapter) -> dict[str, Tensor]:
    held = tensors(before)
    return {name: tensor - held[name] for name, tensor in tensors(after).items()}


def assert_same(one: Adapter, other: Adapter) -> None:
    assert tensors(one).keys() == tensors(other).keys()
    for name, tensor in tensors(one).items():
        assert torch.equal(tensor, tensors(other)[name]), name


def assert_close(one: Adapter, other: Adapter, **tolerance: float) -> None:
    for name, tensor in tensors(one).items():
        torch.testing.assert_close(tensor, tensors(other)[name], **tolerance)


def loss_of(base: Base, data: TextSplit, adapter: Adapter) -> float:
    with base.attached(adapter) as model:
        return evaluate(model, data)["loss"]


# --- it learns, and the same way every time


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("factors", ["A", "B", "AB"])
def test_the_loss_falls(base: Base, adapter: Adapter, toy_texts: TextSplit, optimizer: Any, factors: Any) -> None:
    local = LocalTraining(epochs=8, batch=8, optimizer=optimizer, lr=0.01 if optimizer == "adamw" else 0.1)
    update = train(base, task_of(adapter, local, factors=factors), "c", toy_texts, ALL)
    assert loss_of(base, toy_texts, update.adapter) < 0.7 * loss_of(base, toy_texts, adapter)
    assert update.metrics["steps"] == 48
    assert update.examples == 48


def test_the_low_rank_layers_alone_learn_too(base: Base, toy_texts: TextSplit) -> None:
    layers = {name: fresh(shape, 4, 1.0, stream(0, "adapter")) for name, shape in base.spec.modules.items()}
    head = Adapter({}, base.initial_head())
    local = LocalTraining(epochs=10, batch=8, lr=0.02)
    update = train(base, task_of(Adapter(layers), local, frozen=head), "c", toy_texts, ALL)
    assert update.adapter.dense == {}
    with base.attached(Adapter(layers), head) as model:
        before = evaluate(model, toy_texts)["loss"]
    with base.attached(update.adapter, head) as model:
        assert evaluate(model, toy_texts)["loss"] < 0.7 * before


def test_the_same_seed_gives_the_same_bytes(base: Base, adapter: Adapter, toy_texts: TextSplit) -> None:
    task = task_of(adapter, LocalTraining(epochs=2, batch=8, dropout=0.2))
    state = torch.get_rng_state()
    once = train(base, task, "c", toy_texts, ALL)
    torch.manual_seed(99)
    assert_same(train(base, task, "c", toy_texts, ALL).adapter, once.adapter)
    torch.set_rng_state(state)
    for other in (replace(task, seed=1), replace(task, round=1)):
        assert not torch.equal(
            train(base, other, "c", toy_texts, ALL).adapter.dense["classifier.weight"],
            once.adapter.dense["classifier.weight"],
        )
    another = train(base, task, "d", toy_texts, ALL).adapter
    assert not torch.equal(another.dense["classifier.weight"], once.adapter.dense["classifier.weight"])


# --- what changes


@pytest.mark.parametrize("factors", ["A", "B", "AB"])
def test_only_what_is_trained_changes(
    base: Base, adapter: Adapter, toy_texts: TextSplit, random_adapter: Adapters, factors: Any
) -> None:
    frozen = random_adapter(base.spec, (2, 0), seed=1)
    sent, carried = tensors(adapter), tensors(frozen)
    copies = {id(t): t.clone() for t in [*sent.values(), *carried.values()]}
    weights = {name: p.detach().clone() for name, p in base.model.named_parameters()}
    local = LocalTraining(batch=16, lr=0.01, weight_decay=0.1)
    update = train(base, task_of(adapter, local, frozen=frozen, factors=factors), "c", toy_texts, ALL)
    for name, tensor in tensors(update.adapter).items():
        factor = name.rpartition(".")[2]
        trained = factor in factors or name in adapter.dense
        assert torch.equal(tensor, sent[name]) != trained, name
    for tensor in [*sent.values(), *carried.values()]:
        assert torch.equal(tensor, copies[id(tensor)])
    assert all(torch.equal(p, weights[name]) for name, p in base.model.named_parameters())
    assert update.factors == factors
    assert update.nbytes == nbytes(adapter, factors)


def test_a_client_without_examples_returns_what_it_was_sent(base: Base, adapter: Adapter, toy_texts: TextSplit) -> None:
    update = train(base, task_of(adapter), "c", toy_texts, np.array([], np.int64))
    assert_same(update.adapter, adapter)
    assert update.examples == 0
    assert dict(update.metrics) == {"steps": 0.0}


def test_a_client_with_nothing_to_train_returns_nothing(base: Base, toy_texts: TextSplit) -> None:
    update = train(base, task_of(Adapter()), "c", toy_texts, ALL)
    assert tensors(update.adapter) == {}
    assert update.metrics["steps"] == 0


# --- steps


@pytest.mark.parametrize(
    ("local", "steps"),
    [
        (LocalTraining(epochs=2, batch=20), 6),
        (LocalTraining(epochs=1, batch=5, accumulate=4), 3),
        (LocalTraining(epochs=9, steps=7, batch=16), 7),
        (LocalTraining(epochs=1, steps=1, batch=1), 1),
        (LocalTraining(epochs=1, batch=1000), 1),
    ],
)
def test_steps(base: Base, adapter: Adapter, toy_texts: TextSplit, local: LocalTraining, steps: int) -> None:
    assert train(base, task_of(adapter, local), "c", toy_texts, ALL).metrics["steps"] == steps


def test_accumulation_equals_a_bigger_batch(base: Base, adapter: Adapter, toy_texts: TextSplit) -> None:
    """48 examples in steps of 21, so that the last step is short, and its last batch too."""
    whole = train(base, task_of(adapter, replace(PLAIN, batch=21, epochs=2)), "c", toy_texts, ALL)
    for batch, accumulate in ((7, 3), (3, 7)):
        local = replace(PLAIN, batch=batch, accumulate=accumulate, epochs=2)
        update = train(base, task_of(adapter, local), "c", toy_texts, ALL)
        assert update.metrics["steps"] == whole.metrics["steps"]
        assert update.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-5)
        assert_close(update.adapter, whole.adapter, atol=1e-6, rtol=1e-4)


def one_step_by_hand(base: Base, data: TextSplit, adapter: Adapter) -> dict[str, Tensor]:
    """Gradients of the mean loss over all examples."""
    with base.attached(adapter, None, "AB") as model:
        batch = data.batch(ALL)
        F.cross_entropy(model(batch), batch["labels"]).backward()
        found = {f"{name}.{f}": getattr(model, f)[name].grad for name in model.A for f in ("A", "B")}
        return {**found, **{name: tensor.grad for name, tensor in model.dense.items()}}


def test_grouping_by_length_pads_less_and_sees_everything_once(
    base: Base, adapter: Adapter, toy_texts: TextSplit
) -> None:
    def positions(local: LocalTraining) -> tuple[list[int], int]:
        job = prepare(task_of(adapter, local), "a", ALL, toy_texts)
        batches = [batch for step in job.steps for batch in step]
        assert len(job.steps) == 2 * 8
        padded = sum(len(batch) * int(toy_texts.lengths[batch].max()) for batch in batches)
        return np.concatenate(batches).tolist(), padded

    grouped = replace(PLAIN, batch=2, accumulate=3, epochs=2, group_by_length=True)
    seen, padded = positions(grouped)
    plain, usual = positions(replace(grouped, group_by_length=False))
    assert sorted(seen[:48]) == sorted(seen[48:]) == sorted(plain[:48]) == ALL.tolist()
    assert 2 * toy_texts.lengths.sum() <= padded < 0.9 * usual
    assert seen[:48] != seen[48:]
    by_step = [toy_texts.lengths[seen[at : at + 6]].mean() for at in range(0, 48, 6)]
    assert by_step not in (sorted(by_step), sorted(by_step, reverse=True))  # not from short to long


def test_windows_of_steps_are_grouped_each_by_itself() -> None:
    indices, lengths = np.arange(600), np.arange(600) % 7 + 1
    steps = shuffled(indices, lengths, 4, np.random.default_rng(0))
    assert sorted(np.concatenate(steps)) == indices.tolist()
    drawn = np.random.default_rng(0).permutation(indices)
    assert set(np.concatenate(steps[:50])) == set(drawn[:200])


def test_sgd_steps_against_the_gradient(base: Base, adapter: Adapter, toy_texts: TextSplit) -> None:
    gradients = one_step_by_hand(base, toy_texts, adapter)
    update = train(base, task_of(adapter), "c", toy_texts, ALL)
    for name, move in moves(adapter, update.adapter).items():
        torch.testing.assert_close(move, -0.1 * gradients[name], atol=1e-6, rtol=1e-3)


def test_adamw_s_first_step_has_the_size_of_the_learning_rate(
    base: Base, adapter: Adapter, toy_texts: TextSplit
) -> None:
    gradients = one_step_by_hand(base, toy_texts, adapter)
    local = LocalTraining(batch=48, lr=0.01, clip=None)
    update = train(base, task_of(adapter, local), "c", toy_texts, ALL)
    for name, move in moves(adapter, update.adapter).items():
        clear = gradients[name].abs() > 1e-4
        assert clear.any()
        torch.testing.assert_close(move[clear], -0.01 * gradients[name][clear].sign(), atol=1e-5, rtol=1e-2)


def test_clipping_bounds_the_whole_gradient(base: Base, adapter: Adapter, toy_texts: TextSplit) -> None:
    def length(clip: float | None) -> float:
        update = train(base, task_of(adapter, replace(PLAIN, lr=1.0, clip=clip)), "c", toy_texts, ALL)
        return float(torch.cat([move.flatten() for move in moves(adapter, update.adapter).values()]).norm())

    free = length(None)
    assert length(free / 10) == pytest.approx(free / 10, rel=1e-3)
    assert length(free * 10) == pytest.approx(free, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_weight_decay_shrinks_what_is_trained(
    base: Base, adapter: Adapter, toy_texts: TextSplit, random_adapter: Adapters, optimizer: Any
) -> None:
    """One step with decay differs from one without by -lr * decay * value, for trained tensors alone."""
    frozen = random_adapter(base.spec, (2,), seed=1)
    local = LocalTraining(batch=48, optimizer=optimizer, lr=0.01, clip=None)
    task = task_of(adapter, local, frozen=frozen, factors="B")
    plain = train(base, task, "c", toy_texts, ALL).adapter
    decayed = train(base, replace(task, local=replace(local, weight_decay=0.5)), "c", toy_texts, ALL).adapter
    for name, move in moves(plain, decayed).items():
        trained = not name.endswith(".A")
        expected = -0.01 * 0.5 * tensors(adapter)[name] if trained else torch.zeros_like(move)
        torch.testing.assert_close(move, expected, atol=1e-6, rtol=1e-3)


def test_momentum_carries_a_step_on(base: Base, adapter: Adapter, toy_texts: TextSplit) -> None:
    def move(momentum: float, steps: int) -> Tensor:
        local = replace(PLAIN, lr=1e-3, momentum=momentum, steps=steps)
        update = train(base, task_of(adapter, local), "c", toy_texts, ALL)
        return moves(adapter, update.adapter)["classifier.weight"]

    one = move(0.9, 1)
    torch.testing.assert_close(one, move(0.0, 1))
    torch.testing.assert_close(move(0.9, 2), 2.9 * one, atol=1e-5, rtol=0.05)  # g, then 0.9 g + g


def test_bf16_trains_close_to_fp32_and_keeps_float32(base: Base, adapter: Adapter, toy_texts: TextSplit) -> None:
    exact = train(base, task_of(adapter, replace(PLAIN, precision="fp32")), "c", toy_texts, ALL)
    short = train(base, task_of(adapter, replace(PLAIN, precision="bf16")), "c", toy_texts, ALL)
    assert all(tensor.dtype == torch.float32 for tensor in tensors(short.adapter).values())
    assert short.metrics["loss"] == pytest.approx(exact.metrics["loss"], rel=0.05)
    assert short.metrics["loss"] != exact.metrics["loss"]


# --- over rounds


@pytest.mark.parametrize(
    ("local", "rates"),
    [
        (LocalTraining(lr=0.1), [0.1, 0.1, 0.1, 0.1, 0.1]),
        (LocalTraining(lr=0.1, schedule="linear", lr_min=0.02), [0.1, 0.084, 0.068, 0.052, 0.036]),
        (LocalTraining(lr=0.1, schedule="cosine"), [0.1, 0.0904508, 0.0654508, 0.0345492, 0.0095492]),
        (LocalTraining(lr=0.1, schedule="exponential", lr_decay=0.5), [0.1, 0.05, 0.025, 0.0125, 0.00625]),
    ],
)
def test_schedules(local: LocalTraining, rates: list[float]) -> None:
    assert [local.at(t, 5).lr for t in range(5)] == pytest.approx(rates, abs=1e-7)
    assert local.at(0, 1).lr == 0.1


def test_clients_train_at_the_round_s_rate(base: Base, adapter: Adapter, toy_texts: TextSplit) -> None:
    local = replace(PLAIN, lr=0.1, schedule="linear")
    world = Simulator(base, toy_texts, {"c": ALL}, {"c": ClientProfile(48, rank=4)})
    start = ServerState(0, adapter)
    states, records = zip(*federate(METHODS["fedit"](), start, world, base.spec, local, rounds=3), strict=True)
    assert [record.lr for record in records] == pytest.approx([0.1, 0.0666667, 0.0333333], rel=1e-5)
    assert not torch.equal(states[1].adapter.dense["classifier.bias"], states[0].adapter.dense["classifier.bias"])


# --- HetLoRA's local terms

PENALTY = TailPenalty(weight=0.5, decay=0.5)


def formula(layers: dict[str, LowRank], penalty: TailPenalty) -> float:
    """weight * sum over layers of ||B[:, k:]|| ||A[k:]||, in float64."""
    total = 0.0
    for x in layers.values():
        keep = int(np.floor(penalty.decay * x.rank))
        total += float(torch.linalg.norm(x.B.double()[:, keep:]) * torch.linalg.norm(x.A.double()[keep:]))
    return penalty.weight * total


def test_the_tail_penalty_s_gradient_is_the_formula_s(base: Base, adapter: Adapter, toy_texts: TextSplit) -> None:
    plain = train(base, task_of(adapter), "c", toy_texts, ALL).adapter
    penalty = replace(PENALTY, prune=False)
    punished = train(base, task_of(adapter, penalty=penalty), "c", toy_texts, ALL).adapter
    rng, step = np.random.default_rng(0), 1e-6
    for name, x in adapter.layers.items():
        for factor in ("A", "B"):
            value = getattr(x, factor).double()
            gradient = moves(plain, punished)[f"{name}.{factor}"] / -PLAIN.lr
            for row, column in rng.integers(value.shape, size=(6, 2)):
                change = torch.zeros_like(value)
                change[row, column] = step
                ends = [
                    formula({**adapter.layers, name: replace(x, **{factor: value + sign * change})}, penalty)
                    for sign in (1, -1)
                ]
                slope = (ends[0] - ends[1]) / (2 * step)
                assert float(gradient[row, column]) == pytest.approx(slope, abs=2e-5)
    head = moves(plain, punished)["classifier.weight"]
    assert head.abs().max() < 1e-7


def test_the_reported_loss_is_without_the_penalty(base: Base, adapter: Adapter, toy_texts: TextSplit) -> None:
    plain = train(base, task_of(adapter), "c", toy_texts, ALL)
    punished = train(base, task_of(adapter, penalty=PENALTY), "c", toy_texts, ALL)
    assert punished.metrics["loss"] == plain.metrics["loss"]


def test_a_tail_that_shrank_is_dropped(base: Base, adapter: Adapter, toy_texts: TextSplit) -> None:
    strong = replace(PENALTY, weight=5.0)
    update = train(base, task_of(adapter, replace(PLAIN, lr=0.01), penalty=strong), "c", toy_texts, ALL)
    assert set(x.rank for x in adapter.layers.values()) == {3, 1, 4}
    for name, x in adapter.layers.items():
        assert update.adapter.layers[name].rank == max(x.rank // 2, 1)
        assert update.adapter.layers[name].scale == x.scale


@pytest.mark.parametrize("penalty", [replace(PENALTY, prune=False, weight=5.0), replace(PENALTY, weight=0.0)])
def test_a_tail_is_kept_unless_it_shrank(
    base: Base, adapter: Adapter, toy_texts: TextSplit, penalty: TailPenalty
) -> None:
    lr = 0.01 if penalty.weight else 1e-30  # too small to move anything
    update = train(base, task_of(adapter, replace(PLAIN, lr=lr), penalty=penalty), "c", toy_texts, ALL)
    assert {n: x.rank for n, x in update.adapter.layers.items()} == {n: x.rank for n, x in adapter.layers.items()}


# --- numbers that are none


@pytest.mark.parametrize("steps", [1, 20])
def test_training_that_diverges_is_an_error_that_says_where(
    base: Base, adapter: Adapter, toy_texts: TextSplit, steps: int
) -> None:
    local = LocalTraining(steps=steps, batch=16, optimizer="sgd", lr=1e38, weight_decay=1e3, clip=None)
    with pytest.raises(TrainingError, match=r"round 7, client 'client_3'.*local\.lr \(1e\+38\)"):
        train(base, task_of(adapter, local, round=7), "client_3", toy_texts, ALL)


# --- evaluation and memory


def test_evaluate_equals_a_plain_loop(base: Base, adapter: Adapter, toy_texts: TextSplit) -> None:
    chosen = np.array([5, 1, 40, 22, 9, 30, 17])
    with base.attached(adapter) as model:
        with torch.no_grad():
            examples = [toy_texts.batch(np.array([i])) for i in chosen]
            outputs = [(model(example), example["labels"]) for example in examples]
        for tokens in (1, 16, 2048):
            found = evaluate(model, toy_texts, chosen, tokens=tokens)
            assert found["accuracy"] == np.mean([int(logits.argmax() == label) for logits, label in outputs])
            loss = np.mean([float(F.cross_entropy(logits, label)) for logits, label in outputs])
            assert found["loss"] == pytest.approx(loss, rel=1e-5)
        whole = evaluate(model, toy_texts)
        assert whole == evaluate(model, toy_texts, ALL)


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def test_there_is_one_base_however_many_clients(base: Base, adapter: Adapter, toy_texts: TextSplit) -> None:
    ids = [id(p) for p in base.model.parameters()]
    clients = {f"c{i:02d}": ALL[i::24] for i in range(24)}
    world = Simulator(base, toy_texts, clients, {c: ClientProfile(len(own), rank=2) for c, own in clients.items()})
    task = task_of(adapter, LocalTraining(batch=2))
    updates: list[Update] = []
    counts = []
    for update in world.fit(dict.fromkeys(clients, task)):
        updates[:] = [update]
        if update.client in ("c01", "c12", "c23"):
            counts.append(live_tensors())
    assert counts == counts[:1] * 3
    assert [id(p) for p in base.model.parameters()] == ids
    assert world.only(["c00"]).base is base


def test_clients_answer_in_order_and_absent_ones_do_not(base: Base, adapter: Adapter, toy_texts: TextSplit) -> None:
    clients = {f"c{i}": ALL[i::8] for i in range(8)}
    profiles = {c: ClientProfile(6, rank=2, uplink=8e3, downlink=16e3) for c in clients}
    world = Simulator(base, toy_texts, clients, profiles, absent=0.5, seed=3)
    tasks = dict.fromkeys(reversed(clients), task_of(adapter))
    found = list(world.fit(tasks))
    names = [update.client for update in found]
    assert names == sorted(names)
    assert 0 < len(names) < 8
    assert names == [update.client for update in world.fit(tasks)]
    seconds = nbytes(adapter) / 2e3 + nbytes(adapter) / 1e3
    assert [update.metrics["seconds"] for update in found] == pytest.approx([seconds] * len(found))
    later = {c: replace(task, round=1) for c, task in tasks.items()}
    assert names != [update.client for update in world.fit(later)]
