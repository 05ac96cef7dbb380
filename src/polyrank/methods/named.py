"""The published methods, each a composition of answers. What a method does not name is FedIT's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from polyrank.core.method import Method, Positive
from polyrank.core.types import TailPenalty
from polyrank.methods import dispatch, estimate, factors, importance
from polyrank.methods.aggregate import AGGREGATORS
from polyrank.methods.allocate.uniform import uniform


def fedit() -> Method:
    """FedIT: both factors trained, averaged by size (arXiv 2305.05644)."""
    return Method(
        estimate=estimate.fixed,
        score=importance.alike,
        allocate=uniform,
        dispatch=dispatch.truncate,
        factors=factors.both,
        aggregate=AGGREGATORS["fedit"],
    )


def ffa_lora() -> Method:
    """FFA-LoRA: A is random, shared and frozen; averaging B is exact (arXiv 2403.12313)."""
    return replace(fedit(), factors=factors.only_b, aggregate=partial(AGGREGATORS["fedit"], rows="zero"))


def rolora() -> Method:
    """RoLoRA: B and A in alternate rounds, so that every average is exact (arXiv 2409.02346)."""
    return replace(fedit(), factors=factors.alternating, aggregate=partial(AGGREGATORS["fedit"], rows="zero"))


def hetlora(*, penalty: float = 1e-3, decay: float = 0.99, prune: bool = True) -> Method:
    """HetLoRA: zero-padding weighted by update norms, tail penalty and rank self-pruning (arXiv 2401.06432).

    Args:
        penalty: the weight of the tail penalty in each client's loss.
        decay: the share of its rows that a client keeps when it prunes.
        prune: whether clients drop their tail rows where the penalty has shrunk them.
    """
    return replace(
        fedit(),
        aggregate=partial(AGGREGATORS["hetlora"], weights="norm", pruning=prune),
        penalty=TailPenalty(penalty, decay, prune),
    )


def hetlora_uniform() -> Method:
    """HetLoRA's zero-padding with equal weights, as a baseline (after arXiv 2401.06432)."""
    return replace(fedit(), aggregate=partial(AGGREGATORS["hetlora"], weights="uniform"), dense="uniform")


def hetlora_weighted() -> Method:
    """HetLoRA's zero-padding weighted by data size, as a baseline (after arXiv 2401.06432)."""
    return replace(fedit(), aggregate=partial(AGGREGATORS["hetlora"], weights="size"))


def rbla() -> Method:
    """RBLA: each rank level is averaged over the clients that own it (arXiv 2408.08699)."""
    return replace(fedit(), aggregate=AGGREGATORS["rbla"])


def flexlora() -> Method:
    """FlexLoRA: the exact mean of products, handed out by truncated SVD (arXiv 2402.11505)."""
    return replace(fedit(), aggregate=AGGREGATORS["flexlora"])


def flora() -> Method:
    """FLoRA: stacked updates folded into the model, fresh adapters every round (arXiv 2409.05976)."""
    return replace(fedit(), aggregate=AGGREGATORS["flora"])


def fedex_lora() -> Method:
    """FedEx-LoRA: FedIT, with its residual to the exact mean folded into the model (arXiv 2410.09432)."""
    aggregate = partial(AGGREGATORS["fedex_lora"], rows="keep", layers="keep")
    return replace(fedit(), dispatch=dispatch.whole, aggregate=aggregate, dense="uniform")


def rb_lora() -> Method:
    """RB-LoRA: rank levels weighted by who owns them, in product space (Findings of EACL 2026)."""
    return replace(fedit(), aggregate=AGGREGATORS["rb_lora"])


def lora_fair() -> Method:
    """LoRA-FAIR: FedIT, with B corrected towards the exact mean of products (arXiv 2411.14961)."""
    return replace(fedit(), aggregate=AGGREGATORS["lora_fair"])


def fedsvd() -> Method:
    """FedSVD: only B is trained and averaged, then A and B are re-factorised (arXiv 2505.12805)."""
    return replace(fedit(), factors=factors.only_b, aggregate=AGGREGATORS["fedsvd"])


def lokr(*, rank: Positive = 24) -> Method:
    """LoKr: Kronecker factors instead of low-rank ones, averaged by size, as a baseline (arXiv 2309.14859).

        delta = alpha / rank * kron(w1, w2)

    Every client that can afford anything trains all of it: there are no ranks to cut.

    Args:
        rank: r, which w2 is factored to where it is larger than 2 r on both sides; `lokr_shapes` has the rules.

    References:
        LoKr: arXiv 2309.14859. KronA: arXiv 2212.10650. As a federated baseline: HRALoRA.

    Note:
        HRALoRA's released code trains the head beside the factors and uploads the factors alone, so that clients learn
        for a head that the server never sees. Here the head is averaged or frozen, as for every method.
    """
    return replace(fedit(), form="lokr", rank=rank)


METHODS: dict[str, Callable[..., Method]] = {
    "fedex_lora": fedex_lora,
    "fedit": fedit,
    "fedsvd": fedsvd,
    "ffa_lora": ffa_lora,
    "flexlora": flexlora,
    "flora": flora,
    "hetlora": hetlora,
    "hetlora_uniform": hetlora_uniform,
    "hetlora_weighted": hetlora_weighted,
    "lokr": lokr,
    "lora_fair": lora_fair,
    "raflora": rb_lora,  # arXiv 2602.13486 equals RB-LoRA in product space
    "rb_lora": rb_lora,
    "rbla": rbla,
    "rolora": rolora,
}
