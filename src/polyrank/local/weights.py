"""An adapter written into a model's own weights, for a model that needs no adapter library.

Layer by layer and in place, so that memory stays near one model. Nothing in a run does this: there the base is never
written to.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polyrank.core.lowrank import Adapter, delta, precision
from polyrank.local import lokr
from polyrank.local.adapters import AdapterError
from polyrank.local.base import Base, transposed


def write_into(base: Base, adapter: Adapter, dtype: torch.dtype | None = None) -> nn.Module:
    """The base's model with the adapter in its weights, and its dense parameters in place of the model's.

        W <- W + scale * B A          W <- W + scale * kron(w1, w2)         (W^T in GPT-2's Conv1D)

    Sums are taken in at least float32, then rounded. Beside the model, memory holds a sum and its parts for one layer.

    Args:
        base: its model is changed and returned; the base must not be used any more.
        adapter: LoRA layers at any ranks, or LoKr's factors, and a trained head.
        dtype: of the weights; None: as the base has them.

    Raises:
        AdapterError: if the adapter has a layer or a parameter that the model has not, or of another shape.
    """
    kron, dense = lokr.grouped(adapter.dense), dict(base.model.named_parameters())
    with torch.no_grad():
        for name in [*adapter.layers, *kron]:
            if name not in base.modules:
                raise AdapterError(f"layer {name} is none of the model's modules: another model?")
            update = delta(adapter.layers[name]) if name in adapter.layers else kron[name].delta()
            _add(name, base.modules[name], update, dtype)
        for name, tensor in adapter.dense.items():
            if lokr.is_part(name):
                continue
            if name not in dense or dense[name].shape != tensor.shape:
                raise AdapterError(f"{name} {tuple(tensor.shape)} is no parameter of the model: another model?")
            dense[name].copy_(tensor)
    return base.model if dtype is None else base.model.to(dtype)


def _add(name: str, module: nn.Module, update: Tensor, dtype: torch.dtype | None) -> None:
    """One layer's update, added to its weight."""
    weight, update = module.weight, update.T if transposed(module) else update
    assert isinstance(weight, nn.Parameter)
    if weight.shape != update.shape:
        raise AdapterError(f"layer {name} is {tuple(update.shape)}, the model's is {tuple(weight.shape)}")
    total = update.to(weight.device, precision(weight, update)).add_(weight)
    if dtype is None or dtype == weight.dtype:
        weight.copy_(total)
    else:
        weight.data = total.to(dtype).contiguous()
