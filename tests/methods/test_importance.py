"""Scorers: when they measure, what they keep in between, and what becomes of it in a round."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from polyrank.core.fake import FakeClients
from polyrank.core.federate import absorb, federate, plan, scored
from polyrank.core.lowrank import Adapter, LowRank, delta
from polyrank.core.method import Boost, Method
from polyrank.core.rng import stream, torch_generator
from polyrank.core.types import ClientProfile, LocalTraining, ModelSpec, Query, ServerState, Task
from polyrank.methods.aggregate import AGGREGATORS
from polyrank.methods.allocate.sampled import sampled
from polyrank.methods.importance import alike, every, fisher, gradient_norm, weight_norm
from polyrank.methods.named import fedit

NAMES = [f"l{i}" for i in range(6)]
SPEC = ModelSpec(dict.fromkeys(NAMES, (8, 8)), {name: i for i, name in enumerate(NAMES)})
RANK, LOCAL = 4, LocalTraining()
PROFILES = {name: ClientProfile(examples=10, rank=1) for name in "abcd"}
ONES = dict.fromkeys(NAMES, 1.0)

measured = pytest.mark.parametrize("scorer", [fisher, gradient_norm])


def start() -> ServerState:
    generator = torch_generator(stream(0, "start"))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return ServerState(0, Adapter({name: LowRank(normal(RANK, 8), normal(8, RANK), 0.5) for name in NAMES}))


class Meter:
    """A measurement whose scores grow with the round, and that remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Query] = []

    def __call__(self, query: Query, state: ServerState) -> dict[str, float]:
        assert state.round == query.round
        self.asked.append(query)
        return {name: float((i + 1) ** 2 * 2**query.round) for i, name in enumerate(NAMES)}


def at(round_: int) -> dict[str, float]:
    return Meter()(Query("fisher", round=round_), replace(start(), round=round_))


def run(method: Method, rounds: int, measure: Any = None, state: ServerState | None = None, seed: int = 0) -> list[Any]:
    steps = federate(
        method, state or start(), FakeClients(PROFILES), SPEC, LOCAL, rounds=rounds, seed=seed, measure=measure
    )
    return list(steps)


def with_score(scorer: Callable[..., Mapping[str, float]], **changes: Any) -> Method:
    return replace(fedit(), score=scorer, allocate=partial(sampled, layers=2), **changes)


# --- when it is measured


@measured
@pytest.mark.parametrize(
    ("n", "after", "due"), [(1, 0, [0, 1, 2, 3, 4, 5, 6]), (3, 0, [0, 3, 6]), (2, 3, [3, 5]), (9, 4, [4]), (1, 9, [])]
)
def test_measured_from_after_on_every_so_many_rounds(scorer: Any, n: int, after: int, due: list[int]) -> None:
    meter = Meter()
    states = [state for state, _ in run(with_score(partial(scorer, every=n, after=after)), 7, meter)]
    assert [query.round for query in meter.asked] == due
    for round_, state in enumerate(states):
        last = max((d for d in due if d <= round_), default=None)
        assert state.scores == (ONES if last is None else at(last))
        assert state.memory["scored"] == (round_ if last is None else last)


def test_a_query_says_who_where_and_when() -> None:
    meter = Meter()
    state, budgets = replace(start(), round=3), dict(PROFILES)
    scorer = partial(fisher, on="clients", samples=5, labels="sampled", form="norm", target="logit")
    scored(with_score(scorer), state, sorted(budgets), SPEC, 7, meter)
    assert meter.asked == [
        Query("fisher", "clients", 5, "sampled", "norm", "logit", round=3, seed=7, cohort=("a", "b", "c", "d"))
    ]
    scored(with_score(partial(gradient_norm, samples=None)), state, ["b"], SPEC, 7, meter)
    assert meter.asked[1] == Query("gradient", "holdout", None, round=3, seed=7, cohort=("b",))


