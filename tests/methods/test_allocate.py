"""Where budgets go in models with transformer blocks: published tables, laws that hold for blocks, edge cases."""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyrank.core.rng import stream
from polyrank.core.types import ModelSpec
from polyrank.methods import ALLOCATORS
from polyrank.methods.allocate.arithmetic import arithmetic
from polyrank.methods.allocate.blocks import affordable, blocks_of
from polyrank.methods.allocate.geometric import coverage, geometric, layers_of, random_geometric
from polyrank.methods.allocate.knapsack import knapsack, most_valuable
from polyrank.methods.allocate.proportional import proportional
from polyrank.methods.allocate.random_layers import random_layers
from polyrank.methods.allocate.sampled import sampled
from polyrank.methods.allocate.split import split

Allocate = Callable[..., dict[str, int]]

# Scores of twelve layers in a published run of HRALoRA, and the ranks they led to (288 ranks, floor 10, cap 48).
SCORES = [0.00209, 0.03008, 0.067516, 0.023439, 0.024355, 0.010812, 0.041415, 0.08342, 0.077168, 0.175625, 0.396306, 0.067249]  # fmt: skip  # noqa: E501
RANKS = [10, 15, 21, 13, 14, 11, 16, 48, 23, 48, 48, 21]


def model(layers: int = 12, modules: tuple[str, ...] = ("query", "value"), outside: tuple[str, ...] = ()) -> ModelSpec:
    inside = {f"{layer}.{module}": layer for layer in range(layers) for module in modules}
    return ModelSpec(dict.fromkeys([*inside, *outside], (64, 64)), inside)


def allocated(allocate: Allocate, budget: int, spec: ModelSpec, held: int = 48, seed: int = 0, **options: Any) -> Any:
    """The ranks under caps of `held`, with scores that are `SCORES` per block, half of it on each of two modules."""
    blocks = spec.blocks
    scores = {name: SCORES[blocks[name] % 12] / 2 if name in blocks else 1.0 for name in spec.modules}
    return allocate(budget, dict.fromkeys(spec.modules, held), scores, spec, stream(seed, "allocate"), **options)


def by_block(ranks: Mapping[str, int], spec: ModelSpec) -> list[int]:
    """The rank of each block; all its modules must have it."""
    found = [{ranks.get(name, 0) for name in spec.modules if spec.blocks[name] == block} for block in range(12)]
    assert all(len(block) == 1 for block in found)
    return [block.pop() for block in found]


def layers(ranks: Mapping[str, int], spec: ModelSpec) -> list[int]:
    return [block for block, rank in enumerate(by_block(ranks, spec)) if rank > 0]


# --- blocks


def test_blocks_group_modules_in_the_order_of_the_forward_pass() -> None:
    spec = model(2, outside=("head",))
    caps = {"head": 3, "1.value": 2, "0.query": 5, "1.query": 4}
    found = blocks_of(caps, {"0.query": 1.0, "1.query": 2.0, "1.value": 3.0, "head": 9.0}, spec)
    assert [(b.modules, b.cap, b.score, b.size) for b in found] == [
        (("0.query",), 5, 1.0, 1),
        (("1.query", "1.value"), 4, 5.0, 2),
        (("head",), 3, 9.0, 1),
    ]
    assert [b.modules for b in blocks_of(caps, dict.fromkeys(caps, 1.0), spec, "module")] == [
        ("0.query",), ("1.query",), ("1.value",), ("head",)
    ]  # fmt: skip


@pytest.mark.parametrize(("budget", "count"), [(0, 1), (47, 1), (95, 1), (96, 2), (288, 6), (575, 11), (9999, 12)])
def test_how_many_blocks_a_budget_pays_for(budget: int, count: int) -> None:
    spec = model()
    blocks = blocks_of(dict.fromkeys(spec.modules, 48), dict.fromkeys(spec.modules, 1.0), spec)
    assert affordable(budget, blocks, 24) == count
    assert affordable(2 * budget, blocks) == affordable(2 * budget, blocks, 99) == count
    assert affordable(budget, []) == 0


# --- proportional


def test_proportional_gives_a_blocks_modules_the_published_rank() -> None:
    spec = model()
    options = {"floor": 10, "cap": 48, "leftover": "highest"}
    assert by_block(allocated(proportional, 576, spec, 64, **options), spec) == RANKS


