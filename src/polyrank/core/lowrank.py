"""The algebra: one value carries a layer's low-rank update, and aggregation rules are words over it.

A layer's update is ``delta(x) = x.scale * x.B @ x.A``. The scale (PEFT's alpha / r) is part of the value, so
no rule can forget it. Nothing here forms a d_out x d_in matrix, except `delta`, whose purpose that is. The best
approximation of lower rank is in `polyrank.core.compress`.

Weights are float64; sums are accumulated in the factors' own precision, at least float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from polyrank.core.rng import torch_generator

Fold = Literal["B", "both"]
Factors = Literal["A", "B", "AB"]


@dataclass(frozen=True)
class LowRank:
    """A layer's update in factored form: ``scale * B @ A`` with A (r x d_in, down) and B (d_out x r, up)."""

    A: Tensor
    B: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise ValueError(
                f"A must be r x d_in and B d_out x r with one r, got A {tuple(self.A.shape)}, B {tuple(self.B.shape)}"
            )

    @property
    def rank(self) -> int:
        """r, the number of rows of A."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in), the shape of the weight this updates."""
        return self.B.shape[0], self.A.shape[1]


@dataclass(frozen=True)
class Adapter:
    """The update of a whole model: low-rank layers by module name, and dense (full) parameters by name."""

    layers: Mapping[str, LowRank] = field(default_factory=dict)
    dense: Mapping[str, Tensor] = field(default_factory=dict)


