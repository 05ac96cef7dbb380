"""Prepared data as training and evaluation see it: labelled examples that give batches."""

from __future__ import annotations

from collections.abc import Iterator
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

    def batch(self, indices: Indices) -> dict[str, Tensor]: ...


def by_length(indices: Indices, lengths: Indices, tokens: int, most: int | None = None) -> Iterator[Indices]:
    """Batches of examples of similar length: at most `tokens` positions each, and `most` examples."""
    order = indices[np.argsort(lengths[indices], kind="stable")[::-1]]
    start = 0
    while start < len(order):
        size = max(1, min(tokens // int(max(lengths[order[start]], 1)), most or len(order)))
        yield order[start : start + size]
        start += size
