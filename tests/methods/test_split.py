"""Dividing a budget and drawing layers, on plain numbers: published vectors, exact enumeration, laws."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyrank.core.rng import stream
from polyrank.methods.allocate.draw import successive, tiers
from polyrank.methods.allocate.split import fill, quotas, split

# Scores of twelve layers in round 20 of HRALoRA's published runs, with the ranks they led to (R=288, m=10, C=48).
IID = [0.079413, 1.100811, 0.546707, 0.085971, 0.175156, 0.099647, 0.275515, 0.114502, 0.274488, 0.227051, 0.092557, 0.083468]  # fmt: skip  # noqa: E501
NONIID_20 = [0.005891, 0.041519, 0.093714, 0.048614, 0.011729, 0.020043, 0.044042, 0.113962, 0.221999, 0.221819, 0.489499, 0.098768]  # fmt: skip  # noqa: E501
NONIID_10 = [0.00209, 0.03008, 0.067516, 0.023439, 0.024355, 0.010812, 0.041415, 0.08342, 0.077168, 0.175625, 0.396306, 0.067249]  # fmt: skip  # noqa: E501
NINE, SIX = [0, 1, 2, 4, 5, 7, 8, 10, 11], [1, 3, 5, 7, 9, 11]

PUBLISHED = [
    pytest.param(IID, 288, 10, 48, [14, 48, 48, 14, 19, 15, 40, 16, 24, 22, 14, 14], id="iid"),
    pytest.param(NONIID_20, 288, 10, 48, [10, 14, 21, 15, 11, 12, 15, 25, 48, 48, 48, 21], id="noniid-20"),
    pytest.param(NONIID_10, 288, 10, 48, [10, 15, 21, 13, 14, 11, 16, 48, 23, 48, 48, 21], id="noniid-10"),
    pytest.param([IID[i] for i in NINE], 216, 10, 48, [13, 48, 48, 18, 14, 15, 32, 14, 14], id="nine layers"),
    pytest.param([IID[i] for i in SIX], 144, 10, 48, [48, 14, 14, 15, 39, 14], id="six layers"),
    pytest.param([1] * 6, 144, 10, 48, [24] * 6, id="six ones"),
    pytest.param([1] * 9, 216, 10, 48, [24] * 9, id="nine ones"),
    pytest.param([1] * 12, 288, 10, 48, [24] * 12, id="twelve ones"),
    pytest.param([1] * 7, 100, 3, 48, [16, 14, 14, 14, 14, 14, 14], id="seven ones"),
    pytest.param([5, 1, 1], 40, 2, 16, [16, 16, 8], id="overflow"),
]


def even(budget: int, scores: list[float], cap: int = 48, **options: Any) -> list[int]:
    """A split over layers of one cap and price."""
    return split(budget, scores, [cap] * len(scores), [1] * len(scores), **options)


@pytest.mark.parametrize(("scores", "budget", "floor", "cap", "ranks"), PUBLISHED)
def test_highest_gives_the_published_ranks(
    scores: list[float], budget: int, floor: int, cap: int, ranks: list[int]
) -> None:
    assert even(budget, scores, cap, floor=floor, leftover="highest") == ranks


@pytest.mark.parametrize(
    ("scores", "budget", "options", "ranks"),
    [
        ([3, 2, 1], 12, {}, [6, 4, 2]),  # spare 9: quotas 4.5, 3, 1.5; the tie goes to the lower index
        ([1, 2, 3], 12, {}, [2, 4, 6]),  # ... here to the higher score
        ([1, 2, 3], 12, {"leftover": "highest"}, [2, 4, 6]),
        ([7, 2, 1], 13, {"floor": 0, "cap": 5}, [5, 5, 3]),  # 9.1 is cut at 5; of 8 left, 5.3 is cut at 5
        ([7, 2, 1], 13, {"floor": 0, "cap": 20}, [9, 3, 1]),  # 9.1, 2.6, 1.3
        ([9, 0, 0], 12, {"floor": 0, "cap": 6}, [6, 3, 3]),  # what no score asks for goes to all alike
        ([0, 0, 0], 8, {}, [3, 3, 2]),
        ([0, 0, 0], 8, {"leftover": "highest"}, [4, 2, 2]),
        ([1, 3, 2], 25, {"floor": 10}, [5, 10, 10]),  # the floors of the highest scores first
        ([1, 3, 2], 7, {"floor": 10}, [0, 7, 0]),
        ([1, 3, 2], 1000, {"cap": 16}, [16, 16, 16]),
        ([1, 3, 2], 1000, {"cap": 16, "leftover": "highest"}, [16, 16, 16]),
        ([1, 3, 2], 9, {"floor": 5, "cap": 3}, [3, 3, 3]),
        ([1, 3, 2], 0, {}, [0, 0, 0]),
        ([4], 9, {}, [9]),
        ([], 9, {}, []),
    ],
)
def test_splits_by_hand(scores: list[float], budget: int, options: dict[str, Any], ranks: list[int]) -> None:
    assert even(budget, scores, **options) == ranks


def test_a_rank_of_a_dearer_item_costs_more() -> None:
    assert split(12, [2, 1], [9, 9], [2, 1], floor=0) == [4, 4]  # as dear as it is important: the same rank
    assert split(13, [3, 1], [9, 9], [3, 1], floor=0) == [3, 4]  # 3.25 each, and 1 cannot pay for the first
    assert split(5, [9, 1], [9, 9], [3, 1], floor=2) == [1, 2]
    assert split(3, [3, 2], [9, 9], [3, 1], floor=2) == [0, 3]  # a score of 3 for a price of 3 is the lower one


def test_fill_stops_at_limits_and_at_the_budget() -> None:
    assert fill(10, [1, 0, 0], [3, 9, 9], [2, 3, 1], [0, 1, 2]) == ([3, 2, 0], 0)
    assert fill(10, [5, 0], [3, 2], [1, 1], [1, 0]) == ([5, 2], 8)


def test_quotas_are_proportional_up_to_the_room() -> None:
    assert quotas(12, [1, 2, 3], [9, 9, 9], [1, 1, 1]) == pytest.approx([2, 4, 6])
    assert quotas(12, [1, 2, 3], [9, 9, 5], [1, 1, 1]) == pytest.approx([7 / 3, 14 / 3, 5])
    assert quotas(12, [1, 1], [9, 9], [1, 2]) == pytest.approx([6, 3])
    assert quotas(99, [1, 2], [3, 4], [1, 1]) == [3, 4]


Case = tuple[int, list[float], list[int], int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A budget, scores, caps, and a floor."""
    n = draw(st.integers(1, 8))
    scores = draw(st.lists(st.floats(0, 1e6) | st.sampled_from([0.0, 1.0, 2.0]), min_size=n, max_size=n))
    caps = draw(st.lists(st.integers(0, 20), min_size=n, max_size=n))
    return draw(st.integers(0, 150)), scores, caps, draw(st.integers(0, 6))


