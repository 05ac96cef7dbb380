"""Ranks that grow with depth, on the deepest layers (LEGEND)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from polyrank.core.method import Positive, Ranks
from polyrank.core.types import ModelSpec
from polyrank.methods.allocate.blocks import blocks_of, on_modules


def arithmetic(
    budget: int,
    caps: Ranks,
    scores: Mapping[str, float],
    spec: ModelSpec,
    rng: np.random.Generator,
    *,
    base: Positive = 1,
    step: int = 1,
) -> dict[str, int]:
    """Rank ``base + step * l`` for block l, on as many of the deepest blocks as the budget pays for in full.

        r_l = base + step * l,   l >= L - k,   k the largest with sum over l >= L - k of m_l r_l <= budget

    A block has the same rank with every client that trains it. Only where the budget does not pay for the deepest
    block, that one gets what there is.

    Args:
        budget: module-ranks: the sum of ranks over the modules.
        caps: the largest rank of each module; ranks are cut there.
        scores: unused.
        spec: the modules and their blocks, of m_l modules each; block 0 is closest to the input.
        rng: unused.
        base: the rank of block 0.
        step: how much the rank grows with every block; negative, it falls, to 0 at least.

    References:
        Liu et al., Adaptive Parameter-Efficient Federated Fine-Tuning on Heterogeneous Devices (LEGEND).
        arXiv 2412.20004.

    Note:
        LEGEND searches for the number of layers that equalises the devices' times; here the budget decides it.
    """
    chosen: dict[str, int] = {}
    left = budget
    blocks = blocks_of(caps, scores, spec)
    for place in reversed(range(len(blocks))):
        wanted = on_modules([blocks[place]], [max(0, base + step * place)], caps)
        if sum(wanted.values()) > left:
            if not any(chosen.values()):
                chosen.update(on_modules([blocks[place]], [left // blocks[place].size], caps))
            break
        chosen.update(wanted)
        left -= sum(wanted.values())
    return chosen
