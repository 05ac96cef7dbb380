"""The best approximation of a matrix that is only seen by blocks: against the SVD of the whole."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from polyrank.core import blockwise
from polyrank.core.blockwise import Blocks, approximate
from polyrank.core.lowrank import delta
from polyrank.core.rng import stream, torch_generator

SPACES = {"gram": blockwise._gram, "krylov": blockwise._krylov}
spaces = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
Space = Callable[[Blocks, int, int, torch.device], Tensor]


def by_blocks(M: Tensor, height: int = 7) -> Blocks:
    def blocks() -> Iterator[Tensor]:
        yield from M.split(height)

    return blocks


def matrix(N: int, n: int, decay: float, seed: int = 0) -> Tensor:
    """Random singular vectors, and singular values ``i^-decay``."""
    generator = torch_generator(stream(seed, "matrix"))
    U, V = (torch.linalg.qr(torch.randn(d, n, generator=generator, dtype=torch.float64)).Q for d in (N, n))
    return U * torch.arange(1, n + 1, dtype=torch.float64) ** -decay @ V.T


def found(space: Space, M: Tensor, rank: int) -> blockwise.Approximation:
    blocks = by_blocks(M)
    basis = space(blocks, M.shape[1], rank, torch.device("cpu"))
    return blockwise._onto(blocks, (M.shape[0], M.shape[1]), basis, rank)


@spaces
@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0, 3.0])
def test_the_error_is_that_of_the_best_approximation(space: Space, decay: float) -> None:
    M = matrix(200, 150, decay)
    x, error = found(space, M, 10)
    S = torch.linalg.svdvals(M)
    best = float(S[10:].norm() / S.norm())
    assert float((M - delta(x)).norm() / M.norm()) == pytest.approx(error, rel=1e-9)
    assert best * (1 - 1e-12) <= error <= best * 1.003
    if space is SPACES["gram"]:
        assert error == pytest.approx(best, rel=1e-9)


@spaces
def test_rows_are_orthonormal_and_in_order_of_energy(space: Space) -> None:
    x, _ = found(space, matrix(60, 50, 1.0), 6)
    assert (x.rank, x.shape, x.scale) == (6, (60, 50), 1.0)
    torch.testing.assert_close(x.A @ x.A.T, torch.eye(6, dtype=torch.float64))
    energy = x.B.norm(dim=0)
    assert bool((energy[:-1] >= energy[1:]).all())


@spaces
@pytest.mark.parametrize("rank", [1, 4, 20])
def test_a_matrix_of_low_rank_is_found_whole(space: Space, rank: int) -> None:
    M = matrix(40, 20, 0.5)[:, :3] @ matrix(20, 20, 0.5)[:3]
    x, error = found(space, M, max(rank, 3))
    torch.testing.assert_close(delta(x), M)
    assert error < 1e-7


@spaces
def test_zeros_and_what_is_not_finite(space: Space) -> None:
    x, error = found(space, torch.zeros(30, 20, dtype=torch.float64), 4)
    assert (error, x.rank, bool(delta(x).any())) == (0.0, 4, False)
    for value in (float("nan"), float("inf")):
        M = matrix(30, 20, 1.0)
        M[3, 4] = value
        x, error = found(space, M, 4)
        assert error != error
        assert bool(delta(x).isfinite().all())


def test_the_result_is_a_function_of_the_matrix_however_it_is_cut() -> None:
    M = matrix(90, 80, 0.2)
    whole, parts = (approximate(by_blocks(M, h), (90, 80), 5) for h in (90, 11))
    torch.testing.assert_close(delta(whole.x), delta(parts.x))
    again = approximate(by_blocks(M, 11), (90, 80), 5)
    assert torch.equal(again.x.A, parts.x.A)


def test_a_gram_matrix_is_no_larger_than_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    M = matrix(60, 50, 0.1)
    best = float(torch.linalg.svdvals(M)[4:].norm() / M.norm())
    exact = approximate(by_blocks(M), (60, 50), 4)
    assert exact.error == pytest.approx(best, rel=1e-9)
    monkeypatch.setattr(blockwise, "EXACT", 50 * 50 - 1)
    close = approximate(by_blocks(M), (60, 50), 4)
    assert best * (1 + 1e-9) < close.error < best * 1.01