leftovers = pytest.mark.parametrize("leftover", ["largest_remainder", "highest"])


@leftovers
@given(case=cases())
@settings(deadline=None)
def test_all_of_the_budget_is_spent_or_all_are_at_their_caps(leftover: Any, case: Case) -> None:
    budget, scores, caps, floor = case
    ranks = split(budget, scores, caps, [1] * len(caps), floor=floor, leftover=leftover)
    assert sum(ranks) == min(budget, sum(caps))
    assert all(0 <= rank <= cap for rank, cap in zip(ranks, caps, strict=True))


@leftovers
@given(case=cases())
@settings(deadline=None)
def test_floors_are_kept_where_the_budget_pays_for_them(leftover: Any, case: Case) -> None:
    budget, scores, caps, floor = case
    floors = [min(floor, cap) for cap in caps]
    ranks = split(budget, scores, caps, [1] * len(caps), floor=floor, leftover=leftover)
    if sum(floors) <= budget:
        assert all(rank >= least for rank, least in zip(ranks, floors, strict=True))
    else:
        assert all(rank <= least for rank, least in zip(ranks, floors, strict=True))


@given(case=cases(), more=st.integers(0, 30))
@settings(deadline=None)
def test_a_larger_budget_lowers_no_rank_by_more_than_one(case: Case, more: int) -> None:
    """Largest remainders follow the quotas to within one; that they can fall by one is the Alabama paradox."""
    budget, scores, caps, floor = case
    low, high = (split(b, scores, caps, [1] * len(caps), floor=floor) for b in (budget, budget + more))
    assert all(after >= before - 1 for before, after in zip(low, high, strict=True))


def test_the_alabama_paradox() -> None:
    assert even(10, [6, 6, 2], floor=0) == [4, 4, 2]
    assert even(11, [6, 6, 2], floor=0) == [5, 5, 1]