@pytest.mark.parametrize("leftover", ["largest_remainder", "highest"])
@pytest.mark.parametrize("names", [("query",), ("query", "value"), ("query", "key", "value")])
def test_blocks_of_one_size_divide_ranks_per_block(names: tuple[str, ...], leftover: Any) -> None:
    """Whatever their size, they get what single modules get of the budget per module, to the last bit."""
    spec = model(12, names)
    scores = {name: SCORES[block] * name.endswith("query") for name, block in spec.blocks.items()}
    for budget in range(100, 1300):
        ranks = proportional(budget, dict.fromkeys(scores, 48), scores, spec, stream(0, "x"), leftover=leftover)
        assert by_block(ranks, spec) == split(budget // len(names), SCORES, [48] * 12, [1] * 12, leftover=leftover)


def test_proportional_per_module_and_with_modules_outside_blocks() -> None:
    spec = model(1, ("query", "value"), ("head",))
    scores = {"0.query": 3.0, "0.value": 1.0, "head": 2.0}
    caps = dict.fromkeys(scores, 20)
    ranks = [proportional(15, caps, scores, spec, stream(0, "x"), per=per) for per in ("module", "block")]
    assert list(ranks[0].values()) == [7, 3, 5]
    assert list(ranks[1].values()) == [5, 5, 5]  # a block of score 4 for two modules, and one of 2 for one


def test_a_module_with_a_smaller_cap_is_held_to_its_own() -> None:
    caps = {"0.query": 1, "0.value": 9, "1.query": 9, "1.value": 0}
    ranks = proportional(20, caps, dict.fromkeys(caps, 1.0), model(2), stream(0, "x"))
    assert ranks == {"0.query": 1, "0.value": 5, "1.query": 5, "1.value": 0}


# --- sampled


@pytest.mark.parametrize("within", ["proportional", "uniform"])
@pytest.mark.parametrize(("budget", "count"), [(288, 6), (432, 9), (576, 12)])
def test_sampled_spends_a_thin_budget_on_few_layers(budget: int, count: int, within: str) -> None:
    """Rank 12, 18 and 24 on all twelve layers become an average of 24 on six, nine and twelve (HRALoRA)."""
    spec = model()
    for seed in range(20):
        found = allocated(sampled, budget, spec, seed=seed, rank=24, floor=10, within=within)
        assert len(layers(found, spec)) == count
        assert sum(found.values()) == budget
        ranks = [rank for rank in by_block(found, spec) if rank > 0]
        assert all(10 <= rank <= 48 for rank in ranks)
        assert (set(ranks) == {24}) == (within == "uniform")


def test_sampled_draws_high_tiers_more_often() -> None:
    """Tiers of these scores: ten layers low, layer 9 middle, layer 10 high; one layer in each of 3000 draws."""
    spec = model()
    drawn = Counter(layers(allocated(sampled, 48, spec, seed=seed, layers=1), spec)[0] for seed in range(3000))
    expected = [*[1 / 15] * 9, 2 / 15, 3 / 15, 1 / 15]
    assert [drawn[layer] / 3000 for layer in range(12)] == pytest.approx(expected, abs=4.5 * 0.4 / 3000**0.5)


@pytest.mark.parametrize(("count", "expected"), [(5, 5), (0.5, 6), (0.51, 7), (1.0, 12), (1, 1), (99, 12)])
def test_layers_are_a_number_or_a_share(count: float, expected: int) -> None:
    spec = model()
    assert len(layers(allocated(sampled, 576, spec, layers=count), spec)) == expected


def test_sampled_aims_at_the_caps_by_default() -> None:
    spec = model()
    assert len(layers(allocated(sampled, 288, spec), spec)) == 3
    assert len(layers(allocated(sampled, 288, spec, cap=12), spec)) == 12
    assert set(allocated(sampled, 288, spec, cap=24, within="uniform").values()) == {24}


# --- patterns

X = {
    ("triangle", 6): "xxxxxx......", ("triangle", 9): "xxxxxxxxx...", ("triangle", 3): "xxx.........",
    ("inverted_triangle", 6): "......xxxxxx", ("inverted_triangle", 9): "...xxxxxxxxx",
    ("inverted_triangle", 3): ".........xxx",
    ("bottleneck", 6): "xxx......xxx", ("bottleneck", 9): "xxxxx...xxxx", ("bottleneck", 3): "xx.........x",
    ("uniform", 6): "x.x.x.x.x.x.", ("uniform", 9): "xxx.xxx.xxx.", ("uniform", 3): "x...x...x...",
}  # fmt: skip


@pytest.mark.parametrize(("pattern", "count"), [*X, *((pattern, 12) for pattern in ("triangle", "uniform"))])
def test_geometric_patterns(pattern: Any, count: int) -> None:
    spec = model()
    expected = [layer for layer, mark in enumerate(X.get((pattern, count), "x" * 12)) if mark == "x"]
    assert layers_of(pattern, 12, count) == expected
    ranks = allocated(geometric, count * 16 * 2, spec, pattern=pattern, rank=16)
    assert by_block(ranks, spec) == [16 * (layer in expected) for layer in range(12)]


@pytest.mark.parametrize(
    ("pattern", "groups", "expected"),
    [
        ("triangle", [6, 9, 12], "333333222111"),
        ("inverted_triangle", [6, 9, 12], "111222333333"),
        ("bottleneck", [6, 9, 12], "333221112333"),
        ("uniform", [6, 9, 12], "323132313231"),
        ("triangle", [3, 6, 12], "333222111111"),
        ("inverted_triangle", [3, 6, 12], "111111222333"),
        ("bottleneck", [3, 6, 12], "332111111223"),
        ("uniform", [3, 6, 12], "312131213121"),
        ("bottleneck", [20], "111111111111"),
    ],
)
def test_coverage_of_the_groups(pattern: Any, groups: list[int], expected: str) -> None:
    assert coverage(pattern, 12, groups) == [int(count) for count in expected]


@given(total=st.integers(0, 30), count=st.integers(0, 30), pattern=st.sampled_from(sorted({p for p, _ in X})))
def test_patterns_are_distinct_layers_in_order(total: int, count: int, pattern: Any) -> None:
    count = min(count, total)
    found = layers_of(pattern, total, count)
    assert found == sorted(set(found))
    assert len(found) == count
    assert set(found) <= set(range(total))


def test_random_geometric_draws_by_coverage() -> None:
    """One layer in each of 3000 draws; by default the groups train a half, three quarters and all of the layers."""
    spec = model()
    for options in ({}, {"groups": [6, 9, 12]}):
        found = [allocated(random_geometric, 32, spec, seed=seed, rank=16, **options) for seed in range(3000)]
        drawn = Counter(layers(ranks, spec)[0] for ranks in found)
        expected = [count / 27 for count in (3, 3, 3, 2, 2, 1, 1, 1, 2, 3, 3, 3)]
        assert [drawn[layer] / 3000 for layer in range(12)] == pytest.approx(expected, abs=4.5 * 0.32 / 3000**0.5)


def test_random_geometric_follows_its_pattern_and_groups() -> None:
    spec = model()
    for pattern, expected in {"triangle": [0, 1, 2], "inverted_triangle": [9, 10, 11]}.items():
        found = allocated(random_geometric, 96, spec, pattern=pattern, groups=[3], rank=16)
        assert layers(found, spec) == expected


def test_random_layers_are_all_as_likely() -> None:
    spec = model()
    found = [allocated(random_layers, 6 * 2 * 16, spec, seed=seed, rank=16) for seed in range(2000)]
    assert all(len(layers(ranks, spec)) == 6 and set(ranks.values()) == {16} for ranks in found)
    drawn = Counter(itertools.chain.from_iterable(layers(ranks, spec) for ranks in found))
    assert [drawn[layer] / 2000 for layer in range(12)] == pytest.approx([0.5] * 12, abs=4.5 * 0.5 / 2000**0.5)


@pytest.mark.parametrize("allocate", [random_geometric, random_layers, sampled])
def test_blocks_without_a_cap_are_not_drawn(allocate: Allocate) -> None:
    spec = model()
    caps = {name: 16 * (block % 2) for name, block in spec.blocks.items()}
    for seed in range(5):
        ranks = allocate(192, caps, dict.fromkeys(caps, 1.0), spec, stream(seed, "x"))
        assert by_block(ranks, spec) == [0, 16] * 6


# --- arithmetic


@pytest.mark.parametrize(("first", "total"), [(6, 153), (3, 216), (0, 270)])
def test_legend_ranks_grow_with_depth_on_the_deepest_layers(first: int, total: int) -> None:
    spec = model()
    for budget in (2 * total, 2 * (total + 17 + first - 1) - 1):  # just enough, and one short of a layer more
        ranks = by_block(allocated(arithmetic, budget, spec, 28, base=17), spec)
        assert ranks == [0] * first + [17 + layer for layer in range(first, 12)]
        assert sum(ranks) == total


def test_arithmetic_is_cut_at_caps_and_at_zero() -> None:
    spec = model()
    assert by_block(allocated(arithmetic, 999, spec, 8), spec) == [1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 8]
    assert by_block(allocated(arithmetic, 999, spec, base=9, step=-2), spec) == [9, 7, 5, 3, 1, *[0] * 7]
    assert by_block(allocated(arithmetic, 7, spec), spec) == [0] * 11 + [3]


# --- knapsack


@given(
    items=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), max_size=7),
    budget=st.integers(0, 40),
)
@settings(deadline=None)
def test_the_knapsack_is_as_good_as_every_subset(items: list[tuple[int, int]], budget: int) -> None:
    values, costs = [value for value, _ in items], [cost for _, cost in items]
    subsets = itertools.chain.from_iterable(itertools.combinations(range(len(items)), k) for k in range(len(items) + 1))
    best = max(sum(values[i] for i in s) for s in subsets if sum(costs[i] for i in s) <= budget)
    found = most_valuable(values, costs, budget)
    assert sum(values[i] for i in found) == best
    assert sum(costs[i] for i in found) <= budget
    assert found == sorted(set(found))


