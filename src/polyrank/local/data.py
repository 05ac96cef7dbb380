"""Prepared data as training and evaluation see it: labelled examples that give batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

Indices = npt.NDArray[np.int64]


class Examples(Protocol):
    """Prepared data that gives batches."""

    @property
    def labels(self) -> Indices: ...

    @property
    def lengths(self) -> Indices: ...

    @property
    def targets(self) -> Indices:
        """What is asked of each example: one class, or so many tokens."""
        ...

    def batch(self, indices: Indices) -> dict[str, Tensor]: ...


class Packable(Examples, Protocol):
    """Texts of which several may share a row."""

    def packed(self, rows: Sequence[Indices]) -> dict[str, Tensor]: ...


WINDOW = 50
"""Optimizer steps whose examples are sorted by length together."""


def shuffled(indices: Indices, lengths: Indices | None, per_step: int, rng: np.random.Generator) -> list[Indices]:
    """One epoch: the examples of each optimizer step, `per_step` but for one that may be shorter.

    Args:
        indices: the examples.
        lengths: of all examples, to group those of similar length: windows of `WINDOW` steps are drawn, sorted, cut
            into steps, and the steps drawn again. None: in an order that is drawn once.
        per_step: examples of a step.
        rng: draws.
    """
    order = rng.permutation(indices)
    steps = []
    for start in range(0, len(order), WINDOW * per_step):
        window = order[start : start + WINDOW * per_step]
        if lengths is not None:
            window = window[np.argsort(lengths[window], kind="stable")]
        cut = [window[at : at + per_step] for at in range(0, len(window), per_step)]
        steps += cut if lengths is None else [cut[step] for step in rng.permutation(len(cut))]
    return steps


def by_length(indices: Indices, lengths: Indices, tokens: int, most: int | None = None) -> Iterator[Indices]:
    """Batches of examples of similar length: at most `tokens` positions each, and `most` examples."""
    order = indices[np.argsort(lengths[indices], kind="stable")[::-1]]
    start = 0
    while start < len(order):
        size = max(1, min(tokens // int(max(lengths[order[start]], 1)), most or len(order)))
        yield order[start : start + size]
        start += size
