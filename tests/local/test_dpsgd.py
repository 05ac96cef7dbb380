"""DP-SGD on real, tiny models: against a loop over single examples that clips and sums by hand, for every family."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from opacus.accountants import RDPAccountant
from torch import Tensor, nn

from polyrank.core.lowrank import Adapter, Factors
from polyrank.core.privacy import ClientPrivacy, ExamplePrivacy, Privacy
from polyrank.core.rng import stream
from polyrank.core.types import ClientProfile, LocalTraining, TailPenalty, Task
from polyrank.data import ImageSplit, TextSplit
from polyrank.engines.simulator import Simulator
from polyrank.errors import InputError, TrainingError
from polyrank.local import dpsgd, lokr
from polyrank.local.base import Base
from polyrank.local.cohort import Job
from polyrank.local.data import Examples
from polyrank.local.dp import Part, epsilon
from polyrank.local.dpsgd import refuse_unsound, train_privately
from polyrank.local.grouping import grouped
from polyrank.local.poisson import poisson, rate, steps
from polyrank.local.trainer import prepare, train

FAMILIES = ["bert", "bloom", "gpt2", "llama", "vit"]
CHOSEN = np.array([41, 3, 17, 8, 30])
LR, CLIP = 0.5, 0.7
World = tuple[Base, Adapter, Adapter, Examples]
Model = Callable[[str], nn.Module]


def world(family: str, tiny_model: Model, toy_texts: TextSplit, random_adapter: Any) -> World:
    """A model with an adapter of unequal ranks on every linear layer, a fold beside it, a moved head; and data."""
    base = Base(tiny_model(family), "all-linear", name="tiny")
    adapter = random_adapter(base.spec, (3, 1, 2), head=base.initial_head())
    folded = random_adapter(base.spec, (0, 2, 4), seed=1)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 1, 8, 8), np.uint8)
    data = ImageSplit(pixels, toy_texts.labels, (0.5,), (0.5,)) if family == "vit" else toy_texts
    return base, adapter, folded, data


@pytest.fixture(scope="module")
def bert(tiny_model: Model, toy_texts: TextSplit, random_adapter: Any) -> World:
    return world("bert", tiny_model, toy_texts, random_adapter)


def task_of(adapter: Adapter, folded: Adapter, factors: Factors = "AB", noise: float = 1.0, **local: Any) -> Task:
    settings = {"optimizer": "sgd", "lr": LR, "batch": 4, **local}
    privacy = Privacy(examples=ExamplePrivacy(CLIP, noise))
    return Task(2, adapter, folded, factors, LocalTraining(**settings), None, 5, privacy)


def silent(shape: Sequence[int]) -> Tensor:
    return torch.zeros(tuple(shape), dtype=torch.float64)


def named(adapter: Adapter) -> dict[str, Tensor]:
    layers = {f"{f}/{n}": getattr(x, f) for n, x in adapter.layers.items() for f in ("A", "B")}
    return {**layers, **adapter.dense}


def by_hand(made: World, chosen: np.ndarray, factors: Factors, expected: float) -> dict[str, Tensor]:
    """One step of SGD on the clipped sum of gradients, an example at a time."""
    base, adapter, folded, data = made
    total: dict[str, Tensor] = {}
    with base.attached(adapter, folded, factors) as model:
        own = {f"{f}/{n}": getattr(model, f)[n] for n in model.A for f in factors} | model.dense
        for index in chosen:
            batch = data.batch(np.array([index]))
            for tensor in own.values():
                tensor.grad = None
            F.cross_entropy(model(batch), batch["labels"]).backward()
            found = {n: t.grad.double() for n, t in own.items() if t.grad is not None}
            norm = float(torch.stack([g.square().sum() for g in found.values()]).sum().sqrt())
            for name, g in found.items():
                total[name] = total.get(name, torch.zeros(())) + g * min(1.0, CLIP / norm)
    return {n: t - LR * total.get(n, torch.zeros(())) / expected for n, t in named(adapter).items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("factors", ["AB", "B"])
def test_a_step_is_that_of_clipped_gradients_of_single_examples(
    family: str, factors: Factors, tiny_model: Model, toy_texts: TextSplit, random_adapter: Any
) -> None:
    made = world(family, tiny_model, toy_texts, random_adapter)
    base, adapter, folded, data = made
    found = train_privately(base, task_of(adapter, folded, factors), [CHOSEN], 12, data, 0, silent)
    expected = by_hand(made, CHOSEN, factors, 4.0)  # batch, of 12 examples at a rate of a third
    for name, tensor in named(found).items():
        torch.testing.assert_close(tensor.double(), expected[name].double(), rtol=2e-4, atol=2e-6, msg=name)
    moved = [n for n, t in named(found).items() if not torch.equal(t, named(adapter)[n])]
    assert any(n in adapter.dense for n in moved)
    assert {n[0] for n in moved if "/" in n} == set(factors)


def test_kronecker_factors_have_gradients_by_example_too(
    tiny_model: Model, toy_texts: TextSplit, random_adapter: Any
) -> None:
    base, _, _, data = world("bert", tiny_model, toy_texts, random_adapter)
    factors = {n: t + 0.1 for n, t in lokr.fresh(base.spec.modules, 2, stream(0, "adapter")).items()}
    adapter = Adapter({}, {**factors, **base.initial_head()})
    found = train_privately(base, task_of(adapter, Adapter()), [CHOSEN], 12, data, 0, silent)
    expected = by_hand((base, adapter, Adapter(), data), CHOSEN, "AB", 4.0)
    for name, tensor in named(found).items():
        torch.testing.assert_close(tensor.double(), expected[name].double(), rtol=2e-4, atol=2e-6, msg=name)
    assert any(lokr.is_part(n) and not torch.equal(t, adapter.dense[n]) for n, t in found.dense.items())


def test_samples_that_are_cut_into_several_passes_step_once(bert: World, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter, folded, data = bert
    samples = [CHOSEN, CHOSEN[:2]]
    whole = train_privately(base, task_of(adapter, folded, batch=8), samples, 48, data, 0, silent)
    monkeypatch.setattr(dpsgd, "ELEMENTS", 1)
    cut = train_privately(base, task_of(adapter, folded, batch=8), samples, 48, data, 0, silent)
    for name, tensor in named(whole).items():
        torch.testing.assert_close(tensor, named(cut)[name], rtol=1e-4, atol=1e-6)


def test_every_step_has_noise_on_all_that_is_trained_also_without_examples(bert: World) -> None:
    base, adapter, folded, data = bert

    def ones(shape: Sequence[int]) -> Tensor:
        return torch.ones(tuple(shape), dtype=torch.float64)

    empty = [CHOSEN[:0]] * 3
    found = train_privately(base, task_of(adapter, folded, "A", noise=2.0), empty, 12, data, 0, ones)
    for name, before in named(adapter).items():
        steps_taken = 0.0 if name.startswith("B/") else 3 * LR * 2.0 * CLIP / 4
        torch.testing.assert_close(before - named(found)[name], torch.full_like(before, steps_taken))


def test_one_example_moves_a_step_by_no_more_than_the_bound(bert: World) -> None:
    base, adapter, folded, data = bert
    task = task_of(adapter, folded)
    one, other = (train_privately(base, task, [s], 12, data, 0, silent) for s in (CHOSEN, CHOSEN[1:]))
    gap = sum(float((t - named(other)[n]).double().square().sum()) for n, t in named(one).items()) ** 0.5
    assert gap == pytest.approx(LR * CLIP / 4, rel=1e-3)  # this example's gradient is clipped


def test_an_example_whose_gradient_is_not_finite_counts_as_none() -> None:
    """Otherwise a round would fail by one example, which no noise covers."""
    one, other = torch.ones(3, 2, 2), torch.ones(3, 4)
    one[1, 0, 1], other[2, 3] = math.nan, math.inf
    found = dpsgd._whole([one, other])
    assert [float(gradient.sum()) for gradient in found] == [4.0, 4.0]
    assert all(bool((gradient[0] == 1).all()) for gradient in found)


def test_samples_are_poisson() -> None:
    indices, local = np.arange(100, 400), LocalTraining(batch=20, accumulate=3, epochs=200)
    drawn = poisson(indices, local, stream(0, "fit"))
    assert rate(local, 300) == pytest.approx(0.2)
    assert len(drawn) == steps(local, 300) == 200 * 5
    sizes = np.array([len(sample) for sample in drawn])
    assert sizes.mean() == pytest.approx(60, abs=5 * np.sqrt(48 / 1000))
    assert sizes.var() == pytest.approx(48, rel=5 * np.sqrt(2 / 1000))
    times = np.bincount(np.concatenate(drawn), minlength=400)[100:]
    assert abs(times - 200).max() < 5 * np.sqrt(160)
    assert all(len(np.unique(sample)) == len(sample) for sample in drawn)


def test_a_client_with_fewer_examples_than_a_batch_takes_all_in_every_step() -> None:
    local = LocalTraining(batch=32, epochs=3)
    assert [sorted(s) for s in poisson(np.arange(5), local, stream(0, "fit"))] == [[0, 1, 2, 3, 4]] * 3
    assert rate(local, 5) == 1.0
    assert poisson(np.arange(0), local, stream(0, "fit")) == []
    assert steps(LocalTraining(steps=7), 5) == 7


def test_a_round_repeats_and_a_secret_one_does_not(bert: World) -> None:
    base, adapter, folded, data = bert
    task, indices = task_of(adapter, folded, dropout=0.1, optimizer="adamw", lr=1e-2), np.arange(30)
    one, again, other = (train(base, task, c, data, indices) for c in ("a", "a", "b"))
    unknown = [train(base, task, "a", data, indices, secret=True) for _ in range(2)]
    name = next(iter(adapter.layers))
    assert torch.equal(one.adapter.layers[name].A, again.adapter.layers[name].A)
    for different in (other, *unknown):
        assert not torch.equal(one.adapter.layers[name].A, different.adapter.layers[name].A)
    assert not torch.equal(unknown[0].adapter.layers[name].A, unknown[1].adapter.layers[name].A)
    assert one.examples == 30
    assert one.metrics == {}  # a loss would tell of the examples past the noise


def test_without_examples_what_was_sent_comes_back(bert: World) -> None:
    base, adapter, folded, data = bert
    found = train(base, task_of(adapter, folded), "a", data, np.arange(0))
    assert all(torch.equal(t, named(adapter)[n]) for n, t in named(found.adapter).items())


def test_a_clients_own_noise_comes_on_top(bert: World) -> None:
    base, adapter, folded, data = bert
    task = task_of(adapter, folded)
    both = Privacy(ClientPrivacy(0.1, 2.0, "client"), task.privacy.examples)
    found = train(base, replace(task, privacy=both), "a", data, np.arange(30))
    gap = torch.cat([(t - named(adapter)[n]).flatten() for n, t in named(found.adapter).items()])
    assert float(gap.std()) == pytest.approx(0.2, rel=5 / np.sqrt(2 * len(gap)) + 0.02)
    assert (found.examples, found.metrics) == (1.0, {})


def test_the_server_alone_adds_noise_where_it_is_trusted(bert: World) -> None:
    base, adapter, folded, data = bert
    bare = replace(task_of(adapter, folded), privacy=Privacy())
    central = replace(bare, privacy=Privacy(ClientPrivacy(0.1, 2.0)))
    one, other = (train(base, task, "a", data, np.arange(30)) for task in (bare, central))
    assert all(torch.equal(t, named(other.adapter)[n]) for n, t in named(one.adapter).items())
    assert (other.examples, other.metrics) == (1.0, {})


def test_such_clients_train_alone(bert: World) -> None:
    base, adapter, folded, data = bert

    def jobs(task: Task) -> list[Job]:
        return [prepare(task, c, np.arange(6), data) for c in ("a", "b", "c")]

    task = task_of(adapter, folded)
    assert len(grouped(jobs(replace(task, privacy=Privacy())), base, data.lengths, 4096, 1)) == 1
    assert len(grouped(jobs(task), base, data.lengths, 4096, 1)) == 3


def test_a_simulator_trains_them_whoever_else_is_asked(bert: World) -> None:
    base, adapter, folded, data = bert
    shares = {"a": np.arange(20), "b": np.arange(20, 22), "c": np.arange(0)}
    clients = Simulator(base, data, shares, {c: ClientProfile(len(i)) for c, i in shares.items()}, together=4096)
    updates = list(clients.fit(dict.fromkeys(shares, task_of(adapter, folded, epochs=2))))
    assert [update.client for update in updates] == ["a", "b", "c"]
    alone = train(base, task_of(adapter, folded, epochs=2), "b", data, shares["b"])
    assert all(torch.equal(t, named(updates[1].adapter)[n]) for n, t in named(alone.adapter).items())
    hidden = Simulator(base, data, shares, clients.profiles(), secret=True)
    (secretly,) = hidden.fit({"b": task_of(adapter, folded, epochs=2)})
    assert not all(torch.equal(t, named(alone.adapter)[n]) for n, t in named(secretly.adapter).items())


def test_weights_that_leave_the_finite_numbers_name_the_client(bert: World) -> None:
    base, adapter, folded, data = bert
    with pytest.raises(TrainingError, match=r"round 2, client 'a': weights are not finite.*local\.lr"):
        train(base, task_of(adapter, folded, lr=3e38, steps=3), "a", data, np.arange(9))


# --- what is refused


def test_batch_normalisation_is_refused_by_name(tiny_model: Model) -> None:
    model = tiny_model("bert")
    model.bert.encoder.norm = nn.BatchNorm1d(4)
    base = Base(model, "attention", name="tiny")
    with pytest.raises(InputError, match=r"bert\.encoder\.norm is a batch normalisation"):
        refuse_unsound(base, [])


def test_trained_modules_without_gradients_by_example_are_refused_by_name(tiny_model: Model) -> None:
    name = "vit.embeddings.patch_embeddings.projection.weight"
    base = Base(tiny_model("vit"), "attention", name="tiny", new=[name])
    refuse_unsound(base, [n for n in base.head if n != name])
    with pytest.raises(InputError, match=r"projection is a trained Conv2d.*model\.head: freeze"):
        refuse_unsound(base, base.head)


@pytest.mark.parametrize("options", [{"checkpointing": True}, {"penalty": TailPenalty()}])
def test_tasks_that_cannot_be_protected_are_refused(bert: World, options: dict[str, Any]) -> None:
    base, adapter, folded, data = bert
    penalty = options.pop("penalty", None)
    task = replace(task_of(adapter, folded, **options), penalty=penalty)
    with pytest.raises(InputError, match=r"privacy\.examples"):
        train(base, task, "a", data, np.arange(9))


# --- epsilon


@pytest.mark.parametrize(
    ("parts", "delta"),
    [
        ([Part(1.0, 0.1, 100)], 1e-5),
        ([Part(0.5, 1.0, 3)], 1e-6),
        ([Part(1.1, 0.02, 500), Part(2.0, 1.0, 4)], 1e-5),
    ],
)
def test_epsilon_is_that_of_opacus(parts: list[Part], delta: float) -> None:
    accountant = RDPAccountant()
    for multiplier, probability, count in parts:
        for _ in range(count):
            accountant.step(noise_multiplier=multiplier, sample_rate=probability)
    assert epsilon(parts, delta) == pytest.approx(accountant.get_epsilon(delta), rel=1e-12)


def test_epsilon_of_nothing_is_nothing_and_grows_with_steps() -> None:
    assert epsilon([], 1e-5) == epsilon([Part(1.0, 0.5, 0)], 1e-5) == 0.0
    found = [epsilon([Part(1.0, 0.5, count)], 1e-5) for count in (1, 2, 8)]
    assert found == sorted(found)
    assert 0 < epsilon([Part(1000.0, 1.0, 1)], 1e-5) < 0.1  # the highest order there is; Opacus would warn
    assert epsilon([Part(0.05, 1.0, 1)], 1e-5) > 100
