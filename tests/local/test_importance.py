"""Importance measured on real, tiny models: against a loop over single, unpadded examples, for every family."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from polyrank.core.lowrank import Adapter
from polyrank.core.rng import stream
from polyrank.core.types import ClientProfile, Query, ServerState
from polyrank.data import ImageSplit, TextSplit
from polyrank.engines.simulator import Simulator
from polyrank.local import importance as module
from polyrank.local.base import Base
from polyrank.local.data import Examples, by_length
from polyrank.local.importance import importance

FAMILIES = ["bert", "bloom", "gpt2", "llama", "vit"]
CHOSEN = np.array([41, 3, 17, 8, 30, 9, 22, 0, 5])
Adapters = Callable[..., Adapter]
World = tuple[Base, ServerState, Examples]


@pytest.fixture(scope="module", params=FAMILIES)
def world(
    request: pytest.FixtureRequest,
    tiny_model: Callable[[str], nn.Module],
    toy_texts: TextSplit,
    random_adapter: Adapters,
) -> World:
    return made(request.param, tiny_model, toy_texts, random_adapter)


@pytest.fixture(scope="module")
def bert(tiny_model: Callable[[str], nn.Module], toy_texts: TextSplit, random_adapter: Adapters) -> World:
    return made("bert", tiny_model, toy_texts, random_adapter)


def made(family: str, tiny_model: Any, toy_texts: TextSplit, random_adapter: Adapters) -> World:
    """A model with an adapter of unequal ranks on every linear layer, a fold beside it, a moved head; and data."""
    base = Base(tiny_model(family), "all-linear", name="tiny")
    adapter = random_adapter(base.spec, (3, 1, 2), head=base.initial_head())
    folded = random_adapter(base.spec, (0, 2, 4), seed=1)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 1, 8, 8), np.uint8)
    data = ImageSplit(pixels, toy_texts.labels, (0.5,), (0.5,)) if family == "vit" else toy_texts
    return base, ServerState(0, adapter, folded), data


def reference(world: World, chosen: np.ndarray, query: Query, labels: np.ndarray | None = None) -> dict[str, float]:
    """The definitions, one example at a time, each in a batch of its own, in float64."""
    base, state, data = world
    per_example: dict[str, list[list[Tensor]]] = {name: [[], []] for name in base.spec.modules}
    with base.attached(state.adapter, state.folded, "AB") as model:
        for position, index in enumerate(chosen):
            batch = data.batch(np.array([index]))
            label = int(batch["labels"] if labels is None else labels[position])
            logits = model(batch)[0]
            value = logits[label] if query.target == "logit" else torch.log_softmax(logits, -1)[label]
            for name in base.spec.modules:
                pair = torch.autograd.grad(value, [model.A[name], model.B[name]], retain_graph=True)
                for kept, gradient in zip(per_example[name], pair, strict=True):
                    kept.append(gradient.double())
    return {name: definition([torch.stack(t) for t in pair], query) for name, pair in per_example.items()}


def definition(pair: list[Tensor], query: Query) -> float:
    if query.kind == "gradient":
        return float(sum(t.mean(0).pow(2).sum() for t in pair)) ** 0.5
    diagonals = [t.pow(2).mean(0) for t in pair]
    if query.form == "trace":
        return float(sum(d.sum() for d in diagonals))
    return float(sum(d.pow(2).sum() ** (1.0 if query.form == "squared" else 0.5) for d in diagonals))


def measured(world: World, chosen: np.ndarray, query: Query, seed: int = 0) -> dict[str, float]:
    base, state, data = world
    return importance(base, state, data, chosen, query, stream(seed, "labels"))


def same(found: dict[str, float], expected: dict[str, float], rel: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    assert max(expected.values()) > 0
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=rel, abs=1e-9 * max(expected.values())), name


# --- one pass against a loop


@pytest.mark.parametrize(
    "query",
    [
        Query("fisher", form=form, target=target)
        for form, target in product(("trace", "squared", "norm"), ("log_likelihood", "logit"))
    ]
    + [Query("gradient")],
    ids=lambda q: f"{q.kind}-{q.form}-{q.target}",
)
def test_it_equals_a_loop_over_examples(world: World, query: Query) -> None:
    # Rounding of a gradient counts four times in its fourth power.
    rel = 4e-4 if query.form == "squared" else 1e-4
    same(measured(world, CHOSEN, query), reference(world, CHOSEN, query), rel)


def test_batches_make_no_difference(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = [Query("fisher"), Query("fisher", labels="sampled"), Query("gradient")]
    whole = [measured(world, CHOSEN, query) for query in queries]
    monkeypatch.setattr(module, "POSITIONS", 12)
    for query, expected in zip(queries, whole, strict=True):
        same(measured(world, CHOSEN, query), expected)
    monkeypatch.setattr(module, "POSITIONS", 1024)
    monkeypatch.setattr(module, "ELEMENTS", 1)
    same(measured(world, CHOSEN, queries[0]), whole[0])


def test_the_order_of_examples_makes_no_difference(bert: World) -> None:
    for query in (Query("fisher"), Query("fisher", labels="sampled")):
        assert measured(bert, CHOSEN, query) == measured(bert, CHOSEN[::-1].copy(), query)


def test_padding_makes_no_difference(world: World) -> None:
    """The shortest text beside the longest, and alone: the mean of two traces is that of each."""
    base, _, data = world
    short, long = int(np.argmin(data.lengths)), int(np.argmax(data.lengths))
    assert data.lengths[short] < data.lengths[long] or base.model.config.model_type == "vit"
    together = measured(world, np.array([short, long + (short == long)]), Query("fisher"))
    alone = [measured(world, np.array([i]), Query("fisher")) for i in (short, long + (short == long))]
    same(together, {name: (alone[0][name] + alone[1][name]) / 2 for name in together})


def test_modules_outside_blocks_are_measured(bert: World) -> None:
    base, _, _ = bert
    outside = base.spec.modules.keys() - base.spec.blocks.keys()
    assert outside
    assert all(measured(bert, CHOSEN, Query("fisher"))[name] > 0 for name in outside)


def test_layers_that_are_not_trained_score_nothing(bert: World) -> None:
    base, state, data = bert
    first = next(iter(base.spec.modules))
    layers = {name: x for name, x in state.adapter.layers.items() if name != first}
    fewer = replace(state, adapter=Adapter(layers, state.adapter.dense))
    found = importance(base, fewer, data, CHOSEN, Query("fisher"), stream(0))
    assert found[first] == 0.0
    assert min(value for name, value in found.items() if name != first) > 0


def test_a_fold_and_the_head_are_part_of_the_model(bert: World) -> None:
    base, state, data = bert
    found = measured(bert, CHOSEN, Query("fisher"))
    for less in (replace(state, folded=Adapter()), replace(state, adapter=Adapter(state.adapter.layers))):
        other = importance(base, less, data, CHOSEN, Query("fisher"), stream(0))
        assert other != pytest.approx(found, rel=1e-2)
    frozen = replace(
        state,
        adapter=Adapter(state.adapter.layers),
        folded=Adapter(state.folded.layers, state.adapter.dense),
    )
    assert importance(base, frozen, data, CHOSEN, Query("fisher"), stream(0)) == found


def test_nothing_is_left_behind(bert: World) -> None:
    base, state, _ = bert
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    sent = {name: x.A.clone() for name, x in state.adapter.layers.items()}
    measured(bert, CHOSEN, Query("fisher"))
    assert all(p.grad is None for p in base.model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    assert all(torch.equal(x.A, sent[name]) and x.A.grad is None for name, x in state.adapter.layers.items())


# --- labels


def probabilities(world: World, chosen: np.ndarray) -> np.ndarray:
    base, state, data = world
    with base.attached(state.adapter, state.folded) as model, torch.no_grad():
        return torch.stack([model(data.batch(np.array([i])))[0] for i in chosen]).double().softmax(-1).numpy()


@pytest.mark.parametrize("target", ["log_likelihood", "logit"])
def test_sampled_labels_come_from_the_prediction_and_the_stream(world: World, target: Any) -> None:
    query, chosen = Query("fisher", labels="sampled", target=target), np.sort(CHOSEN)
    cumulative = probabilities(world, chosen).cumsum(-1)
    results = []
    for seed in range(2):
        uniform = stream(seed, "labels").random(len(chosen))
        labels = (cumulative <= uniform[:, None]).sum(-1)
        results.append(measured(world, chosen, query, seed))
        same(results[-1], reference(world, chosen, query, labels))
    assert results[0] != results[1]


def test_sampled_labels_follow_the_softmax() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -30.0]])
    draws = torch.tensor(stream(0, "draws").random(20000))
    labels = module._sampled(logits.expand(20000, -1), draws)
    share = torch.bincount(labels, minlength=4) / 20000
    torch.testing.assert_close(share, logits[0].softmax(-1), atol=0.01, rtol=0)
    assert module._sampled(logits, torch.tensor([1.0])).item() == 3  # never beyond the last class


# --- who measures


@pytest.fixture
def clients() -> dict[str, np.ndarray]:
    return {"a": np.arange(20), "b": np.arange(20, 26), "c": np.arange(26, 40), "d": np.arange(0)}


def simulator(world: World, clients: dict[str, np.ndarray], **options: Any) -> Simulator:
    base, _, data = world
    return Simulator(base, data, clients, {c: ClientProfile(len(own), rank=2) for c, own in clients.items()}, **options)


def test_the_hold_out_is_measured_whole_or_in_part(bert: World, clients: dict[str, np.ndarray]) -> None:
    _, state, data = bert
    held = TextSplit(data.ids, data.offsets[36:], data.labels[36:], data.pad_id)
    one = simulator(bert, clients, holdout=held)
    whole = one.measure(Query("fisher"), state)
    same(whole, measured(bert, np.arange(36, 48), Query("fisher")))
    assert one.measure(Query("fisher", samples=12), state) == one.measure(Query("fisher", samples=99), state) == whole
    part = Query("fisher", samples=5)
    assert one.measure(part, state) == one.measure(part, state) != whole
    assert len({one.measure(replace(part, round=t), state)[next(iter(whole))] for t in range(4)}) > 1
    with pytest.raises(ValueError, match="no hold-out to measure importance on"):
        simulator(bert, clients).measure(Query("fisher"), state)


def test_clients_measure_on_their_own_data_and_count_by_its_size(bert: World, clients: dict[str, np.ndarray]) -> None:
    _, state, _ = bert
    world = simulator(bert, clients)
    query = Query("fisher", on="clients", cohort=("a", "b", "d"))
    own = {c: measured(bert, clients[c], query) for c in "ab"}
    same(dict(world.measure(query, state)), {n: (20 * own["a"][n] + 6 * own["b"][n]) / 26 for n in own["a"]})
    pooled = measured(bert, np.arange(26), query)
    same(dict(world.measure(query, state)), pooled)  # a trace is a mean over examples, whoever holds them
    few = replace(query, samples=6, cohort=("a", "b"))
    drawn = np.sort(stream(0, "importance", 0, "a").choice(clients["a"], 6, replace=False))
    a, b = (measured(bert, indices, query) for indices in (drawn, clients["b"]))
    same(dict(world.measure(few, state)), {n: (20 * a[n] + 6 * b[n]) / 26 for n in a})
    assert world.measure(few, state) != world.measure(replace(few, round=1), state)


def test_where_nobody_answers_there_is_nothing(bert: World, clients: dict[str, np.ndarray]) -> None:
    _, state, _ = bert
    assert simulator(bert, clients).measure(Query("fisher", on="clients", cohort=("d",)), state) == {}
    away = simulator(bert, clients, absent=0.5, seed=4)
    here = [c for c in "abc" if stream(4, "absent", 0, c).random() >= 0.5]
    assert len(here) in (1, 2), "this seed shows nothing"
    due = simulator(bert, clients).measure(Query("fisher", on="clients", cohort=tuple(here)), state)
    assert away.measure(Query("fisher", on="clients", cohort=("a", "b", "c")), state) == due


def test_batches_hold_so_many_at_most() -> None:
    lengths = np.array([3, 9, 1, 4, 4])
    found = [batch.tolist() for batch in by_length(np.arange(5), lengths, 12, 2)]
    assert found == [[1], [3, 4], [0, 2]] or found == [[1], [4, 3], [0, 2]]
