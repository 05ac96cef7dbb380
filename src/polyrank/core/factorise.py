"""The routes to a truncated singular value decomposition of ``B A``, with what each costs and what it can promise.

    qr           QR of both factors, SVD of the core in float64: any input, to rounding
    gram         ``B^T B`` and ``A A^T`` in float64, and an m x m eigenproblem: about half the time of qr
    dense        the product itself, where it is no larger than its factors, by the Gram matrix of its shorter side
    randomised   subspace iteration on the product, where its distance to the best approximation is certified

Squaring loses what is small: gram and dense find singular values down to about 1e-8 of the factors' norms. They say
for every matrix whether the values asked for are far above that; where they are not, the caller goes on to `qr` or
`svd`, which always answer. All but `randomised` take any number of leading batch dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from polyrank.core.rng import stream, torch_generator

OVERSAMPLE = 8
PASSES = 6  # of subspace iteration, at most
_FAITHFUL = 1e-4  # of the factors' norms: from here on, the square root of a float64 eigenvalue is good to 1e-8
_PLAIN = 1 / 16  # of the factors' norms: from here on, float32 forms singular vectors to a few roundings
_ROWS = 1024  # of a factor that are in float64 at a time


class Triplets(NamedTuple):
    """U (... x d_out x k), S (... x k) in descending order, Vt (... x k x d_in), in the dtype of what they are of."""

    U: Tensor
    S: Tensor
    Vt: Tensor


Trusted = tuple[Triplets, Tensor]
"""Triplets, and for every matrix of the batch whether they are accurate."""


def svd(W: Tensor, keep: int) -> Triplets:
    """The first `keep` triplets of W, decomposed in float64."""
    U, S, Vt = torch.linalg.svd(W.double(), full_matrices=False)
    return Triplets(U[..., :keep].to(W.dtype), S[..., :keep].to(W.dtype), Vt[..., :keep, :].to(W.dtype))


def qr(A: Tensor, B: Tensor, keep: int) -> Triplets:
    """``B = Qb Rb``, ``A^T = Qa Ra``, and the SVD of ``Rb Ra^T``; a side that is no taller than m needs no QR."""
    m = B.shape[-1]
    left, Rb = (None, B) if m >= B.shape[-2] else _reflectors(B)
    right, Ra = (None, A.mT) if m >= A.shape[-1] else _reflectors(A.mT)
    U, S, Vt = (part.to(A.dtype) for part in svd(Rb.double() @ Ra.mT.double(), keep))
    return Triplets(_rotate(left, U), S, _rotate(right, Vt.mT).mT)


def _reflectors(M: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """QR of a tall M as Householder reflectors (Q is never formed) and the square factor R."""
    reflectors, tau = torch.geqrf(M)
    return (reflectors, tau), reflectors[..., : M.shape[-1], :].triu()


def _rotate(reflectors: tuple[Tensor, Tensor] | None, small: Tensor) -> Tensor:
    """Q @ small, with Q given by `_reflectors` (None: Q is the identity)."""
    if reflectors is None:
        return small
    packed, tau = reflectors
    padded = small.new_zeros(*packed.shape[:-1], small.shape[-1])
    padded[..., : small.shape[-2], :] = small
    return torch.ormqr(packed, tau, padded)


def gram(A: Tensor, B: Tensor, keep: int) -> Trusted:
    """From ``B^T B = P P^T``: the eigenvectors Z of ``P^T A A^T P = Z S^2 Z^T`` give ``V^T = S^-1 Z^T P^T A``.

    The pairs are balanced first, |b_j| = |a_j|, which the Gram matrices allow after the fact: no client's way of
    writing its factors costs accuracy. ``U S = B (A V)`` is a projection: it adds nothing to what V lacks.
    """
    GB, GA = row_gram(B.mT), row_gram(A)
    b, a = (G.diagonal(dim1=-2, dim2=-1).sqrt() for G in (GB, GA))
    up, down = (torch.where((x > 0) & (y > 0), (y / x).sqrt(), 0.0) for x, y in ((b, a), (a, b)))
    GB, GA = GB * up[..., None] * up[..., None, :], GA * down[..., None] * down[..., None, :]
    P = _root(GB)
    values, Z = torch.linalg.eigh(P.mT @ GA @ P)
    S, Z = _leading(values, Z, keep)
    size = (torch.linalg.matrix_norm(GB) * torch.linalg.matrix_norm(GA)).sqrt()
    T = (P @ (Z * _inverse(S)[..., None, :]) * down[..., None]).mT
    Vt = _combined(T, A, S, size)
    US = B @ (A @ Vt.mT)
    return Triplets(US * _inverse(S).to(B.dtype)[..., None, :], S.to(B.dtype), Vt), _trusted(S, size)


def dense(W: Tensor, keep: int) -> Trusted:
    """The eigenvectors of ``W W^T`` (or ``W^T W``, whichever is smaller) are one side; W times them is the other."""
    if W.shape[-2] > W.shape[-1]:
        (V, S, Ut), trusted = dense(W.mT, keep)
        return Triplets(Ut.mT, S, V.mT), trusted
    G = row_gram(W)
    values, vectors = torch.linalg.eigh(G)
    S, Z = _leading(values, vectors, keep)
    size = torch.linalg.matrix_norm(G).sqrt()
    Vt = _combined((Z * _inverse(S)[..., None, :]).mT, W, S, size)
    return Triplets(Z.to(W.dtype), S.to(W.dtype), Vt), _trusted(S, size)


def row_gram(X: Tensor) -> Tensor:
    """``X X^T`` in float64 for X (... x m x d), a part of d at a time and each half of the symmetric result once."""
    m = X.shape[-2]
    G = X.new_zeros(*X.shape[:-1], m, dtype=torch.float64)
    block = max(-(-m // 6), 64)
    for start in range(0, X.shape[-1], _ROWS):
        wide = X[..., start : start + _ROWS].double()
        for i in range(0, m, block):
            G[..., i : i + block, i:] += wide[..., i : i + block, :] @ wide[..., i:, :].mT
    return G.triu() + G.triu(1).mT


def _root(G: Tensor) -> Tensor:
    """P with ``P P^T = G``: Cholesky, or where G has no full rank its eigenvectors, without those that are rounding."""
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(G)
    if bool(failed.any()):
        values, Q = torch.linalg.eigh(G)
        root = Q * torch.where(values > 1e-14 * values[..., -1:], values, 0.0).sqrt()[..., None, :]
    return root


def _leading(values: Tensor, vectors: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The square roots of the `keep` largest eigenvalues (ascending, as eigh has them), and their eigenvectors."""
    return values.flip(-1)[..., :keep].clamp(min=0).sqrt(), vectors.flip(-1)[..., :keep]


