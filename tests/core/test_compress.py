"""Every route to the best approximation: they agree, keep their promises, and are chosen by sizes alone."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyrank.core import factorise
from polyrank.core.compress import compress, compress_all, costs, route
from polyrank.core.lowrank import LowRank, delta, stack
from polyrank.core.rng import stream, torch_generator
from polyrank.core.running import RunningSum, factored


def random(d_out: int, d_in: int, rank: int, seed: int, scale: float = 1.0, dtype=torch.float32) -> LowRank:
    generator = torch_generator(stream(seed, "random"))
    A, B = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rank, d_in), (d_out, rank)))
    return LowRank(A.to(dtype), B.to(dtype), scale)


def dense(x: LowRank) -> Tensor:
    return x.scale * (x.B.double() @ x.A.double())


def magnitude(x: LowRank) -> float:
    return abs(x.scale) * float((x.B.double().norm(dim=0) * x.A.double().norm(dim=1)).sum())


def product(found: factorise.Triplets) -> Tensor:
    return (found.U.double() * found.S.double()[..., None, :]) @ found.Vt.double()


FLAWS = ["none", "unbalanced", "duplicate", "dead", "deficient", "bfloat16"]


@st.composite
def factors(draw: st.DrawFn) -> LowRank:
    x = random(draw(st.integers(2, 40)), draw(st.integers(2, 40)), draw(st.integers(1, 30)), draw(st.integers(0, 99)))
    A, B, half = x.A.clone(), x.B.clone(), x.rank // 2
    flaw = draw(st.sampled_from(FLAWS))
    if flaw == "unbalanced":
        A[:half], B[:, :half] = A[:half] * 1e4, B[:, :half] * 1e-4
    elif flaw == "duplicate":
        A[half : 2 * half], B[:, half : 2 * half] = A[:half], B[:, :half]
    elif flaw == "dead":
        A[:half], B[:, -half:] = 0, 0
    elif flaw == "deficient":
        B[:, half:] = B[:, :1]
    elif flaw == "bfloat16":
        return LowRank(A.bfloat16(), B.bfloat16())
    return LowRank(A, B)


@given(factors(), st.integers(1, 12))
@settings(deadline=None, max_examples=300)
def test_routes_attain_the_eckart_young_error_or_say_that_they_do_not(x: LowRank, rank: int) -> None:
    keep = min(rank, x.rank, *x.shape)
    A, B = x.A.float(), x.B.float()
    lost = float(torch.linalg.svdvals(dense(x))[keep:].norm())
    results = {"qr": (factorise.qr(A, B, keep), torch.tensor(True)), "dense": factorise.dense(B @ A, keep)}
    if x.rank <= min(x.shape):
        results["gram"] = factorise.gram(A, B, keep)
    for name, (found, trusted) in results.items():
        if trusted:
            error = float((dense(x) - product(found)).norm())
            assert abs(error - lost) <= 2e-5 * magnitude(x), name
            identity = torch.eye(keep).double()
            torch.testing.assert_close(found.Vt.double() @ found.Vt.double().T, identity, rtol=0, atol=2e-5)


def test_gram_is_trusted_on_ordinary_factors_and_on_badly_scaled_ones() -> None:
    x = random(60, 50, 20, 0)
    up = torch.tensor([1e4, 1e-4]).repeat(10)
    for A, B in ((x.A, x.B), (x.A * up[:, None], x.B / up)):
        found, trusted = factorise.gram(A, B, 12)
        assert bool(trusted)
        assert float((product(found) - product(factorise.qr(A, B, 12))).norm()) < 1e-6 * float(delta(x).norm())
    assert not bool(factorise.gram(x.A, torch.zeros_like(x.B), 12)[1])


# --- the certificate


@given(st.integers(0, 9), st.sampled_from([0.0, 1e-9, 1e-6, 1e-3, 0.1, 1.0]), st.sampled_from([4, 8]))
@settings(deadline=None, max_examples=80)
def test_the_certificate_is_honest(seed: int, noise: float, keep: int) -> None:
    x = random(90, 80, 8, seed, dtype=torch.float64)
    W = dense(x) + noise * random(90, 80, 80, seed + 100, dtype=torch.float64).B @ torch.eye(80).double()
    found, bound = factorise.randomised(W, keep, 1e-6)
    best = factorise.svd(W, keep)
    if bound < float("inf"):
        assert float((product(found) - product(best)).norm()) <= bound * float(W.norm())


def test_what_decays_is_certified_and_what_does_not_is_not() -> None:
    low = dense(random(90, 80, 8, 0))
    assert factorise.randomised(low, 8, 1e-6)[1] <= 1e-6
    assert factorise.randomised(low + 1e-3 * random(90, 80, 80, 1).B, 8, 1e-6)[1] <= 1e-6
    assert factorise.randomised(random(90, 80, 80, 1).B.double(), 8, 1e-6)[1] > 1e-6


@pytest.mark.parametrize("flat", [False, True])
def test_a_randomised_result_stands_only_with_its_certificate(flat: bool, caplog: pytest.LogCaptureFixture) -> None:
    W = random(400, 400, 400 if flat else 20, 3).B @ random(400, 400, 400 if flat else 20, 4).A
    assert route(tuple(W.shape), None, 20) == "randomised"
    with caplog.at_level(logging.DEBUG, "polyrank.core.compress"):
        y = compress(W, 20)
    assert ("certified to" in caplog.text) == flat
    assert "(400, 400) of rank None to rank 20, 1 at once: randomised" in caplog.text
    error = float((dense(y) - product(factorise.svd(W.double(), 20))).norm())
    assert error <= 2e-6 * float(W.norm())
    assert torch.equal(compress(W, 20).A, y.A)


# --- the choice


@pytest.mark.parametrize(
    ("shape", "stacked", "kept", "expected"),
    [
        ((768, 768), 138, 24, "gram"),
        ((4096, 4096), 936, 256, "gram"),
        ((1024, 4096), 936, 256, "gram"),
        ((768, 768), 1380, 300, "dense"),
        ((4096, 4096), 3552, 64, "randomised"),
        ((768, 768), None, 300, "dense"),
    ],
)
def test_the_choice_is_the_cheapest(shape: tuple[int, int], stacked: int | None, kept: int, expected: str) -> None:
    assert route(shape, stacked, kept) == expected
    table = costs(shape, stacked, kept)
    assert expected == min(table, key=table.get)
    assert route(shape, stacked, kept, tolerance=0) != "randomised"
    assert route(shape, stacked, kept, torch.float64) in ("qr", "dense")


# --- many layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("split", ["energy", "balanced"])
def test_many_layers_are_each_layer(dtype: torch.dtype, split: str) -> None:
    xs = {f"a{i}": random(20, 16, 6, i, (-1.0) ** i * (i + 1), dtype) for i in range(4)}
    xs |= {"zero": LowRank(xs["a0"].A, torch.zeros_like(xs["a0"].B)), "other": random(16, 20, 18, 9, 2.0, dtype)}
    xs |= {"none": random(20, 16, 0, 0, dtype=dtype)}
    matrices = {**xs, "matrix": dense(xs["a1"]).to(dtype)}
    ranks = {name: 5 for name in matrices} | {"a3": 2}
    found = compress_all(matrices, ranks, split)
    assert list(found) == list(matrices)
    for name, x in matrices.items():
        alone = compress(x, ranks[name], split)
        assert found[name].rank == alone.rank
        torch.testing.assert_close(delta(found[name]), delta(alone), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[name].A.abs(), alone.A.abs(), rtol=1e-3, atol=1e-4)


def test_many_layers_twice_are_the_same_bytes() -> None:
    xs = {f"a{i}": random(20, 16, 6, i) for i in range(4)}
    first, second = compress_all(xs, 3), compress_all(xs, 3)
    assert all(torch.equal(first[n].A, second[n].A) and torch.equal(first[n].B, second[n].B) for n in xs)


# --- running sums


@pytest.mark.parametrize("count", [1, 2, 3, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_running_sum_is_the_sum_and_never_outgrows_the_matrix(count: int, dtype: torch.dtype) -> None:
    xs = [random(12, 30, 4, seed, seed + 0.5, dtype) for seed in range(count)]
    running = RunningSum((12, 30))
    for i, x in enumerate(xs):
        running.add(x, i + 1)
        held = sum(part.A.numel() + part.B.numel() for part in running.parts)
        assert held + (0 if running.matrix is None else running.matrix.numel()) <= 12 * 30
    total = running.total(7.0)
    assert isinstance(total, Tensor) == (count >= 3)
    expected = sum((i + 1) / 7 * dense(x) for i, x in enumerate(xs))
    whole = factored(total)
    assert whole.rank == (12 if count >= 3 else 4 * count)
    torch.testing.assert_close(delta(whole).double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(delta(compress(total, 3)), delta(compress(stack([whole]), 3)), rtol=1e-4, atol=1e-4)
    assert torch.equal(factored(torch.ones(3, 2)).A, torch.eye(2))
