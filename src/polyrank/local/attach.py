"""An adapter attached to a frozen model by forward hooks, at any rank per layer, without a trace afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from polyrank.core.lowrank import Adapter, Factors, LowRank
from polyrank.local import lokr

Batch = Mapping[str, Tensor]
Forward = Callable[[Batch, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Attachment:
    """An adapter attached to a model: call it on a batch to get logits.

    Attributes:
        A, B: the low-rank factors by layer (leaves; they need gradients where the factor is trained). With copies,
            A is b x r x d_in and B is b x d_out x r, and row i of a batch runs through copy i.
        dense: the dense parameters by name, likewise; LoKr's factors are among them.
        fixed: dense parameters that only run.
        frozen: low-rank layers that only run.
        scales: of the layers.
        forward: the model, called with a batch and the dense parameters of its own to use.
    """

    A: dict[str, Tensor]
    B: dict[str, Tensor]
    dense: dict[str, Tensor]
    fixed: dict[str, Tensor]
    frozen: dict[str, LowRank]
    scales: dict[str, float]
    forward: Forward

    def __call__(self, batch: Batch) -> Tensor:
        return self.forward(batch, {n: t for n, t in {**self.fixed, **self.dense}.items() if not lokr.is_part(n)})

    def parameters(self) -> list[Tensor]:
        """What an optimizer updates."""
        return [t for group in (self.A, self.B, self.dense) for t in group.values() if t.requires_grad]

    def tensors(self) -> list[Tensor]:
        """All that is held beside the base: trained, frozen and fixed."""
        frozen = [t for layer in self.frozen.values() for t in (layer.A, layer.B)]
        return [*self.A.values(), *self.B.values(), *self.dense.values(), *self.fixed.values(), *frozen]

    def adapter(self) -> Adapter:
        """The current values, detached, on the CPU."""
        layers = {
            name: LowRank(self.A[name].detach().cpu(), self.B[name].detach().cpu(), self.scales[name])
            for name in self.A
        }
        return Adapter(layers, {name: tensor.detach().cpu() for name, tensor in self.dense.items()})


@contextmanager
def attached(
    modules: Mapping[str, nn.Module],
    forward: Forward,
    device: torch.device,
    adapter: Adapter,
    frozen: Adapter,
    factors: Factors | None,
    dropout: float = 0.0,
    rng: np.random.Generator | None = None,
    blocks: Sequence[nn.Module] = (),
    copies: int | None = None,
) -> Iterator[Attachment]:
    """Attaches `adapter` in training and `frozen` beside it, until the context ends.

    Args:
        modules: the model's modules by name.
        forward: the model, called with a batch and the dense parameters to use instead of its own.
        device: where the model is.
        adapter: layers at any ranks and dense parameters; their tensors are copied, never written to.
        frozen: layers and dense parameters that only run.
        factors: the factors that need gradients, with the dense parameters; None: nothing does.
        dropout: probability that an input element of A is dropped.
        rng: draws the dropout masks.
        blocks: transformer blocks that keep their inputs only and run again in the backward pass.
        copies: a copy of every layer of `adapter` for each of so many examples, so that one backward pass leaves the
            gradient of each; None: one for all.
    """
    trains = factors or ""
    live = Attachment(
        A={name: _leaf(x.A, device, "A" in trains, copies) for name, x in adapter.layers.items()},
        B={name: _leaf(x.B, device, "B" in trains, copies) for name, x in adapter.layers.items()},
        dense={name: _leaf(tensor, device, factors is not None) for name, tensor in adapter.dense.items()},
        fixed={name: tensor.to(device) for name, tensor in frozen.dense.items()},
        frozen={n: LowRank(_leaf(x.A, device), _leaf(x.B, device), x.scale) for n, x in frozen.layers.items()},
        scales={name: x.scale for name, x in adapter.layers.items()},
        forward=forward,
    )
    masks = _Masks(dropout, int(rng.integers(2**63 - 1))) if dropout and rng is not None else None
    if masks is not None:
        live = replace(live, forward=masks.counted(forward))
    kron = lokr.grouped({**live.fixed, **live.dense})
    handles = []
    for name in {**live.A, **live.frozen, **kron}:
        handles.append(modules[name].register_forward_hook(_hook(name, live, kron.get(name), masks)))
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield live
    finally:
        for block in blocks:
            del block.forward
        for handle in handles:
            handle.remove()


def _leaf(tensor: Tensor, device: torch.device, trained: bool = False, copies: int | None = None) -> Tensor:
    # Row-major, whatever it was: products of other layouts round differently, and files and wires keep none.
    copy = tensor.detach().to(device, torch.float32, copy=True).contiguous()
    return (copy if copies is None else copy.expand(copies, *copy.shape)).requires_grad_(trained)


def _product(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """B (A x) of every position, with one A and B for all examples or one for each."""
    if A.ndim == 2:
        return F.linear(F.linear(x, A), B)
    # Positions of an example side by side; a pooler sees one an example, and some models flatten (b, T, d) themselves.
    rows = x.reshape(A.shape[0], -1, x.shape[-1])
    return (rows @ A.mT @ B.mT).reshape(*x.shape[:-1], B.shape[1])


def _hook(
    name: str, live: Attachment, kron: lokr.LoKr | None, masks: _Masks | None
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """Adds the updates of one module, trained and held, to its output. Dropout is LoRA's: LoKr has none."""

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0].to(torch.float32)
        update = torch.zeros((), device=x.device)
        held = live.frozen.get(name)
        if held is not None:
            update = F.linear(F.linear(x, held.A), held.B) * held.scale
        if kron is not None:
            update = update + kron(x)
        if name in live.A:
            scale = live.scales[name]
            if masks is not None:
                x, scale = masks.drop(name, x), scale / (1.0 - masks.probability)
            update = update + _product(x, live.A[name], live.B[name]) * scale
        return output + update.to(output.dtype)

    return add


class _Masks:
    """Dropout masks that depend on the client's stream, the forward pass and the module, and on nothing else.

    A block that runs again in the backward pass meets the masks it met before. They are drawn on the CPU, so that all
    devices see the same ones, and kept as one byte per element.
    """

    def __init__(self, probability: float, seed: int) -> None:
        self.probability, self.seed, self.calls = probability, seed, 0

    def counted(self, forward: Forward) -> Forward:
        """`forward`, with every call meeting new masks."""

        def call(batch: Batch, dense: Mapping[str, Tensor]) -> Tensor:
            self.calls += 1
            return forward(batch, dense)

        return call

    def drop(self, name: str, x: Tensor) -> Tensor:
        """`x` with dropped elements zero; what is kept is not scaled."""
        digest = hashlib.blake2b(f"{self.seed}/{self.calls}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        dropped = torch.rand(x.shape, generator=generator) < self.probability
        return x.masked_fill(dropped.to(x.device), 0.0)
