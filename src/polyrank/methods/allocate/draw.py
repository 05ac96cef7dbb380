"""Drawing layers by importance: tiers of scores, and weighted sampling without replacement; on plain numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

TIERS = 3


def tiers(scores: Sequence[float]) -> list[int]:
    """The tier of each score, 0, 1 or 2 from low to high: exact k-means in one dimension with three clusters.

        min over cuts a < b of   sse(v[:a]) + sse(v[a:b]) + sse(v[b:]),   v the sorted distinct scores

    Clusters of points on a line are intervals, so trying every pair of cuts is exact. With fewer than three distinct
    scores, all are in tier 0.

    >>> tiers([0.1, 5.0, 0.2, 9.0, 0.1])
    [0, 1, 0, 2, 0]

    References:
        Gronlund et al., Fast Exact k-Means, k-Medians and Bregman Divergence Clustering in 1D. arXiv 1701.07204.
    """
    values, which, counts = np.unique(np.asarray(scores, np.float64), return_inverse=True, return_counts=True)
    if len(values) < TIERS:
        return [0] * len(scores)
    v = values / np.abs(values).max()  # squares of large scores must not overflow
    n, s, q = (np.concatenate([[0.0], np.cumsum(counts * v**power)]) for power in (0, 1, 2))

    def sse(start: NDArray[np.intp], stop: NDArray[np.intp]) -> NDArray[np.float64]:
        """Squared distances to the mean within ``v[start:stop]``, for arrays of bounds."""
        return np.asarray(q[stop] - q[start] - (s[stop] - s[start]) ** 2 / (n[stop] - n[start]))

    a, b = np.triu_indices(len(v) - 1, 1)
    a, b = a + 1, b + 1
    best = int(np.argmin(sse(np.zeros_like(a), a) + sse(a, b) + sse(b, np.full_like(b, len(v)))))
    return [int(i >= a[best]) + int(i >= b[best]) for i in which.ravel()]


def successive(weights: Sequence[float], size: int, rng: np.random.Generator) -> list[int]:
    """`size` different indices, drawn one after the other in proportion to the weights of those left; sorted.

        P(i first) = w_i / sum(w),   P(j next) = w_j / (sum(w) - w_i),   ...

    Exponential variables E_i / w_i come in exactly this order, so the smallest `size` of them are the sample, and
    with the same generator a larger sample contains the smaller one. Weights of 0 are drawn last.

    References:
        Efraimidis and Spirakis, Weighted random sampling with a reservoir. Information Processing Letters 97, 2006.
    """
    with np.errstate(divide="ignore", over="ignore"):
        arrival = rng.exponential(size=len(weights)) / np.asarray(weights, np.float64)
    return sorted(int(i) for i in np.argsort(arrival, kind="stable")[:size])
