"""Every entry of every table through the laws of its slot. Names come from the tables, options from the signatures."""

import inspect
import itertools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyrank.core.architecture import Architecture
from polyrank.core.fake import FakeClients, echo
from polyrank.core.federate import absorb, plan, scored
from polyrank.core.lowrank import Adapter, LowRank, delta, overlay, pad, rescale, tail, truncate, zeros
from polyrank.core.method import Method
from polyrank.core.rng import stream, torch_generator
from polyrank.core.types import Budget, ClientProfile, LocalTraining, ModelSpec, Query, ServerState, Task, Update
from polyrank.methods import AGGREGATORS, ALLOCATORS, DISPATCHERS, ESTIMATORS, METHODS, SCHEDULES, SCORERS
from polyrank.methods.named import fedit

TABLES = {
    "aggregators": AGGREGATORS,
    "allocators": ALLOCATORS,
    "dispatchers": DISPATCHERS,
    "estimators": ESTIMATORS,
    "methods": METHODS,
    "schedules": SCHEDULES,
    "scorers": SCORERS,
}
ENTRIES = [(table, name) for table, entries in TABLES.items() for name in entries]
# A paper's identifier, or a section that says where an original rule comes from.
REFERENCE = re.compile(r"\d{4}\.\d{5}|\d{4}\.[a-z-]+\.\d+|Findings of EACL 2026|References:\s+\S")

SPEC = ModelSpec({"l0": (12, 10), "l1": (8, 10)})
SHAPES = {"q": (16, 16), "k": (16, 16), "v": (16, 16), "o": (16, 16), "up": (64, 16), "down": (16, 64)}
MADE_OF = Architecture(
    family="bert",
    linears=SHAPES,
    blocks=(tuple(SHAPES),),
    after=(),
    hidden=16,
    heads=2,
    kv_heads=2,
    activation="gelu",
    attention="sdpa",
    tokens=8,
    classes=2,
    weights=4,
    parameters=5000,
)
COSTED = ModelSpec({"q": (16, 16), "v": (16, 16)}, {"q": 0, "v": 0}, {"head": 32}, architecture=MADE_OF)
RANK = 6
EQUAL = dict.fromkeys("abcd", RANK)
UNEQUAL = {"a": 2, "b": 4, "c": 6, "d": 6}
EXAMPLES = {"a": 10, "b": 20, "c": 30, "d": 5}


def choices(function: Callable[..., Any]) -> dict[str, list[Any]]:
    """The options of an answer that have finitely many values, by name, with those values."""
    hints = get_type_hints(function)
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        if get_origin(hints[name]) is Literal:
            found[name] = list(get_args(hints[name]))
        elif hints[name] is bool:
            found[name] = [False, True]
    return found


def variants(table: Mapping[str, Callable[..., Any]]) -> list[Any]:
    """Each entry as it is, and with each of its finite options set to each other value; one of several names."""
    cases = []
    for function in dict.fromkeys(table.values()):
        name = next(name for name, entry in table.items() if entry is function)
        cases.append(pytest.param(function, id=name))
        defaults = inspect.signature(function).parameters
        for option, values in choices(function).items():
            for value in values:
                if value != defaults[option].default:
                    cases.append(pytest.param(partial(function, **{option: value}), id=f"{name}({option}={value})"))
    return cases


def with_option(option: str, value: Any, but: tuple[str, ...] = ()) -> Any:
    """Parametrises over the aggregators that have this option, set to this value."""
    cases = [
        pytest.param(partial(rule, **{option: value}), id=name)
        for name, rule in AGGREGATORS.items()
        if value in choices(rule).get(option, ()) and name not in but
    ]
    return pytest.mark.parametrize("rule", cases)


def start(rank: int = RANK, dtype: torch.dtype = torch.float64) -> ServerState:
    generator = torch_generator(stream(0, "start"))

    def layer(d_out: int, d_in: int) -> LowRank:
        A = torch.randn(rank, d_in, generator=generator, dtype=torch.float64)
        return LowRank(A.to(dtype), torch.randn(d_out, rank, generator=generator, dtype=torch.float64).to(dtype), 2.0)

    return ServerState(0, Adapter({name: layer(*shape) for name, shape in SPEC.modules.items()}))


