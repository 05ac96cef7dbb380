"""Models with modules that have less room than the server's rank: every method, rule and allocator runs on them."""

import numpy as np
import pytest
import torch

from polyrank.core.architecture import ModelSpec
from polyrank.core.fake import FakeClients
from polyrank.core.federate import federate
from polyrank.core.lokr import lokr_parameters
from polyrank.core.lowrank import Adapter, delta, fresh
from polyrank.core.method import Method
from polyrank.core.rng import stream
from polyrank.core.types import ClientProfile, LocalTraining, Query, ServerState, Update
from polyrank.methods import ALLOCATORS, METHODS
from polyrank.methods.named import flexlora

RANK, ROUNDS = 4, 3
WIDE, ROUTER, GATE = (12, 10), (2, 10), (1, 10)
MODULES = {f"{block}.{name}": s for block in range(3) for name, s in (("q", WIDE), ("router", ROUTER), ("gate", GATE))}
SPEC = ModelSpec({**MODULES, "project": (3, 12)}, {name: int(name[0]) for name in MODULES})
ROOM = {name: min(RANK, *shape) for name, shape in SPEC.modules.items()}
PROFILES = {
    client: ClientProfile(10 + 5 * i, rank=rank)
    for i, (client, rank) in enumerate(zip("abcde", (1, 2, 3, 4, 4), strict=True))
}


def start(method: Method) -> ServerState:
    rng = stream(0, "start")
    if method.form == "lokr":
        shapes = lokr_parameters(SPEC.modules, method.rank or 1)
        return ServerState(0, Adapter({}, {name: torch.zeros(shape) for name, shape in shapes.items()}))
    return ServerState(0, Adapter({n: fresh(SPEC.modules[n], own, 0.5, rng) for n, own in SPEC.at(RANK).items()}))


def measure(query: Query, state: ServerState) -> dict[str, float]:
    return {name: 1.0 + position for position, name in enumerate(SPEC.modules)}


def test_a_rank_on_every_module_is_what_each_has_room_for() -> None:
    assert SPEC.at(RANK) == ROOM
    assert {ROOM[name] for name in ("0.q", "0.router", "0.gate", "project")} == {4, 2, 1, 3}
    assert SPEC.full_rank == 10


def test_modules_named_by_themselves_bound_the_rank() -> None:
    assert ModelSpec(SPEC.modules, exact=frozenset({"0.router", "0.q"})).full_rank == 2


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs(name: str) -> None:
    method = METHODS[name]()
    state, clients = start(method), FakeClients(PROFILES)
    rounds = federate(method, state, clients, SPEC, LocalTraining(), rounds=ROUNDS, seed=1, measure=measure)
    for after, record in rounds:
        assert {name: x.rank for name, x in after.adapter.layers.items()} == ({} if method.form == "lokr" else ROOM)
        assert all(torch.isfinite(t).all() for x in after.adapter.layers.values() for t in (x.A, x.B))
        assert all(rank <= ROOM[layer] for ranks in record.ranks.values() for layer, rank in ranks.items())
        assert all(x.rank <= min(x.shape) for x in after.folded.layers.values())
        assert not record.refused
    assert after.round == ROUNDS
    moved = after.adapter.dense if method.form == "lokr" else {n: delta(x) for n, x in after.adapter.layers.items()}
    moved |= {n: delta(x) for n, x in after.folded.layers.items() if x.rank}
    assert any(float(tensor.abs().sum()) > 0 for tensor in moved.values())


@pytest.mark.parametrize("name", ALLOCATORS)
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_no_allocator_spends_more_than_the_budget_or_than_there_is_room_for(name: str, rank: int) -> None:
    budget = rank * len(SPEC.modules)
    scores = measure(Query("fisher"), ServerState(0, Adapter()))
    ranks = ALLOCATORS[name](budget, ROOM, scores, SPEC, np.random.default_rng(0))
    assert 0 < sum(ranks.values()) <= budget
    assert all(own <= ROOM[layer] for layer, own in ranks.items())


def test_the_exact_mean_of_a_narrow_module_is_kept_whole() -> None:
    """A module that is trained at all the rank it has loses nothing by being cut to the server's rank."""
    sent: list[Update] = []

    class Watched(FakeClients):
        def fit(self, tasks):  # type: ignore[no-untyped-def]
            for update in super().fit(tasks):
                sent.append(update)
                yield update

    method = flexlora()
    ((after, _),) = federate(method, start(method), Watched(PROFILES), SPEC, LocalTraining(), rounds=1, seed=1)
    total = sum(update.examples for update in sent)
    for name in ("0.router", "1.gate", "project"):
        mean = sum(update.examples / total * delta(update.adapter.layers[name]).double() for update in sent)
        torch.testing.assert_close(delta(after.adapter.layers[name]).double(), mean, atol=1e-5, rtol=1e-4)
