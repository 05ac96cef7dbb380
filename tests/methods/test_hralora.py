"""HRALoRA's server step: the mean of what was trained, exactly where it can be, and components that never die."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyrank.core.fake import FakeClients, echo, perturb
from polyrank.core.federate import absorb, plan
from polyrank.core.lowrank import Adapter, Factors, LowRank, delta, fresh
from polyrank.core.method import Method
from polyrank.core.rng import stream, torch_generator
from polyrank.core.types import Client, ClientProfile, LocalTraining, ModelSpec, ServerState, Task, Update
from polyrank.methods import AGGREGATORS, DISPATCHERS
from polyrank.methods.aggregate.hralora import refactored
from polyrank.methods.estimate import fixed
from polyrank.methods.named import fedit

SPEC = ModelSpec({"l0": (12, 10), "l1": (8, 14), "l2": (5, 9)})
RANK, SCALE = 4, 2.5
SIZES = {"a": 10, "b": 20, "c": 30, "d": 0}
PROFILES = {client: ClientProfile(size, rank=RANK) for client, size in SIZES.items()}
LOCAL = LocalTraining()
Assignment = Mapping[Client, Mapping[str, int]]


def start(seed: int = 0, rank: int = RANK) -> ServerState:
    """Round 0 of a run, in float32: B is zero."""
    rng = stream(seed, "start")
    return ServerState(0, Adapter({name: fresh(shape, rank, SCALE, rng) for name, shape in SPEC.modules.items()}))


def learnt(seed: int = 0) -> ServerState:
    """A server in the middle of a run."""
    generator = torch_generator(stream(seed, "learnt"))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    layers = {n: LowRank(normal(RANK, d_in), normal(d_out, RANK), SCALE) for n, (d_out, d_in) in SPEC.modules.items()}
    return ServerState(3, Adapter(layers))


def method_of(factors: Factors = "AB", **options: Any) -> Method:
    return replace(fedit(), factors=lambda _: factors, aggregate=partial(AGGREGATORS["hralora"], **options))


def tasks_of(
    state: ServerState, assignment: Assignment, factors: Factors = "AB", dispatch: str = "whole", **options: Any
) -> dict[Client, Task]:
    """Tasks with these ranks, each client by its own."""
    tasks = {}
    for client, ranks in assignment.items():
        handed = DISPATCHERS[dispatch](state, ranks, stream(0, "dispatch"), **options)
        tasks[client] = Task(state.round, *(Adapter(part) for part in handed), factors, LOCAL, None, 0)
    return tasks


def fit(tasks: Mapping[Client, Task], answer: Any = perturb) -> list[Update]:
    return list(FakeClients(PROFILES, answer).fit(tasks))


def mean_models(tasks: Mapping[Client, Task], updates: list[Update]) -> dict[str, Tensor]:
    """The mean, by size, of what the models of the clients that trained a layer compute there."""
    means: dict[str, Tensor] = {}
    for name in SPEC.modules:
        holders = [u for u in updates if name in u.adapter.layers and u.examples]
        total = sum(u.examples for u in holders)
        if total:
            parts = [(u.examples / total, a) for u in holders for a in (u.adapter, tasks[u.client].frozen)]
            means[name] = sum(w * delta(wide(a.layers[name])) for w, a in parts if name in a.layers)
    return means


def wide(x: LowRank) -> LowRank:
    return LowRank(x.A.double(), x.B.double(), x.scale)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


UNEQUAL: Assignment = {"a": {"l0": 1, "l1": 2}, "b": {"l0": 3}, "c": {"l0": 4, "l1": 1, "l2": 2}}


# --- what is averaged


@pytest.mark.parametrize("refactor", [True, False])
@pytest.mark.parametrize("factors", ["A", "B"])
@pytest.mark.parametrize("scaling", ["constant", "lora", "rslora"])
def test_one_factor_rounds_are_exact_where_clients_run_the_whole_adapter(
    factors: Factors, refactor: bool, scaling: str
) -> None:
    """Clients train the first r rows and run the others frozen: rows they lack are the server's, which they ran."""
    state = learnt()
    tasks = tasks_of(state, UNEQUAL, factors, scaling=scaling)
    for client, ranks in UNEQUAL.items():
        assert {n: x.rank for n, x in tasks[client].adapter.layers.items()} == ranks
        assert {n: x.rank for n, x in tasks[client].frozen.layers.items()} == {
            n: RANK - ranks.get(n, 0) for n in SPEC.modules if ranks.get(n, 0) < RANK
        }
    updates = fit(tasks)
    after = absorb(method_of(factors, refactor=refactor), state, updates, 0)
    for name, expected in mean_models(tasks, updates).items():
        assert distance(delta(wide(after.adapter.layers[name])), expected) < 1e-6


