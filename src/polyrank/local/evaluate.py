"""Evaluation: in inference mode, in large batches of examples of similar length; the metrics are scikit-learn's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from polyrank.local.attach import Batch
from polyrank.local.data import Examples, Indices, by_length

Predict = Callable[[Batch], Tensor]
"""A model: batch -> logits."""


@dataclass(frozen=True)
class Predictions:
    """What a model says of examples.

    Attributes:
        truth: the labels, (n,).
        chosen: the predicted labels, (n,).
        losses: the cross-entropy of each example, (n,).
    """

    truth: Indices
    chosen: Indices
    losses: npt.NDArray[np.float64]

    def metrics(self) -> dict[str, float]:
        """``accuracy``, mean ``loss``, ``macro_f1``, ``micro_f1`` and ``mcc`` (Matthews' correlation coefficient).

        Macro F1 is the plain mean over the classes that occur or are predicted. Where every example has one class and
        gets one, micro F1 is the accuracy.
        """
        from sklearn.metrics import f1_score, matthews_corrcoef

        return {
            **self.brief(),
            "macro_f1": float(f1_score(self.truth, self.chosen, average="macro", zero_division=0)),
            "micro_f1": float(f1_score(self.truth, self.chosen, average="micro", zero_division=0)),
            "mcc": float(matthews_corrcoef(self.truth, self.chosen)),
        }

    def brief(self) -> dict[str, float]:
        """``accuracy`` and mean ``loss`` alone."""
        return {"accuracy": float((self.truth == self.chosen).mean()), "loss": float(self.losses.mean())}

    def confusion(self, classes: int) -> Indices:
        """How often each class (row) was taken for each (column), classes x classes."""
        from sklearn.metrics import confusion_matrix

        return np.asarray(confusion_matrix(self.truth, self.chosen, labels=np.arange(classes)), np.int64)

    def part(self, first: int, last: int) -> Predictions:
        """Those of the examples from `first` to before `last`, by position."""
        return Predictions(self.truth[first:last], self.chosen[first:last], self.losses[first:last])


def predictions(predict: Predict, data: Examples, indices: Indices | None = None, *, tokens: int = 2048) -> Predictions:
    """What a model says of `data` (or `indices` of it), in order.

    Batches hold examples of similar length, at most `tokens` input positions each.
    """
    everything = np.arange(len(data.labels)) if indices is None else indices
    chosen, losses = np.empty(len(everything), np.int64), np.empty(len(everything), np.float64)
    lengths = data.lengths[everything]
    with torch.inference_mode():
        for places in by_length(np.arange(len(everything)), lengths, tokens):
            batch = data.batch(everything[places])
            logits = predict(batch).float().cpu()
            chosen[places] = logits.argmax(-1).numpy()
            losses[places] = F.cross_entropy(logits, batch["labels"], reduction="none").numpy()
    return Predictions(data.labels[everything], chosen, losses)


def evaluate(
    predict: Predict, data: Examples, indices: Indices | None = None, *, tokens: int = 2048
) -> dict[str, float]:
    """The metrics of a model over `data` (or `indices` of it): see `Predictions.metrics`."""
    return predictions(predict, data, indices, tokens=tokens).metrics()
