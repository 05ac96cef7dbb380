"""The published methods, each a composition of answers. What a method does not name is FedIT's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Annotated

from annotated_types import Ge

from polyrank.core.method import Aggregate, Allocate, Boost, Method, Positive, Score
from polyrank.core.types import TailPenalty
from polyrank.methods import dispatch, estimate, factors, importance
from polyrank.methods.aggregate import AGGREGATORS
from polyrank.methods.allocate.arithmetic import arithmetic
from polyrank.methods.allocate.geometric import Pattern, geometric, random_geometric
from polyrank.methods.allocate.random_layers import random_layers
from polyrank.methods.allocate.sampled import sampled
from polyrank.methods.allocate.split import Floor
from polyrank.methods.allocate.uniform import uniform

Rounds = Annotated[int, Ge(0)]
Step = Annotated[int, Ge(0)]


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


def trimmed_mean() -> Method:
    """The coordinate-wise trimmed mean of products, against some poisoned clients (arXiv 1803.01498)."""
    return _of_the_whole(AGGREGATORS["trimmed_mean"])


def median() -> Method:
    """The coordinate-wise median of products, against fewer than half poisoned clients (arXiv 1803.01498)."""
    return _of_the_whole(AGGREGATORS["median"])


def krum() -> Method:
    """Krum: the client whose model is closest to the others' (arXiv 1703.02757)."""
    return _of_the_whole(AGGREGATORS["krum"])


def norm_clipping() -> Method:
    """The exact mean of products, with every client's change clipped to the median norm (arXiv 1911.07963)."""
    return _of_the_whole(AGGREGATORS["norm_clipping"])


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


def hralora(
    *,
    rank: Positive | None = None,
    floor: Floor = 1,
    warmup: Rounds = 20,
    every: Positive = 20,
    multiplier: Positive = 1,
    samples: Positive = 100,
) -> Method:
    """HRALoRA: budgets from memory and links, spent on layers drawn by Fisher information (CCGrid 2026).

    Both factors are trained for `warmup` rounds on layers drawn uniformly; then B and A alternate, on layers that are
    drawn, and ranks that are given, by importance, anew every `every` rounds. Clients run the whole adapter and train
    the first rows of their layers. The server's mean is put back into singular order.

    Args:
        rank: the average rank of a layer that is trained: a client draws as many as its budget pays for; None: the
            server's rank.
        floor: the least rank of a layer that is trained.
        warmup: rounds of both factors, before importance is first measured.
        every: rounds from one measurement of importance to the next.
        multiplier: of all ranks in the warm-up. The published 2 spends twice the budget that a client can afford.
        samples: training examples that the server measures importance on.

    References:
        HRALoRA, CCGrid 2026 (github.com/UIUC-Cloud-Computing-Capstone/hralora).
    """
    return replace(
        fedit(),
        estimate=estimate.least,
        score=partial(importance.fisher, every=every, after=warmup, samples=samples),
        allocate=partial(sampled, rank=rank, floor=floor),
        dispatch=dispatch.whole,
        factors=partial(factors.warm_up, rounds=warmup) if warmup else factors.alternating,
        aggregate=AGGREGATORS["hralora"],
        hold=True,
        boost=Boost(warmup, multiplier) if multiplier > 1 else None,
    )


def fed_hello(
    *,
    pattern: Pattern = "bottleneck",
    groups: list[Positive] | None = None,
    rank: Positive | None = None,
    after: Rounds = 50,
    every: Positive = 50,
    samples: Positive = 100,
) -> Method:
    """Fed-HeLLo: layers drawn around a pattern, then by Fisher information (arXiv 2506.12213).

    RGD-HLA warm start, then FIM-HLA: importance is measured every `every` rounds and kept until the next.

    Args:
        pattern: of the warm start.
        groups: how many blocks each device group trains, for the pattern; None: a half, three quarters and all.
        rank: of every trained layer; None: the server's.
        after: rounds of the warm start.
        every: rounds from one measurement of importance to the next.
        samples: training examples that the server measures importance on.
    """
    drawn = partial(sampled, within="uniform", rank=rank, cap=rank, pattern=pattern, groups=groups)
    return replace(_layers_of_the_whole(drawn), score=_fisher(every, after, samples))


