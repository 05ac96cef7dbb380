"""The aggregation error against its definition on dense float64 matrices, and what it says of rules known exact."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from polyrank.core.exactness import aggregation_error
from polyrank.core.fake import FakeClients, echo, perturb
from polyrank.core.federate import absorb, federate, plan
from polyrank.core.lowrank import Adapter, LowRank, fresh
from polyrank.core.method import Method
from polyrank.core.rng import stream, torch_generator
from polyrank.core.types import Client, ClientProfile, LocalTraining, ModelSpec, Query, ServerState, Task, Update
from polyrank.methods import AGGREGATORS, DISPATCHERS, METHODS
from polyrank.methods.dispatch import whole
from polyrank.methods.factors import alternating

SPEC = ModelSpec({"l0": (12, 10), "l1": (8, 14)})
FULL = 8  # a server rank that holds the sum of the clients' products
SIZES = {"a": 10, "b": 20, "c": 30}
EQUAL, UNEQUAL = {"a": 3, "b": 3, "c": 3}, {"a": 1, "b": 2, "c": 3}
LOCAL = LocalTraining()


def importance(query: Query, state: ServerState) -> dict[str, float]:
    """What a hold-out would say: something new every round."""
    return {name: 1.0 + (index + query.round) % 3 for index, name in enumerate(SPEC.modules)}


ASKED: dict[str, Any] = {"errors": True, "measure": importance}


def start(rank: int, dtype: torch.dtype = torch.float32, learnt: bool = True) -> ServerState:
    rng = stream(0, "start")
    layers = {name: fresh(shape, min(rank, *shape), 2.0, rng) for name, shape in SPEC.modules.items()}
    if learnt:
        generator = torch_generator(rng)
        layers = {n: replace(x, B=torch.randn(x.B.shape, generator=generator)) for n, x in layers.items()}
    return ServerState(0, Adapter({n: LowRank(x.A.to(dtype), x.B.to(dtype), x.scale) for n, x in layers.items()}))


def profiles(ranks: Mapping[Client, int]) -> dict[Client, ClientProfile]:
    return {client: ClientProfile(SIZES[client], rank=rank) for client, rank in ranks.items()}


def errors(
    method: Method, state: ServerState, ranks: Mapping[Client, int], rounds: int = 2, answer: Any = perturb
) -> list[float | None]:
    clients = FakeClients(profiles(ranks), answer)
    return [r.aggregation_error for _, r in federate(method, state, clients, SPEC, LOCAL, rounds=rounds, **ASKED)]


def one_round(
    method: Method, state: ServerState, clients: FakeClients
) -> tuple[ServerState, dict[Client, Task], list[Update], float]:
    """A round with all that the definition speaks of."""
    tasks: dict[Client, Task] = {}
    updates: list[Update] = []

    class Watched(FakeClients):
        def fit(self, asked: Mapping[Client, Task]) -> Any:
            tasks.update(asked)
            for update in clients.fit(asked):
                updates.append(update)
                yield update

    watched = Watched(clients.profiles())
    after, record = next(federate(method, state, watched, SPEC, LOCAL, rounds=state.round + 1, **ASKED))
    assert record.aggregation_error is not None
    return after, tasks, updates, record.aggregation_error


def by_definition(
    before: ServerState, after: ServerState, tasks: Mapping[Client, Task], updates: list[Update]
) -> float:
    """Dense, in float64."""

    def model(name: str, *parts: Adapter) -> Tensor:
        xs = [part.layers[name] for part in parts if name in part.layers]
        return sum((x.scale * x.B.double() @ x.A.double() for x in xs), torch.zeros(SPEC.modules[name]).double())

    gap, change = 0.0, 0.0
    for name in SPEC.modules:
        holders = [u for u in updates if name in u.adapter.layers]
        total = sum(u.examples for u in holders)
        if total:
            exact = sum(u.examples / total * model(name, u.adapter, tasks[u.client].frozen) for u in holders)
            gap += float((model(name, after.adapter, after.folded) - exact).square().sum())
            change += float((exact - model(name, before.adapter, before.folded)).square().sum())
    return (gap / change) ** 0.5


@pytest.mark.parametrize("ranks", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize("dispatch", DISPATCHERS)
@pytest.mark.parametrize("name", [*METHODS, "hralora"])
def test_it_is_what_the_dense_definition_says(name: str, dispatch: str, ranks: Mapping[Client, int]) -> None:
    method = METHODS[name]() if name in METHODS else replace(METHODS["fedit"](), aggregate=AGGREGATORS[name])
    method, state = replace(method, dispatch=DISPATCHERS[dispatch]), start(3)
    for _ in range(3):
        before = state
        state, tasks, updates, error = one_round(method, before, FakeClients(profiles(ranks)))
        assert error == pytest.approx(by_definition(before, state, tasks, updates), rel=1e-6, abs=1e-12)


def test_fedit_s_joint_rounds_are_not_exact() -> None:
    for ranks in (EQUAL, UNEQUAL):
        assert all(error > 0.05 for error in errors(METHODS["fedit"](), start(3), ranks))


EXACT = [
    ("flexlora", {}, UNEQUAL, FULL),  # the server's rank holds the sum of products
    ("flora", {}, UNEQUAL, 3),
    ("fedex_lora", {"weights": "size", "rows": "keep", "layers": "keep"}, UNEQUAL, 3),
    ("fedex_lora", {"weights": "size"}, EQUAL, 3),
]


@pytest.mark.parametrize(("name", "options", "ranks", "rank"), EXACT)
def test_exact_rules_have_no_error(name: str, options: dict[str, Any], ranks: dict[str, int], rank: int) -> None:
    method = replace(METHODS[name](), aggregate=partial(AGGREGATORS[name], **options))
    for learnt in (False, True):
        assert all(error <= 1e-6 for error in errors(method, start(rank, learnt=learnt), ranks, rounds=4))


@pytest.mark.parametrize("name", ["ffa_lora", "rolora", "fedsvd"])
def test_rounds_of_one_factor_have_no_error(name: str) -> None:
    assert all(error <= 1e-6 for error in errors(METHODS[name](), start(3), EQUAL, rounds=4))


@pytest.mark.parametrize("refactor", [True, False])
@pytest.mark.parametrize("ranks", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_hralora_s_have_none_at_unequal_ranks_either(ranks: Mapping[Client, int], refactor: bool) -> None:
    rule = partial(AGGREGATORS["hralora"], refactor=refactor)
    method = replace(METHODS["fedit"](), dispatch=whole, factors=partial(alternating, warmup=2), aggregate=rule)
    found = errors(method, start(5), ranks, rounds=6)
    assert all(error > 0.05 for error in found[:2])
    assert all(error <= 1e-6 for error in found[2:])


def test_a_small_error_is_not_lost_among_large_updates() -> None:
    """A gap of 1e-9 of the model, where differences of Gram matrices would end at 1e-8."""
    state = start(3, torch.float64)
    x = state.adapter.layers["l0"]
    moved = replace(x, B=x.B + 1e-4)
    near = replace(moved, B=moved.B + 1e-9)
    update = Update("a", Adapter({"l0": moved}), 1)
    task = Task(0, Adapter({"l0": x}), Adapter(), "AB", LOCAL, None, 0)
    after = replace(state, adapter=Adapter({**state.adapter.layers, "l0": near}))
    assert aggregation_error(state, after, {"a": task}, [update]) == pytest.approx(1e-5, rel=1e-4)


def test_nothing_changed_is_no_error() -> None:
    for method in (METHODS["fedit"](), METHODS["flexlora"]()):
        for state in (start(3), start(3, learnt=False)):
            assert errors(method, state, EQUAL, answer=echo) == [0.0, 0.0]
    absent = FakeClients(profiles(EQUAL), absent=frozenset(EQUAL))
    _, record = next(federate(METHODS["fedit"](), start(3), absent, SPEC, LOCAL, rounds=1, errors=True))
    assert record.aggregation_error == 0.0


def test_clients_without_data_and_layers_without_holders_do_not_count() -> None:
    state = start(3)
    x, y = state.adapter.layers.values()
    tasks = {c: Task(0, Adapter({"l0": x}), Adapter({"l1": y}), "AB", LOCAL, None, 0) for c in "ab"}
    sent = [replace(x, B=x.B + i + 1) for i in range(2)]
    updates = [Update(c, Adapter({"l0": z}), n) for c, z, n in zip("ab", sent, (5, 0), strict=True)]

    def after(l0: LowRank) -> ServerState:
        return replace(state, adapter=Adapter({"l0": l0, "l1": replace(y, B=y.B + 1)}))

    assert aggregation_error(state, after(sent[0]), tasks, updates) == pytest.approx(0.0, abs=1e-12)
    weightless = [updates[0], replace(updates[1], adapter=Adapter({"l0": sent[1], "l1": y}))]
    assert aggregation_error(state, after(sent[0]), tasks, weightless) == pytest.approx(0.0, abs=1e-12)
    nobody = [replace(update, examples=0) for update in updates]
    assert aggregation_error(state, after(replace(x, B=x.B + 1.5)), tasks, nobody) == pytest.approx(0.0, abs=1e-6)
    assert aggregation_error(state, after(x), tasks, updates) == pytest.approx(1.0)


def test_it_is_measured_only_where_asked() -> None:
    clients = FakeClients(profiles(EQUAL))
    plain = list(federate(METHODS["fedit"](), start(3), clients, SPEC, LOCAL, rounds=2))
    asked = list(federate(METHODS["fedit"](), start(3), clients, SPEC, LOCAL, rounds=2, errors=True))
    assert [record.aggregation_error for _, record in plain] == [None, None]
    for (_, one), (_, other) in zip(plain, asked, strict=True):
        assert one == replace(other, aggregation_error=None)
    for name, x in plain[-1][0].adapter.layers.items():
        assert torch.equal(x.B, asked[-1][0].adapter.layers[name].B)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("name", ["median", "fedit"])
def test_an_update_that_is_not_finite_is_no_exact_round(name: str, value: float) -> None:
    """The mean of models has no bound then, and no rule that stays near it is called exact."""

    def answer(client: Client, task: Task) -> Adapter:
        moved = perturb(client, task)
        if client != "b":
            return moved
        return Adapter({n: LowRank(x.A * value, x.B * value, x.scale) for n, x in moved.layers.items()})

    method, state, clients = METHODS[name](), start(FULL), FakeClients(profiles(EQUAL), answer)
    tasks = plan(method, state, method.estimate(profiles(EQUAL), SPEC, LOCAL), list(EQUAL), SPEC, LOCAL, 0)
    updates = list(clients.fit(tasks))
    error = aggregation_error(state, absorb(method, state, updates, 0), tasks, updates)
    assert error == pytest.approx(1.0) if name == "median" else error > 0.5
