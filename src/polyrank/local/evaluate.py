"""Evaluation: in inference mode, in large batches of examples of similar length."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from polyrank.local.attach import Batch
from polyrank.local.data import Examples, Indices, by_length


def evaluate(
    predict: Callable[[Batch], Tensor], data: Examples, indices: Indices | None = None, *, tokens: int = 2048
) -> dict[str, float]:
    """Accuracy and mean cross-entropy of a model, given as batch -> logits, over `data` (or `indices` of it).

    Batches hold examples of similar length, at most `tokens` input positions each.
    """
    everything = np.arange(len(data.labels)) if indices is None else indices
    correct, loss = 0, 0.0
    with torch.inference_mode():
        for chosen in by_length(everything, data.lengths, tokens):
            batch = data.batch(chosen)
            logits = predict(batch).float().cpu()
            correct += int((logits.argmax(-1) == batch["labels"]).sum())
            loss += float(F.cross_entropy(logits, batch["labels"], reduction="sum"))
    count = len(everything)
    return {"accuracy": correct / count, "loss": loss / count}