def precision(*tensors: Tensor) -> torch.dtype:
    """The dtype sums of these tensors are kept in: their promoted dtype, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def zeros(shape: tuple[int, int], rank: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> LowRank:
    """The zero update of a (d_out, d_in) layer with `rank` rows, all zero."""
    d_out, d_in = shape
    return LowRank(torch.zeros(rank, d_in, dtype=dtype), torch.zeros(d_out, rank, dtype=dtype), scale)


def fresh(shape: tuple[int, int], rank: int, scale: float, rng: np.random.Generator) -> LowRank:
    """A fresh LoRA as PEFT starts it: A ~ U(-1/sqrt(d_in), 1/sqrt(d_in)), B = 0, so delta = 0."""
    return pad(zeros(shape, 0, scale), rank, rng)


def truncate(x: LowRank, rank: int) -> LowRank:
    """The first `rank` rows of A and columns of B (all of them if there are fewer)."""
    return LowRank(x.A[:rank], x.B[:, :rank], x.scale)


def tail(x: LowRank, rank: int) -> LowRank:
    """What `truncate` to `rank` leaves out: ``delta(truncate(x, r)) + delta(tail(x, r)) == delta(x)``."""
    return LowRank(x.A[rank:], x.B[:, rank:], x.scale)


def pad(x: LowRank, rank: int, rng: np.random.Generator | None = None) -> LowRank:
    """`x` with rows added up to `rank`, its delta unchanged.

    Without `rng` the new rows of A are zero; with it they are drawn like a fresh LoRA's, so that the new
    directions can learn (a pair with a = 0 and b = 0 has no gradient and never would).
    """
    missing = rank - x.rank
    if missing <= 0:
        return x
    d_out, d_in = x.shape
    rows = torch.zeros(missing, d_in, dtype=x.A.dtype)
    if rng is not None:
        bound = d_in**-0.5
        rows.uniform_(-bound, bound, generator=torch_generator(rng))
    columns = torch.zeros(d_out, missing, dtype=x.B.dtype, device=x.B.device)
    return LowRank(torch.cat([x.A, rows.to(x.A.device)]), torch.cat([x.B, columns], dim=1), x.scale)


def overlay(x: LowRank, onto: LowRank) -> LowRank:
    """`onto` with its first rows replaced by those of `x`: rows that `x` does not hold keep their value."""
    x = rescale(x, onto.scale)
    return LowRank(torch.cat([x.A, onto.A[x.rank :]]), torch.cat([x.B, onto.B[:, x.rank :]], dim=1), onto.scale)


def rescale(x: LowRank, scale: float, fold: Fold = "B") -> LowRank:
    """The same delta written under another scale.

    Args:
        x: the update.
        scale: the new scale, not zero.
        fold: where the ratio ``x.scale / scale`` goes: all of it into B, or its square root into both factors
            (the choice that treats A and B alike, used where raw factors are averaged).
    """
    if scale == x.scale:
        return x
    ratio = x.scale / scale
    if fold == "B":
        return LowRank(x.A, x.B * ratio, scale)
    if ratio < 0:
        raise ValueError(f"scales {x.scale} and {scale} differ in sign; fold into B instead")
    return LowRank(x.A * ratio**0.5, x.B * ratio**0.5, scale)


def mean(xs: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """The weighted mean of raw factors, ``sum w_i B_i / sum w_i`` and ``sum w_i A_i / sum w_i``.

    Its delta is *not* the mean of the deltas: the cross terms B_i A_j remain. Use `stack` for the exact sum.

    Raises:
        ValueError: if scales or ranks differ (`rescale` and `pad` first), or the weights do not sum to more than 0.
    """
    if len({x.scale for x in xs}) > 1:
        raise ValueError(
            f"factors under unequal scales {sorted({x.scale for x in xs})} cannot be averaged: rescale first"
        )
    if len({x.rank for x in xs}) > 1:
        raise ValueError(f"factors of unequal ranks {sorted({x.rank for x in xs})} cannot be averaged: pad first")
    share = _shares(weights)
    dtype = precision(*(x.A for x in xs), *(x.B for x in xs))
    A = sum((x.A.to(dtype) * w for x, w in zip(xs, share, strict=True)), torch.zeros(()))
    B = sum((x.B.to(dtype) * w for x, w in zip(xs, share, strict=True)), torch.zeros(()))
    return LowRank(A, B, xs[0].scale)


def stack(xs: Sequence[LowRank], weights: Sequence[float] | None = None) -> LowRank:
    """The exact weighted sum in factored form: ``delta(stack(xs, w)) == sum w_i delta(x_i)``, scale 1.

    Weights are used as given (they need not sum to 1) and are folded into A together with the scales, as FLoRA does.
    """
    ws = [1.0] * len(xs) if weights is None else list(weights)
    dtype = precision(*(x.A for x in xs), *(x.B for x in xs))
    A = torch.cat([x.A.to(dtype) * (w * x.scale) for x, w in zip(xs, ws, strict=True)])
    B = torch.cat([x.B.to(dtype) for x in xs], dim=1)
    return LowRank(A, B, 1.0)


def trim(x: LowRank) -> LowRank:
    """`x` without the rows that contribute nothing (a = 0 or b = 0); its delta is unchanged."""
    alive = x.A.any(dim=1) & x.B.any(dim=0)
    return x if bool(alive.all()) else LowRank(x.A[alive], x.B[:, alive], x.scale)


def norm(x: LowRank) -> float:
    """The Frobenius norm of ``delta(x)``, from two r x r Gram matrices in float64."""
    return math.sqrt(inner(x, x))


def inner(x: LowRank, y: LowRank) -> float:
    """The Frobenius inner product of two deltas, ``s_x s_y <B_x^T B_y, A_x A_y^T>``, never forming them."""
    BB = x.B.double().T @ y.B.double()
    AA = x.A.double() @ y.A.double().T
    value = x.scale * y.scale * float((BB * AA).sum())
    return max(value, 0.0) if x is y else value


def delta(x: LowRank) -> Tensor:
    """The d_out x d_in matrix itself, ``scale * B @ A``. For tests, merging and export only."""
    dtype = precision(x.A, x.B)
    return x.scale * (x.B.to(dtype) @ x.A.to(dtype))


def nbytes(x: LowRank | Adapter, factors: Factors = "AB") -> int:
    """Bytes of the tensors: the factors named, and (for an `Adapter`) the dense parameters."""
    if isinstance(x, LowRank):
        return sum(t.numel() * t.element_size() for name, t in (("A", x.A), ("B", x.B)) if name in factors)
    dense = sum(t.numel() * t.element_size() for t in x.dense.values())
    return dense + sum(nbytes(layer, factors) for layer in x.layers.values())


def combine(parts: Iterable[Adapter]) -> Adapter:
    """The adapters as one: layers stacked exactly (scale 1), dense parameters of later parts winning."""
    layers: dict[str, list[LowRank]] = {}
    dense: dict[str, Tensor] = {}
    for part in parts:
        for name, x in part.layers.items():
            layers.setdefault(name, []).append(x)
        dense.update(part.dense)
    merged = {name: xs[0] if len(xs) == 1 else stack(xs) for name, xs in layers.items()}
    return Adapter({name: merged[name] for name in sorted(merged)}, dense)


def _shares(weights: Sequence[float]) -> list[float]:
    total = float(np.sum(np.asarray(weights, dtype=np.float64)))
    if not total > 0:
        raise ValueError(f"weights must sum to more than 0, got {list(weights)}")
    return [float(w) / total for w in weights]
