"""A weighted sum of a layer's updates, taken one by one, that never outgrows the layer's matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from polyrank.core.compress import Matrix
from polyrank.core.lowrank import LowRank, precision, stack, zeros


class RunningSum:
    """``sum w_i delta(x_i)``, exactly: stacked factors while those are smaller than d_out x d_in, then the matrix.

    What is added is copied, so an update can go once it was added: the state is at most d_out d_in words, whatever
    the number of updates. The matrix is kept in the precision of the first updates, at least float32.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape
        self.parts: list[LowRank] = []
        self.rank = 0
        self.matrix: Tensor | None = None

    def add(self, x: LowRank, weight: float) -> None:
        """Adds ``weight * delta(x)``."""
        dtype = precision(x.A, x.B)
        part = LowRank(x.A.to(dtype) * (weight * x.scale), x.B.to(dtype, copy=True))
        self.rank += x.rank
        if self.matrix is not None:
            self.matrix.addmm_(part.B.to(self.matrix.dtype), part.A.to(self.matrix.dtype))
            return
        self.parts.append(part)
        d_out, d_in = self.shape
        if self.rank * (d_out + d_in) >= d_out * d_in:
            whole = stack(self.parts)
            self.matrix, self.parts = whole.B @ whole.A, []

    def total(self, divisor: float) -> Matrix:
        """The sum over `divisor`: factors of scale 1, or the matrix."""
        if self.matrix is not None:
            return self.matrix / divisor
        if not self.parts:
            return zeros(self.shape, 0)
        whole = stack(self.parts)
        return LowRank(whole.A / divisor, whole.B)


def factored(x: Matrix) -> LowRank:
    """`x` as factors, exactly: a matrix is itself times the identity of its shorter side."""
    if isinstance(x, LowRank):
        return x
    d_out, d_in = x.shape
    eye = torch.eye(min(d_out, d_in), dtype=x.dtype, device=x.device)
    return LowRank(x, eye) if d_out <= d_in else LowRank(eye, x)
