"""Rounds: named streams, cohorts, tasks, and what the server makes of what comes back, for every named method."""

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from polyrank.core.fake import FakeClients, echo, perturb
from polyrank.core.federate import absorb, federate, plan, sample
from polyrank.core.lowrank import Adapter, LowRank, delta, fresh, nbytes, truncate
from polyrank.core.method import Method
from polyrank.core.rng import stream, torch_generator
from polyrank.core.types import (
    Budget,
    ClientProfile,
    LocalTraining,
    ModelSpec,
    Query,
    ServerState,
    Task,
    Update,
)
from polyrank.methods import METHODS
from polyrank.methods.allocate.uniform import uniform
from polyrank.methods.estimate import fixed
from polyrank.methods.named import fedit

SHAPES = {"l0": (12, 10), "l1": (8, 10)}
SPEC = ModelSpec(SHAPES, head={"head": 15})
RANK = 6
LOCAL = LocalTraining()
PROFILES = {
    "a": ClientProfile(examples=10, rank=2),
    "b": ClientProfile(examples=20, rank=4),
    "c": ClientProfile(examples=30, rank=6),
    "d": ClientProfile(examples=5, rank=6),
}


def start(dtype: torch.dtype = torch.float64) -> ServerState:
    """A server whose adapter has learnt something already."""
    generator = torch_generator(stream(0, "start"))

    def layer(d_out: int, d_in: int) -> LowRank:
        A = torch.randn(RANK, d_in, generator=generator, dtype=dtype)
        return LowRank(A, torch.randn(d_out, RANK, generator=generator, dtype=dtype), 2.0)

    layers = {name: layer(*shape) for name, shape in SHAPES.items()}
    return ServerState(0, Adapter(layers, {"head": torch.zeros(3, 5, dtype=dtype)}))


def tasks_of(
    method: Method, state: ServerState, profiles: Mapping[str, ClientProfile] = PROFILES, seed: int = 0
) -> dict[str, Task]:
    return plan(method, state, fixed(profiles, SPEC, LOCAL), sorted(profiles), SPEC, LOCAL, seed)


def answers(method: Method, state: ServerState, profiles: Mapping[str, ClientProfile] = PROFILES) -> list[Update]:
    return list(FakeClients(profiles).fit(tasks_of(method, state, profiles)))


def run(method: Method, state: ServerState, rounds: int, seed: int = 0, **options: Any) -> list[ServerState]:
    clients = options.pop("clients", FakeClients(PROFILES))
    options = {"measure": importance, "seed": seed, **options}
    return [s for s, _ in federate(stated(method), state, clients, SPEC, LOCAL, rounds=rounds, **options)]


def stated(method: Method) -> Method:
    """The method with stated ranks: these tests are about rounds, and not about who can afford what."""
    return replace(method, estimate=fixed)


def importance(query: Query, state: ServerState) -> dict[str, float]:
    """What a hold-out would say: something new every round."""
    return {"l0": 1.0 + query.round, "l1": 2.0}


