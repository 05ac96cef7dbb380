"""The algebra: one value carries a layer's low-rank update, and aggregation rules are words over it.

A layer's update is ``delta(x) = x.scale * x.B @ x.A``. The scale (PEFT's alpha / r) is part of the value, so
no rule can forget it. Nothing here forms a d_out x d_in matrix, except `delta`, whose purpose that is, and
`compress` where the stacked rank is so large that the factors would be the bigger object.

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

Split = Literal["energy", "balanced"]
Fold = Literal["B", "both"]
Factors = Literal["A", "B", "AB"]

_FAINT = 1e-6  # of the largest energy: less is rounding, or has yet to be learnt


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


def compress(x: LowRank, rank: int | None = None, split: Split = "energy") -> LowRank:
    """The best approximation of `x` of at most `rank`, from its factors alone.

    With m rows, ``B = Qb Rb`` and ``A^T = Qa Ra``; the singular value decomposition of the m x m core
    ``Rb Ra^T = U' S V'^T`` gives ``U = Qb U'`` and ``V = Qa V'``. Exact to rounding; 4 (d_out + d_in) m^2 +
    26 m^3 flops and about (d_out + d_in) m words. A side with m >= d needs no QR. Where m reaches both
    dimensions, the product is the smaller object and is decomposed itself. Either is formed and decomposed in
    float64: it is small, and where singular values lie close its rounding would be most of the error.

    Rows are ordered by energy and their signs fixed (the largest entry of each row of V^T is positive), so
    truncating the result *is* the truncated SVD: one factorisation serves receivers of every rank.

    Args:
        x: the update; bfloat16 factors are computed and returned in float32.
        rank: the largest rank of the result (default: all of it, lossless).
        split: ``energy`` puts S into B and leaves orthonormal rows in A. ``balanced`` gives both factors
            sqrt(S); directions of less than 1e-6 of the largest energy, none included, are split as by ``energy``:
            with (next to) nothing on both sides they would never learn again.

    Returns:
        An update of rank min(rank, m, d_out, d_in) and scale 1.
    """
    d_out, d_in = x.shape
    dtype = precision(x.A, x.B)
    A, B = x.A.to(dtype), x.B.to(dtype)
    B = B if x.scale == 1.0 else B * x.scale
    m = x.rank
    keep = min(m, d_out, d_in) if rank is None else min(rank, m, d_out, d_in)
    del x  # here and below: stacked factors are the largest objects, so each is let go as soon as it is used
    if m >= max(d_out, d_in):  # the product is no larger than either factor
        U, S, Vt = _svd(B, A)
    else:
        left, Rb = (None, B) if m >= d_out else _reflectors(B)
        del B
        right, Ra = (None, A.T) if m >= d_in else _reflectors(A.T)
        del A
        core_U, S, core_Vt = _svd(Rb, Ra.T)
        U = _rotate(left, core_U[:, :keep])
        Vt = _rotate(right, core_Vt[:keep].T).T
    U, S, Vt = U[:, :keep], S[:keep].clone(), Vt[:keep]
    if keep:
        S[S[0] * 4 * torch.finfo(dtype).eps >= S] = 0.0  # rounding, not energy
        sign = torch.sign(Vt.gather(1, Vt.abs().argmax(dim=1, keepdim=True))).squeeze(1)
        U, Vt = U * sign, Vt * sign[:, None]
    if split == "energy":
        return LowRank(Vt.contiguous(), U * S)
    root = torch.where(_FAINT * S[:1] < S, S.sqrt(), 1.0)
    return LowRank(Vt * root[:, None], U * (S / root))


def _svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin singular value decomposition of ``left @ right``, computed in float64, in the arguments' dtype."""
    U, S, Vt = torch.linalg.svd(left.double() @ right.double(), full_matrices=False)
    return U.to(left.dtype), S.to(left.dtype), Vt.to(left.dtype)


def _reflectors(M: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """QR of a tall M as Householder reflectors (Q is never formed) and the square factor R."""
    reflectors, tau = torch.geqrf(M)
    return (reflectors, tau), reflectors[: M.shape[1]].triu()


def _rotate(reflectors: tuple[Tensor, Tensor] | None, small: Tensor) -> Tensor:
    """Q @ small, with Q given by `_reflectors` (None: Q is the identity)."""
    if reflectors is None:
        return small
    packed, tau = reflectors
    padded = small.new_zeros(packed.shape[0], small.shape[1])
    padded[: small.shape[0]] = small
    return torch.ormqr(packed, tau, padded)


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
