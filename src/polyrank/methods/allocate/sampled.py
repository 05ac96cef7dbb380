"""Layers drawn by importance, and a budget divided over those that were drawn (HRALoRA, Fed-HeLLo's FIM-HLA)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
from annotated_types import Gt, Le

from polyrank.core.method import Positive, Ranks
from polyrank.core.types import ModelSpec
from polyrank.methods.allocate.blocks import affordable, blocks_of, equally, held_to
from polyrank.methods.allocate.draw import successive, tiers
from polyrank.methods.allocate.geometric import Pattern, prior
from polyrank.methods.allocate.proportional import by_score
from polyrank.methods.allocate.split import Floor, Leftover

Share = Annotated[float, Gt(0), Le(1)]


def sampled(
    budget: int,
    caps: Ranks,
    scores: Mapping[str, float],
    spec: ModelSpec,
    rng: np.random.Generator,
    *,
    layers: Positive | Share | None = None,
    rank: Positive | None = None,
    within: Literal["proportional", "uniform"] = "proportional",
    floor: Floor = 1,
    cap: Positive | None = None,
    leftover: Leftover = "largest_remainder",
    pattern: Pattern | None = None,
    groups: list[Positive] | None = None,
) -> dict[str, int]:
    """Few blocks, drawn by importance, at a high rank each, in place of all blocks at a low one.

    The blocks' scores fall into three tiers (exact 1-D k-means), and k blocks are drawn without replacement with

        P(b) ~ 1, 2, 3   for the low, middle and high tier;   k = floor(budget / (rank * modules per block))

    so a budget of rank 12 on 12 blocks is spent as an average rank of 24 on 6 blocks. With fewer than three distinct
    scores, all blocks are as likely.

    Args:
        budget: module-ranks: the sum of ranks over the modules.
        caps: the largest rank of each module.
        scores: importance of each module, non-negative.
        spec: the modules and their blocks.
        rng: draws the blocks.
        layers: how many blocks to draw: a whole number, a share of all (0.5), or None for as many as `rank` allows.
        rank: the average rank to aim at where `layers` is None; None aims at the largest that the caps allow.
        within: how the budget is divided over the drawn blocks: ``proportional`` to their scores, or ``uniform``.
        floor: the least rank of a drawn block, for ``proportional``.
        cap: the largest rank of a block, beside `caps`.
        leftover: what becomes of the rest, for ``proportional`` (see `proportional`).
        pattern: around which blocks are drawn as long as all scores are alike, that is before importance is measured
            (Fed-HeLLo's warm start); None: uniformly.
        groups: how many blocks each group of clients trains, for `pattern` (see `random_geometric`).

    References:
        HRALoRA, CCGrid 2026 (``within="proportional"``). Zhang et al., Fed-HeLLo: Efficient Federated Foundation
        Model Fine-Tuning with Heterogeneous LoRA Allocation. arXiv 2506.12213 (``within="uniform"``: FIM-HLA).

    Note:
        The released code of both clusters with a randomly started k-means, which misses the optimum at times;
        Fed-HeLLo's takes the arbitrary cluster numbers for the order of importance.
    """
    caps = held_to(cap, caps)
    blocks = [block for block in blocks_of(caps, scores, spec) if block.cap > 0]
    if layers is None:
        count = affordable(budget, blocks, rank)
    else:
        count = layers if isinstance(layers, int) else math.ceil(layers * len(blocks))
    found = [block.score for block in blocks]
    if pattern is not None and len(set(found)) <= 1:
        weights = prior(pattern, len(blocks), groups)
    else:
        weights = [tier + 1 for tier in tiers(found)]
    drawn = [blocks[i] for i in successive(weights, count, rng)]
    if within == "uniform":
        return equally(budget, drawn, caps)
    return by_score(budget, drawn, caps, floor, leftover)
