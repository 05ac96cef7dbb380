"""Adapters attached to a frozen model by forward hooks, at any rank per layer, without a trace afterwards.

A tensor with one dimension more than its kind has is a stack: of a copy per example, or of a tensor per client. The
examples of a batch then come in as many equal parts, and each part runs through its own. Where a module's input has
them is its layout (`polyrank.local.layout`), which the model is asked for (`polyrank.local.probe`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from polyrank.core.lowrank import Adapter, Factors, LowRank
from polyrank.local import heads, lokr
from polyrank.local.layout import BATCH_FIRST, Layout

Batch = Mapping[str, Tensor]
Forward = Callable[[Batch, Mapping[str, Tensor]], Tensor]
Scale = float | Tensor


class Layer(NamedTuple):
    """A low-rank layer on the model's device, or n of them: A (n x) r x d_in, B (n x) d_out x r, scale (n x 1 x 1)."""

    A: Tensor
    B: Tensor
    scale: Scale


@dataclass
class Attachment:
    """An adapter attached to a model: call it on a batch to get logits.

    Attributes:
        forward: the model, called with a batch and the dense parameters to use instead of its own.
        A, B: the low-rank factors by layer, or stacks of them; they need gradients where the factor is trained.
        scales: of the layers.
        dense: the dense parameters by name, likewise; LoKr's factors are among them.
        fixed: dense parameters that only run.
        frozen: low-rank layers that only run.
        stacked: whether `dense` are stacks; the modules that own them run them then.
        kron: the LoKr layers among the dense parameters.
        layouts: of the modules that are not batch-first.
        examples: of the batch that runs now.
    """

    forward: Forward
    A: dict[str, Tensor] = field(default_factory=dict)
    B: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Scale] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)
    fixed: dict[str, Tensor] = field(default_factory=dict)
    frozen: dict[str, Layer] = field(default_factory=dict)
    stacked: bool = False
    kron: dict[str, lokr.LoKr] = field(default_factory=dict)
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    examples: int = 0

    def settle(self) -> Attachment:
        """Has the LoKr layers follow the dense parameters, after these have been set."""
        self.kron = lokr.grouped({**self.fixed, **self.dense}, self.stacked)
        return self

    def __call__(self, batch: Batch) -> Tensor:
        self.examples = len(next(iter(batch.values())))
        own = self.fixed if self.stacked else {**self.fixed, **self.dense}
        return self.forward(batch, {name: tensor for name, tensor in own.items() if not lokr.is_part(name)})

    def layout(self, name: str) -> Layout:
        """Where a module's input has the examples of a batch."""
        return self.layouts.get(name, BATCH_FIRST)

    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return [t for group in (self.A, self.B, self.dense) for t in group.values() if t.requires_grad]

    def tensors(self) -> list[Tensor]:
        """All that is held beside the base: trained, frozen and fixed."""
        frozen = [t for layer in self.frozen.values() for t in (layer.A, layer.B)]
        return [*self.A.values(), *self.B.values(), *self.dense.values(), *self.fixed.values(), *frozen]


def attachment(
    forward: Forward,
    device: torch.device,
    adapter: Adapter,
    frozen: Adapter,
    factors: Factors | None,
    copies: int | None = None,
    layouts: Mapping[str, Layout] | None = None,
) -> Attachment:
    """`adapter` in training and `frozen` beside it, as tensors of their own on the model's device.

    Args:
        forward: the model.
        device: where it is.
        adapter: layers at any ranks and dense parameters; their tensors are copied, never written to.
        frozen: layers and dense parameters that only run.
        factors: the factors that need gradients, with the dense parameters; None: nothing does.
        copies: a copy of every layer of `adapter` for each of so many examples, so that one backward pass leaves the
            gradient of each; None: one for all.
        layouts: of the modules that are not batch-first.
    """
    trains = factors or ""

    def copied(tensor: Tensor, trained: bool) -> Tensor:
        own = leaf(tensor, device)
        return (own if copies is None else own.expand(copies, *own.shape)).requires_grad_(trained)

    return Attachment(
        forward,
        A={name: copied(x.A, "A" in trains) for name, x in adapter.layers.items()},
        B={name: copied(x.B, "B" in trains) for name, x in adapter.layers.items()},
        scales={name: x.scale for name, x in adapter.layers.items()},
        dense={name: leaf(t, device).requires_grad_(factors is not None) for name, t in adapter.dense.items()},
        fixed={name: tensor.to(device) for name, tensor in frozen.dense.items()},
        frozen={name: on_device(x, device) for name, x in frozen.layers.items()},
        layouts=layouts or {},
    ).settle()


def leaf(tensor: Tensor, device: torch.device) -> Tensor:
    """A float32 copy. Row-major, whatever it was: products of other layouts round differently, and files keep none."""
    return tensor.detach().to(device, torch.float32, copy=True).contiguous()


def on_device(x: LowRank, device: torch.device) -> Layer:
    """A layer that only runs."""
    return Layer(leaf(x.A, device), leaf(x.B, device), x.scale)


