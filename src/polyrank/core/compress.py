"""The best approximation of lower rank, one layer or all of a model's, by the route that a cost model chooses.

The routes are in `polyrank.core.factorise`; `route` is the choice, a function of sizes alone, and the logger of this
module says at level DEBUG what was chosen and where a route had to be left for a safer one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from polyrank.core import factorise
from polyrank.core.factorise import OVERSAMPLE, PASSES, Triplets
from polyrank.core.lowrank import LowRank, precision

Split = Literal["energy", "balanced"]
Route = Literal["qr", "gram", "dense", "randomised"]
Matrix = LowRank | Tensor
"""A layer's update: its factors, or the d_out x d_in matrix itself."""

TOLERANCE = 1e-6  # of the norm: what float32 factors of this size are rounded by anyway

_FAINT = 1e-6  # of the largest energy: less is rounding, or has yet to be learnt
_BATCH = {"cpu": 1 << 18, "cuda": 1 << 28}  # words decomposed by one call: launches cost there, caches matter here

_log = logging.getLogger(__name__)


def compress(x: Matrix, rank: int | None = None, split: Split = "energy", *, tolerance: float = TOLERANCE) -> LowRank:
    """The best approximation of `x` of at most `rank`, from its factors alone where those are the smaller object.

        U S V^T = scale * B A,   A <- V^T[:rank],   B <- U[:, :rank] S[:rank]

    Exact to the rounding of the factors, by whichever `route` is cheapest. A randomised one stands only if its
    distance to the best approximation is certified to be at most `tolerance` of the norm; else the exact one follows.

    Rows are ordered by energy and their signs fixed (the largest entry of each row of V^T is positive), so
    truncating the result *is* the truncated SVD: one factorisation serves receivers of every rank.

    Args:
        x: the update; bfloat16 factors are computed and returned in float32.
        rank: the largest rank of the result (default: all of it, lossless).
        split: ``energy`` puts S into B and leaves orthonormal rows in A. ``balanced`` gives both factors
            sqrt(S); directions of less than 1e-6 of the largest energy, none included, are split as by ``energy``:
            with (next to) nothing on both sides they would never learn again.
        tolerance: the largest certified distance to the best approximation, relative to the norm, at which a
            randomised result is taken; 0 rules it out.

    Returns:
        An update of rank min(rank, m, d_out, d_in) and scale 1, where m is the rank of `x`.
    """
    return compress_all({"x": x}, rank, split, tolerance=tolerance)["x"]


def compress_all(
    layers: Mapping[str, Matrix],
    rank: int | Mapping[str, int] | None = None,
    split: Split = "energy",
    *,
    tolerance: float = TOLERANCE,
) -> dict[str, LowRank]:
    """`compress` for every layer; layers of one shape, rank, precision and device are decomposed by one batched call.

    Batches are as large as their device rewards: on a GPU all layers of a shape at once, on a CPU only small ones,
    where the call itself is what costs.

    Args:
        layers: the updates by name.
        rank: the largest rank of the results: one for all, by name, or None (lossless).
        split: as for `compress`.
        tolerance: as for `compress`.
    """
    groups: dict[tuple[int, object], list[str]] = {}
    for name, x in layers.items():
        keep = _kept(x, rank[name] if isinstance(rank, Mapping) else rank)
        kind = [(part.shape, part.device) for part in _tensors(x)], precision(*_tensors(x))
        groups.setdefault((keep, str(kind)), []).append(name)
    done: dict[str, LowRank] = {}
    for (keep, _), names in groups.items():
        for batch in _batches(names, layers[names[0]]):
            found = _compressed([layers[name] for name in batch], keep, split, tolerance)
            done |= dict(zip(batch, found, strict=True))
    return {name: done[name] for name in layers}


def route(
    shape: tuple[int, int],
    stacked: int | None,
    kept: int,
    dtype: torch.dtype = torch.float32,
    tolerance: float = TOLERANCE,
) -> Route:
    """The cheapest way to the best approximation of rank `kept`, by `costs`.

    float64 factors promise float64 results, which Gram matrices and certificates of 1e-6 cannot keep: they take qr, or
    dense where the product is the smallest object, and dense then is an SVD.

    >>> route((768, 768), stacked=138, kept=24)
    'gram'
    >>> route((4096, 4096), stacked=3552, kept=64)
    'randomised'
    >>> route((768, 768), stacked=1380, kept=300)
    'dense'
    >>> route((768, 768), stacked=138, kept=24, dtype=torch.float64)
    'qr'

    Args:
        shape: (d_out, d_in).
        stacked: m, the rank of the factors; None if the matrix itself is given.
        kept: the rank of the result.
        dtype: the precision that sums are kept in.
        tolerance: the certified distance at which a randomised result is taken; 0 rules it out.
    """
    if dtype == torch.float64:
        return "dense" if stacked is None or stacked >= max(shape) else "qr"
    table = costs(shape, stacked, kept)
    if tolerance <= 0:
        table.pop("randomised", None)
    return min(table, key=lambda name: table[name])


