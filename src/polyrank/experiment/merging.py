"""Merging PEFT adapters of unequal ranks from disk, by any rule that needs no earlier state, without a base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from polyrank.core.compress import compress, compress_all
from polyrank.core.federate import absorb
from polyrank.core.lowrank import Adapter, LowRank, combine, pad, rescale, trim, truncate, zeros
from polyrank.core.method import Method
from polyrank.core.rng import stream
from polyrank.core.types import ServerState, Update
from polyrank.local import lokr
from polyrank.local.adapters import AdapterError, AdapterInfo, check_same_model, read_adapter


@dataclass(frozen=True)
class Merged:
    """Merged adapters.

    Attributes:
        state: the server's state after the round in which the adapters were the updates.
        info: what the first adapter's config says of the model.
        alpha: the alpha that all layers of all adapters share (scale = alpha / r) and that is kept, or None.
    """

    state: ServerState
    info: AdapterInfo
    alpha: float | None

    def whole(self, rank: int | None = None) -> Adapter:
        """The whole merged adapter, lossless, or its best approximation of `rank`."""
        held = self.state.adapter.layers
        layers = dict(self._total().layers)
        if rank is not None:
            layers = compress_all(layers, rank)
        elif self.state.folded.layers:
            # A fold stacks more rows than its rank: no weighted sum of the adapters exceeds the room the server has.
            layers = compress_all(layers, {name: held[name].rank for name in layers})
        return self._written({name: trim(x) for name, x in layers.items()})

    def client(self, rank: int) -> Adapter:
        """What a client of `rank` would be handed next: the first rows, or the best approximation where a rule folds.

        Rows that hold nothing start fresh, so that the client can train them.
        """
        cut = compress if self.state.folded.layers else truncate
        rng = stream(0, "merge", rank)
        layers = {name: trim(cut(x, rank)) for name, x in self._total().layers.items()}
        return self._written({name: pad(x, min(rank, *x.shape), rng) for name, x in layers.items()})

    def _total(self) -> Adapter:
        return combine([self.state.folded, self.state.adapter])

    def _written(self, layers: dict[str, LowRank]) -> Adapter:
        if self.alpha is not None:
            layers = {name: rescale(x, self.alpha / max(x.rank, 1)) for name, x in layers.items()}
        return Adapter(layers, self._total().dense)


def merge(folders: Sequence[Path], method: Method, weights: Sequence[float] | None = None) -> Merged:
    """One round in which the adapters in these folders are the updates.

    The server starts from zero with room for the sum of the ranks, so nothing is cut off: product-space rules keep
    their aggregate exactly.

    Args:
        folders: PEFT adapters of one model; layers may be missing from some.
        method: the rule and what becomes of dense parameters. A method that freezes A needs adapters that share it.
        weights: examples behind each adapter (default: one each).

    Raises:
        AdapterError: if a folder is no plain LoRA adapter, they are of different models, or the method trains LoKr.
    """
    read = [read_adapter(folder) for folder in folders]
    adapters = [adapter for adapter, _ in read]
    _check_form(folders, adapters, method)
    check_same_model(list(folders), adapters, [info for _, info in read])
    alpha, factors = _common_alpha(adapters), method.factors(0)
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
    return Merged(absorb(method, ServerState(0, Adapter(layers, dense)), updates, seed=0), read[0][1], alpha)


def _check_form(folders: Sequence[Path], adapters: Sequence[Adapter], method: Method) -> None:
    """LoKr's factors are averaged in a run; a mean of finished adapters' factors is not a mean of their updates."""
    for folder, adapter in zip(folders, adapters, strict=True):
        if lokr.grouped(adapter.dense):
            raise AdapterError(f"{folder}: a LoKr adapter; only LoRA adapters can be merged")
    if method.form == "lokr":
        raise AdapterError(
            "this method trains LoKr, and LoRA adapters are merged; choose another, for example flexlora"
        )


def _common_alpha(adapters: Sequence[Adapter]) -> float | None:
    alphas = [x.scale * x.rank for adapter in adapters for x in adapter.layers.values()]
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
