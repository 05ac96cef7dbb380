"""Layers drawn at random (FedRA)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from polyrank.core.method import Positive, Ranks
from polyrank.core.types import ModelSpec
from polyrank.methods.allocate.blocks import affordable, blocks_of, equally, held_to
from polyrank.methods.allocate.draw import successive


def random_layers(
    budget: int,
    caps: Ranks,
    scores: Mapping[str, float],
    spec: ModelSpec,
    rng: np.random.Generator,
    *,
    rank: Positive | None = None,
) -> dict[str, int]:
    """As many blocks as the budget pays for at one rank, every block as likely.

        k = floor(budget / (rank * modules per block)),   1 <= k <= L

    A budget below one block at `rank` goes to one block, at the rank it pays for.

    Args:
        budget: module-ranks: the sum of ranks over the modules.
        caps: the largest rank of each module; blocks with none left are not drawn.
        scores: unused.
        spec: the modules and their blocks.
        rng: draws the blocks.
        rank: the rank of a drawn block; None is the largest cap.

    References:
        Su et al., FedRA: A Random Allocation Strategy for Federated Tuning to Unleash the Power of Heterogeneous
        Clients. arXiv 2311.11227.

    Note:
        FedRA also leaves the other layers out of the client's model; here they run frozen, or with what the dispatcher
        sends of them.
    """
    caps = held_to(rank, caps)
    blocks = [block for block in blocks_of(caps, scores, spec) if block.cap > 0]
    drawn = successive([1] * len(blocks), affordable(budget, blocks), rng)
    return equally(budget, [blocks[i] for i in drawn], caps)