def test_early_modules_cost_more() -> None:
    """Ranks of 4 in three blocks cost 8, 6 and 4 each; flat, 4 each."""
    spec = model(3, ("query",))
    scores = {"0.query": 10.0, "1.query": 6.0, "2.query": 5.0}
    caps = dict.fromkeys(scores, 4)
    pick = partial(knapsack, caps=caps, scores=scores, spec=spec, rng=stream(0, "x"))
    chosen = {budget: sorted(pick(budget)) for budget in (4, 8, 10, 12, 18)}
    assert chosen == {
        4: ["2.query"],
        8: ["0.query"],
        10: ["1.query", "2.query"],
        12: ["0.query", "2.query"],
        18: ["0.query", "1.query", "2.query"],
    }
    assert sorted(pick(8, depth=0.0)) == ["0.query", "1.query"]
    assert pick(9, rank=2, depth=0.0) == dict.fromkeys(scores, 2)
    assert pick(3) == {"2.query": 3}
    assert list(pick(4, depth=0.1)) == ["2.query"]  # a price is rounded up
    scores["0.query"] = scores["2.query"] = 0.0
    assert sorted(pick(10)) == ["1.query", "2.query"]
    assert sorted(pick(9)) == ["1.query"]


@given(scores=st.lists(st.integers(0, 9), min_size=1, max_size=8), budget=st.integers(0, 40))
def test_at_one_price_the_highest_scores_are_chosen(scores: list[int], budget: int) -> None:
    spec = model(1, tuple(f"m{i}" for i in range(len(scores))))
    named = {name: float(score) for name, score in zip(spec.modules, scores, strict=True)}
    ranks = knapsack(budget, dict.fromkeys(named, 4), named, spec, stream(0, "x"))
    for a, b in itertools.permutations(named, 2):
        assert named[a] <= named[b] or ranks.get(a, 0) >= ranks.get(b, 0)