def test_a_round_of_both_factors_has_cross_terms_and_a_single_client_none() -> None:
    state = learnt()
    tasks = tasks_of(state, UNEQUAL)
    updates = fit(tasks)
    after = absorb(method_of(), state, updates, 0)
    expected = mean_models(tasks, updates)
    errors = {name: distance(delta(x), expected[name]) for name, x in after.adapter.layers.items()}
    assert errors["l0"] > 0.01
    assert errors["l1"] > 0.01
    assert errors["l2"] < 1e-6  # one client trained it


def test_a_component_that_one_client_trained_is_diluted_unless_in_segments() -> None:
    state = learnt()
    held = state.adapter.layers["l0"]
    updates = fit(tasks_of(state, {"a": {"l0": 1}, "b": {"l0": 3}, "c": {"l0": 1}}))
    b = updates[1].adapter.layers["l0"]
    kept = absorb(method_of(refactor=False), state, updates, 0).adapter.layers["l0"]
    own = absorb(method_of(refactor=False, segments=True), state, updates, 0).adapter.layers["l0"]
    share = SIZES["b"] / 60
    torch.testing.assert_close(kept.A[1:3], held.A[1:3] + share * (b.A[1:3] - held.A[1:3]))
    torch.testing.assert_close(kept.B[:, 1:3], held.B[:, 1:3] + share * (b.B[:, 1:3] - held.B[:, 1:3]))
    torch.testing.assert_close(own.A[1:3], b.A[1:3])
    torch.testing.assert_close(own.B[:, 1:3], b.B[:, 1:3])
    torch.testing.assert_close(own.A[0], kept.A[0])  # all three trained it
    for x in (kept, own):
        assert torch.equal(x.A[3], held.A[3])
        assert torch.equal(x.B[:, 3], held.B[:, 3])


def test_weights_are_examples_or_all_alike() -> None:
    state = learnt()
    updates = fit(tasks_of(state, {"a": {"l0": RANK}, "c": {"l0": RANK}}, "B"))
    a, c = (u.adapter.layers["l0"].B for u in updates)
    by_size = absorb(method_of("B", refactor=False), state, updates, 0).adapter.layers["l0"].B
    alike = absorb(method_of("B", refactor=False, weights="uniform"), state, updates, 0).adapter.layers["l0"].B
    torch.testing.assert_close(by_size, a / 4 + 3 * c / 4)
    torch.testing.assert_close(alike, (a + c) / 2)


@pytest.mark.parametrize("options", [{}, {"refactor": False}, {"segments": True}])
def test_layers_that_nobody_trained_stay_bit_for_bit(options: dict[str, Any]) -> None:
    """Also where only a client without data trained them."""
    for state in (start(), learnt()):
        updates = fit(tasks_of(state, {"a": {"l0": 2}, "d": {"l0": 4, "l2": 4}}))
        after = absorb(method_of(**options), state, updates, 0).adapter.layers
        for name in ("l1", "l2"):
            assert torch.equal(after[name].A, state.adapter.layers[name].A)
            assert torch.equal(after[name].B, state.adapter.layers[name].B)
        assert not torch.equal(after["l0"].B, state.adapter.layers["l0"].B)


def test_clients_that_return_what_they_were_sent_leave_every_product() -> None:
    state = learnt()
    for dispatch in DISPATCHERS:
        after = absorb(method_of(), state, fit(tasks_of(state, UNEQUAL, dispatch=dispatch), echo), 0)
        for name, x in after.adapter.layers.items():
            assert distance(delta(wide(x)), delta(wide(state.adapter.layers[name]))) < 1e-6


# --- re-factorisation