def method_of(rule: Callable[..., ServerState]) -> Method:
    return replace(fedit(), aggregate=rule)


def answers(
    state: ServerState,
    ranks: Mapping[str, int],
    answer: Callable[[str, Task], Adapter] | None = None,
    method: Method | None = None,
) -> list[Update]:
    """Updates of clients of these ranks: noise on what they were sent, unless `answer` says otherwise."""
    profiles = {c: ClientProfile(EXAMPLES[c], rank=rank) for c, rank in ranks.items()}
    method = method or fedit()
    budgets = method.estimate(profiles, SPEC, LocalTraining())
    tasks = plan(method, state, budgets, list(profiles), SPEC, LocalTraining(), 0)
    clients = FakeClients(profiles) if answer is None else FakeClients(profiles, answer)
    return list(clients.fit(tasks))


def total(state: ServerState) -> dict[str, Tensor]:
    """What the server's model adds to the base: the folded part and the adapter."""
    return {
        name: delta(x) + (delta(state.folded.layers[name]) if name in state.folded.layers else 0.0)
        for name, x in state.adapter.layers.items()
    }


def absorbed(rule: Callable[..., ServerState], state: ServerState, updates: list[Update]) -> dict[str, Tensor]:
    return total(absorb(method_of(rule), state, updates, 0))


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9)


def changed(updates: list[Update], client: str, change: Callable[[str, LowRank], LowRank | None]) -> list[Update]:
    """The updates with one client's layers changed, or dropped where the change is None."""

    def of(update: Update) -> Update:
        layers = {name: change(name, x) for name, x in update.adapter.layers.items()}
        return replace(update, adapter=Adapter({name: x for name, x in layers.items() if x is not None}))

    return [of(u) if u.client == client else u for u in updates]


rules = pytest.mark.parametrize("rule", variants(AGGREGATORS))


# --- tables


@pytest.mark.parametrize("table", TABLES)
def test_tables_are_sorted_and_not_empty(table: str) -> None:
    assert list(TABLES[table]) == sorted(TABLES[table])
    assert TABLES[table]


@pytest.mark.parametrize(("table", "name"), ENTRIES)
def test_entries_have_a_first_line(table: str, name: str) -> None:
    first = (inspect.getdoc(TABLES[table][name]) or "").split("\n")[0]
    assert first.endswith((".", ")")), first
    assert len(first) <= 120


@pytest.mark.parametrize(("table", "name"), [e for e in ENTRIES if e[0] in ("aggregators", "methods")])
def test_published_entries_name_their_source(table: str, name: str) -> None:
    assert REFERENCE.search(inspect.getdoc(TABLES[table][name]) or "")


@pytest.mark.parametrize(("table", "name"), [e for e in ENTRIES if e[0] != "methods"])
def test_options_are_keyword_only_with_defaults_and_described(table: str, name: str) -> None:
    """The signature is the schema: an option has a type and a default, so that a bare name is an answer."""
    function = TABLES[table][name]
    for option, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            assert parameter.default is not parameter.empty, option
            assert option in get_type_hints(function)


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_compositions_of_the_tables(name: str) -> None:
    def bare(answer: Any) -> Any:
        return answer.func if isinstance(answer, partial) else answer

    method = METHODS[name]()
    assert bare(method.estimate) in ESTIMATORS.values()
    assert bare(method.score) in SCORERS.values()
    assert bare(method.allocate) in ALLOCATORS.values()
    assert bare(method.dispatch) in DISPATCHERS.values()
    assert bare(method.factors) in SCHEDULES.values()
    assert bare(method.aggregate) in AGGREGATORS.values()


# --- how do updates become one adapter?


