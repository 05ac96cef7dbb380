"""What an update must satisfy: each check, the bounds behind them, and a poisoned client of ten."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyrank.core.federate import federate
from polyrank.core.gate import Gate, change, moved, reachable
from polyrank.core.lowrank import Adapter, LowRank, delta, truncate
from polyrank.core.rng import stream, torch_generator
from polyrank.core.types import ClientProfile, LocalTraining, ModelSpec, ServerState, Task, Update
from polyrank.experiment.build import build
from polyrank.experiment.loading import parse
from polyrank.experiment.regimes import EVERYBODY
from polyrank.experiment.session import Session
from polyrank.experiment.store import Run
from polyrank.local.optimizer import optimizer_of
from polyrank.methods import METHODS

SPEC = ModelSpec({"q": (6, 5), "v": (4, 7)})
LOCAL = LocalTraining(lr=0.01, batch=4)


def adapter_of(seed: int, ranks: tuple[int, int] = (2, 3), dense: bool = True, size: float = 1.0) -> Adapter:
    generator = torch_generator(stream(seed, "gate"))

    def normal(*shape: int) -> Tensor:
        return size * torch.randn(shape, generator=generator)

    layers = {
        name: LowRank(normal(rank, d_in), normal(d_out, rank), 0.5 + rank)
        for (name, (d_out, d_in)), rank in zip(SPEC.modules.items(), ranks, strict=True)
    }
    return Adapter(layers, {"head": normal(3, 2), "scale": normal()} if dense else {})


def task_of(adapter: Adapter, local: LocalTraining = LOCAL, factors: Any = "AB") -> Task:
    return Task(0, adapter, Adapter(), factors, local, None, 0)


def shifted(adapter: Adapter, by: float) -> Adapter:
    layers = {name: LowRank(x.A + by, x.B + by, x.scale) for name, x in adapter.layers.items()}
    return Adapter(layers, {name: tensor + by for name, tensor in adapter.dense.items()})


def judged(gate: Gate, tasks: Mapping[str, Task], updates: list[Update]) -> tuple[list[str], dict[str, str]]:
    refused: dict[str, str] = {}
    passed = list(gate.admitted(tasks, updates, refused.__setitem__))
    return [update.client for update in passed], refused


# --- each check


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["A", "B", "head", "scale"])
def test_what_is_not_finite_is_always_refused(where: str, value: float) -> None:
    sent = adapter_of(0)
    poisoned = copy.deepcopy(sent)
    tensor = poisoned.dense[where] if where in poisoned.dense else getattr(poisoned.layers["v"], where)
    tensor.view(-1)[-1] = value
    updates = [Update("a", sent, 3), Update("b", poisoned, 3), Update("c", sent, 3)]
    passed, refused = judged(Gate(), dict.fromkeys("abc", task_of(sent)), updates)
    assert passed == ["a", "c"]
    assert "not finite" in refused["b"]
    assert where in refused["b"]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("value", [-9e5, 3e6, 1e15, 1e30, -3e38])
def test_one_client_s_sizes_end_no_run(name: str, value: float) -> None:
    """Without any check of norms: what passes is aggregated by every rule to what is finite, and trains on."""

    class Clients:
        known = {c: ClientProfile(10, rank=rank) for c, rank in zip("abc", (1, 2, 4), strict=True)}  # noqa: RUF012

        def profiles(self) -> Mapping[str, ClientProfile]:
            return self.known

        def fit(self, tasks: Mapping[str, Task]) -> Iterator[Update]:
            for client, task in tasks.items():
                by = value if client == "c" else 0.01
                yield Update(client, shifted(task.adapter, by), 10, task.factors)

    state = ServerState(0, adapter_of(0, (4, 4), size=0.1))
    method = METHODS[name]()
    scores = dict.fromkeys(SPEC.modules, 1.0)
    rounds = list(federate(method, state, Clients(), SPEC, LOCAL, rounds=2, measure=lambda query, state: scores))
    assert all(set(record.refused) == ({"c"} if abs(value) > 1e6 else set()) for _, record in rounds)
    after = rounds[-1][0]
    values = [y for x in after.adapter.layers.values() for y in (x.A, x.B)] + list(after.adapter.dense.values())
    assert all(bool(torch.isfinite(y).all()) for y in values)


@pytest.mark.parametrize("examples", [-1.0, math.nan, math.inf])
def test_a_number_of_examples_must_be_one(examples: float) -> None:
    sent = adapter_of(0)
    passed, refused = judged(Gate(), {"a": task_of(sent)}, [Update("a", sent, examples)])
    assert not passed
    assert refused == {"a": f"claims {examples:g} examples"}


def test_a_cap_on_examples() -> None:
    sent = adapter_of(0)
    updates = [Update("a", sent, 100), Update("b", sent, 101)]
    passed, refused = judged(Gate(most_examples=100), dict.fromkeys("ab", task_of(sent)), updates)
    assert passed == ["a"]
    assert refused == {"b": "claims 101 examples, over the cap of 100"}


def test_who_was_not_asked_is_refused() -> None:
    sent = adapter_of(0)
    passed, refused = judged(Gate(), {"a": task_of(sent)}, [Update("a", sent, 1), Update("z", sent, 1)])
    assert passed == ["a"]
    assert refused == {"z": "was given no task in this round"}


def test_a_change_many_times_the_usual_is_refused() -> None:
    sent = adapter_of(0)
    steps = {"a": 0.01, "b": 0.012, "c": 0.03, "d": 0.2, "e": 0.011}
    updates = [Update(client, shifted(sent, by), 1) for client, by in steps.items()]
    tasks = dict.fromkeys(steps, task_of(sent))
    assert judged(Gate(norm=10), tasks, updates)[0] == ["a", "b", "c", "e"]
    assert judged(Gate(norm=2), tasks, updates)[0] == ["a", "b", "e"]
    assert judged(Gate(), tasks, updates)[0] == list(steps)


def test_who_changes_nothing_does_not_set_what_is_usual() -> None:
    sent = adapter_of(0)
    updates = [Update(client, sent, 0) for client in "abcd"]
    updates += [
        Update("e", shifted(sent, 0.01), 1),
        Update("f", shifted(sent, 0.02), 1),
        Update("g", shifted(sent, 9), 1),
    ]
    passed, refused = judged(Gate(norm=10), dict.fromkeys("abcdefg", task_of(sent)), updates)
    assert passed == list("abcdef")
    assert list(refused) == ["g"]
    assert judged(Gate(norm=10), dict.fromkeys("abcd", task_of(sent)), updates[:4])[0] == list("abcd")


@pytest.mark.parametrize("value", [1e19, 1e30, 3e38])
def test_no_size_escapes_the_norm(value: float) -> None:
    """Products of such values are no float32; one factor zero elsewhere would make them not even a number."""
    sent = adapter_of(0)
    B = torch.zeros_like(sent.layers["q"].B)
    B[0, 0] = value
    huge = {**sent.layers, "q": LowRank(torch.full_like(sent.layers["q"].A, value), B, sent.layers["q"].scale)}
    updates = [Update(client, shifted(sent, 0.01), 1) for client in "ab"] + [Update("c", Adapter(huge, sent.dense), 1)]
    passed, refused = judged(Gate(norm=10), dict.fromkeys("abc", task_of(sent)), updates)
    assert passed == ["a", "b"]
    assert list(refused) == ["c"]
    assert math.isfinite(change(sent, Adapter(huge, sent.dense)))


def test_what_an_optimizer_cannot_reach_is_refused() -> None:
    sent = adapter_of(0)
    task = task_of(sent)
    values = sum(x.A.numel() + x.B.numel() for x in sent.layers.values()) + 7
    one_step = Update("a", shifted(sent, 0.0099), 4)  # every value by less than the rate
    far = Update("b", shifted(sent, 0.05), 4)
    claims_more = Update("c", shifted(sent, 0.05), 40)
    passed, refused = judged(Gate(reach=True), dict.fromkeys("abc", task), [one_step, far, claims_more])
    assert passed == ["a", "c"]
    assert "which adamw can reach" in refused["b"]
    assert moved(sent, one_step.adapter) == pytest.approx(0.0099 * math.sqrt(values), rel=1e-4)
    assert reachable(task, 4) == pytest.approx(0.01 * math.sqrt(values), rel=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("examples", "steps"), [(1, 1), (3, 1), (4, 1), (5, 2), (7, 2), (8, 2), (9, 3)])
def test_a_part_of_a_batch_is_a_step(examples: int, steps: int, optimizer: str) -> None:
    """As a data loader has it, which drops nothing: batches of 4."""
    local = replace(LOCAL, optimizer=optimizer, batch=4, clip=1.0, steps=None, epochs=1)
    loader = torch.utils.data.DataLoader(range(examples), batch_size=4)
    assert len(loader) == steps
    counted = task_of(adapter_of(0), replace(local, steps=steps))
    assert reachable(task_of(adapter_of(0), local), examples) == reachable(counted, examples) > 0
    twice = replace(local, epochs=2, accumulate=2)
    rounded = -(-examples // 8)  # passes that are accumulated make one step, and a part of them makes one, too
    counted = task_of(adapter_of(0), replace(local, steps=2 * rounded))
    assert reachable(task_of(adapter_of(0), twice), examples) == reachable(counted, examples)


def test_a_client_of_fewer_examples_than_a_batch_is_not_refused() -> None:
    sent = adapter_of(0)
    trained = Update("a", shifted(sent, 0.0099), 1)
    assert judged(Gate(reach=True), {"a": task_of(sent)}, [trained]) == (["a"], {})


# --- the measures


@settings(max_examples=100, deadline=None)
@given(
    seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)),
    ranks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    kept=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    dense=st.booleans(),
)
def test_change_is_the_dense_definition(
    seeds: tuple[int, int], ranks: tuple[int, int], kept: tuple[int, int], dense: bool
) -> None:
    assume(seeds[0] != seeds[1])
    sent, trained = adapter_of(seeds[0], ranks, dense), adapter_of(seeds[1], ranks, dense)
    pruned = {name: truncate(x, rank) for (name, x), rank in zip(trained.layers.items(), kept, strict=True)}
    trained = Adapter(pruned, trained.dense)
    parts = [delta(x) - delta(sent.layers[name]) for name, x in trained.layers.items()]
    parts += [trained.dense[name] - tensor for name, tensor in sent.dense.items()]
    expected = math.sqrt(sum(float((part.double() ** 2).sum()) for part in parts))
    assert change(sent, trained) == pytest.approx(expected, rel=1e-5)
    assert change(sent, sent) == 0
    before = [x for n, y in sent.layers.items() for x in (y.A[: pruned[n].rank], y.B[:, : pruned[n].rank])]
    after = [x for y in pruned.values() for x in (y.A, y.B)]
    far = sum(float(((x - y) ** 2).sum()) for x, y in zip(before, after, strict=True))
    far += sum(float(((trained.dense[name] - tensor) ** 2).sum()) for name, tensor in sent.dense.items())
    assert moved(sent, trained) == pytest.approx(math.sqrt(far), rel=1e-5)


Gradients = Callable[[int, int, Tensor, np.random.Generator], Tensor]

ADVERSARIES: dict[str, Gradients] = {
    # (step, steps, value, rng) -> a gradient
    "constant": lambda t, n, p, rng: torch.ones_like(p),
    "after nothing": lambda t, n, p, rng: torch.full_like(p, 1e6 if t == n - 1 else 0.0),
    # As beta_1 / beta_2 grows: where the inequality of Cauchy and Schwarz behind the bound is an equality.
    "growing": lambda t, n, p, rng: torch.full_like(p, min(1e-2 * (0.999 / 0.9) ** t, 1e18)),
    "one at last": lambda t, n, p, rng: torch.full_like(p, 1e-4 if t < n - 3 else 1e6),
    "away from zero": lambda t, n, p, rng: -p / torch.linalg.vector_norm(p).clamp(min=1e-9),
    "with the decay": lambda t, n, p, rng: p / torch.linalg.vector_norm(p).clamp(min=1e-9) * 1e4,
    "random": lambda t, n, p, rng: torch.tensor(rng.standard_normal(p.shape) * 10 ** rng.uniform(-4, 4)).float(),
}


def trained_by(sent: Adapter, local: LocalTraining, steps: int, gradients: Gradients) -> Adapter:
    """What torch's optimizer makes of gradients that an adversary chooses, clipped as the trainer clips them."""
    moving = copy.deepcopy(sent)
    values = [y for x in moving.layers.values() for y in (x.A, x.B)] + list(moving.dense.values())
    parameters = [torch.nn.Parameter(value) for value in values]
    optimizer, rng = optimizer_of(parameters, local), stream(0, "adversary")
    for step in range(steps):
        for parameter in parameters:
            parameter.grad = gradients(step, steps, parameter.detach(), rng)
        if local.clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, local.clip)
        optimizer.step()
    rest: Iterator[Tensor] = iter([parameter.detach() for parameter in parameters])
    layers = {name: LowRank(next(rest), next(rest), x.scale) for name, x in sent.layers.items()}
    return Adapter(layers, {name: next(rest) for name in sent.dense})


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize("steps", [1, 2, 10, 100, 300])
@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw", "clip": None},
        {"optimizer": "adamw", "clip": 1.0, "weight_decay": 0.1},
        {"optimizer": "adamw", "clip": None, "weight_decay": 1.0, "lr": 0.05},
        {"optimizer": "sgd", "clip": 1.0},
        {"optimizer": "sgd", "clip": 0.3, "momentum": 0.9},
        {"optimizer": "sgd", "clip": 1.0, "momentum": 0.9, "weight_decay": 0.05},
        {"optimizer": "sgd", "clip": 1e-3, "momentum": 0.99, "weight_decay": 0.5},
    ],
    ids=str,
)
def test_no_gradients_reach_farther_than_the_bound(options: dict[str, Any], steps: int, adversary: str) -> None:
    local = replace(LOCAL, steps=steps, **options)
    sent = adapter_of(3)
    far = moved(sent, trained_by(sent, local, steps, ADVERSARIES[adversary]))
    assert 0 < far <= reachable(task_of(sent, local), 1) * (1 + 1e-4)


