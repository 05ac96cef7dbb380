"""The most valuable modules that a budget pays for, where early ones cost more (after Fed-pilot)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
from annotated_types import Ge

from polyrank.core.method import Positive, Ranks
from polyrank.core.types import ModelSpec
from polyrank.methods.allocate.blocks import blocks_of, held_to


def most_valuable(values: Sequence[float], costs: Sequence[int], budget: int) -> list[int]:
    """The 0/1 knapsack, exactly: the indices of largest total value whose costs sum to at most the budget.

        V_i(c) = max(V_{i-1}(c), V_{i-1}(c - cost_i) + value_i)

    by dynamic programming over whole costs, in time and memory O(items * budget). Of sets of equal value, the one
    with the later items is taken, so that items of no value fill what is left.

    >>> most_valuable([6, 10, 12], [1, 2, 3], 5)
    [1, 2]
    """
    room = min(budget, sum(costs))
    best = np.zeros(room + 1)
    taken = np.zeros((len(costs), room + 1), bool)
    for i, (value, cost) in enumerate(zip(values, costs, strict=True)):
        if cost <= room:
            with_item = best[: room + 1 - cost] + value
            taken[i, cost:] = with_item >= best[cost:]
            best[cost:] = np.maximum(with_item, best[cost:])
    chosen = []
    for i in reversed(range(len(costs))):
        if taken[i, room]:
            chosen.append(i)
            room -= costs[i]
    return chosen[::-1]


def knapsack(
    budget: int,
    caps: Ranks,
    scores: Mapping[str, float],
    spec: ModelSpec,
    rng: np.random.Generator,
    *,
    rank: Positive | None = None,
    depth: Annotated[float, Ge(0)] = 1.0,
) -> dict[str, int]:
    """The modules of largest total score that the budget pays for, each at one rank and early ones at a higher price.

        max  sum of s_i over the chosen   with   sum of r_i + ceil(depth * h_i * r_i) <= budget

    h_i is the distance of module i's block from the output: 0 for the last block, 1 for the first. To train a module,
    every later block must keep its activations and pass gradients back, so memory and time both grow with h_i. A rank
    in the last block costs 1, as in every other allocator, and in the first ``1 + depth``: the ranks never sum to
    more than the budget.

    Args:
        budget: module-ranks, each the price of one rank in the last block.
        caps: the largest rank of each module.
        scores: importance of each module, non-negative; modules of score 0 fill what the others leave, late ones first.
        spec: the modules and their blocks.
        rng: unused.
        rank: the rank r_i of a chosen module; None is its cap. No rank exceeds the budget.
        depth: how much more a rank costs in the first block than in the last; 0 makes depth irrelevant.

    References:
        Zhang et al., Fed-pilot: Optimizing LoRA Allocation for Efficient Federated Fine-Tuning with Heterogeneous
        Clients. arXiv 2410.10200.

    Note:
        The paper measures each module's memory on the device and has no released code; a price that is linear in depth
        stands in for it, so that no measurement is needed.
    """
    places = {name: place for place, b in enumerate(blocks_of(caps, scores, spec)) for name in b.modules}
    last = max(places.values(), default=0)
    ranks = {name: min(most, budget) for name, most in held_to(rank, caps).items()}
    names = [name for name in places if ranks[name] > 0]
    prices = [ranks[n] + math.ceil(depth * ranks[n] * (last - places[n]) / max(1, last)) for n in names]
    chosen = most_valuable([scores[name] for name in names], prices, budget)
    return {names[i]: ranks[names[i]] for i in chosen}