def gd_hla(*, pattern: Pattern = "bottleneck", rank: Positive | None = None) -> Method:
    """GD-HLA: fixed layers in a geometric pattern, as many as a client can afford (arXiv 2506.12213).

    Args:
        pattern: ``triangle``, ``inverted_triangle``, ``bottleneck`` or ``uniform``.
        rank: of every trained layer; None: the server's.
    """
    return _layers_of_the_whole(partial(geometric, pattern=pattern, rank=rank))


def rgd_hla(
    *, pattern: Pattern = "bottleneck", groups: list[Positive] | None = None, rank: Positive | None = None
) -> Method:
    """RGD-HLA: layers drawn around a geometric pattern, anew every round (arXiv 2506.12213).

    Args:
        pattern: ``triangle``, ``inverted_triangle``, ``bottleneck`` or ``uniform``.
        groups: how many blocks each device group trains; None: a half, three quarters and all.
        rank: of every trained layer; None: the server's.
    """
    return _layers_of_the_whole(partial(random_geometric, pattern=pattern, groups=groups, rank=rank))


def fim_hla(*, rank: Positive | None = None, every: Positive = 50, samples: Positive = 100) -> Method:
    """FIM-HLA: layers drawn by Fisher information from the first round on (arXiv 2506.12213).

    Args:
        rank: of every trained layer; None: the server's.
        every: rounds from one measurement of importance to the next.
        samples: training examples that the server measures importance on.
    """
    drawn = partial(sampled, within="uniform", rank=rank, cap=rank)
    return replace(_layers_of_the_whole(drawn), score=_fisher(every, 0, samples))


def fedra(*, rank: Positive | None = None) -> Method:
    """FedRA: layers drawn uniformly, anew every round (arXiv 2311.11227).

    Args:
        rank: of every trained layer; None: the server's.
    """
    return _layers_of_the_whole(partial(random_layers, rank=rank))


def legend(*, base: Positive = 1, step: Step = 1) -> Method:
    """LEGEND: ranks that grow with depth, on the deepest layers a client can afford (arXiv 2412.20004).

    Args:
        base: the rank of the first layer.
        step: how much the rank grows from layer to layer.
    """
    return _layers_of_the_whole(partial(arithmetic, base=base, step=step))


def straggler() -> Method:
    """FedIT with the weakest client's budget for everybody, a baseline of HRALoRA.

    References:
        HRALoRA, CCGrid 2026 (github.com/UIUC-Cloud-Computing-Capstone/hralora).
    """
    return replace(fedit(), estimate=estimate.straggler)


def exclusive() -> Method:
    """FedIT with only those clients that can afford the full rank, a baseline of HRALoRA.

    References:
        HRALoRA, CCGrid 2026 (github.com/UIUC-Cloud-Computing-Capstone/hralora).
    """
    return replace(fedit(), estimate=estimate.exclusive)


def _of_the_whole(aggregate: Aggregate) -> Method:
    """Clients run the whole adapter: what one does not train is the server's, as the robust rules have it."""
    return replace(fedit(), dispatch=dispatch.whole, aggregate=aggregate)


def _layers_of_the_whole(allocate: Allocate) -> Method:
    """Clients run the whole adapter and train some of its layers; each layer is averaged over those that trained it."""
    return replace(fedit(), allocate=allocate, dispatch=dispatch.whole)


def _fisher(every: int, after: int, samples: int) -> Score:
    return partial(importance.fisher, every=every, after=after, samples=samples)


METHODS: dict[str, Callable[..., Method]] = {
    "exclusive": exclusive,
    "fed_hello": fed_hello,
    "fedex_lora": fedex_lora,
    "fedit": fedit,
    "fedra": fedra,
    "fedsvd": fedsvd,
    "ffa_lora": ffa_lora,
    "fim_hla": fim_hla,
    "flexlora": flexlora,
    "flora": flora,
    "gd_hla": gd_hla,
    "hetlora": hetlora,
    "hetlora_uniform": hetlora_uniform,
    "hetlora_weighted": hetlora_weighted,
    "hralora": hralora,
    "krum": krum,
    "legend": legend,
    "lokr": lokr,
    "lora_fair": lora_fair,
    "median": median,
    "norm_clipping": norm_clipping,
    "raflora": rb_lora,  # arXiv 2602.13486 equals RB-LoRA in product space
    "rb_lora": rb_lora,
    "rbla": rbla,
    "rgd_hla": rgd_hla,
    "rolora": rolora,
    "straggler": straggler,
    "trimmed_mean": trimmed_mean,
}