@rules
@pytest.mark.parametrize("order", [{"a": "d", "d": "a"}, {"a": "b", "b": "c", "c": "d", "d": "a"}])
def test_the_order_of_clients_is_irrelevant(rule: Callable[..., ServerState], order: dict[str, str]) -> None:
    state = start()
    updates = answers(state, UNEQUAL)
    renamed = sorted((replace(u, client=order.get(u.client, u.client)) for u in updates), key=lambda u: u.client)
    assert [u.client for u in renamed] == [u.client for u in updates]
    same(absorbed(rule, state, renamed), absorbed(rule, state, updates))


@rules
def test_a_common_factor_of_the_examples_is_irrelevant(rule: Callable[..., ServerState]) -> None:
    state = start()
    updates = answers(state, UNEQUAL)
    more = [replace(u, examples=u.examples * 1000) for u in updates]
    same(absorbed(rule, state, more), absorbed(rule, state, updates))


@rules
def test_where_a_client_puts_its_scale_is_irrelevant(rule: Callable[..., ServerState]) -> None:
    state = start()
    updates = answers(state, UNEQUAL)
    rewritten = changed(updates, "b", lambda name, x: rescale(x, 0.125, "both"))
    same(absorbed(rule, state, rewritten), absorbed(rule, state, updates))


@rules
def test_if_everyone_returns_what_the_server_holds_nothing_changes(rule: Callable[..., ServerState]) -> None:
    state = start()
    for _ in range(2):
        after = absorb(method_of(rule), state, answers(state, EQUAL, echo), 0)
        same(total(after), total(state))
        state = after


@rules
def test_a_lone_full_rank_client_is_adopted(rule: Callable[..., ServerState]) -> None:
    state = start()
    updates = answers(state, {"c": RANK})
    same(absorbed(rule, state, updates), {name: delta(x) for name, x in updates[0].adapter.layers.items()})


@rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_arguments_dtype_and_rank_are_kept(rule: Callable[..., ServerState], dtype: torch.dtype) -> None:
    state = start(dtype=dtype)
    updates = answers(state, UNEQUAL)
    tensors = [t for a in [state.adapter, *(u.adapter for u in updates)] for x in a.layers.values() for t in (x.A, x.B)]
    copies = [t.clone() for t in tensors]
    after = absorb(method_of(rule), state, updates, 0)
    assert all(torch.equal(t, copy) for t, copy in zip(tensors, copies, strict=True))
    for name, x in after.adapter.layers.items():
        assert (x.rank, x.scale, x.A.dtype, x.B.dtype) == (RANK, 2.0, dtype, dtype)
        assert bool(x.A.isfinite().all() and x.B.isfinite().all()), name


@rules
def test_no_pair_of_the_result_is_dead(rule: Callable[..., ServerState]) -> None:
    """A row of A and a column of B that are both zero never learn again."""
    state = ServerState(0, Adapter({n: pad(zeros(s, 0), RANK, stream(0, n)) for n, s in SPEC.modules.items()}))
    for updates in (answers(state, EQUAL, echo), answers(state, dict.fromkeys("ab", 2), echo), answers(state, UNEQUAL)):
        after = absorb(method_of(rule), state, updates, 0)
        assert all(bool((x.A.any(dim=1) | x.B.any(dim=0)).all()) for x in after.adapter.layers.values())


@rules
def test_the_result_is_a_function_of_the_stream(rule: Callable[..., ServerState]) -> None:
    state = start()
    updates = answers(state, UNEQUAL)
    first, second = (rule(state, iter(updates), stream(0, "x")) for _ in range(2))
    for name, x in first.adapter.layers.items():
        assert torch.equal(x.A, second.adapter.layers[name].A)


@rules
def test_the_result_does_not_depend_on_where_it_is_computed(rule: Callable[..., ServerState]) -> None:
    state = start(dtype=torch.float32)
    updates = answers(state, UNEQUAL)
    here, there = (absorb(method_of(rule), state, updates, 0, device) for device in (None, "cpu"))
    for name, x in here.adapter.layers.items():
        assert torch.equal(x.A, there.adapter.layers[name].A)
        assert torch.equal(x.B, there.adapter.layers[name].B)