def test_the_bound_is_nearly_reached() -> None:
    """So that it refuses what it can."""
    for steps, options, adversary, share in (
        (1, {"optimizer": "adamw"}, "constant", 0.999),
        (300, {"optimizer": "adamw", "clip": None}, "growing", 0.8),
        (100, {"optimizer": "sgd"}, "constant", 0.999),
        (100, {"optimizer": "sgd", "momentum": 0.9}, "constant", 0.85),
    ):
        local = replace(LOCAL, steps=steps, **options)  # type: ignore[arg-type]
        sent = adapter_of(3)
        far = moved(sent, trained_by(sent, local, steps, ADVERSARIES[adversary]))
        assert far > share * reachable(task_of(sent, local), 1), (steps, options)


def test_what_bounds_nothing_is_infinite_and_no_number_of_steps_is_too_many() -> None:
    sent = adapter_of(0)
    assert reachable(task_of(sent, replace(LOCAL, optimizer="sgd", clip=None)), 9) == math.inf
    for options in ({"optimizer": "adamw"}, {"optimizer": "sgd"}, {"optimizer": "sgd", "weight_decay": 0.1}):
        near, far = (reachable(task_of(sent, replace(LOCAL, **options)), n) for n in (9, 2.0**53))  # type: ignore[arg-type]
        assert 0 < near < far
    only_B = reachable(task_of(sent, replace(LOCAL, steps=3), "B"), 1)
    assert only_B < reachable(task_of(sent, replace(LOCAL, steps=3)), 1)


