"""Merging PEFT adapters of unequal ranks from disk, by any rule that needs no earlier state, without a base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from polyrank.core.compress import compress, compress_all
from polyrank.core.federate import absorb
from polyrank.core.lowrank import Adapter, LowRank, combine, delta, pad, rescale, trim, truncate, zeros
from polyrank.core.method import Method
from polyrank.core.rng import stream
from polyrank.core.types import ServerState, Update
from polyrank.experiment.config import ConfigError
from polyrank.local.adapters import AdapterError, AdapterInfo
from polyrank.local.peft_config import few
from polyrank.local.same_model import Adapters, read_adapters


@dataclass(frozen=True)
class Merged:
    """Merged adapters.

    Attributes:
        state: the server's state after the round in which the adapters were the updates.
        info: what the adapters' configs say of the model.
        alpha: the alpha that all layers of all adapters share (scale = alpha / r) and that is kept, or None.
        notes: what is to be known of the result, each a sentence: what was not used, or counts as zero.
    """

    state: ServerState
    info: AdapterInfo
    alpha: float | None
    notes: tuple[str, ...] = ()

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


def merge(
    folders: Sequence[Path], method: Method, weights: Sequence[float] | None = None, base: str | None = None
) -> Merged:
    """One round in which the adapters in these folders are the updates.

    The server starts from zero with room for the sum of the ranks, so nothing is cut off: product-space rules keep
    their aggregate exactly.

    Args:
        folders: PEFT adapters of one model; layers may be missing from some.
        method: the rule and what becomes of dense parameters. A method that freezes A needs adapters that share it.
        weights: examples behind each adapter (default: one each).
        base: the name of the base of all of them, whatever their configs say.

    Raises:
        AdapterError: if a folder is no plain LoRA adapter, they are of different models, or the method trains LoKr.
        ConfigError: if all weights are zero.
    """
    if method.form == "lokr":  # in a run LoKr's factors are averaged; a mean of factors is not a mean of updates
        raise AdapterError(
            "this method trains LoKr, and LoRA adapters are merged; choose another, for example flexlora"
        )
    if weights is not None and not any(weights):
        raise ConfigError("--weights: all are zero; leave --weights out, and all adapters weigh the same")
    read = read_adapters(folders, base)
    examples = [1.0] * len(folders) if weights is None else list(weights)
    state = _absorbed(read.adapters, method, examples)
    notes = _notes(read, method, examples, state)
    return Merged(state, read.info, _common_alpha(read.adapters), notes)


def crowded(merged: Merged, rank: int | None, client_ranks: Sequence[int]) -> list[str]:
    """Notes of ranks that some layers have no room for."""
    rooms = [min(x.shape) for x in merged.state.adapter.layers.values()]
    named = [("--rank", rank)] * (rank is not None) + [("--client-ranks", each) for each in client_ranks]
    return [
        f"{option} {each}: {sum(room < each for room in rooms)} of {len(rooms)} layers have room for less, "
        f"{min(rooms)} the smallest"
        for option, each in named
        if each is not None and rooms and each > min(rooms)
    ]


def _absorbed(adapters: Sequence[Adapter], method: Method, examples: Sequence[float]) -> ServerState:
    """The server's state after a round of these updates, from zero."""
    factors = method.factors(0)
    names = sorted({name for adapter in adapters for name in adapter.layers})
    layers = {name: _server(name, [a.layers[name] for a in adapters if name in a.layers], factors) for name in names}
    dense: dict[str, torch.Tensor] = {}
    for adapter in reversed(adapters):
        dense.update(adapter.dense)
    if factors == "B":  # A is shared as it is: scales go into B
        adapters = [Adapter({n: rescale(x, 1.0) for n, x in a.layers.items()}, a.dense) for a in adapters]
    updates = (
        Update(f"{index:06d}", adapter, count, factors)
        for index, (adapter, count) in enumerate(zip(adapters, examples, strict=True))
    )
    return absorb(method, ServerState(0, Adapter(layers, dense)), updates, seed=0)


def _notes(read: Adapters, method: Method, examples: Sequence[float], state: ServerState) -> tuple[str, ...]:
    """What the merge did with these adapters that a user may not expect."""
    notes = []
    for folder, names in read.names.items():
        for name, to in list(names.items())[:1]:
            more = f", and {len(names) - 1} more names likewise" if len(names) > 1 else ""
            notes.append(f"{folder}: {name} is read as {to}{more}")
    layers, dense = _weighs(method, examples)
    saved = list(dict.fromkeys(name for adapter in read.adapters for name in adapter.dense))
    if len(set(examples)) > 1 and not layers:
        use = f"used for {few(saved)} alone" if saved and dense else "not used"
        notes.append(f"--weights: {use}: this rule weighs the layers of all adapters alike")
    else:
        nothing = [folder for folder, count in zip(read.folders, examples, strict=True) if not count]
        notes += [f"{folder}: has weight 0, so it counts for nothing" for folder in nothing]
    notes += _lacking(read, method)
    total = combine([state.folded, state.adapter]).layers
    if empty := [name for name, x in total.items() if not trim(x).rank]:
        notes.append(f"zero in the merged adapter, and left out of its file: {few(empty)}")
    return tuple(notes)


def _lacking(read: Adapters, method: Method) -> list[str]:
    """Which adapters lack layers or dense parameters that others have, and what they count as there."""
    notes = []
    layers = list(dict.fromkeys(name for adapter in read.adapters for name in adapter.layers))
    dense = list(dict.fromkeys(name for adapter in read.adapters for name in adapter.dense))
    for folder, adapter in zip(read.folders, read.adapters, strict=True):
        if lack := [name for name in layers if name not in adapter.layers]:
            how = "counts as zero there" if _counts_as_zero(method, len(read.adapters)) else "the others alone decide"
            notes.append(f"{folder}: lacks {len(lack)} of {len(layers)} layers ({few(lack)}); {how}")
        if lack := [name for name in dense if name not in adapter.dense]:
            notes.append(f"{folder}: lacks {few(lack)}; the others alone decide")
    return notes


def _weighs(method: Method, examples: Sequence[float]) -> tuple[bool, bool]:
    """Whether layers, and dense parameters, depend on the weights; tried on small adapters."""
    shared = torch.eye(2, 4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    B = torch.randn(len(examples), 4, 2, generator=generator, dtype=torch.float64)
    adapters = [Adapter({"x": LowRank(shared, each)}, {"h": each}) for each in B]
    one, other = (_tried(adapters, method, counts) for counts in (examples, [1.0] * len(examples)))
    return not torch.allclose(delta(one.layers["x"]), delta(other.layers["x"])), not torch.allclose(
        one.dense["h"], other.dense["h"]
    )


def _counts_as_zero(method: Method, count: int) -> bool:
    """Whether an adapter that lacks a layer counts as one that holds zeros, tried on small adapters that are alike."""
    x = LowRank(torch.eye(1, 4, dtype=torch.float64), torch.ones(4, 1, dtype=torch.float64))
    adapters = [Adapter({"x": x, "y": x}) for _ in range(count - 1)] + [Adapter({"y": x})]
    return not torch.allclose(delta(_tried(adapters, method, [1.0] * count).layers["x"]), delta(x))


def _tried(adapters: Sequence[Adapter], method: Method, examples: Sequence[float]) -> Adapter:
    state = _absorbed(adapters, method, examples)
    return combine([state.folded, state.adapter])


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