# --- laws for blocks

NESTED: list[Any] = [
    arithmetic,
    *(partial(geometric, pattern=pattern) for pattern in ("triangle", "inverted_triangle", "bottleneck")),
    random_geometric,
    random_layers,
    ALLOCATORS["uniform"],
]


@pytest.mark.parametrize("allocate", NESTED)
@given(budget=st.integers(0, 700), more=st.integers(0, 200), held=st.integers(0, 30), seed=st.integers(0, 9))
@settings(deadline=None)
def test_a_larger_budget_keeps_what_a_smaller_one_got(
    allocate: Allocate, budget: int, more: int, held: int, seed: int
) -> None:
    low, high = (allocated(allocate, b, model(), held, seed) for b in (budget, budget + more))
    assert all(high.get(name, 0) >= rank for name, rank in low.items())


@pytest.mark.parametrize("leftover", ["largest_remainder", "highest"])
@given(
    scores=st.lists(st.floats(0, 1e6), min_size=12, max_size=12),
    budget=st.integers(0, 700),
    floor=st.integers(0, 20),
)
@settings(deadline=None)
def test_a_block_of_higher_score_never_gets_a_lower_rank(
    leftover: Any, scores: list[float], budget: int, floor: int
) -> None:
    spec = model()
    named = {name: scores[spec.blocks[name]] if name.endswith("query") else 0.0 for name in spec.modules}
    caps = dict.fromkeys(named, 48)
    ranks = proportional(budget, caps, named, spec, stream(0, "x"), floor=floor, leftover=leftover)
    found = by_block(ranks, spec)
    assert sum(found) == min(budget // 2, 12 * 48)
    for a, b in itertools.permutations(range(12), 2):
        assert scores[a] <= scores[b] or found[a] >= found[b]


@pytest.mark.parametrize("allocate", ALLOCATORS.values(), ids=ALLOCATORS)
def test_edges(allocate: Allocate) -> None:
    spec, alone = model(), model(1, ("query",))
    caps, zero = dict.fromkeys(spec.modules, 8), dict.fromkeys(spec.modules, 0.0)
    assert not any(allocated(allocate, 0, spec).values())
    assert not any(allocated(allocate, 100, spec, 0).values())
    assert 80 <= sum(allocate(100, caps, zero, spec, stream(0, "x")).values()) <= 100
    everything = allocate(10**6, caps, zero, spec, stream(0, "x"))
    assert by_block(everything, spec) == ([1, 2, 3, 4, 5, 6, 7, *[8] * 5] if allocate is arithmetic else [8] * 12)
    lone = allocate(5, {"0.query": 8}, {"0.query": 0.0}, alone, stream(0, "x"))
    assert lone == {"0.query": 1 if allocate is arithmetic else 5}