# --- one poisoned client of ten

POISONED = "client_3"


class Poisoned:
    """A simulator one of whose clients sends a thousand times its change, turned round."""

    def __init__(self, clients: Any, times: float) -> None:
        self.clients, self.times = clients, times

    def __getattr__(self, name: str) -> Any:
        return getattr(self.clients, name)

    def profiles(self) -> Mapping[str, ClientProfile]:
        return self.clients.profiles()  # type: ignore[no-any-return]

    def fit(self, tasks: Mapping[str, Task]) -> Iterator[Update]:
        for update in self.clients.fit(tasks):
            yield self.poison(update, tasks[update.client].adapter) if update.client == POISONED else update

    def poison(self, update: Update, sent: Adapter) -> Update:
        def scaled(before: Tensor, after: Tensor, times: float) -> Tensor:
            return before - times * (after - before)

        layers = {}
        for name, x in update.adapter.layers.items():
            before = sent.layers[name]
            layers[name] = LowRank(x.A, scaled(before.B, x.B, self.times), x.scale)
        dense = {name: scaled(sent.dense[name], tensor, self.times) for name, tensor in update.adapter.dense.items()}
        return replace(update, adapter=Adapter(layers, dense))


@pytest.fixture(scope="module")
def accuracy(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., float]:
    """(trust, poisoned) -> test accuracy of ten clients' digits after some rounds."""
    config: dict[str, Any] = {
        "seed": 0,
        "threads": 1,
        "device": "cpu",
        "model": {"name": "digits-vit", "targets": "attention+mlp", "rank": 8, "alpha": 24},
        "data": {"name": "digits", "clients": 10, "partition": {"name": "iid"}},
        "fleet": [{"share": 0.5, "rank": 4}, {"share": 0.5, "rank": 8}],
        "method": "rb_lora",
        "local": {"epochs": 1, "batch": 16, "lr": 3e-3},
    }
    folder = tmp_path_factory.mktemp("poisoned")

    def run(name: str, trust: dict[str, Any], times: float | None, rounds: int = 8) -> float:
        experiment = parse({**config, "rounds": rounds, "trust": trust}, "test", Path())
        world = build(experiment)
        if times is not None:
            world = replace(world, clients=Poisoned(world.clients, times))
        session = Session(Run.create(folder / name, experiment), world)
        due = [POISONED] if times is not None and "norm" in trust else []
        assert all(list(record.refused) == due for record, _ in session.rounds())
        return float(session.measure({EVERYBODY: [session.state.folded, session.state.adapter]}, "test")["accuracy"])

    return run


def test_a_poisoned_client_of_ten_does_not_matter_with_the_check_and_ruins_all_without(
    accuracy: Callable[..., float],
) -> None:
    clean = accuracy("clean", {"norm": 10.0, "reach": True}, None)
    checked = accuracy("checked", {"norm": 10.0, "reach": False}, 1000.0)
    unchecked = accuracy("unchecked", {"reach": False}, 1000.0, rounds=2)
    assert clean > 0.5, (clean, checked, unchecked)
    assert abs(clean - checked) <= 0.02
    assert unchecked < 0.3