# Those that read no value while they compute: torch's meta device has shapes and devices only.
@pytest.mark.parametrize("name", ["fedex_lora", "fedit", "flexlora", "flora", "rb_lora", "rbla"])
def test_no_rule_mixes_devices(name: str) -> None:
    def there(adapter: Adapter) -> Adapter:
        return Adapter({n: LowRank(x.A.to("meta"), x.B.to("meta"), x.scale) for n, x in adapter.layers.items()})

    state = start()
    updates = [replace(u, adapter=there(u.adapter)) for u in answers(state, UNEQUAL)]
    after = AGGREGATORS[name](replace(state, adapter=there(state.adapter)), iter(updates), stream(0, "x"))
    assert {n: x.shape for n, x in after.adapter.layers.items()} == SPEC.modules


@rules
def test_what_is_remembered_is_json(rule: Callable[..., ServerState]) -> None:
    state = start()
    memory = absorb(method_of(rule), state, answers(state, UNEQUAL), 0).memory
    assert json.loads(json.dumps(memory)) == memory


# The three words for what a client lacks, each against the client having sent what the word says.


@with_option("layers", "zero")
def test_layers_zero_counts_as_holding_zeros(rule: Callable[..., ServerState]) -> None:
    state = start()
    updates = answers(state, UNEQUAL)
    lacking = changed(updates, "b", lambda name, x: None if name == "l1" else x)
    sent = changed(updates, "b", lambda name, x: zeros(x.shape, RANK, 2.0, x.A.dtype) if name == "l1" else x)
    same(absorbed(rule, state, lacking), absorbed(rule, state, sent))


@with_option("layers", "keep")
def test_layers_keep_counts_as_holding_the_servers(rule: Callable[..., ServerState]) -> None:
    state = start()
    updates = answers(state, UNEQUAL)
    lacking = changed(updates, "b", lambda name, x: None if name == "l1" else x)
    sent = changed(updates, "b", lambda name, x: state.adapter.layers[name] if name == "l1" else x)
    same(absorbed(rule, state, lacking), absorbed(rule, state, sent))


# Not of Krum and norm clipping: whom they choose, and what they clip to, goes by whole models.
@pytest.mark.parametrize("name", [name for name in AGGREGATORS if name not in ("krum", "norm_clipping")])
def test_by_default_a_layer_is_averaged_over_its_holders(name: str) -> None:
    rule, state = AGGREGATORS[name], start()
    updates = answers(state, UNEQUAL)
    lacking = changed(updates, "b", lambda name, x: None if name == "l1" else x)
    absent = [u for u in updates if u.client != "b"]
    found, expected = absorbed(rule, state, lacking), absorbed(rule, state, absent)
    same({"l1": found["l1"]}, {"l1": expected["l1"]})


@with_option("rows", "zero")
def test_rows_zero_counts_as_holding_zeros(rule: Callable[..., ServerState]) -> None:
    state = start()
    updates = answers(state, UNEQUAL)
    sent = changed(updates, "a", lambda name, x: pad(x, RANK))
    same(absorbed(rule, state, updates), absorbed(rule, state, sent))


@with_option("rows", "keep")
def test_rows_keep_counts_as_holding_the_servers(rule: Callable[..., ServerState]) -> None:
    if "weights" in inspect.signature(rule).parameters:
        rule = partial(rule, weights="uniform")  # a weight by norm is of what was sent
    state = start()
    updates = answers(state, UNEQUAL)
    sent = changed(updates, "a", lambda name, x: overlay(x, state.adapter.layers[name]))
    same(absorbed(rule, state, updates), absorbed(rule, state, sent))


# Not a law of FedSVD, which re-orders rows, nor of LoRA-FAIR, which corrects every column of B.
@with_option("rows", "renormalise", but=("fedsvd", "lora_fair"))
def test_rows_that_one_client_owns_are_its_own(rule: Callable[..., ServerState]) -> None:
    state = start()
    updates = answers(state, {"a": 2, "c": 6})
    alone = absorb(method_of(rule), state, updates[1:], 0)
    both = absorb(method_of(rule), state, updates, 0)
    for name, x in both.adapter.layers.items():
        torch.testing.assert_close(tail(x, 2).A, tail(alone.adapter.layers[name], 2).A)
        torch.testing.assert_close(tail(x, 2).B, tail(alone.adapter.layers[name], 2).B)


