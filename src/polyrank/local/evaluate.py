"""Evaluation: in inference mode, in large batches of examples of similar length; class metrics are scikit-learn's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyrank.local.attach import Batch
from polyrank.local.data import Examples, Indices, by_length
from polyrank.local.losses import asked, asked_alone, by_example

Predict = Callable[[Batch], Tensor]
"""A model: batch -> logits."""

Floats = npt.NDArray[np.float64]


class Predictions(Protocol):
    """What a model says of examples."""

    def metrics(self) -> dict[str, float]:
        """All that is told of it."""
        ...

    def brief(self) -> dict[str, float]:
        """``accuracy`` and mean ``loss`` alone."""
        ...

    def confusion(self, classes: int) -> Indices | None:
        """How often each class (row) was taken for each (column), classes x classes; None of texts."""
        ...

    def part(self, first: int, last: int) -> Predictions:
        """Those of the examples from `first` to before `last`, by position."""
        ...


@dataclass(frozen=True)
class Classes(Predictions):
    """Of examples with a class each.

    Attributes:
        truth: the labels, (n,).
        chosen: the predicted labels, (n,).
        losses: the cross-entropy of each example, (n,).
    """

    truth: Indices
    chosen: Indices
    losses: Floats

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
        return {"accuracy": float((self.truth == self.chosen).mean()), "loss": float(self.losses.mean())}

    def confusion(self, classes: int) -> Indices | None:
        from sklearn.metrics import confusion_matrix

        return np.asarray(confusion_matrix(self.truth, self.chosen, labels=np.arange(classes)), np.int64)

    def part(self, first: int, last: int) -> Classes:
        return Classes(self.truth[first:last], self.chosen[first:last], self.losses[first:last])


@dataclass(frozen=True)
class Tokens(Predictions):
    """Of texts, whose next tokens are asked for.

    Attributes:
        counts: tokens asked of each text, (n,).
        correct: how many of them had the highest logit, (n,).
        losses: their cross-entropy, summed, in nats (n,).
    """

    counts: Indices
    correct: Indices
    losses: Floats

    def metrics(self) -> dict[str, float]:
        """``accuracy`` (of tokens), ``loss`` (nats per token) and ``perplexity`` (its exponential)."""
        brief = self.brief()
        return {**brief, "perplexity": math.exp(min(brief["loss"], 700.0))}

    def brief(self) -> dict[str, float]:
        total = max(int(self.counts.sum()), 1)
        return {"accuracy": float(self.correct.sum() / total), "loss": float(self.losses.sum() / total)}

    def confusion(self, classes: int) -> Indices | None:
        return None

    def part(self, first: int, last: int) -> Tokens:
        return Tokens(self.counts[first:last], self.correct[first:last], self.losses[first:last])


def predictions(
    predict: Predict,
    data: Examples,
    indices: Indices | None = None,
    *,
    tokens: int = 2048,
    output: nn.Module | None = None,
) -> Predictions:
    """What a model says of `data` (or `indices` of it), in order.

    Args:
        predict: the model.
        data: examples.
        indices: which of them; None: all.
        tokens: most input positions of a batch, whose examples are of similar length.
        output: the layer of the model that makes logits, which then runs only where a token is asked for.
    """
    everything = np.arange(len(data.labels)) if indices is None else indices
    chosen, hits, told = (np.zeros(len(everything), kind) for kind in (np.int64, np.int64, np.float64))
    texts = False
    with torch.inference_mode():
        for places in by_length(np.arange(len(everything)), data.lengths[everything], tokens):
            batch = data.batch(everything[places])
            with asked_alone(output, batch["labels"]):
                logits, truth, where = asked(predict(batch), batch["labels"])
            best, texts = logits.argmax(-1), where is not None
            each = F.cross_entropy(logits.float(), truth, reduction="none")
            told[places] = by_example(each, where).cpu().numpy()
            hits[places] = by_example((best == truth).long(), where).cpu().numpy()
            chosen[places] = 0 if texts else best.cpu().numpy()
    if texts:
        return Tokens(data.targets[everything], hits, told)
    return Classes(data.labels[everything], chosen, told)


def evaluate(
    predict: Predict, data: Examples, indices: Indices | None = None, *, tokens: int = 2048
) -> dict[str, float]:
    """The metrics of a model over `data` (or `indices` of it): see `Classes.metrics` and `Tokens.metrics`."""
    return predictions(predict, data, indices, tokens=tokens).metrics()


def worth(metrics: Mapping[str, float], prefix: str = "") -> float:
    """What models are chosen by, higher is better: accuracy, or minus the loss where there is a perplexity."""
    causal = f"{prefix}perplexity" in metrics
    return -metrics[f"{prefix}loss"] if causal else metrics[f"{prefix}accuracy"]
