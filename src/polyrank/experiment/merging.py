"""Merging PEFT adapters of unequal ranks from disk, by any rule that needs no earlier state, without a base model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from polyrank.core.federate import absorb
from polyrank.core.lowrank import Adapter, LowRank, combine, compress, rescale, trim, truncate, zeros
from polyrank.core.method import Method
from polyrank.core.types import ServerState, Update
from polyrank.local.adapters import AdapterError, AdapterInfo, check_same_model, read_adapter


def merge(
    folders: Sequence[Path], method: Method, weights: Sequence[float] | None = None
) -> tuple[ServerState, AdapterInfo]:
    """The state after one round in which these adapters were the updates.

    The server starts from zero with room for the sum of the ranks, so nothing is cut off: product-space rules keep
    their aggregate exactly.

    Args:
        folders: PEFT adapters of one model; layers may be missing from some.
        method: the rule and what becomes of dense parameters. A method that freezes A needs adapters that share it.
        weights: examples behind each adapter (default: one each).

    Raises:
        AdapterError: if a folder is no plain LoRA adapter, or they are of different models.
    """
    read = [read_adapter(folder) for folder in folders]
    adapters = [adapter for adapter, _ in read]
    check_same_model(list(folders), adapters, [info for _, info in read])
    factors = method.factors(0)
    names = sorted({name for adapter in adapters for name in adapter.layers})
    layers = {name: _server(name, [a.layers[name] for a in adapters if name in a.layers], factors) for name in names}
    dense: dict[str, torch.Tensor] = {}
    for adapter in reversed(adapters):
        dense.update(adapter.dense)
    if factors == "B":  # A is shared as it is: scales go into B
        adapters = [Adapter({n: rescale(x, 1.0) for n, x in a.layers.items()}, a.dense) for a in adapters]
    examples = [1.0] * len(adapters) if weights is None else weights
    updates = (
        Update(f"{index:06d}", adapter, count, factors)
        for index, (adapter, count) in enumerate(zip(adapters, examples, strict=True))
    )
    state = absorb(method, ServerState(0, Adapter(layers, dense)), updates, seed=0)
    return state, read[0][1]


def merged(state: ServerState, alpha: float | None, rank: int | None = None) -> Adapter:
    """The whole merged adapter, lossless, or its best approximation of `rank`."""
    total = combine([state.folded, state.adapter])
    layers = {name: x if rank is None else compress(x, rank) for name, x in total.layers.items()}
    if (
        rank is None and state.folded.layers
    ):  # no weighted sum of the inputs has a rank above the server's room for them
        layers = {name: compress(x, state.adapter.layers[name].rank) for name, x in layers.items()}
    return Adapter({name: _with_alpha(trim(x), alpha) for name, x in layers.items()}, total.dense)


def for_client(state: ServerState, alpha: float | None, rank: int) -> Adapter:
    """What a client of `rank` would be handed next: the first rows, or the best approximation where the rule folds."""
    total = combine([state.folded, state.adapter])
    cut = compress if state.folded.layers else truncate
    return Adapter({name: _with_alpha(cut(x, rank), alpha) for name, x in total.layers.items()}, total.dense)


def common_alpha(folders: Sequence[Path]) -> float | None:
    """The alpha that all layers of all adapters share (scale = alpha / r), or None."""
    alphas = {x.scale * x.rank for folder in folders for x in read_adapter(folder)[0].layers.values()}
    low, high = min(alphas, default=0.0), max(alphas, default=0.0)
    return high if high and (high - low) < 1e-9 * high else None


def _server(name: str, xs: list[LowRank], factors: str) -> LowRank:
    """The server's layer before the merge: zero, or the shared A of a method that trains B alone."""
    shape = xs[0].shape
    if factors == "AB":
        return zeros(shape, min(sum(x.rank for x in xs), *shape), dtype=xs[0].A.dtype)
    longest = max(xs, key=lambda x: x.rank)
    if not all(torch.equal(x.A, longest.A[: x.rank]) for x in xs):
        raise AdapterError(
            f"layer {name}: this method averages B under one shared A, but the adapters' A differ; "
            "choose a method that trains both factors, for example flexlora or rb_lora"
        )
    return LowRank(longest.A, torch.zeros_like(longest.B), 1.0)


def _with_alpha(x: LowRank, alpha: float | None) -> LowRank:
    return rescale(x, alpha / x.rank) if alpha and x.rank else x