# --- where does a budget go?


Case = tuple[int, dict[str, int], dict[str, float], ModelSpec]


@st.composite
def allocations(draw: st.DrawFn, *, blocks: bool) -> Case:
    """A budget, caps, scores and a model: modules in blocks of any size and outside them, or each on its own."""
    names = [f"l{i}" for i in range(draw(st.integers(1, 6)))]
    caps = {name: draw(st.integers(0, 12)) for name in names}
    scores = {name: draw(st.floats(0, 1e6)) for name in names}
    places = sorted(draw(st.lists(st.integers(0, 3), min_size=len(names), max_size=len(names))))
    inside = {name: place for name, place in zip(names, places, strict=True) if place < 3}
    return draw(st.integers(0, 100)), caps, scores, ModelSpec(dict.fromkeys(names, (8, 8)), inside if blocks else {})


def allocators(but: Mapping[str, str] | None = None) -> Any:
    """Parametrises over the allocators, without those of which a law is not true: names, each with the reason."""
    cases, names = variants(ALLOCATORS), set(but or {})
    left = [case for case in cases if not names & {case.id, case.id.split("(")[0]}]
    assert names <= {name for case in cases for name in (case.id, case.id.split("(")[0])}
    return pytest.mark.parametrize("allocate", left)


@allocators()
@given(case=allocations(blocks=True))
@settings(deadline=None)
def test_allocations_fit_budget_and_caps(allocate: Callable[..., dict[str, int]], case: Case) -> None:
    budget, caps, scores, spec = case
    ranks = allocate(budget, caps, scores, spec, stream(0, "allocate"))
    assert set(ranks) <= set(caps)
    assert sum(ranks.values()) <= budget
    assert all(isinstance(rank, int) and 0 <= rank <= caps[layer] for layer, rank in ranks.items())
    assert ranks == allocate(budget, caps, scores, spec, stream(0, "allocate"))


@allocators()
@given(case=allocations(blocks=True), seed=st.integers(0, 9))
@settings(deadline=None)
def test_what_can_be_trained_at_all_is(allocate: Callable[..., dict[str, int]], case: Case, seed: int) -> None:
    """A budget that pays for a rank everywhere is not left unspent."""
    budget, caps, scores, spec = case
    if budget >= len(caps) and all(cap > 0 for cap in caps.values()):
        assert any(allocate(budget, caps, scores, spec, stream(seed, "allocate")).values())


# The laws below are about modules that stand alone. What holds for blocks is in test_allocate.py, as are the laws
# that come nearest where one is not true.


@allocators(
    but={
        "geometric(pattern=uniform)": "an even spread over one layer more is other layers",
        "knapsack": "the best set that a larger budget pays for need not contain the best of a smaller one",
        "proportional": "the Alabama paradox, and with `highest` the whole remainder",
        "sampled": "one layer more, and all of them share the budget",
    }
)
@given(case=allocations(blocks=False), more=st.integers(0, 30))
@settings(deadline=None)
def test_a_larger_budget_never_lowers_a_rank(allocate: Callable[..., dict[str, int]], case: Case, more: int) -> None:
    budget, caps, scores, spec = case
    low = allocate(budget, caps, scores, spec, stream(0, "allocate"))
    high = allocate(budget + more, caps, scores, spec, stream(0, "allocate"))
    assert all(high.get(layer, 0) >= rank for layer, rank in low.items())


@allocators(
    but={
        "arithmetic": "goes by depth",
        "geometric": "goes by place",
        "knapsack": "a high score in an early module may cost more than it is worth",
        "random_geometric": "goes by place and chance",
        "random_layers": "goes by chance",
        "sampled": "a high score makes a layer likely, not certain",
    }
)
@given(case=allocations(blocks=False))
@settings(deadline=None)
def test_a_higher_score_never_gets_a_lower_rank(allocate: Callable[..., dict[str, int]], case: Case) -> None:
    budget, caps, scores, spec = case
    ranks = allocate(budget, caps, scores, spec, stream(0, "allocate"))
    for a, b in itertools.permutations(caps, 2):
        if scores[a] > scores[b]:
            assert ranks.get(a, 0) >= min(ranks.get(b, 0), caps[a])


