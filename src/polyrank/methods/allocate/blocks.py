"""Transformer blocks as the unit of allocation: all modules of a block share one rank.

A budget counts module-ranks, so a rank on a block of m modules costs m. A module outside all blocks is a block of
its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from polyrank.core.method import Ranks
from polyrank.core.types import ModelSpec

Per = Literal["block", "module"]


@dataclass(frozen=True)
class Block:
    """Modules that share one rank.

    Attributes:
        modules: their names, in the order of the forward pass.
        cap: the largest cap of its modules; a module with a smaller one is held to its own.
        score: the sum of its modules' scores.
    """

    modules: tuple[str, ...]
    cap: int
    score: float

    @property
    def size(self) -> int:
        """What one rank costs: the number of modules."""
        return len(self.modules)


def blocks_of(caps: Ranks, scores: Mapping[str, float], spec: ModelSpec, per: Per = "block") -> list[Block]:
    """The blocks of the modules in `caps`, in the order of the forward pass; ``per="module"``: each alone."""
    depth = {name: position for position, name in enumerate(spec.modules)}
    groups: dict[int | str, list[str]] = {}
    for name in sorted(caps, key=lambda name: depth.get(name, len(depth))):
        groups.setdefault(spec.blocks.get(name, name) if per == "block" else name, []).append(name)
    return [
        Block(tuple(names), max(caps[name] for name in names), sum(scores[name] for name in names))
        for names in groups.values()
    ]


def held_to(most: int | None, caps: Ranks) -> dict[str, int]:
    """The caps, none above `most`."""
    return {name: cap if most is None else min(cap, most) for name, cap in caps.items()}


def on_modules(blocks: Iterable[Block], ranks: Iterable[int], caps: Ranks) -> dict[str, int]:
    """Each block's rank on all its modules, none above its own cap."""
    return {name: min(rank, caps[name]) for block, rank in zip(blocks, ranks, strict=True) for name in block.modules}


def equally(budget: int, blocks: Sequence[Block], caps: Ranks) -> dict[str, int]:
    """The same rank on all `blocks`: what the budget pays for, none above its module's cap."""
    rank = budget // max(1, sum(block.size for block in blocks))
    return on_modules(blocks, [rank] * len(blocks), caps)


def affordable(budget: int, blocks: Sequence[Block], rank: int | None = None) -> int:
    """How many blocks of average size the budget pays for at `rank`, or the largest cap: at least 1, if there is one.

        k = floor(budget / (rank * modules per block)),   1 <= k <= L

    >>> affordable(288, [Block(("query", "value"), 48, 1.0)] * 12, rank=24)
    6
    """
    largest = max((block.cap for block in blocks), default=0)
    price = min(rank or largest, largest) * sum(block.size for block in blocks)
    paid = budget * len(blocks) // price if price else 0
    return min(max(paid, 1), len(blocks))