def costs(shape: tuple[int, int], stacked: int | None, kept: int) -> dict[Route, float]:
    """The cost of every route that is open, in multiplications-and-additions of a float32 matrix product.

    With m = `stacked`, r = `kept`, n <= N the dimensions and l = r + 8:

        qr           3.7 m^2 (d - m/3) + 11 d m r for both d > m, + 47 m^3
        gram         3.1 m^2 (d_out + d_in) + 27 m^3 + 2 m r (d_out + 2 d_in)
        dense        2 m n N + 3.1 n^2 N + 19 n^3 + 2 n N r
        randomised   2 m n N + 6 (8 n N l + 8 (n + N) l^2)

    Float64 counts twice. The factors are measured ones (LAPACK on one core of a CPU with AVX-512): QR runs at half the
    speed of a product, an eigenproblem takes 19 m^3 and a singular value decomposition 43 m^3. gram is open up to
    m = n, beyond which its matrices are singular; qr where m is below N; randomised where 4 l <= n.
    """
    n, N = sorted(shape)
    m, r = stacked, kept
    formed = 0.0 if m is None else 2.0 * m * n * N
    table: dict[Route, float] = {"dense": formed + 3.1 * n * n * N + 19 * n**3 + 2 * n * N * r}
    if m is not None and m < N:
        sides = sum(3.7 * m * m * (d - m / 3) + 11 * d * m * r for d in shape if d > m)
        table["qr"] = sides + 47 * min(m, n) * m * min(m, N)
    if m is not None and m <= n:
        table["gram"] = 3.1 * m * m * (n + N) + 27 * m**3 + 2 * m * r * (shape[0] + 2 * shape[1])
    basis = r + OVERSAMPLE
    if r > 0 and 4 * basis <= n:
        table["randomised"] = formed + PASSES * (8.0 * n * N * basis + 8 * (n + N) * basis**2)
    return table


def _tensors(x: Matrix) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else (x.A, x.B)


def _kept(x: Matrix, rank: int | None) -> int:
    most = min(x.shape) if isinstance(x, Tensor) else min(x.rank, *x.shape)
    return most if rank is None else min(rank, most)


def _batches(names: Sequence[str], like: Matrix) -> Iterator[Sequence[str]]:
    tensors = _tensors(like)
    words = sum(t.numel() for t in tensors)
    size = max(_BATCH.get(tensors[0].device.type, _BATCH["cpu"]) // max(words, 1), 1)
    for start in range(0, len(names), size):
        yield names[start : start + size]


def _compressed(xs: Sequence[Matrix], keep: int, split: Split, tolerance: float) -> list[LowRank]:
    """Layers of one kind, by one batched call; a single one is no batch, and is not copied."""
    dtype = precision(*_tensors(xs[0]))
    A, *rest = (_together(parts, dtype) for parts in zip(*map(_tensors, xs), strict=True))
    U, S, Vt = _decomposed(A, rest[0] if rest else None, keep, tolerance)
    scales = [1.0 if isinstance(x, Tensor) else x.scale for x in xs]
    scale = torch.tensor(scales, dtype=dtype, device=S.device).reshape(*S.shape[:-1], 1)
    A, B = _split(U * scale.sign()[..., None], S * scale.abs(), Vt, split)
    return [LowRank(a, b) for a, b in (zip(A, B, strict=True) if A.ndim == 3 else [(A, B)])]


def _together(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return tensors[0].to(dtype) if len(tensors) == 1 else torch.stack([t.to(dtype) for t in tensors])


def _decomposed(A: Tensor, B: Tensor | None, keep: int, tolerance: float) -> Triplets:
    """The triplets of ``B @ A`` (of A itself without a B) by the cheapest route, and by a safe one where that fails."""
    shape, stacked = ((A if B is None else B).shape[-2], A.shape[-1]), None if B is None else A.shape[-2]
    chosen = route(shape, stacked, keep, A.dtype, tolerance)
    _log.debug("%s of rank %s to rank %d, %d at once: %s", shape, stacked, keep, len(A) if A.ndim == 3 else 1, chosen)
    if B is not None and (chosen == "qr" or keep == 0):
        return factorise.qr(A, B, keep)
    if B is not None and chosen == "gram":
        return _or_exact(factorise.gram(A, B, keep), A, B, keep)
    W = A if B is None else B @ A
    if A.dtype == torch.float64 or keep == 0:
        return factorise.svd(W, keep)
    if chosen == "randomised":
        found = [factorise.randomised(M, keep, tolerance) for M in (W if W.ndim == 3 else W[None])]
        if all(bound <= tolerance for _, bound in found):
            U, S, Vt = (torch.stack(part) for part in zip(*(triplets for triplets, _ in found), strict=True))
            return Triplets(U, S, Vt) if W.ndim == 3 else Triplets(U[0], S[0], Vt[0])
        _log.debug("certified to %.1e only, %.1e was asked for: dense", max(bound for _, bound in found), tolerance)
    return _or_exact(factorise.dense(W, keep), W, None, keep)


def _or_exact(found: factorise.Trusted, A: Tensor, B: Tensor | None, keep: int) -> Triplets:
    """The triplets, those that are not to be trusted replaced: by qr, or by the SVD of the matrix itself."""
    triplets, trusted = found
    if bool(trusted.all()):
        return triplets
    _log.debug("small singular values: %d of %d once more, exactly", int((~trusted).sum()), trusted.numel())
    at = ~trusted if trusted.ndim else ...
    exact = factorise.svd(A[at], keep) if B is None else factorise.qr(A[at], B[at], keep)
    for part, new in zip(triplets, exact, strict=True):
        part[at] = new
    return triplets


def _split(U: Tensor, S: Tensor, Vt: Tensor, split: Split) -> tuple[Tensor, Tensor]:
    """A and B: signs fixed, S on one side or shared, and what is rounding set to zero."""
    if S.shape[-1]:
        S = torch.where(S[..., :1] * 4 * torch.finfo(S.dtype).eps >= S, 0.0, S)
        sign = torch.sign(Vt.gather(-1, Vt.abs().argmax(dim=-1, keepdim=True)))
        U, Vt = U * sign.mT, Vt * sign
    if split == "energy":
        return Vt.contiguous(), U * S[..., None, :]
    root = torch.where(_FAINT * S[..., :1] < S, S.sqrt(), 1.0)
    return Vt * root[..., None], U * (S / root)[..., None, :]