def _inverse(S: Tensor) -> Tensor:
    """1 / S, finite: what comes of a value that is zero is not trusted and not used."""
    return 1 / S.clamp(min=torch.finfo(torch.float32).tiny)


def _trusted(S: Tensor, size: Tensor) -> Tensor:
    """Whether the smallest value that was asked for is well above what squaring leaves of it."""
    trusted: Tensor = S[..., -1] > _FAITHFUL * size
    return trusted


def _combined(T: Tensor, M: Tensor, S: Tensor, size: Tensor) -> Tensor:
    """``T @ M`` in the dtype of M, formed in float64 where small values make large coefficients that cancel."""
    if bool((S[..., -1] >= _PLAIN * size).all()):
        return T.to(M.dtype) @ M
    return (T @ M.double()).to(M.dtype)


def randomised(W: Tensor, keep: int, tolerance: float) -> tuple[Triplets, float]:
    """Subspace iteration on W (d_out x d_in) in float64, until its certificate is at most `tolerance`.

    With Q an orthonormal basis of keep + 8 columns, ``K = Q^T W`` and ``E = W - Q K``, the triplets kept are those of
    K. Their distance to the best approximation W_k is at most the smaller of

        sqrt(2) ||W||_2 ||C||_F / (s_k^2 - s_{k+1}^2 - ||E||_F^2),   C = (W W^T - Q K K^T Q^T) U
        2 (||W||_F^2 - sum s_i^2)^(1/2)

    the first by Davis and Kahan's sine theorem for W W^T, whose remaining eigenvalues are at most
    ``s_{k+1}^2 + ||E||_F^2``; the second because W_k is no further from W. Both are computed, none is estimated:
    ``||E||_F^2 = ||W||_F^2 - ||K||_F^2``, with room for rounding. The test matrix is drawn from a fixed stream, so the
    result is a function of W.

    Returns:
        The triplets, and the certificate relative to ``||W||_F``: infinite where nothing could be certified, and above
        `tolerance` where the iteration gave up.
    """
    wide = W.double()
    energy = float((wide * wide).sum())
    generator = torch_generator(stream(0, "compress"))
    start = torch.randn(W.shape[1], keep + OVERSAMPLE, generator=generator, dtype=torch.float64)
    Y = wide @ start.to(W.device)
    for done in range(PASSES):
        Q = torch.linalg.qr(Y).Q
        K = Q.mT @ wide
        Y = wide @ K.mT
        values, Z = torch.linalg.eigh(K @ K.mT)
        theta, Z = values.flip(0).clamp(min=0), Z.flip(1)
        leaving = Y @ Z[:, :keep] - Q @ (Z[:, :keep] * theta[:keep])
        bound = _certificate(theta, energy, float(leaving.norm()), keep)
        if bound <= tolerance or (done > 0 and bound == float("inf")):
            break
    S = theta[:keep].sqrt()
    Vt = (Z[:, :keep] * _inverse(S)).mT @ K
    return Triplets((Q @ Z[:, :keep]).to(W.dtype), S.to(W.dtype), Vt.to(W.dtype)), bound


def _certificate(theta: Tensor, energy: float, leaving: float, keep: int) -> float:
    """See `randomised`; relative to the square root of `energy`, infinite where there is no bound below 1."""
    rounding = 1e-14 * energy
    beyond = max(energy - float(theta.sum()), 0.0) + rounding
    tail = max(energy - float(theta[:keep].sum()), 0.0) + rounding
    gap = float(theta[keep - 1] - theta[keep]) - beyond
    # The values that are kept must also be large enough for S^-1 not to magnify rounding.
    if not float(theta[keep - 1]) > _FAITHFUL**2 * float(theta[0]):
        return float("inf")
    close = (2 * (float(theta[0]) + beyond)) ** 0.5 * (leaving + rounding) / gap if gap > 0 else float("inf")
    bound = min(close, 2 * tail**0.5) / energy**0.5
    return bound if bound < 1 else float("inf")
