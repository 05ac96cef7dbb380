"""An adapter attached to a frozen model by forward hooks, at any rank per layer, without a trace afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyrank.core.lowrank import Adapter, Factors, LowRank
from polyrank.core.rng import torch_generator

Batch = Mapping[str, Tensor]
Forward = Callable[[Batch, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Attachment:
    """An adapter attached to a model: call it on a batch to get logits.

    Attributes:
        A, B: the low-rank factors by layer (leaves; they need gradients where the factor is trained).
        dense: the dense parameters by name, likewise.
        fixed: dense parameters that only run.
        scales: of the layers.
        forward: the model, called with a batch and the dense parameters to use.
    """

    A: dict[str, Tensor]
    B: dict[str, Tensor]
    dense: dict[str, Tensor]
    fixed: dict[str, Tensor]
    scales: dict[str, float]
    forward: Forward

    def __call__(self, batch: Batch) -> Tensor:
        return self.forward(batch, {**self.fixed, **self.dense})

    def parameters(self) -> list[Tensor]:
        """What an optimizer updates."""
        return [t for group in (self.A, self.B, self.dense) for t in group.values() if t.requires_grad]

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
    """
    trains = factors or ""
    live = Attachment(
        A={name: _leaf(x.A, device, "A" in trains) for name, x in adapter.layers.items()},
        B={name: _leaf(x.B, device, "B" in trains) for name, x in adapter.layers.items()},
        dense={name: _leaf(tensor, device, factors is not None) for name, tensor in adapter.dense.items()},
        fixed={name: tensor.to(device) for name, tensor in frozen.dense.items()},
        scales={name: x.scale for name, x in adapter.layers.items()},
        forward=forward,
    )
    masks = torch_generator(rng) if dropout and rng is not None else None
    handles = []
    for name in {**live.A, **frozen.layers}:
        held = frozen.layers.get(name)
        held = held and LowRank(_leaf(held.A, device), _leaf(held.B, device), held.scale)
        handles.append(modules[name].register_forward_hook(_hook(name, live, held, dropout, masks)))
    try:
        yield live
    finally:
        for handle in handles:
            handle.remove()


def _leaf(tensor: Tensor, device: torch.device, trained: bool = False) -> Tensor:
    # Row-major, whatever it was: products of other layouts round differently, and files and wires keep none.
    copy = tensor.detach().to(device, torch.float32, copy=True).contiguous()
    return copy.requires_grad_(trained)


def _hook(
    name: str, live: Attachment, held: LowRank | None, dropout: float, masks: torch.Generator | None
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """Adds the low-rank updates of one module, trained and held, to its output."""

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0].to(torch.float32)
        update = torch.zeros((), device=x.device)
        if held is not None:
            update = F.linear(F.linear(x, held.A), held.B) * held.scale
        if name in live.A:
            kept = x if masks is None else x * _keep(x, dropout, masks)
            update = update + F.linear(F.linear(kept, live.A[name]), live.B[name]) * live.scales[name]
        return output + update.to(output.dtype)

    return add


def _keep(x: Tensor, dropout: float, masks: torch.Generator) -> Tensor:
    # Drawn on the CPU from the client's own stream, so that devices and cohorts see the same mask.
    mask = torch.rand(x.shape, generator=masks) >= dropout
    return mask.to(x.device, x.dtype) / (1.0 - dropout)