@allocators()
def test_nothing_to_adapt_gets_nothing(allocate: Callable[..., dict[str, int]]) -> None:
    assert allocate(10, {}, {}, SPEC, stream(0, "allocate")) == {}


# --- what does the client receive?

dispatchers = pytest.mark.parametrize("dispatch", variants(DISPATCHERS))
Dispatched = Callable[..., tuple[dict[str, LowRank], dict[str, LowRank]]]


@dispatchers
@pytest.mark.parametrize("ranks", [{"l0": 2, "l1": 5}, {"l0": 6, "l1": 6}, {"l1": 3}, {"l0": 1}, {}])
def test_dispatch_hands_out_the_ranks_asked_for(dispatch: Dispatched, ranks: dict[str, int]) -> None:
    state = start()
    trained, carried = dispatch(state, ranks, stream(0, "dispatch"))
    assert {name: x.rank for name, x in trained.items()} == ranks
    for name, x in trained.items():
        torch.testing.assert_close(delta(x), delta(truncate(state.adapter.layers[name], x.rank)))
    if carried:
        for name, server in state.adapter.layers.items():
            parts = [part[name] for part in (trained, carried) if name in part]
            torch.testing.assert_close(sum(delta(x) for x in parts), delta(server))


@dispatchers
def test_rows_beyond_the_servers_start_fresh(dispatch: Dispatched) -> None:
    state = start()
    trained, carried = dispatch(state, dict.fromkeys(SPEC.modules, RANK + 3), stream(0, "dispatch"))
    assert carried == {}
    for name, x in trained.items():
        assert x.rank == RANK + 3
        torch.testing.assert_close(delta(x), delta(state.adapter.layers[name]))
        assert bool(tail(x, RANK).A.any(dim=1).all())


@dispatchers
def test_unequal_ranks_that_return_what_they_were_sent_change_nothing(dispatch: Dispatched) -> None:
    """Whatever scale a client was given, a rule that averages each row over its owners takes it back as it was."""
    state, method = start(), replace(fedit(), dispatch=dispatch, aggregate=AGGREGATORS["rbla"])
    after = absorb(method, state, answers(state, UNEQUAL, echo, method), 0)
    same(total(after), total(state))


@dispatchers
@pytest.mark.parametrize("factors", ["A", "B"])
def test_one_factor_rounds_are_exact_under_every_scale(dispatch: Dispatched, factors: str) -> None:
    rule = partial(AGGREGATORS["fedit"], rows="zero")
    method = replace(fedit(), dispatch=dispatch, factors=lambda round_: factors, aggregate=rule)
    state = start()
    updates = answers(state, UNEQUAL, method=method)
    after = absorb(method, state, updates, 0)
    weight = sum(EXAMPLES.values())
    for name, x in after.adapter.layers.items():
        expected = sum(delta(u.adapter.layers[name]) * u.examples for u in updates) / weight
        torch.testing.assert_close(delta(x), expected)


def test_scalings_keep_alpha() -> None:
    state = start()
    for scaling, expected in {"constant": 2.0, "lora": 6.0, "rslora": 2.0 * 3**0.5}.items():
        for dispatch in DISPATCHERS.values():
            trained, _ = dispatch(state, {"l0": 2}, stream(0, "dispatch"), scaling=scaling)
            assert trained["l0"].scale == pytest.approx(expected)


# --- what does it train this round?


@pytest.mark.parametrize("schedule", variants(SCHEDULES))
def test_schedules_name_factors(schedule: Callable[[int], str]) -> None:
    assert {schedule(round_) for round_ in range(20)} <= {"A", "B", "AB"}
    assert [schedule(round_) for round_ in range(20)] == [schedule(round_) for round_ in range(20)]


# --- which layers matter, and what can each client afford?


