"""Counting what autograd keeps must not keep it."""

import gc
import weakref
from typing import Any

import torch
from torch import Tensor

from polyrank.local.measure import saved_tensors

seen: list[weakref.ref[Any]] = []


class Marked(torch.autograd.Function):
    """The same tensor, and a node of the graph that can be seen to be alive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        seen.append(weakref.ref(ctx))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients


def test_a_graph_that_was_counted_goes_when_nobody_holds_it() -> None:
    """An operation that saves its own result would hold itself, and with it the model, through what is packed."""
    x = torch.ones(1000, requires_grad=True)
    with saved_tensors([x]) as kept:
        Marked.apply(x).exp().sum()  # never run backward
    gc.collect()
    assert kept.nbytes == 4000
    assert seen[-1]() is None
