"""What a model's logits cost: the cross-entropy of an example's class, or of every next token that is asked for.

Labels of a batch are (b,), a class each, or (b, T), a token each in the place where it stands, and `IGNORED` where
nothing is asked: in prompts and padding. Position t predicts position t + 1, so nothing is asked of the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyrank.data.causal import IGNORED


def asked(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The logits of what is asked, n x classes, in the order of examples and positions; the n labels; and where.

    Args:
        logits: b x classes, or b x T x vocabulary, or n x vocabulary, as a model under `asked_alone` makes them.
        labels: (b,), or (b, T).

    Returns:
        The third is b x (T - 1), true where the next token is asked; None where every example has one class.
    """
    labels = labels.to(logits.device)
    if labels.ndim == 1:
        return logits, labels, None
    following = labels[:, 1:]
    where = following != IGNORED
    return logits if logits.ndim == 2 else logits[:, :-1][where], following[where], where


@contextmanager
def asked_alone(output: nn.Module | None, labels: Tensor) -> Iterator[None]:
    """Until the context ends, the output layer sees only the positions whose next token is asked for.

    Logits are then n x vocabulary, and neither memory nor time goes into those of prompts and padding.

    Args:
        output: the layer that makes logits of hidden states, b x T x d; None: there is nothing to be done.
        labels: (b, T), or (b,), of which nothing is to be picked.
    """
    if output is None or labels.ndim == 1:
        yield
        return
    where = F.pad(labels[:, 1:] != IGNORED, (0, 1))

    def pick(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *others = inputs
        return hidden[where.to(hidden.device)], *others

    handle = output.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def by_example(values: Tensor, where: Tensor | None) -> Tensor:
    """The sum of n values by example, (b,): `asked` says where they belong."""
    if where is None:
        return values
    return torch.zeros(where.shape, dtype=values.dtype, device=values.device).masked_scatter(where, values).sum(1)


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each example, summed over what is asked of it, (b,), in float32."""
    chosen, truth, where = asked(logits, labels)
    return by_example(F.cross_entropy(chosen.float(), truth, reduction="none"), where)