def answer(query: Query) -> dict[str, float]:
    """A measurement that depends on what is asked and in which round."""
    return {name: 1.0 + position + len(repr(query)) for position, name in enumerate(SPEC.modules)}


def scoring(score: Callable[..., Mapping[str, float]], rounds: int = 6, **measured: Any) -> list[Mapping[str, float]]:
    """The scores of some rounds, as `federate` would have them."""
    method, state, found = replace(fedit(), score=score), start(), []
    measure = measured.get("measure", lambda query, state: answer(query))
    for round_ in range(rounds):
        state = scored(method, replace(state, round=round_), ["a"], SPEC, 0, measure)
        found.append(state.scores)
    return found


scorers = pytest.mark.parametrize("score", variants(SCORERS))


@scorers
def test_scores_are_non_negative_for_every_layer(score: Callable[..., Mapping[str, float]]) -> None:
    for scores in scoring(score):
        assert scores.keys() == SPEC.modules.keys()
        assert all(0 <= value < float("inf") for value in scores.values())
        assert json.loads(json.dumps(dict(scores))) == scores


@scorers
def test_scores_are_a_function_of_what_is_given(score: Callable[..., Mapping[str, float]]) -> None:
    assert scoring(score) == scoring(score)
    state = start()
    before = [x.A.clone() for x in state.adapter.layers.values()], dict(state.scores), dict(state.memory)
    score(SPEC, state, answer)
    assert all(torch.equal(x.A, A) for x, A in zip(state.adapter.layers.values(), before[0], strict=True))
    assert (dict(state.scores), dict(state.memory)) == before[1:]


@scorers
def test_nobody_to_measure_leaves_usable_scores(score: Callable[..., Mapping[str, float]]) -> None:
    for scores in scoring(score, measure=lambda query, state: {}):
        assert scores.keys() == SPEC.modules.keys()


MEASURED = [name for name, score in SCORERS.items() if "on" in inspect.signature(score).parameters]


@pytest.mark.parametrize("name", SCORERS)
def test_what_measures_says_so_and_cannot_do_without(name: str) -> None:
    """The option `on` is how a configuration knows that a scorer needs data."""
    asked: list[Query] = []

    def watch(query: Query) -> dict[str, float]:
        asked.append(query)
        return answer(query)

    SCORERS[name](SPEC, start(), watch)
    assert bool(asked) == (name in MEASURED)
    if name in MEASURED:
        with pytest.raises(ValueError, match="give `federate` a `measure`"):
            SCORERS[name](SPEC, start(), None)
    else:
        assert SCORERS[name](SPEC, start(), None) == SCORERS[name](SPEC, start(), answer)


@pytest.mark.parametrize("name", MEASURED)
def test_measured_scorers_ask_for_what_their_options_say(name: str) -> None:
    asked: list[Query] = []

    def watch(query: Query) -> dict[str, float]:
        asked.append(query)
        return answer(query)

    for option, values in choices(SCORERS[name]).items():
        for value in values:
            partial(SCORERS[name], samples=7, **{option: value})(SPEC, start(), watch)
            assert (getattr(asked[-1], option), asked[-1].samples) == (value, 7)


@pytest.mark.parametrize("estimate", variants(ESTIMATORS))
def test_budgets_are_whole_and_never_lowered_by_a_stronger_client(estimate: Callable[..., dict[str, Budget]]) -> None:
    def profile(rank: int) -> ClientProfile:
        return ClientProfile(100, rank, memory=rank * 2.0**30, uplink=rank * 1e6, downlink=rank * 1e7, flops=1e12)

    profiles = {"a": profile(2), "b": profile(8), "c": profile(2)}
    budgets = estimate(profiles, COSTED, LocalTraining())
    assert budgets.keys() == profiles.keys()
    assert all(isinstance(budget.total, int) and budget.total >= 0 for budget in budgets.values())
    assert budgets["a"] == budgets["c"]
    assert budgets["a"].total <= budgets["b"].total
    alone = estimate({"a": profiles["a"]}, COSTED, LocalTraining())
    assert alone["a"].total >= budgets["a"].total  # others can only take a client out (exclusive)