@measured
def test_smoothing_mixes_measurements_and_nothing_else(scorer: Any) -> None:
    method = with_score(partial(scorer, every=2, after=2, smoothing=0.75))
    scores = [state.scores for state, _ in run(method, 7, Meter())]
    assert scores[:2] == [ONES, ONES]
    assert scores[2] == scores[3] == at(2)  # not mixed with the warm-up's
    assert scores[4] == pytest.approx({n: 0.75 * at(2)[n] + 0.25 * at(4)[n] for n in NAMES})
    assert scores[6] == pytest.approx({n: 0.75 * scores[4][n] + 0.25 * at(6)[n] for n in NAMES})
    first = [state.scores for state, _ in run(with_score(partial(scorer, smoothing=0.75)), 2, Meter())]
    assert first == [at(0), pytest.approx({n: 0.75 * at(0)[n] + 0.25 * at(1)[n] for n in NAMES})]


@measured
def test_where_nobody_answers_scores_stay(scorer: Any) -> None:
    def measure(query: Query, state: ServerState) -> dict[str, float]:
        return {} if query.round in (0, 2) else at(query.round)

    states = [state for state, _ in run(with_score(scorer), 4, measure)]
    assert [state.scores for state in states] == [ONES, at(1), at(1), at(3)]
    assert [state.memory["scored"] for state in states] == [0, 1, 1, 3]


@measured
def test_without_a_measurement_it_fails_at_once(scorer: Any) -> None:
    with pytest.raises(ValueError, match=r"on holdout\) is measured: give `federate` a `measure`"):
        run(with_score(partial(scorer, after=3)), 1)


def test_every_schedules_any_scorer() -> None:
    method = with_score(every(2, weight_norm, after=1))
    before, states = start(), []
    for state, _ in run(method, 5):
        states.append((before, state))
        before = state
    assert states[0][1].scores == ONES
    for round_ in (1, 3):
        assert states[round_][1].scores == weight_norm(SPEC, states[round_][0])
        assert states[round_ + 1][1].scores == states[round_][1].scores
        assert states[round_ + 1][1].memory["scored"] == round_
    assert states[1][1].scores != states[3][1].scores


@pytest.mark.parametrize("k", range(1, 6))
def test_resuming_equals_going_on(k: int) -> None:
    method = with_score(partial(fisher, every=3, after=1, smoothing=0.5), hold=True, boost=Boost(2, 2))
    whole = run(method, 6, Meter())
    rest = run(method, 6, Meter(), whole[k - 1][0])
    for (state, record), (expected, due) in zip(rest, whole[k:], strict=True):
        assert (state.scores, state.memory, record.ranks) == (expected.scores, expected.memory, due.ranks)
        for name in NAMES:
            assert torch.equal(state.adapter.layers[name].A, expected.adapter.layers[name].A)


# --- by the weights


def test_weight_norm_is_that_of_all_that_was_learnt() -> None:
    state = start()
    found = weight_norm(SPEC, state)
    assert found == pytest.approx({name: float(delta(x).norm()) for name, x in state.adapter.layers.items()})
    fold = LowRank(torch.ones(2, 8, dtype=torch.float64), torch.ones(8, 2, dtype=torch.float64), 0.1)
    folded = weight_norm(SPEC, replace(state, folded=Adapter({"l1": fold})))
    assert folded["l1"] == pytest.approx(float((delta(state.adapter.layers["l1"]) + delta(fold)).norm()))
    assert {n: s for n, s in folded.items() if n != "l1"} == {n: s for n, s in found.items() if n != "l1"}
    assert weight_norm(SPEC, ServerState(0, Adapter())) == dict.fromkeys(NAMES, 0.0)


# --- what a round makes of scores


def layers_of(tasks: Mapping[str, Task]) -> dict[str, tuple[str, ...]]:
    return {client: tuple(task.adapter.layers) for client, task in tasks.items()}


def tasks_of(method: Method, state: ServerState) -> dict[str, Task]:
    return plan(method, state, method.estimate(PROFILES, SPEC, LOCAL), sorted(PROFILES), SPEC, LOCAL, 0)


