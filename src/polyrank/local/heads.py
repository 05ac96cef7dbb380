"""Modules that run parameters of every client's own: the trained head, where several clients train together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from polyrank.local.layout import Layout

Stacks = Mapping[str, Tensor]


class Stacked(Protocol):
    """What is attached to a model, as far as its heads see it."""

    @property
    def dense(self) -> Stacks: ...

    @property
    def examples(self) -> int: ...

    def layout(self, name: str) -> Layout: ...


def stackable(modules: Mapping[str, nn.Module], parameters: Iterable[str]) -> bool:
    """Whether the modules that own these parameters can run a stack of them."""
    return all(type(modules[owner]).__name__ in _FORWARD for owner in owners(parameters))


def owners(parameters: Iterable[str]) -> list[str]:
    """The modules that own these parameters, once each."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))


def stacked_forward(module: nn.Module, name: str, live: Stacked) -> Callable[[Tensor], Tensor]:
    """The forward pass of a module with stacks n x ... in place of some of its parameters.

    The examples of a batch come in n equal parts; each runs through its own parameters, and all through the module's
    own where there is no stack.

    Args:
        module: a linear layer or a layer normalisation.
        name: its full name.
        live: has the stacks, by full names of parameters; read at every call.
    """
    return partial(_in_parts, _FORWARD[type(module).__name__], module, name, live)


def _in_parts(forward: Callable[..., Tensor], module: nn.Module, name: str, live: Stacked, x: Tensor) -> Tensor:
    layout, stacks = live.layout(name), live.dense
    count = next(len(tensor) for parameter, tensor in stacks.items() if parameter.rpartition(".")[0] == name)
    y = forward(module, name, stacks, layout.parts(x, count, live.examples))
    return layout.whole(y, x.shape[:-1], live.examples)


def _linear(module: nn.Module, name: str, stacks: Stacks, rows: Tensor) -> Tensor:
    return _with_bias(rows @ _own(module, name, stacks, "weight", 2).mT, module, name, stacks)


def _conv1d(module: nn.Module, name: str, stacks: Stacks, rows: Tensor) -> Tensor:
    """GPT-2's linear layer, whose weight is d_in x d_out."""
    return _with_bias(rows @ _own(module, name, stacks, "weight", 2), module, name, stacks)


def _layer_norm(module: nn.LayerNorm, name: str, stacks: Stacks, rows: Tensor) -> Tensor:
    y = F.layer_norm(rows, module.normalized_shape, eps=module.eps) * _own(module, name, stacks, "weight", 1)
    return _with_bias(y, module, name, stacks)


_FORWARD: dict[str, Callable[..., Tensor]] = {"Linear": _linear, "Conv1D": _conv1d, "LayerNorm": _layer_norm}


def _own(module: nn.Module, name: str, stacks: Stacks, parameter: str, ndim: int) -> Tensor:
    """The stack of a parameter of `ndim` dimensions, or the module's own; a vector applies to every row of its part."""
    tensor = stacks.get(f"{name}.{parameter}", getattr(module, parameter))
    assert isinstance(tensor, Tensor)
    return tensor[:, None] if ndim == 1 and tensor.ndim == 2 else tensor


def _with_bias(y: Tensor, module: nn.Module, name: str, stacks: Stacks) -> Tensor:
    return y if module.bias is None else y + _own(module, name, stacks, "bias", 1)