def test_highest_can_lose_more_than_one_rank_to_a_larger_budget() -> None:
    options = {"floor": 0, "leftover": "highest"}
    assert even(9, [1] * 10, **options) == [9, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    assert even(10, [1] * 10, **options) == [1] * 10


# --- tiers


def test_tiers_of_the_published_scores() -> None:
    assert tiers(NONIID_10) == [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 0]
    assert tiers(NONIID_20) == [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 0]
    assert tiers(IID) == [0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]


def squares(scores: list[float], labels: Any) -> float:
    groups = [[x for x, label in zip(scores, labels, strict=True) if label == tier] for tier in range(3)]
    return sum(float(np.var(group)) * len(group) for group in groups if group)


@given(scores=st.lists(st.floats(0, 1e3), min_size=3, max_size=6))
@settings(deadline=None, max_examples=50)
def test_tiers_are_the_best_of_all_labellings(scores: list[float]) -> None:
    found = tiers(scores)
    if len(set(scores)) < 3:
        assert found == [0] * len(scores)
        return
    best = min(squares(scores, labels) for labels in itertools.product(range(3), repeat=len(scores)))
    assert squares(scores, found) == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert set(found) == {0, 1, 2}
    pairs = itertools.product(zip(scores, found, strict=True), repeat=2)
    assert all(low <= high for (x, low), (y, high) in pairs if x <= y)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_tiers_do_not_depend_on_the_scale(scale: float) -> None:
    assert tiers([score * scale for score in NONIID_20]) == tiers(NONIID_20)


@pytest.mark.parametrize("scores", [[], [1.0], [1.0, 2.0], [0.0] * 5, [3.0, 1.0, 3.0, 1.0]])
def test_fewer_than_three_distinct_scores_are_one_tier(scores: list[float]) -> None:
    assert tiers(scores) == [0] * len(scores)


# --- successive sampling


def inclusion(weights: list[int], size: int) -> list[float]:
    """The probability that each item is drawn, summed over all sets that can be drawn so far."""
    sets = {frozenset[int](): 1.0}
    for _ in range(size):
        grown: dict[frozenset[int], float] = {}
        for drawn, p in sets.items():
            left = [i for i in range(len(weights)) if i not in drawn]
            total = sum(weights[i] for i in left)
            for i in left:
                grown[drawn | {i}] = grown.get(drawn | {i}, 0.0) + p * weights[i] / total
        sets = grown
    return [sum(p for drawn, p in sets.items() if i in drawn) for i in range(len(weights))]


# How many of three groups, which train 6, 9 and 12 (3, 6 and 12) of 12 layers in a pattern, train each layer.
THICK, THIN = [3, 3, 3, 2, 2, 1, 1, 1, 2, 3, 3, 3], [3, 3, 2, 1, 1, 1, 1, 1, 1, 2, 2, 3]


@pytest.mark.parametrize(
    ("weights", "size", "published"),
    [
        (THICK, 6, {3: 0.626, 2: 0.477, 1: 0.271}),
        (THICK, 9, {3: 0.875, 2: 0.755, 1: 0.496}),
        (THIN, 3, {3: 0.406, 2: 0.289, 1: 0.153}),
        (THIN, 6, {3: 0.728, 2: 0.580, 1: 0.346}),
    ],
)
def test_inclusion_probabilities(weights: list[int], size: int, published: dict[int, float]) -> None:
    """Enumeration against the published values to their last digit; 20,000 draws against it to 4.5 deviations."""
    exact = inclusion(weights, size)
    assert exact == pytest.approx([published[weight] for weight in weights], abs=5e-4)
    rng, times, counts = stream(0, "inclusion", size), 20_000, np.zeros(12)
    for _ in range(times):
        counts[successive(weights, size, rng)] += 1
    assert np.abs(counts / times - exact).max() < 4.5 * 0.5 / times**0.5  # 0.016


@given(weights=st.lists(st.floats(0, 10), max_size=8), size=st.integers(0, 8), seed=st.integers(0, 99))
@settings(deadline=None)
def test_samples_are_sorted_distinct_and_nested(weights: list[float], size: int, seed: int) -> None:
    drawn = successive(weights, size, stream(seed, "draw"))
    assert drawn == sorted(set(drawn))
    assert len(drawn) == min(size, len(weights))
    assert set(drawn) <= set(successive(weights, size + 1, stream(seed, "draw")))


def test_items_of_no_weight_are_drawn_last() -> None:
    assert all(successive([0, 1, 0, 5], 2, stream(seed, "draw")) == [1, 3] for seed in range(50))
    assert successive([0, 1, 0, 5], 4, stream(0, "draw")) == [0, 1, 2, 3]
