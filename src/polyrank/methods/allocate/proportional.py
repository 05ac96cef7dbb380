"""Ranks in proportion to importance, between a floor and a cap (HRALoRA)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from polyrank.core.method import Positive, Ranks
from polyrank.core.types import ModelSpec
from polyrank.methods.allocate.blocks import Block, Per, blocks_of, held_to, on_modules
from polyrank.methods.allocate.split import Floor, Leftover, split


def proportional(
    budget: int,
    caps: Ranks,
    scores: Mapping[str, float],
    spec: ModelSpec,
    rng: np.random.Generator,
    *,
    floor: Floor = 1,
    cap: Positive | None = None,
    leftover: Leftover = "largest_remainder",
    per: Per = "block",
) -> dict[str, int]:
    """A floor for every block, and the rest of the budget in proportion to the blocks' scores.

        r_b = floor + s_b / sum(s) * spare / m_b,   spare = budget - floor * modules

    with s_b the sum of the scores of block b's m_b modules, which all get rank r_b; rounded down to whole ranks and
    cut at the cap. A budget that does not pay for every floor pays for those of the highest scores first; one above
    all caps is not spent in full. Scores that are all zero count as all alike.

    Args:
        budget: module-ranks: the sum of ranks over the modules.
        caps: the largest rank of each module.
        scores: importance of each module, non-negative.
        spec: the modules and their blocks.
        rng: unused.
        floor: the least rank of every block.
        cap: the largest rank of every block, beside `caps`.
        leftover: ``largest_remainder``: what rounding leaves over goes to the largest remainders, one rank each, and
            what a cap cuts off to the other blocks in proportion. ``highest``: both go to the highest score, up to
            its cap, and then to the next.
        per: ``block``: the modules of a block share one rank; ``module``: each has its own.

    References:
        HRALoRA, CCGrid 2026.

    Note:
        ``leftover="highest"`` gives the ranks of HRALoRA's released code wherever that is defined: it divides by zero
        where all scores are zero, gives ranks below the floor where the budget is short, and does not end where the
        budget exceeds all caps.
    """
    caps = held_to(cap, caps)
    return by_score(budget, blocks_of(caps, scores, spec, per), caps, floor, leftover)


def by_score(budget: int, blocks: Sequence[Block], caps: Ranks, floor: int, leftover: Leftover) -> dict[str, int]:
    """The budget divided over `blocks` in proportion to their scores (see `proportional`)."""
    sizes = [block.size for block in blocks]
    unit = math.gcd(*sizes) or 1  # every rank costs a multiple of it; with blocks of one size, ranks cost 1
    scores, most = [block.score for block in blocks], [block.cap for block in blocks]
    ranks = split(budget // unit, scores, most, [size // unit for size in sizes], floor=floor, leftover=leftover)
    return on_modules(blocks, ranks, caps)