def test_plan_goes_by_the_scores_of_the_state() -> None:
    seen: list[dict[str, float]] = []

    def allocate(budget: int, caps: Any, scores: Any, spec: ModelSpec, rng: np.random.Generator) -> dict[str, int]:
        seen.append(dict(scores))
        return dict(caps)

    method = replace(fedit(), allocate=allocate)
    state = start()
    tasks_of(method, state)
    tasks_of(method, replace(state, scores={**ONES, "l2": 9.0}))
    tasks_of(method, replace(state, scores={"l2": 9.0}))
    assert seen[0] == ONES
    assert seen[len(PROFILES)] == seen[-1] == {**ONES, "l2": 9.0}


def test_held_draws_last_until_scores_are_new() -> None:
    for hold in (True, False):
        method = with_score(partial(fisher, every=3, after=2), hold=hold)
        records = [record for _, record in run(method, 9, Meter())]
        drawn = [{client: tuple(ranks) for client, ranks in record.ranks.items()} for record in records]
        assert drawn[0] != drawn[1]  # the warm-up draws every round
        assert len({str(d) for d in drawn[2:5]}) == (1 if hold else 3)
        assert len({str(d) for d in drawn[5:8]}) == (1 if hold else 3)
        assert drawn[2] != drawn[5] != drawn[8]


def test_a_held_draw_is_that_of_the_round_of_its_scores() -> None:
    method, state = with_score(alike), replace(start(), scores=ONES, memory={"scored": 4})
    held = replace(method, hold=True)
    assert layers_of(tasks_of(held, replace(state, round=7))) == layers_of(tasks_of(method, replace(state, round=4)))
    assert layers_of(tasks_of(method, replace(state, round=7))) == layers_of(
        tasks_of(held, replace(state, round=7, memory={}))
    )
    assert layers_of(tasks_of(held, replace(state, round=7))) != layers_of(tasks_of(method, replace(state, round=7)))


def test_a_scorer_that_is_never_kept_draws_every_round() -> None:
    drawn = [record.ranks for _, record in run(with_score(alike, hold=True), 3)]
    assert drawn[0] != drawn[1] != drawn[2]


def test_a_boost_multiplies_ranks_up_to_the_caps() -> None:
    def allocate(budget: int, caps: Any, scores: Any, spec: ModelSpec, rng: np.random.Generator) -> dict[str, int]:
        return {"l0": 1, "l1": 2, "l2": 3, "l3": 0}

    method = replace(fedit(), allocate=allocate, boost=Boost(rounds=2, factor=2))
    state = replace(start(), memory={"ranks": {"a": {"l1": 3}}})
    for round_, due in (
        (0, {"l0": 2, "l1": 4, "l2": 4}),
        (1, {"l0": 2, "l1": 4, "l2": 4}),
        (2, {"l0": 1, "l1": 2, "l2": 3}),
    ):
        tasks = tasks_of(method, replace(state, round=round_))
        ranks = {c: {name: x.rank for name, x in task.adapter.layers.items()} for c, task in tasks.items()}
        assert ranks["b"] == due
        assert ranks["a"] == {**due, "l1": min(due["l1"], 3)}


@pytest.mark.parametrize(("rounds", "factor"), [(-1, 2), (3, 0)])
def test_a_boost_that_makes_no_sense_is_refused(rounds: int, factor: int) -> None:
    with pytest.raises(ValueError, match="a boost needs"):
        Boost(rounds, factor)


@pytest.mark.parametrize("rule", AGGREGATORS.values(), ids=AGGREGATORS)
def test_scores_pass_through_every_aggregation(rule: Callable[..., ServerState]) -> None:
    method = with_score(fisher, aggregate=rule)
    state = scored(method, start(), ["a"], SPEC, 0, Meter())
    after = absorb(method, state, FakeClients(PROFILES).fit(tasks_of(method, state)), 0)
    assert (after.scores, after.memory["scored"]) == (at(0), 0)