@st.composite
def layers(draw: st.DrawFn) -> LowRank:
    """A layer in the middle of a run: of any rank, some components untrained, repeated, faint or badly scaled."""
    d_out, d_in, rank = draw(st.integers(1, 24)), draw(st.integers(1, 24)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    A, B = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
    for j in range(rank):
        flaw = draw(st.sampled_from(["none", "none", "untrained", "repeated", "faint", "unbalanced"]))
        if flaw == "untrained":
            B[:, j] = 0
        elif flaw == "repeated":
            A[j], B[:, j] = A[0], B[:, 0]
        elif flaw == "faint":
            B[:, j] *= 1e-7
        elif flaw == "unbalanced":
            A[j], B[:, j] = A[j] * 1e3, B[:, j] * 1e-3
    return LowRank(A, B, draw(st.sampled_from([1.0, 0.125, 4.0])))


@given(layers())
@settings(deadline=None, max_examples=300)
def test_refactoring_keeps_the_delta_and_balances_what_has_energy(x: LowRank) -> None:
    y = refactored({"x": x}, stream(0, "refactor"))["x"]
    y = LowRank(y.A.float(), y.B.float(), y.scale)  # as the server keeps it
    before, after = delta(wide(x)), delta(wide(y))
    assert (y.rank, y.scale, y.shape) == (x.rank, x.scale, x.shape)
    assert float((after - before).norm()) <= 1e-6 * float(before.norm())
    a, b = y.A.double().norm(dim=1), y.B.double().norm(dim=0)
    energy = a * b
    assert bool((energy[1:] <= energy[:-1] * (1 + 1e-5) + 1e-12).all()), "not sorted"
    strong = energy > 2e-6 * energy[0]
    A, B = y.A[strong].double(), y.B[:, strong].double()
    torch.testing.assert_close(A @ A.T, B.T @ B, rtol=0, atol=1e-5 * max(1.0, float(energy[0])))
    torch.testing.assert_close(A @ A.T, torch.diag(energy[strong]), rtol=0, atol=1e-5 * max(1.0, float(energy[0])))
    weak = y.A[energy <= 0.5e-6 * energy[0]][: min(x.rank, *x.shape)].double()
    assert bool((weak.norm(dim=1) > 0.01).all()), "a component that cannot learn"


def test_a_rank_beyond_the_layer_starts_fresh_rows() -> None:
    x = fresh((5, 3), 6, 1.0, stream(0, "x"))
    y = refactored({"x": x}, stream(0, "y"))["x"]
    assert (y.rank, bool(y.A.any(dim=1).all()), bool(y.B.any())) == (6, True, False)


# --- whole runs


@st.composite
def runs(draw: st.DrawFn) -> list[tuple[Factors, bool, str, Assignment]]:
    """Rounds: factors, whether clients learn anything, dispatch, and who trains which layers at which ranks."""
    ranks = st.dictionaries(st.sampled_from(list(SPEC.modules)), st.integers(1, RANK), max_size=3)
    cohort = st.dictionaries(st.sampled_from(list(SIZES)), ranks, max_size=4)
    factors: st.SearchStrategy[Factors] = st.sampled_from(["AB", "AB", "B", "A"])
    one = st.tuples(factors, st.booleans(), st.sampled_from(sorted(DISPATCHERS)), cohort)
    return draw(st.lists(one, min_size=1, max_size=8))


def states(state: ServerState, rounds: list[tuple[Factors, bool, str, Assignment]], **options: Any) -> Iterator[Any]:
    """The assignment of each round with the states before and after it."""
    for factors, learns, dispatch, assignment in rounds:
        updates = fit(tasks_of(state, assignment, factors, dispatch), perturb if learns else echo)
        before, state = state, absorb(method_of(factors, **options), state, updates, 0)
        yield {u.client: u for u in updates}, before, state


@given(runs(), st.booleans(), st.booleans(), st.integers(0, 5))
@settings(deadline=None, max_examples=120)
def test_no_component_ever_dies(rounds: Any, refactor: bool, segments: bool, seed: int) -> None:
    """In any sequence of factors, layers, ranks and absences; and what is not trained is not touched."""
    for updates, before, after in states(start(seed), rounds, refactor=refactor, segments=segments):
        trained = {name for u in updates.values() for name in u.adapter.layers}
        for name, x in after.adapter.layers.items():
            held = before.adapter.layers[name]
            assert (x.rank, x.scale, x.A.dtype) == (held.rank, held.scale, held.A.dtype)
            if name not in trained:
                assert torch.equal(x.A, held.A)
                assert torch.equal(x.B, held.B)
            alive = torch.maximum(x.A.norm(dim=1), x.B.norm(dim=0))
            assert float(alive.min()) > 1e-4 * max(1.0, float(alive.max())), f"{name}: {alive}"


def test_the_weakest_client_trains_the_strongest_component() -> None:
    state = absorb(method_of(), learnt(), fit(tasks_of(learnt(), UNEQUAL)), 0)
    for name, x in tasks_of(state, {"a": dict.fromkeys(SPEC.modules, 1)})["a"].adapter.layers.items():
        top = torch.linalg.svdvals(delta(wide(state.adapter.layers[name])))[0]
        torch.testing.assert_close(delta(wide(x)).norm(), top, rtol=1e-5, atol=0)


def test_a_planned_round_sends_up_the_trained_rows_only() -> None:
    """The method as a composition: ranks from the profiles, the whole adapter down, r rows up."""
    state = learnt()
    profiles = {"a": ClientProfile(10, rank=1), "b": ClientProfile(20, rank=3)}
    method = replace(method_of("B"), dispatch=DISPATCHERS["whole"])
    tasks = plan(method, state, fixed(profiles, SPEC, LOCAL), ["a", "b"], SPEC, LOCAL, 0)
    updates = fit(tasks)
    for update, rank in zip(updates, (1, 3), strict=True):
        assert update.nbytes == 4 * rank * sum(d_out for d_out, _ in SPEC.modules.values())
    after = absorb(method, state, updates, 0)
    for name, expected in mean_models(tasks, updates).items():
        assert distance(delta(wide(after.adapter.layers[name])), expected) < 1e-6
