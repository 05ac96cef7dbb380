"""LoKr's shapes and names: a d_out x d_in update as the Kronecker product of two small matrices.

    delta = scale * kron(w1, w2)        w1: l x m,   w2: k x n,   l k = d_out,   m n = d_in
    w2    = w2_a @ w2_b                 k x r and r x n, where r is less than half of max(k, n)

The factors are dense parameters, ``MODULE.lokr_w1`` and so on, as PEFT names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt, prod

Shape = tuple[int, int]


def factorise(dimension: int) -> Shape:
    """The two factors of a number that lie closest to its square root, the smaller one first.

    >>> factorise(384), factorise(128), factorise(127)
    ((16, 24), (8, 16), (1, 127))
    """
    small = next(m for m in range(isqrt(dimension), 0, -1) if dimension % m == 0)
    return small, dimension // small


def lokr_shapes(shape: Shape, rank: int) -> dict[str, Shape]:
    """The shape of each Kronecker factor of a (d_out, d_in) module, by PEFT's rules.

    With ``factorise(d_out) == (l, k)`` and ``factorise(d_in) == (m, n)``, w1 is l x m. w2 is k x n where
    ``rank >= max(k, n) / 2``, and the product of k x r and r x n otherwise.

    Args:
        shape: (d_out, d_in) of the module.
        rank: r, which w2 is cut to where it is larger.

    References:
        LoKr: arXiv 2309.14859. KronA: arXiv 2212.10650.

    >>> lokr_shapes((384, 384), 24)
    {'lokr_w1': (16, 16), 'lokr_w2': (24, 24)}
    >>> lokr_shapes((384, 384), 8)
    {'lokr_w1': (16, 16), 'lokr_w2_a': (24, 8), 'lokr_w2_b': (8, 24)}
    """
    (l, k), (m, n) = map(factorise, shape)  # noqa: E741 - the equation's letter
    if rank >= max(k, n) / 2:
        return {"lokr_w1": (l, m), "lokr_w2": (k, n)}
    return {"lokr_w1": (l, m), "lokr_w2_a": (k, rank), "lokr_w2_b": (rank, n)}


def lokr_parameters(modules: Mapping[str, Shape], rank: int) -> dict[str, Shape]:
    """The shape of every factor of these modules, by the parameter's name."""
    shapes = {name: lokr_shapes(shape, rank) for name, shape in modules.items()}
    return {f"{name}.{factor}": shape for name, factors in shapes.items() for factor, shape in factors.items()}


def lokr_elements(modules: Mapping[str, Shape], rank: int) -> int:
    """How many parameters LoKr trains in these modules.

    >>> lokr_elements({f"{i}.{part}": (384, 384) for i in range(12) for part in "qv"}, 24)
    19968
    """
    return sum(map(prod, lokr_parameters(modules, rank).values()))
