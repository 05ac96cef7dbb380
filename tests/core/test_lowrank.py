"""The algebra: every word against dense float64 matrices, and the laws that tie the words together."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from polyrank.core.compress import compress
from polyrank.core.lowrank import (
    Adapter,
    LowRank,
    combine,
    delta,
    fresh,
    inner,
    mean,
    nbytes,
    norm,
    overlay,
    pad,
    precision,
    rescale,
    stack,
    tail,
    trim,
    truncate,
    zeros,
)
from polyrank.core.rng import stream

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# Of sums kept in this precision, relative to the largest term: a few hundred roundings.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 2e-5}

dims = st.integers(1, 9)
seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from([1.0, 0.0625, 4.0, 3.7, -2.0])
dtypes = st.sampled_from(DTYPES)
splits = st.sampled_from(["energy", "balanced"])


def random(
    d_out: int, d_in: int, rank: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> LowRank:
    rng = np.random.default_rng(seed)
    A = torch.from_numpy(rng.standard_normal((rank, d_in))).to(dtype)
    B = torch.from_numpy(rng.standard_normal((d_out, rank))).to(dtype)
    return LowRank(A, B, scale)


@st.composite
def lowranks(draw: st.DrawFn, most: int = 12) -> LowRank:
    """Any shape, any rank from 0 to beyond both dimensions, any dtype; sometimes with duplicate or zero rows."""
    x = random(draw(dims), draw(dims), draw(st.integers(0, most)), draw(seeds), draw(scales), draw(dtypes))
    flaw = draw(st.sampled_from(["none", "duplicate", "zero", "dead", "unbalanced"]))
    if x.rank < 2 or flaw == "none":
        return x
    A, B = x.A.clone(), x.B.clone()
    if flaw == "duplicate":
        A[1], B[:, 1] = A[0], B[:, 0]
    elif flaw == "zero":
        B.zero_()
    elif flaw == "dead":
        A[-1], B[:, -1] = 0, 0
    else:  # one client's factors are badly scaled; its delta is not
        A[0], B[:, 0] = A[0] * 1e4, B[:, 0] * 1e-4
    return LowRank(A, B, x.scale)


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[list[LowRank], list[float]]:
    """Updates of one layer, of unequal ranks and scales, with weights."""
    d_out, d_in, dtype = draw(dims), draw(dims), draw(dtypes)
    size = draw(st.integers(1, 5))
    xs = [random(d_out, d_in, draw(st.integers(0, 6)), draw(seeds), draw(scales), dtype) for _ in range(size)]
    return xs, draw(st.lists(st.just(0.0) | st.floats(1e-6, 100), min_size=size, max_size=size))


def dense(x: LowRank) -> Tensor:
    """The reference: the product in float64."""
    return x.scale * (x.B.double() @ x.A.double())


def magnitude(*xs: LowRank) -> float:
    """What rounding errors are relative to: the sum of the norms of the rank-one terms."""
    return sum(abs(x.scale) * float((x.B.double().norm(dim=0) * x.A.double().norm(dim=1)).sum()) for x in xs)


def close(found: Tensor, expected: Tensor, size: float, dtype: torch.dtype) -> bool:
    return float((found.double() - expected).norm()) <= TOLERANCE[dtype] * size + 1e-300


# --- values


def test_factors_must_share_a_rank() -> None:
    with pytest.raises(ValueError, match=r"A \(2, 3\), B \(4, 5\)"):
        LowRank(torch.zeros(2, 3), torch.zeros(4, 5))
    with pytest.raises(ValueError, match="one r"):
        LowRank(torch.zeros(3), torch.zeros(4, 3))


def test_rank_and_shape() -> None:
    x = random(5, 7, 3, 0)
    assert (x.rank, x.shape) == (3, (5, 7))


def test_delta_counts_the_scale() -> None:
    x = LowRank(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.0]]), 0.5)
    assert delta(x).tolist() == [[1.5, 3.0], [0.0, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_has_no_delta(dtype: torch.dtype) -> None:
    x = zeros((3, 4), 2, 1.5, dtype)
    assert (x.rank, x.shape, x.scale, x.A.dtype, x.B.dtype) == (2, (3, 4), 1.5, dtype, dtype)
    assert not delta(x).any()


def test_fresh_starts_as_peft_does() -> None:
    x = fresh((30, 400), 8, 2.0, stream(0, "test"))
    assert (x.rank, x.shape, x.scale) == (8, (30, 400), 2.0)
    assert not x.B.any()
    assert float(x.A.abs().max()) <= 400**-0.5
    assert float(x.A.std()) == pytest.approx(400**-0.5 / math.sqrt(3), rel=0.05)
    assert torch.equal(x.A, fresh((30, 400), 8, 2.0, stream(0, "test")).A)
    assert not torch.equal(x.A, fresh((30, 400), 8, 2.0, stream(1, "test")).A)


def test_precision_is_at_least_float32() -> None:
    half, single, double = (torch.zeros(1, dtype=d) for d in (torch.bfloat16, torch.float32, torch.float64))
    assert precision() == torch.float32
    assert precision(half) == precision(half, single) == torch.float32
    assert precision(half, double) == torch.float64


# --- rows


@given(lowranks(), st.integers(0, 15))
@settings(deadline=None)
def test_truncate_and_tail_are_the_whole(x: LowRank, rank: int) -> None:
    head, rest = truncate(x, rank), tail(x, rank)
    assert head.rank == min(rank, x.rank)
    assert head.rank + rest.rank == x.rank
    assert torch.equal(stack_raw(head, rest).A, x.A)
    assert torch.equal(stack_raw(head, rest).B, x.B)
    assert close(delta(head).double() + delta(rest).double(), dense(x), magnitude(x), x.A.dtype)


def stack_raw(x: LowRank, y: LowRank) -> LowRank:
    return LowRank(torch.cat([x.A, y.A]), torch.cat([x.B, y.B], dim=1), x.scale)


@given(lowranks(), st.integers(0, 15), st.booleans())
@settings(deadline=None)
def test_pad_leaves_the_delta_alone(x: LowRank, rank: int, seeded: bool) -> None:
    padded = pad(x, rank, stream(0, "pad") if seeded else None)
    assert padded.rank == max(rank, x.rank)
    assert (padded.shape, padded.scale) == (x.shape, x.scale)
    assert (padded.A.dtype, padded.B.dtype) == (x.A.dtype, x.B.dtype)
    assert torch.equal(truncate(padded, x.rank).A, x.A)
    assert torch.equal(truncate(padded, x.rank).B, x.B)
    added = tail(padded, x.rank)
    assert not added.B.any()
    assert bool((added.A.abs() <= (1.01 if seeded else 0.0) * x.shape[1] ** -0.5).all())
    assert close(delta(padded), dense(x), magnitude(x), x.A.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_pad_adds_with_a_stream_can_learn(dtype: torch.dtype) -> None:
    added = tail(pad(random(4, 6, 2, 0, dtype=dtype), 5, stream(0, "pad")), 2)
    assert bool(added.A.any(dim=1).all())


@given(lowranks(), lowranks(), seeds)
@settings(deadline=None)
def test_overlay_replaces_the_first_rows(x: LowRank, other: LowRank, seed: int) -> None:
    onto = random(*x.shape, other.rank, seed, other.scale, x.A.dtype)
    laid = overlay(x, onto)
    assert laid.rank == max(x.rank, onto.rank)
    assert laid.scale == onto.scale
    assert torch.equal(tail(laid, x.rank).A, tail(onto, x.rank).A)
    assert torch.equal(tail(laid, x.rank).B, tail(onto, x.rank).B)
    tolerance = {torch.bfloat16: 1e-2}.get(x.A.dtype, TOLERANCE[x.A.dtype])  # B itself is rounded again
    found = delta(truncate(laid, x.rank)).double()
    assert float((found - dense(x)).norm()) <= tolerance * magnitude(x)


@given(lowranks(), st.integers(0, 12))
@settings(deadline=None)
def test_overlaying_a_truncation_on_its_origin_changes_nothing(x: LowRank, rank: int) -> None:
    laid = overlay(truncate(x, rank), x)
    assert torch.equal(laid.A, x.A)
    assert torch.equal(laid.B, x.B)


@given(lowranks(), st.sampled_from([1.0, 0.25, 7.3]), st.sampled_from(["B", "both"]))
@settings(deadline=None)
def test_rescale_leaves_the_delta_alone(x: LowRank, scale: float, fold: str) -> None:
    if x.scale < 0 and fold == "both":
        with pytest.raises(ValueError, match="differ in sign"):
            rescale(x, scale, fold)
        return
    y = rescale(x, scale, fold)
    assert y.scale == scale
    assert (y.A.dtype, y.B.dtype) == (x.A.dtype, x.B.dtype)
    tolerance = {torch.bfloat16: 2e-2}.get(x.A.dtype, TOLERANCE[x.A.dtype])
    assert float((delta(y).double() - dense(x)).norm()) <= tolerance * magnitude(x)
    if fold == "B":
        assert torch.equal(y.A, x.A)


def test_rescale_both_shares_the_ratio_evenly() -> None:
    x = random(4, 5, 2, 0, scale=4.0)
    y = rescale(x, 1.0, "both")
    torch.testing.assert_close(y.A, x.A * 2)
    torch.testing.assert_close(y.B, x.B * 2)


def test_trim_drops_only_what_contributes_nothing() -> None:
    x = random(4, 5, 4, 0)
    x.A[1], x.B[:, 3] = 0, 0
    y = trim(x)
    assert y.rank == 2
    assert torch.equal(y.A, x.A[[0, 2]])
    assert torch.equal(y.B, x.B[:, [0, 2]])
    assert trim(y) is y
    assert trim(zeros((3, 4), 2)).rank == 0


# --- sums


@given(cohorts())
@settings(deadline=None)
def test_stack_is_the_exact_weighted_sum(cohort: tuple[list[LowRank], list[float]]) -> None:
    xs, ws = cohort
    y = stack(xs, ws)
    assert (y.rank, y.scale) == (sum(x.rank for x in xs), 1.0)
    expected = sum((w * dense(x) for x, w in zip(xs, ws, strict=True)), torch.zeros(xs[0].shape).double())
    size = sum(w * magnitude(x) for x, w in zip(xs, ws, strict=True))
    assert close(delta(y), expected, size, xs[0].A.dtype)
    assert close(delta(stack(xs)), sum(dense(x) for x in xs), magnitude(*xs), xs[0].A.dtype)


def test_stack_folds_weights_and_scales_into_the_down_factor_as_flora_does() -> None:
    xs = [random(3, 4, 2, 0, scale=4.0), random(3, 4, 1, 1, scale=0.5)]
    y = stack(xs, [0.25, 3.0])
    torch.testing.assert_close(y.A, torch.cat([xs[0].A * 1.0, xs[1].A * 1.5]))
    assert torch.equal(y.B, torch.cat([xs[0].B, xs[1].B], dim=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_averages_raw_factors(dtype: torch.dtype) -> None:
    xs = [random(4, 5, 3, seed, 2.0, dtype) for seed in range(3)]
    y = mean(xs, [1, 2, 5])
    assert y.scale == 2.0
    assert y.A.dtype == y.B.dtype == precision(xs[0].A)
    for name in ("A", "B"):
        factors = [getattr(x, name).double() for x in xs]
        expected = (1 * factors[0] + 2 * factors[1] + 5 * factors[2]) / 8
        torch.testing.assert_close(getattr(y, name).double(), expected, rtol=1e-5, atol=1e-6)


def test_mean_of_one_is_itself() -> None:
    x = random(4, 5, 3, 0)
    torch.testing.assert_close(mean([x], [0.3]).A, x.A)


def test_mean_refuses_what_it_would_get_wrong() -> None:
    x = random(4, 5, 3, 0)
    with pytest.raises(ValueError, match=r"unequal scales \[0.5, 1.0\]"):
        mean([x, LowRank(x.A, x.B, 0.5)], [1, 1])
    with pytest.raises(ValueError, match=r"unequal ranks \[2, 3\]"):
        mean([x, truncate(x, 2)], [1, 1])
    for weights in ([0.0, 0.0], [1.0, -1.0], [math.nan, 1.0]):
        with pytest.raises(ValueError, match="sum to more than 0"):
            mean([x, x], weights)


def test_weights_are_float64() -> None:
    x = LowRank(torch.ones(1, 1), torch.ones(1, 1))
    many = 1 << 14
    assert float(mean([x] * many, [0.1] * many).A) == pytest.approx(1.0, abs=1e-5)


@given(lowranks(), seeds)
@settings(deadline=None)
def test_norm_and_inner_are_those_of_the_products(x: LowRank, seed: int) -> None:
    y = random(*x.shape, 3, seed, 1.5)
    assert norm(x) == pytest.approx(float(dense(x).norm()), rel=1e-6, abs=1e-7 * magnitude(x))
    expected = float((dense(x) * dense(y)).sum())
    assert inner(x, y) == pytest.approx(expected, abs=1e-10 * magnitude(x) * magnitude(y))
    assert inner(x, y) == pytest.approx(inner(y, x), abs=1e-10 * magnitude(x) * magnitude(y))


# --- compress


def spectrum(x: LowRank) -> Tensor:
    return torch.linalg.svdvals(dense(x))


@given(lowranks(most=20), st.none() | st.integers(0, 12), splits)
@settings(deadline=None, max_examples=300)
def test_compress_attains_the_eckart_young_error(x: LowRank, rank: int | None, split: str) -> None:
    y = compress(x, rank, split)
    full = min(x.rank, *x.shape)
    assert y.rank == (full if rank is None else min(rank, full))
    assert (y.shape, y.scale, y.A.dtype, y.B.dtype) == (x.shape, 1.0, precision(x.A), precision(x.B))
    lost = float(spectrum(x)[y.rank :].norm())
    found = float((dense(x) - dense(y)).norm())
    assert abs(found - lost) <= TOLERANCE[x.A.dtype] * magnitude(x)


@given(lowranks(most=20), st.none() | st.integers(0, 12))
@settings(deadline=None, max_examples=300)
def test_the_energy_split_is_orthonormal_ordered_and_signed(x: LowRank, rank: int | None) -> None:
    y = compress(x, rank)
    tolerance = TOLERANCE[x.A.dtype]
    torch.testing.assert_close(
        y.A.double() @ y.A.double().T, torch.eye(y.rank).double(), rtol=0, atol=max(tolerance, 1e-12)
    )
    energy = y.B.double().norm(dim=0)
    assert bool((energy[:-1] >= energy[1:] - tolerance * magnitude(x)).all())
    assert close(energy, spectrum(x)[: y.rank], magnitude(x), x.A.dtype)
    largest = y.A.gather(1, y.A.abs().argmax(dim=1, keepdim=True))
    assert bool((largest > 0).all())


@given(lowranks(most=20), st.integers(0, 9), st.integers(0, 9), splits)
@settings(deadline=None)
def test_truncating_a_compression_is_the_compression(x: LowRank, low: int, high: int, split: str) -> None:
    low, high = sorted([low, high])
    nested, direct = truncate(compress(x, high, split), low), compress(x, low, split)
    assert close(delta(nested), dense(direct), magnitude(x), x.A.dtype)


@given(lowranks(most=20), st.integers(0, 9), splits)
@settings(deadline=None)
def test_compress_is_idempotent(x: LowRank, rank: int, split: str) -> None:
    once = compress(x, rank, split)
    assert close(delta(compress(once, rank, split)), dense(once), magnitude(x), x.A.dtype)
    assert close(delta(compress(once, None, split)), dense(once), magnitude(x), x.A.dtype)


@given(lowranks(most=20), st.none() | st.integers(0, 12))
@settings(deadline=None, max_examples=300)
def test_the_balanced_split_has_equal_grams_and_no_dead_pair(x: LowRank, rank: int | None) -> None:
    y = compress(x, rank, "balanced")
    assert bool((y.A.norm(dim=1) > 0).all()), "a zero row of A can never learn again"
    energy = y.A.double().norm(dim=1) * y.B.double().norm(dim=0)
    live = energy > 2e-6 * energy[:1]
    A, B = y.A[live].double(), y.B[:, live].double()
    largest = float(spectrum(x).max()) if x.rank else 0.0
    torch.testing.assert_close(A @ A.T, B.T @ B, rtol=0, atol=TOLERANCE[x.A.dtype] * (largest + magnitude(x)))
    dead = y.A[energy <= 0.5e-6 * energy[:1]].double()  # in between, rounding decides
    torch.testing.assert_close(dead @ dead.T, torch.eye(len(dead)).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("d_out", "d_in", "rank"),
    [(9, 7, 3), (7, 9, 3), (4, 9, 6), (9, 4, 6), (5, 4, 11), (4, 5, 11), (6, 6, 6), (5, 4, 0), (1, 1, 3), (1, 5, 2)],
)
def test_compress_in_every_regime(d_out: int, d_in: int, rank: int, dtype: torch.dtype) -> None:
    x = random(d_out, d_in, rank, 0, scale=0.5, dtype=dtype)
    y = compress(x)
    assert y.rank == min(d_out, d_in, rank)
    assert close(delta(y), dense(x), magnitude(x), dtype)


@pytest.mark.parametrize("split", ["energy", "balanced"])
@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(6, 5, 3), (4, 5, 7), (3, 9, 5)])
def test_compress_of_zero_is_zero_and_can_learn(d_out: int, d_in: int, rank: int, split: str) -> None:
    for x in (zeros((d_out, d_in), rank), LowRank(torch.randn(rank, d_in), torch.zeros(d_out, rank))):
        y = compress(x, split=split)
        assert not delta(y).any()
        torch.testing.assert_close(y.A @ y.A.T, torch.eye(y.rank))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_badly_scaled_clients_do_not_cost_accuracy(dtype: torch.dtype) -> None:
    xs = [random(60, 50, 4, seed, dtype=dtype) for seed in range(4)]
    skewed = [LowRank(x.A * 1e4, x.B * 1e-4) if i % 2 else LowRank(x.A * 1e-4, x.B * 1e4) for i, x in enumerate(xs)]
    x = stack(skewed, [0.1, 0.2, 0.3, 0.4])
    U, S, Vt = torch.linalg.svd(dense(x), full_matrices=False)
    for rank in (3, 9, 16):
        best = (U[:, :rank] * S[:rank]) @ Vt[:rank]
        assert float((dense(compress(x, rank)) - best).norm() / best.norm()) < 50 * torch.finfo(dtype).eps


@pytest.mark.parametrize("seed", range(4))
def test_close_singular_values_do_not_cost_accuracy(seed: int) -> None:
    """A float32 core alone would move the cut by a few 1e-5: the gap is 0.2 % of the singular values."""
    U, V, M = (torch.linalg.qr(random(n, 60, 60, seed + n).B[:, :60])[0] for n in (150, 120, 60))
    x = LowRank((M.T @ V.T).float(), (U * torch.linspace(1, 0.9, 60).double() @ M).float())
    left, S, right = torch.linalg.svd(dense(x), full_matrices=False)
    best = (left[:, :20] * S[:20]) @ right[:20]
    assert float((dense(compress(x, 20)) - best).norm() / best.norm()) < 1.5e-5


def test_duplicate_clients_add_no_rank() -> None:
    x = random(20, 15, 3, 0, dtype=torch.float32)
    y = compress(stack([x] * 4))
    energy = y.B.norm(dim=0)
    assert y.rank == 12
    assert bool((energy[3:] <= 1e-5 * energy[0]).all())
    torch.testing.assert_close(delta(y), 4 * delta(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("split", ["energy", "balanced"])
def test_rounding_is_not_energy(split: str, dtype: torch.dtype) -> None:
    """Directions that are there by rounding only get no energy at all, and a row of A that can learn."""
    x = random(20, 15, 1, 0, dtype=dtype)
    y = compress(stack([x, x]), split=split)
    assert not y.B[:, 1].any()
    assert float(y.A[1].norm()) == pytest.approx(1.0)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("split", ["energy", "balanced"])
@pytest.mark.parametrize(("d_out", "d_in"), [(600, 500), (500, 600)])
def test_compress_never_forms_the_product(d_out: int, d_in: int, split: str) -> None:
    xs = [random(d_out, d_in, 10, seed, dtype=torch.float32) for seed in range(2)]
    with Largest() as largest:
        compress(stack(xs, [0.5, 0.5]), 8, split)
    assert 0 < largest.numel <= 20 * 600
    with Largest() as largest:
        norm(xs[0])
    assert largest.numel <= 10 * 600


# --- adapters


def test_nbytes_counts_the_named_factors() -> None:
    x = random(6, 10, 2, 0, dtype=torch.float32)
    assert [nbytes(x, f) for f in ("A", "B", "AB")] == [80, 48, 128]
    assert nbytes(LowRank(x.A.bfloat16(), x.B.bfloat16(), x.scale)) == 64
    adapter = Adapter({"l": x, "m": x}, {"head": torch.zeros(3, 5)})
    assert [nbytes(adapter, f) for f in ("A", "B", "AB")] == [220, 156, 316]
    assert nbytes(Adapter()) == 0


def test_combine_stacks_layers_and_lets_later_heads_win() -> None:
    x, y, z = random(4, 5, 2, 0, 2.0), random(4, 5, 3, 1, 0.5), random(6, 5, 1, 2, 3.0)
    both = combine([Adapter({"b": x, "a": z}, {"h": torch.zeros(1)}), Adapter({"b": y}, {"h": torch.ones(1)})])
    assert list(both.layers) == ["a", "b"]
    assert both.layers["a"] is z
    torch.testing.assert_close(delta(both.layers["b"]), dense(x) + dense(y))
    assert both.dense["h"].item() == 1.0
    assert combine([]) == Adapter()


WORDS = {
    "truncate": lambda x: truncate(x, 2),
    "tail": lambda x: tail(x, 2),
    "pad": lambda x: pad(x, 6, stream(0, "pad")),
    "overlay": lambda x: overlay(truncate(x, 1), x),
    "rescale": lambda x: rescale(x, 1.0, "both"),
    "mean": lambda x: mean([x, x], [1, 2]),
    "stack": lambda x: stack([x, x], [1, 2]),
    "compress": lambda x: compress(x, 2, "balanced"),
    "trim": trim,
    "norm": norm,
    "delta": delta,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("word", WORDS)
def test_no_word_writes_to_its_argument(word: str, dtype: torch.dtype) -> None:
    x = random(5, 6, 4, 0, scale=2.0, dtype=dtype)
    A, B = x.A.clone(), x.B.clone()
    WORDS[word](x)
    assert torch.equal(x.A, A)
    assert torch.equal(x.B, B)