@contextmanager
def hooked(
    live: Attachment, modules: Mapping[str, nn.Module], masks: Masks | None = None, blocks: Sequence[nn.Module] = ()
) -> Iterator[Attachment]:
    """The attachment at work in the model, until the context ends.

    Args:
        live: what is attached; what its dictionaries hold may change meanwhile.
        modules: the model's modules by name.
        masks: dropout on the input of A.
        blocks: transformer blocks that keep their inputs only and run again in the backward pass.
    """
    names = {**live.A, **live.frozen, **live.kron}
    hooks = {name: _hook(name, live, masks) for name in names}
    handles = [modules[name].register_forward_hook(hook, with_kwargs=True) for name, hook in hooks.items()]
    replaced: dict[nn.Module, Callable[..., Any]] = {block: _run_again(block.forward) for block in blocks}
    if live.stacked:
        owners = heads.owners(name for name in live.dense if not lokr.is_part(name))
        replaced |= {modules[name]: heads.stacked_forward(modules[name], name, live) for name in owners}
    for module, forward in replaced.items():
        module.forward = forward
    try:
        yield live
    finally:
        for module in replaced:
            del module.forward
        for handle in handles:
            handle.remove()


def _run_again(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A block's forward pass that keeps its inputs only.

    Some models hand their blocks a cache whatever their config says (XLM, the decoder of T5). A block that runs again
    would add to it again, and nothing here generates: it gets none.
    """

    def without(value: Any) -> Any:
        return None if hasattr(value, "get_seq_length") else value

    def run(*args: Any, **kwargs: Any) -> Any:
        given = {key: without(value) for key, value in kwargs.items()}
        return checkpoint(forward, *map(without, args), use_reentrant=False, preserve_rng_state=False, **given)

    return run


def _hook(
    name: str, live: Attachment, masks: Masks | None
) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], Tensor]:
    """Adds the updates of one module, trained and held, to its output. Dropout is LoRA's: LoKr has none."""
    layout = live.layout(name)

    def add(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
        x = (args or tuple(kwargs.values()))[0].to(torch.float32)
        updates = []
        if name in live.frozen:
            updates.append(_update(x, live.frozen[name], layout, live.examples))
        if name in live.kron:
            updates.append(live.kron[name](x, layout, live.examples))
        if name in live.A:
            scale = live.scales[name]
            if masks is not None:
                x, scale = masks.drop(name, x, layout), scale / (1.0 - masks.probability)
            updates.append(_update(x, Layer(live.A[name], live.B[name], scale), layout, live.examples))
        return output + reduce(torch.add, updates).to(output.dtype)

    return add


def _update(x: Tensor, layer: Layer, layout: Layout, examples: int) -> Tensor:
    """``scale * B (A x)`` of every position."""
    A, B, scale = layer
    if A.ndim == 2:
        return F.linear(F.linear(x, A), B) * scale
    # Positions of a part side by side; a pooler sees one an example, and some models flatten (b, T, d) themselves.
    parts = layout.parts(x, len(A), examples)
    return layout.whole(parts @ A.mT @ B.mT * scale, x.shape[:-1], examples)


class Masks:
    """Dropout masks that depend on a client's stream, its forward pass and the module, and on nothing else.

    A block that runs again in the backward pass meets the masks it met before, and a client that trains together with
    others those it would meet alone. They are drawn on the CPU, so that all devices see the same ones, and kept as one
    byte per element.

    Args:
        probability: that an element is dropped.
        seeds: of each client's masks; for several clients, the rows of a batch come in as many equal parts.
    """

    def __init__(self, probability: float, seeds: Sequence[int]) -> None:
        self.probability, self.seeds = probability, seeds
        self.calls = [0] * len(seeds)
        self.rows: Sequence[int] = ()
        self.positions: Sequence[int] = ()
        self.width = 0

    def counted(self, forward: Forward) -> Forward:
        """`forward` for one client, with every call meeting new masks."""

        def call(batch: Batch, dense: Mapping[str, Tensor]) -> Tensor:
            self.meet([1])
            return forward(batch, dense)

        return call

    def meet(self, rows: Sequence[int], positions: Sequence[int] = (), width: int = 0) -> None:
        """Begins a forward pass.

        Args:
            rows: for each client that takes part (the first ones), the rows of its part that a batch of its own would
                have; without any, it has no batch in this pass. Parts are as long as the largest.
            positions: likewise the positions of its rows, where they are filled up.
            width: the positions that they are filled up to.
        """
        self.rows, self.positions, self.width = rows, positions, width
        for client, count in enumerate(rows):
            self.calls[client] += count > 0

    def drop(self, name: str, x: Tensor, layout: Layout = BATCH_FIRST) -> Tensor:
        """`x` with dropped elements zero; what is kept is not scaled."""
        dropped = torch.zeros(x.shape, dtype=torch.bool)
        for client, own in enumerate(self._parts(dropped, layout)):
            path = f"{self.seeds[client]}/{self.calls[client]}/{name}"
            digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            own.copy_(torch.rand(own.shape, generator=generator) < self.probability)
        return x.masked_fill(dropped.to(x.device), 0.0)

    def _parts(self, mask: Tensor, layout: Layout) -> Iterator[Tensor]:
        """Each client's elements of a mask, without those that only fill up its part."""
        if len(self.rows) < 2:
            yield mask
            return
        parts, longest = len(self.rows), max(self.rows)
        examples_at = layout.axis if layout.outer else layout.axis + 1
        for client, count in enumerate(self.rows):
            own = layout.group(mask, client, parts, count, parts * longest)
            # A module that sees one position of an example has none to leave out.
            filled = [a for a, size in enumerate(own.shape[:-1]) if size == self.width and a != examples_at]
            yield own.narrow(filled[0], 0, self.positions[client]) if self.positions and filled else own
