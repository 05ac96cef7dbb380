"""Layers chosen by their place in the model, fixed or at random around a pattern (Fed-HeLLo's GD-HLA and RGD-HLA)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from polyrank.core.method import Positive, Ranks
from polyrank.core.types import ModelSpec
from polyrank.methods.allocate.blocks import affordable, blocks_of, equally, held_to
from polyrank.methods.allocate.draw import successive

Pattern = Literal["triangle", "inverted_triangle", "bottleneck", "uniform"]


def layers_of(pattern: Pattern, layers: int, count: int) -> list[int]:
    """The places of `count` of `layers` blocks, 0 closest to the input.

        triangle             the first k                        wide near the input
        inverted_triangle    the last k                         wide near the output
        bottleneck           the first ceil(k/2), the last floor(k/2)
        uniform              floor(i L / k), i = 0 ... k-1      evenly spread

    >>> layers_of("bottleneck", 12, 6)
    [0, 1, 2, 9, 10, 11]
    >>> layers_of("uniform", 12, 9)
    [0, 1, 2, 4, 5, 6, 8, 9, 10]
    """
    first = {"triangle": count, "inverted_triangle": 0, "bottleneck": (count + 1) // 2}
    if pattern == "uniform":
        return [i * layers // count for i in range(count)]
    return [*range(first[pattern]), *range(layers - count + first[pattern], layers)]


def coverage(pattern: Pattern, layers: int, groups: Sequence[int]) -> list[int]:
    """How many of the groups train each block, if group g trains `pattern` with ``groups[g]`` blocks.

        c_l = sum over g of [l in P(L, k_g)]

    >>> coverage("bottleneck", 12, [6, 9, 12])
    [3, 3, 3, 2, 2, 1, 1, 1, 2, 3, 3, 3]
    """
    trained = [set(layers_of(pattern, layers, count)) for count in groups]
    return [sum(layer in group for group in trained) for layer in range(layers)]


def prior(pattern: Pattern, layers: int, groups: Sequence[int] | None) -> list[int]:
    """The weights with which blocks are drawn around a pattern; without `groups`, a half, three quarters and all."""
    return coverage(pattern, layers, groups or [-(-layers // 2), -(-3 * layers // 4), layers])


def geometric(
    budget: int,
    caps: Ranks,
    scores: Mapping[str, float],
    spec: ModelSpec,
    rng: np.random.Generator,
    *,
    pattern: Pattern = "bottleneck",
    rank: Positive | None = None,
) -> dict[str, int]:
    """As many blocks as the budget pays for at one rank, in a fixed pattern.

        k = floor(budget / (rank * modules per block)),   1 <= k <= L;   the blocks are P(L, k)

    A budget below one block at `rank` goes to one block, at the rank it pays for.

    Args:
        budget: module-ranks: the sum of ranks over the modules.
        caps: the largest rank of each module.
        scores: unused.
        spec: the modules and their blocks.
        rng: unused.
        pattern: ``triangle`` (the first k), ``inverted_triangle`` (the last k), ``bottleneck`` (half of them at either
            end) or ``uniform`` (evenly spread).
        rank: the rank of a chosen block; None is the largest cap.

    References:
        Zhang et al., Fed-HeLLo: Efficient Federated Foundation Model Fine-Tuning with Heterogeneous LoRA Allocation.
        arXiv 2506.12213 (GD-HLA).
    """
    caps = held_to(rank, caps)
    blocks = blocks_of(caps, scores, spec)
    chosen = layers_of(pattern, len(blocks), affordable(budget, blocks))
    return equally(budget, [blocks[i] for i in chosen], caps)


def random_geometric(
    budget: int,
    caps: Ranks,
    scores: Mapping[str, float],
    spec: ModelSpec,
    rng: np.random.Generator,
    *,
    pattern: Pattern = "bottleneck",
    groups: list[Positive] | None = None,
    rank: Positive | None = None,
) -> dict[str, int]:
    """As many blocks as the budget pays for at one rank, drawn around a pattern.

        P(l) = c_l / sum(c),   c_l = sum over g of [l in P(L, k_g)]

    k = floor(budget / (rank * modules per block)) blocks are drawn without replacement, one after the other. A budget
    below one block at `rank` goes to one block, at the rank it pays for.

    Args:
        budget: module-ranks: the sum of ranks over the modules.
        caps: the largest rank of each module; blocks with none left are not drawn.
        scores: unused.
        spec: the modules and their blocks.
        rng: draws the blocks.
        pattern: the pattern whose coverage by the groups gives the probabilities (see `geometric`).
        groups: how many blocks each group of clients trains, for example ``[6, 9, 12]``; more than the model has
            means all. None is a half, three quarters and all of the blocks. A block that no group covers is drawn
            only when the others run out.
        rank: the rank of a drawn block; None is the largest cap.

    References:
        Zhang et al., Fed-HeLLo: Efficient Federated Foundation Model Fine-Tuning with Heterogeneous LoRA Allocation.
        arXiv 2506.12213 (RGD-HLA).

    Note:
        The released code has the probabilities of 12 blocks and groups of 6, 9 and 12 typed into its configuration;
        with these groups they are the same.
    """
    caps = held_to(rank, caps)
    blocks = blocks_of(caps, scores, spec)
    total = len(blocks)
    weights = prior(pattern, total, groups)
    free = [i for i in range(total) if blocks[i].cap > 0]
    drawn = successive([weights[i] for i in free], affordable(budget, [blocks[i] for i in free]), rng)
    return equally(budget, [blocks[free[i]] for i in drawn], caps)
