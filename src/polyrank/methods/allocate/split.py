"""Dividing a budget in proportion to scores, in whole ranks between a floor and a cap; on plain numbers.

One rank of item i costs ``costs[i]``. Nothing is spent beyond the budget, and no loop depends on it running out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from annotated_types import Ge

Leftover = Literal["largest_remainder", "highest"]
Floor = Annotated[int, Ge(0)]


def fill(
    budget: int, ranks: Sequence[int], limits: Sequence[int], costs: Sequence[int], order: Iterable[int]
) -> tuple[list[int], int]:
    """Raises ranks towards their limits, one item after the other, while the budget lasts.

    An item that the rest cannot pay for in full is raised as far as it goes.

    Returns:
        The ranks, and the budget that is left.
    """
    filled = list(ranks)
    for i in order:
        more = max(0, min(limits[i] - filled[i], budget // costs[i]))
        filled[i] += more
        budget -= more * costs[i]
    return filled, budget


def quotas(spare: int, weights: Sequence[float], room: Sequence[int], costs: Sequence[int]) -> list[float]:
    """Fractional ranks in proportion to weight over cost that spend `spare`, none above its room.

        q_i = min(room_i, lambda w_i / c_i),   sum c_i q_i = spare

    What an item has no room for is shared by the others in proportion; where only weights of 0 are left, equally.
    """
    found = [0.0] * len(weights)
    active, left = list(range(len(weights))), spare
    while active:
        shares = [weights[i] for i in active]
        if not any(shares):
            shares = [float(costs[i]) for i in active]
        total = math.fsum(shares)
        for i, share in zip(active, shares, strict=True):
            found[i] = share / total * left / costs[i]
        full = {i for i in active if found[i] >= room[i]}
        if not full:
            break
        for i in full:
            found[i] = float(room[i])
            left -= room[i] * costs[i]
        active = [i for i in active if i not in full]
    return found


def split(
    budget: int,
    scores: Sequence[float],
    caps: Sequence[int],
    costs: Sequence[int],
    *,
    floor: int = 1,
    leftover: Leftover = "largest_remainder",
) -> list[int]:
    """Everybody's floor, highest scores first, and the rest of the budget in proportion to the scores.

        r_i = floor + s_i / sum(s) * spare / c_i,   spare = budget - floor * sum(c)

    rounded down. What that leaves over goes to the largest remainders, one rank each, and what a cap cuts off to the
    others in proportion (``largest_remainder``); or both go to the highest score, up to its cap, and then to the next
    (``highest``). Ties go to the lower index; scores that are all zero count as all alike.

    >>> split(40, [5, 1, 1], [16, 16, 16], [1, 1, 1], floor=2, leftover="highest")
    [16, 16, 8]
    >>> split(40, [5, 1, 1], [16, 16, 16], [1, 1, 1], floor=2)
    [16, 12, 12]
    """
    order = sorted(range(len(scores)), key=lambda i: -scores[i] / costs[i])
    ranks, spare = fill(budget, [0] * len(scores), [min(floor, cap) for cap in caps], costs, order)
    room = [cap - rank for cap, rank in zip(caps, ranks, strict=True)]
    unbounded = [spare] * len(scores)
    shares = quotas(spare, scores, unbounded if leftover == "highest" else room, costs)
    limits = [rank + min(int(share), free) for rank, share, free in zip(ranks, shares, room, strict=True)]
    ranks, left = fill(spare, ranks, limits, costs, order)
    if leftover == "highest":
        return fill(left, ranks, caps, costs, order)[0]
    nearest = sorted(order, key=lambda i: int(shares[i]) - shares[i])
    return fill(left, ranks, [min(cap, rank + 1) for cap, rank in zip(caps, ranks, strict=True)], costs, nearest)[0]
