"""What a model's logits cost: the cross-entropy of an example's class, or of every next token that is asked for.

Labels of a batch are (b,), a class each, or (b, T), a token each in the place where it stands, and `IGNORED` where
nothing is asked: in prompts and padding. Position t predicts position t + 1, so nothing is asked of the first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from polyrank.data.causal import IGNORED


def asked(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The logits of what is asked, n x classes, in the order of examples and positions; the n labels; and where.

    Args:
        logits: b x classes, or b x T x vocabulary.
        labels: (b,), or (b, T).

    Returns:
        The third is b x (T - 1), true where the next token is asked; None where every example has one class.
    """
    labels = labels.to(logits.device)
    if labels.ndim == 1:
        return logits, labels, None
    following = labels[:, 1:]
    where = following != IGNORED
    return logits[:, :-1][where], following[where], where


def by_example(values: Tensor, where: Tensor | None) -> Tensor:
    """The sum of n values by example, (b,): `asked` says where they belong."""
    if where is None:
        return values
    return torch.zeros(where.shape, dtype=values.dtype, device=values.device).masked_scatter(where, values).sum(1)


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each example, summed over what is asked of it, (b,), in float32."""
    chosen, truth, where = asked(logits, labels)
    return by_example(F.cross_entropy(chosen.float(), truth, reduction="none"), where)