def content(value: Any) -> Any:
    """Any of our values as plain, comparable Python: tensors become digests of their bytes."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), digest(value)
    if isinstance(value, Mapping):
        return {key: content(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [content(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return {name: content(getattr(value, name)) for name in value.__dataclass_fields__}
    return value


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:12]


def tensors(adapter: Adapter) -> Iterable[torch.Tensor]:
    for x in adapter.layers.values():
        yield from (x.A, x.B)
    yield from adapter.dense.values()


def check(state: ServerState, before: ServerState) -> None:
    """What must be true of every state that a round leaves behind."""
    assert state.round == before.round + 1
    assert list(state.adapter.layers) == list(before.adapter.layers)
    for name, x in state.adapter.layers.items():
        held = before.adapter.layers[name]
        assert (x.rank, x.shape, x.A.dtype, x.B.dtype) == (held.rank, held.shape, held.A.dtype, held.B.dtype), name
    for adapter in (state.adapter, state.folded):
        assert all(bool(tensor.isfinite().all()) for tensor in tensors(adapter))
    assert state.adapter.dense.keys() == before.adapter.dense.keys()


methods = pytest.mark.parametrize("name", METHODS)


# --- streams


def test_a_stream_depends_on_its_seed_and_path_only() -> None:
    first = stream(0, "fit", 1, "a").integers(2**62, size=4)
    stream(0, "cohort", 1).integers(2**62, size=100)
    assert (stream(0, "fit", 1, "a").integers(2**62, size=4) == first).all()


@pytest.mark.parametrize(
    "path", [("fit", 1, "b"), ("fit", 2, "a"), ("fit", "1", "a"), ("fit",), ("fit", 1), ("fi", "t")]
)
def test_streams_of_different_paths_differ(path: tuple[str | int, ...]) -> None:
    assert stream(0, *path).integers(2**62) != stream(0, "fit", 1, "a").integers(2**62)
    assert stream(0, *path).integers(2**62) != stream(1, *path).integers(2**62)


def test_streams_are_uncorrelated() -> None:
    draws = np.stack([stream(0, "fit", t).standard_normal(4000) for t in range(8)])
    assert np.abs(np.corrcoef(draws) - np.eye(8)).max() < 0.07


def test_torch_generators_follow_their_stream() -> None:
    rng = stream(0, "x")
    first, second = (torch.randn(3, generator=torch_generator(rng)) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, torch.randn(3, generator=torch_generator(stream(0, "x"))))


@methods
def test_nothing_global_is_seeded_or_read(name: str) -> None:
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the global state is what is watched
        ours, theirs = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        results.append(content(run(METHODS[name](), start(), 3)))
        assert torch.equal(torch.get_rng_state(), ours)
        assert (np.random.get_state()[1] == theirs).all()  # noqa: NPY002
    assert results[0] == results[1]


# --- sample


def test_sample_is_sorted_distinct_and_of_the_size_asked() -> None:
    names = sorted(f"c{i}" for i in range(20))
    for round_ in range(30):
        cohort = sample(names, 5, round_, 0)
        assert cohort == sorted(set(cohort))
        assert len(cohort) == 5
        assert cohort == sample(names, 5, round_, 0)
    assert sample(names, None, 0, 0) == sample(names, 99, 0, 0) == names


def test_sample_reaches_everybody_about_equally() -> None:
    counts = dict.fromkeys("abcdefgh", 0)
    for round_ in range(800):
        for client in sample(list(counts), 2, round_, 0):
            counts[client] += 1
    assert min(counts.values()) > 140
    assert max(counts.values()) < 260


def test_cohorts_differ_between_rounds_and_seeds() -> None:
    names = [f"c{i}" for i in range(20)]
    assert len({tuple(sample(names, 5, t, s)) for t in range(10) for s in range(3)}) == 30


# --- plan


@methods
def test_tasks_say_all_a_client_must_know(name: str) -> None:
    method, state = METHODS[name](), start()
    tasks = tasks_of(method, state, seed=7)
    assert list(tasks) == sorted(PROFILES)
    for client, task in tasks.items():
        assert (task.round, task.seed, task.penalty, task.local) == (0, 7, method.penalty, LOCAL)
        assert task.factors == method.factors(0)
        ranks = [x.rank for x in task.adapter.layers.values()]
        assert sum(ranks) <= 2 * PROFILES[client].rank
        assert method.allocate is not uniform or ranks == [PROFILES[client].rank] * 2
        assert content(task.adapter.dense) == content(state.adapter.dense)


def test_no_client_is_planned_above_the_servers_rank() -> None:
    tasks = tasks_of(fedit(), start(), {"a": ClientProfile(1, rank=99)})
    assert {x.rank for x in tasks["a"].adapter.layers.values()} == {RANK}


def test_a_client_that_pruned_itself_is_planned_no_more() -> None:
    state = replace(start(), memory={"ranks": {"c": {"l0": 3}}})
    ranks = {n: x.rank for n, x in tasks_of(fedit(), state)["c"].adapter.layers.items()}
    assert ranks == {"l0": 3, "l1": 6}


def test_layers_of_rank_zero_are_not_sent() -> None:
    method = replace(fedit(), allocate=lambda budget, caps, scores, spec, rng: {"l0": 0, "l1": 2})
    task = tasks_of(method, start())["a"]
    assert list(task.adapter.layers) == ["l1"]
    nothing = replace(fedit(), allocate=lambda budget, caps, scores, spec, rng: {})
    assert list(tasks_of(nothing, start())["a"].adapter.dense) == ["head"]


def test_every_client_and_round_has_streams_of_its_own() -> None:
    drawn: dict[str, list[int]] = {"allocate": [], "dispatch": []}

    def allocate(budget: int, caps: Any, scores: Any, spec: ModelSpec, rng: np.random.Generator) -> dict[str, int]:
        drawn["allocate"].append(int(rng.integers(2**62)))
        return dict(caps)

    def dispatch(state: ServerState, ranks: Any, rng: np.random.Generator) -> Any:
        drawn["dispatch"].append(int(rng.integers(2**62)))
        return fedit().dispatch(state, ranks, rng)

    method = replace(fedit(), allocate=allocate, dispatch=dispatch)
    for round_ in range(3):
        tasks_of(method, replace(start(), round=round_))
    assert len({*drawn["allocate"], *drawn["dispatch"]}) == 2 * 3 * len(PROFILES)
    again = {name: list(values) for name, values in drawn.items()}
    tasks_of(method, start())
    assert {name: values[-len(PROFILES) :] for name, values in drawn.items()} == {
        name: values[: len(PROFILES)] for name, values in again.items()
    }


def test_folds_always_travel() -> None:
    fold = fresh(SHAPES["l1"], 3, 1.0, stream(0, "fold"))
    state = replace(start(), folded=Adapter({"l1": fold}, {"frozen_head": torch.ones(2)}))
    for task in tasks_of(fedit(), state).values():
        assert torch.equal(task.frozen.layers["l1"].A, fold.A)
        assert "frozen_head" in task.frozen.dense
        assert task.nbytes == nbytes(task.adapter) + nbytes(task.frozen)


def test_a_frozen_head_stays_as_it_started() -> None:
    method, state = replace(fedit(), dense="freeze"), start()
    task = tasks_of(method, state)["a"]
    assert "head" in task.frozen.dense
    assert "head" not in task.adapter.dense
    assert content(run(method, state, 2)[-1].adapter.dense) == content(state.adapter.dense)


# --- absorb


def one(client: str, state: ServerState, examples: int = 1, **changes: Any) -> Update:
    return replace(Update(client, state.adapter, examples), **changes)


@pytest.mark.parametrize("order", ["ba", "aa"])
def test_updates_out_of_order_are_refused(order: str) -> None:
    state = start()
    with pytest.raises(ValueError, match="ascending order of client"):
        absorb(fedit(), state, [one(client, state) for client in order], 0)


def test_what_the_server_does_not_hold_is_refused() -> None:
    state = start()
    x = state.adapter.layers["l0"]
    for layers, message in (
        ({"l9": x}, "'a' sent layer 'l9', which the server does not hold"),
        ({"l1": x}, r"'a', layer 'l1': shape \(12, 10\), not \(8, 10\)"),
    ):
        with pytest.raises(ValueError, match=message):
            absorb(fedit(), state, [one("a", state, adapter=Adapter(layers))], 0)
    with pytest.raises(ValueError, match=r"'a', parameter 'head': shape \(1, 5\), not \(3, 5\)"):
        absorb(fedit(), state, [one("a", state, adapter=Adapter({}, {"head": torch.zeros(1, 5)}))], 0)


def heads(*examples: int, rule: str = "size", start_at: float = 9.0) -> float:
    """The head after a round in which client i sends the value i + 1 on that many examples."""
    state = ServerState(0, Adapter({}, {"h": torch.full((2,), start_at, dtype=torch.bfloat16)}))
    updates = [
        Update(f"c{i}", Adapter({}, {"h": torch.full((2,), float(i + 1), dtype=torch.bfloat16)}), n)
        for i, n in enumerate(examples)
    ]
    head = absorb(replace(fedit(), dense=rule), state, updates, 0).adapter.dense["h"]
    assert head.dtype == torch.bfloat16
    return float(head[0])


def test_the_head_is_averaged_over_those_that_sent_it() -> None:
    assert heads(1, 3) == 1.75
    assert heads(1, 3, rule="uniform") == 1.5
    assert heads(0, 3) == heads(0, 1) == 2.0
    assert heads(0, 0, 5) == heads(5 * 0, 0, 1) == 3.0
    assert heads(2, 0) == 1.0
    assert heads(0, 0) == 1.5
    assert heads() == heads(rule="uniform") == 9.0


@methods
def test_all_absent_only_the_round_advances(name: str) -> None:
    method, state = METHODS[name](), start()
    state = absorb(method, state, answers(method, state), 0)
    assert content(absorb(method, state, [], 0)) == content(replace(state, round=state.round + 1))


def without(client: str, layer: str, updates: list[Update]) -> list[Update]:
    def kept(update: Update) -> Update:
        layers = {n: x for n, x in update.adapter.layers.items() if n != layer}
        return replace(update, adapter=replace(update.adapter, layers=layers))

    return [kept(u) if client in ("*", u.client) else u for u in updates]


def sized(updates: list[Update], *examples: int) -> list[Update]:
    return [replace(u, examples=n) for u, n in zip(updates, examples, strict=True)]


def taller(method: Method, state: ServerState, updates: list[Update]) -> list[Update]:
    """One client holds more rows than the server does."""
    trained, frozen = method.dispatch(state, dict.fromkeys(SHAPES, RANK + 3), stream(0, "taller"))
    task = Task(0, Adapter(trained), Adapter(frozen), method.factors(0), LOCAL, None, 0)
    return [*updates, Update("z", perturb("z", task), 10, task.factors)]


EDGES: dict[str, Callable[[Method, ServerState, list[Update]], list[Update]]] = {
    "as planned": lambda method, state, us: us,
    "one client without examples": lambda method, state, us: sized(us, 0, 20, 30, 5),
    "the tallest without examples": lambda method, state, us: sized(us, 10, 20, 0, 0),
    "one client": lambda method, state, us: us[:1],
    "one client without any": lambda method, state, us: sized(us[:1], 0),
    "nobody has examples": lambda method, state, us: sized(us, 0, 0, 0, 0),
    "a rank above the server's": taller,
    "a layer that nobody holds": lambda method, state, us: without("*", "l1", us),
    "a layer that some hold": lambda method, state, us: without("c", "l1", us),
    "a layer that only clients without examples hold": lambda method, state, us: sized(
        without("c", "l1", without("d", "l1", us)), 0, 0, 30, 5
    ),
}


RULES = {method().aggregate: name for name, method in reversed(METHODS.items())}  # several methods share one


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in METHODS]
    + [(name, dtype) for name in RULES.values() for dtype in (torch.float64, torch.bfloat16)],
)
@pytest.mark.parametrize("edge", EDGES)
def test_edges_are_defined_and_finite(name: str, edge: str, dtype: torch.dtype) -> None:
    method, state = METHODS[name](), start(dtype)
    for _ in range(2):  # twice: both phases of an alternation, and folds that meet folds
        after = absorb(method, state, EDGES[edge](method, state, answers(method, state)), 0)
        check(after, state)
        state = after


@methods
def test_a_layer_that_nobody_holds_is_left_alone(name: str) -> None:
    method, state = METHODS[name](), start()
    after = absorb(method, state, without("*", "l1", answers(method, state)), 0)
    assert content(after.adapter.layers["l1"]) == content(state.adapter.layers["l1"])
    assert content(after.adapter.layers["l0"]) != content(state.adapter.layers["l0"])
    assert "l1" not in after.folded.layers


def weighs_by_size(method: Method) -> bool:
    options = inspect.signature(method.aggregate).parameters  # of a partial: what it has set is the default
    return "weights" in options and options["weights"].default == method.dense == "size"


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if weighs_by_size(method())])
def test_clients_without_examples_count_for_nothing(name: str) -> None:
    method, state = METHODS[name](), start()
    updates = sized(answers(method, state), 0, 20, 30, 0)
    some, all_ = absorb(method, state, updates[1:3], 0), absorb(method, state, updates, 0)
    assert content(some.adapter) == content(all_.adapter)


@methods
def test_arguments_are_untouched(name: str) -> None:
    method, state = METHODS[name](), start()
    for _ in range(3):
        updates = answers(method, state)
        before = content([state, updates])
        after = absorb(method, state, updates, 0)
        assert content([state, updates]) == before
        state = after


# --- federate


@methods
def test_same_seed_same_bytes(name: str) -> None:
    first, second, other = (run(METHODS[name](), start(), 3, seed, cohort=3) for seed in (3, 3, 4))
    assert content(first) == content(second)
    assert content(first) != content(other)


@methods
def test_resuming_equals_going_on(name: str) -> None:
    whole = run(METHODS[name](), start(), 4, cohort=3)
    for k, state in enumerate(whole[:-1]):
        assert content(run(METHODS[name](), state, 4, cohort=3)) == content(whole[k + 1 :])


@methods
def test_records_keep_the_books(name: str) -> None:
    method, state = METHODS[name](), start()
    clients = FakeClients(PROFILES, absent=frozenset("bd"))
    for after, record in federate(stated(method), state, clients, SPEC, LOCAL, rounds=2, measure=importance):
        tasks = tasks_of(method, replace(state, scores=after.scores, memory=after.memory))
        assert record.round == state.round == after.round - 1
        assert record.dropped == ("b", "d")
        assert record.factors == method.factors(record.round)
        assert record.ranks.keys() == record.bytes_down.keys() == PROFILES.keys()
        assert record.bytes_down == {c: task.nbytes for c, task in tasks.items()}
        assert record.bytes_up == {c: nbytes(tasks[c].adapter, record.factors) for c in "ac"}
        assert record.examples == {"a": 10, "c": 30}
        check(after, state)
        state = after


def test_only_trained_factors_travel_up() -> None:
    x = start().adapter.layers["l0"]
    update = Update("a", Adapter({"l0": x}, {"h": torch.zeros(5)}), 1, "B")
    assert update.nbytes == 12 * RANK * 8 + 20
    assert replace(update, factors="A").nbytes == RANK * 10 * 8 + 20
    assert replace(update, factors="AB").nbytes == RANK * 22 * 8 + 20


@methods
def test_everybody_absent_all_the_time(name: str) -> None:
    method, state = METHODS[name](), start()
    clients = FakeClients(PROFILES, absent=frozenset(PROFILES))
    *_, (after, record) = federate(stated(method), state, clients, SPEC, LOCAL, rounds=3, measure=importance)
    assert content(replace(after, scores={}, memory={})) == content(replace(state, round=3))
    assert set(after.memory) == {"scored"}
    assert record.dropped == tuple(PROFILES)
    assert record.bytes_up == {}


def test_metrics_reach_the_record() -> None:
    class Timed(FakeClients):
        def fit(self, tasks: Mapping[str, Task]) -> Iterable[Update]:
            for i, update in enumerate(super().fit(tasks)):
                yield replace(update, metrics={"loss": i, "seconds": 10.0 * i})

    (_, record), *_ = federate(fedit(), start(), Timed(PROFILES), SPEC, LOCAL, rounds=1)
    assert record.losses == {"a": 0.0, "b": 1.0, "c": 2.0, "d": 3.0}
    assert record.seconds == 30.0


def test_the_learning_rate_follows_its_schedule() -> None:
    for schedule, expected in {
        "constant": [1.0, 1.0, 1.0],
        "linear": [1.0, 0.733333, 0.466667],
        "cosine": [1.0, 0.8, 0.4],
        "exponential": [1.0, 0.5, 0.25],
    }.items():
        local = LocalTraining(lr=1.0, lr_min=0.2, lr_decay=0.5, schedule=schedule)
        records = [r for _, r in federate(fedit(), start(), FakeClients(PROFILES), SPEC, local, rounds=3)]
        assert [record.lr for record in records] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "exponential"])
@pytest.mark.parametrize("lr_min", [0.0, 0.1, 0.3])
def test_every_round_of_a_schedule_is_valid(schedule: str, lr_min: float) -> None:
    local = LocalTraining(lr=0.3, lr_min=lr_min, lr_decay=0.5, schedule=schedule)
    for rounds in (1, 2, 7, 30):
        rates = [local.at(t, rounds).lr for t in range(rounds)]
        assert rates == sorted(rates, reverse=True)
        assert rates[0] == pytest.approx(0.3)
        assert rates[-1] > lr_min or lr_min == 0.3 or schedule == "exponential"  # no round is spent at a rate of 0


def test_a_finished_run_yields_nothing() -> None:
    assert run(fedit(), replace(start(), round=5), 5) == []


def test_fakes_answer_by_their_tasks() -> None:
    tasks = tasks_of(METHODS["ffa_lora"](), start())
    moved = {u.client: u for u in FakeClients(PROFILES).fit(tasks)}
    for client, task in tasks.items():
        assert torch.equal(moved[client].adapter.layers["l0"].A, task.adapter.layers["l0"].A)
        assert not torch.equal(moved[client].adapter.layers["l0"].B, task.adapter.layers["l0"].B)
    same = {u.client: u for u in FakeClients(PROFILES, echo).fit(tasks)}
    assert content(same["a"].adapter) == content(tasks["a"].adapter)
    noise = moved["a"].adapter.dense["head"] - tasks["a"].adapter.dense["head"]
    assert not torch.equal(noise, moved["b"].adapter.dense["head"] - tasks["b"].adapter.dense["head"])
    assert torch.equal(delta(truncate(tasks["c"].adapter.layers["l0"], 2)), delta(tasks["a"].adapter.layers["l0"]))


def test_a_client_that_can_afford_nothing_gets_no_task() -> None:
    broke = Budget(0, 0, "memory")

    def estimate(profiles: Any, spec: ModelSpec, local: LocalTraining) -> dict[str, Budget]:
        return {**fedit().estimate(profiles, spec, local), "b": broke}

    method = replace(fedit(), estimate=estimate)
    budgets = method.estimate(PROFILES, SPEC, LOCAL)
    assert list(plan(method, start(), budgets, list(PROFILES), SPEC, LOCAL, 0)) == ["a", "c", "d"]
    nobody = replace(fedit(), estimate=lambda profiles, spec, local: dict.fromkeys(profiles, broke))
    state = start()
    [(after, record)] = federate(nobody, state, FakeClients(PROFILES), SPEC, LOCAL, rounds=1)
    assert record.ranks == {}
    assert after.round == 1
    assert after.adapter.layers == state.adapter.layers
