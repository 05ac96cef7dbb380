"""What one client of ten can do by what it says of itself and by what it sends, and what a server believes of it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from polyrank.core.clipping import change_of
from polyrank.core.federate import federate
from polyrank.core.gate import Gate, reachable
from polyrank.core.lowrank import Adapter, LowRank, delta
from polyrank.core.rng import stream, torch_generator
from polyrank.core.types import ClientProfile, LocalTraining, ModelSpec, Query, RoundRecord, ServerState, Task, Update
from polyrank.methods import METHODS, SCORERS

SPEC = ModelSpec({"q": (6, 5), "v": (4, 7)})
LOCAL = LocalTraining(lr=0.1, batch=4)
NAMES = [f"c{number}" for number in range(10)]
CLAIM = 2**53
TRUST = Gate(reach=True, size_cap=3.0, clip=2.0)


def noise(*shape: int, path: str) -> Tensor:
    return torch.randn(shape, generator=torch_generator(stream(0, path)))


def start(rank: int = 4) -> ServerState:
    layers = {
        name: LowRank(noise(rank, d_in, path=f"A{name}"), 0.1 * noise(d_out, rank, path=f"B{name}"))
        for name, (d_out, d_in) in SPEC.modules.items()
    }
    return ServerState(0, Adapter(layers, {"head": noise(3, 2, path="head")}))


def honest(client: str, task: Task) -> Adapter:
    """Everybody goes the same way, each with some noise of its own."""

    def moved(tensor: Tensor, name: str) -> Tensor:
        return tensor + 0.02 + 0.005 * noise(*tensor.shape, path=f"{client}{name}{task.round}")

    layers = {
        n: LowRank(
            moved(x.A, f"A{n}") if "A" in task.factors else x.A,
            moved(x.B, f"B{n}") if "B" in task.factors else x.B,
            x.scale,
        )
        for n, x in task.adapter.layers.items()
    }
    return Adapter(layers, {name: moved(tensor, name) for name, tensor in task.adapter.dense.items()})


def scaled(sent: Adapter, trained: Adapter, times: float) -> Adapter:
    """The same training, so many times as far; backwards where `times` is negative."""

    def far(before: Tensor, after: Tensor) -> Tensor:
        return before + times * (after - before)

    layers = {
        name: LowRank(far(sent.layers[name].A, x.A), far(sent.layers[name].B, x.B), x.scale)
        for name, x in trained.layers.items()
    }
    return Adapter(layers, {name: far(sent.dense[name], tensor) for name, tensor in trained.dense.items()})


Attack = Callable[[Task, Adapter], Adapter]


class Clients:
    """Ten clients of 40 examples, the last of which may lie."""

    def __init__(self, claim: int = 40, attack: Attack | None = None, sizes: Mapping[str, int] | None = None) -> None:
        self.known = {name: ClientProfile((sizes or {}).get(name, 40), rank=4) for name in NAMES}
        self.known["c9"] = replace(self.known["c9"], examples=claim)
        self.attack = attack
        self.tasks: dict[str, Task] = {}

    def profiles(self) -> Mapping[str, ClientProfile]:
        return self.known

    def fit(self, tasks: Mapping[str, Task]) -> Iterator[Update]:
        self.tasks = dict(tasks)
        for client, task in tasks.items():
            trained = honest(client, task)
            if client == "c9" and self.attack is not None:
                trained = self.attack(task, trained)
            yield Update(client, trained, self.known[client].examples, task.factors)


def rounds_of(
    clients: Clients, gate: Gate, method: str = "fedit", rounds: int = 1
) -> list[tuple[ServerState, RoundRecord]]:
    return list(federate(METHODS[method](), start(), clients, SPEC, LOCAL, rounds=rounds, gate=gate))


def model(state: ServerState) -> Tensor:
    values = [delta(x).flatten() for x in state.adapter.layers.values()]
    return torch.cat([*values, state.adapter.dense["head"].flatten()])


def progress(clients: Clients, gate: Gate, method: str = "fedit") -> float:
    """How far the model goes where honest clients take it: 1 as far as without an attack, 0 not at all."""
    before = model(start())
    due = model(rounds_of(Clients(), Gate(), method)[-1][0]) - before
    far = model(rounds_of(clients, gate, method)[-1][0]) - before
    return float(far @ due / (due @ due))


def flipped(task: Task, trained: Adapter) -> Adapter:
    return scaled(task.adapter, trained, -1.0)


@pytest.mark.parametrize("method", ["fedit", "rb_lora", "flexlora", "lora_fair", "hetlora"])
def test_who_claims_many_examples_does_not_own_the_model(method: str) -> None:
    liar = Clients(CLAIM, flipped)
    if method != "hetlora":  # which weighs low-rank layers by norms
        assert progress(liar, Gate(reach=True), method) < -0.5
    assert progress(liar, TRUST, method) > 0.4


def test_a_claim_counts_as_so_many_times_the_median() -> None:
    sizes = {name: 10 * (number + 1) for number, name in enumerate(NAMES)}
    (_, record), *_ = rounds_of(Clients(CLAIM, sizes=sizes), Gate(size_cap=3.0))
    assert record.examples == {**{name: 10.0 * (n + 1) for n, name in enumerate(NAMES[:9])}, "c9": 150.0}
    assert record.bounded == {"c9": "states 9.0072e+15 examples, and counts as 150: 3 times the median of 50"}
    (_, record), *_ = rounds_of(Clients(CLAIM), Gate(size_cap=None))
    assert record.examples["c9"] == CLAIM
    assert not record.bounded


def test_who_has_no_examples_does_not_set_what_is_usual() -> None:
    sizes = dict.fromkeys(NAMES[:8], 0) | {"c8": 40}
    (_, record), *_ = rounds_of(Clients(CLAIM, sizes=sizes), Gate(size_cap=3.0))
    assert record.examples["c9"] == 120


def test_a_claim_lifts_no_bound_on_how_far_training_can_come() -> None:
    """Who states more than counts is asked for as many steps as count, and those bound how far it can have come."""
    liar = Clients(CLAIM)
    (_, _), *_ = rounds_of(liar, Gate(reach=True))
    assert reachable(liar.tasks["c9"], CLAIM) > 1e12
    (_, record), *_ = rounds_of(liar, TRUST)
    assert liar.tasks["c9"].local.steps == 30  # of 120 examples in batches of 4
    assert liar.tasks["c0"].local.steps is None
    assert reachable(liar.tasks["c9"], CLAIM) == reachable(liar.tasks["c0"], 120)
    assert not record.refused
    liar.attack = lambda task, trained: scaled(task.adapter, trained, 1e4)
    (_, record), *_ = rounds_of(liar, replace(TRUST, clip=None))
    assert "which adamw can reach" in record.refused["c9"]


def test_steps_that_the_server_states_are_left_alone() -> None:
    liar = Clients(CLAIM)
    local = replace(LOCAL, steps=7)
    next(federate(METHODS["fedit"](), start(), liar, SPEC, local, rounds=1, gate=TRUST))
    assert {task.local.steps for task in liar.tasks.values()} == {7}


@pytest.mark.parametrize("method", ["fedit", "rb_lora", "flexlora"])
@pytest.mark.parametrize("times", [-10.0, -300.0])
def test_nobody_moves_the_model_many_times_as_far_as_others(method: str, times: float) -> None:
    clients = Clients(attack=lambda task, trained: scaled(task.adapter, trained, times))
    due = model(rounds_of(Clients(), Gate(), method)[-1][0])
    far = due - model(start())

    def beside(gate: Gate) -> float:
        return float((model(rounds_of(clients, gate, method)[-1][0]) - due).norm() / far.norm())

    assert beside(Gate()) > 0.8
    assert beside(Gate(clip=2.0)) < 0.4


@pytest.mark.parametrize("method", ["fedit", "flexlora"])
def test_other_factors_of_the_same_product_do_not_escape_the_bound(method: str) -> None:
    """The product is as it was trained, and a mean of factors is not: A is a thousand times as large, B as small."""

    def rewritten(task: Task, trained: Adapter) -> Adapter:
        return Adapter({n: LowRank(1000 * x.A, x.B / 1000, x.scale) for n, x in trained.layers.items()}, trained.dense)

    clients = Clients(attack=rewritten)
    (state, record), *_ = rounds_of(clients, Gate(clip=2.0), method)
    (due, _), *_ = rounds_of(Clients(), Gate(), method)
    assert list(record.bounded) == ["c9"]
    assert float((model(state) - model(due)).norm() / (model(due) - model(start())).norm()) < 0.3
    assert "reach" in rounds_of(clients, TRUST, method)[0][1].refused["c9"]


def test_what_is_held_back_is_within_the_bound_and_goes_the_same_way() -> None:
    clients = Clients(attack=lambda task, trained: scaled(task.adapter, trained, 40.0))
    (_, record), *_ = rounds_of(clients, Gate(clip=2.0))
    assert list(record.bounded) == ["c9"]
    assert "times as far as the median client, and counts as 2 times" in record.bounded["c9"]
    tasks = clients.tasks
    sent: dict[str, Update] = {update.client: update for update in clients.fit(tasks)}
    bounded = {u.client: u for u in Gate(clip=2.0).admitted(tasks, sent.values(), lambda *_: None)}
    assert all(bounded[name] is sent[name] for name in NAMES[:9])
    changes = {n: change_of(tasks[n].adapter, u.adapter, "AB") for n, u in bounded.items()}
    for norm in ("product", "factors"):
        norms = sorted(getattr(change, norm)(1.0) for name, change in changes.items())
        assert getattr(changes["c9"], norm)(1.0) <= 2 * norms[4] * (1 + 1e-5)
    before, after = (tasks["c9"].adapter.layers["q"].B, bounded["c9"].adapter.layers["q"].B)
    way = sent["c9"].adapter.layers["q"].B - before
    assert float(torch.nn.functional.cosine_similarity((after - before).flatten(), way.flatten(), dim=0)) > 0.999


def test_two_clients_are_too_few_to_say_what_is_usual() -> None:
    clients = Clients(attack=lambda task, trained: scaled(task.adapter, trained, 40.0))
    rounds_of(clients, Gate())
    updates = list(clients.fit({name: clients.tasks[name] for name in ("c8", "c9")}))
    assert list(Gate(clip=2.0).admitted(clients.tasks, iter(updates), lambda *_: None)) == updates


@pytest.mark.parametrize("method", sorted(METHODS))
def test_honest_clients_end_with_the_same_bytes(method: str) -> None:
    scores: Any = lambda query, state: dict.fromkeys(SPEC.modules, 1.0)  # noqa: E731
    ends = []
    for gate in (Gate(), TRUST):
        rounds = federate(METHODS[method](), start(), Clients(), SPEC, LOCAL, rounds=2, gate=gate, measure=scores)
        ends.append(list(rounds)[-1])
    (one, mine), (other, theirs) = ends
    assert mine == theirs
    for name, x in one.adapter.layers.items():
        assert torch.equal(x.A, other.adapter.layers[name].A)
        assert torch.equal(x.B, other.adapter.layers[name].B)


def test_scores_of_layers_weigh_by_what_a_claim_counts_as() -> None:
    asked: list[Query] = []

    def measure(query: Query, state: ServerState) -> dict[str, float]:
        asked.append(query)
        return dict.fromkeys(SPEC.modules, 1.0)

    method = replace(METHODS["fedit"](), score=partial(SCORERS["fisher"], on="clients"))
    liar = Clients(CLAIM)
    next(federate(method, start(), liar, SPEC, LOCAL, rounds=1, measure=measure, gate=TRUST))
    assert asked[0].most == 120
