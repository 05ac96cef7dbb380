"""Multiple choice by log-likelihood: which answer a language model finds most likely.

What the choices of a question have in common, its prompt, runs once: its keys and values are kept, copied for every
choice, and each choice goes on from there. That is the same computation as running each choice with its prompt, up to
rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from polyrank.data.causal import IGNORED
from polyrank.local.losses import losses

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Choices:
    """A question's choices as token ids, each behind the prompt.

    Attributes:
        rows: token ids of the prompt and each choice.
        starts: the first token of each row that belongs to the choice; at least 1.
        characters: of each choice.
        answer: which is right.
        subject: what the question is about.
    """

    rows: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    characters: tuple[int, ...]
    answer: int
    subject: str = ""

    @property
    def shared(self) -> int:
        """Tokens that run once: those that all rows begin with, up to the last one before a choice."""
        alike = [len(set(tokens)) == 1 for tokens in zip(*self.rows, strict=False)]
        return min([*alike, False].index(False), *self.starts) - 1

    @property
    def longest(self) -> int:
        return max(map(len, self.rows))


@dataclass(frozen=True)
class Likelihoods:
    """What a model says of questions.

    Attributes:
        questions: the questions.
        sums: ``log p(choice | prompt)`` of each choice of each question, in nats.
    """

    questions: Sequence[Choices]
    sums: Sequence[Floats]

    def metrics(self) -> dict[str, Any]:
        """How often the right choice is the most likely one, of all and by subject.

        ``accuracy`` compares sums; ``accuracy_norm`` sums per character; ``accuracy_token`` sums per token. The first
        two are those of lm-evaluation-harness, ``acc`` and ``acc_norm``. ``error`` is the standard error of
        ``accuracy``, and ``chance`` the accuracy of who guesses.
        """
        found = np.array([self._right(q, own) for q, own in zip(self.questions, self.sums, strict=True)])
        names = sorted({q.subject for q in self.questions if q.subject})
        of = np.array([q.subject for q in self.questions])
        whole = _means(found)
        accuracy, count = whole["accuracy"], len(found)
        return {
            **whole,
            "error": float(np.sqrt(accuracy * (1 - accuracy) / (count - 1))) if count > 1 else None,
            "chance": float(np.mean([1 / len(q.rows) for q in self.questions])),
            "questions": count,
            **({"subjects": {n: {**_means(found[of == n]), "questions": int((of == n).sum())} for n in names}}),
        }

    @staticmethod
    def _right(question: Choices, sums: Floats) -> tuple[bool, bool, bool]:
        tokens = np.array([len(row) - start for row, start in zip(question.rows, question.starts, strict=True)])
        scored = (sums, sums / np.array(question.characters), sums / tokens)
        a, b, c = (int(np.argmax(values)) == question.answer for values in scored)
        return a, b, c


def _means(right: npt.NDArray[np.bool_]) -> dict[str, float]:
    names = ("accuracy", "accuracy_norm", "accuracy_token")
    return dict(zip(names, right.mean(0).tolist(), strict=True))


def likelihoods(model: nn.Module, questions: Sequence[Choices], pad_id: int, *, tokens: int = 8192) -> Likelihoods:
    """Scores every choice of every question.

    Args:
        model: a causal language model of Transformers, with whatever is attached to it.
        questions: to score.
        pad_id: fills up batches.
        tokens: positions of a batch, of all choices with their prompts: what its keys and values take.
    """
    sums: list[Floats] = [np.empty(0)] * len(questions)
    with torch.inference_mode():
        for places in _batches(questions, tokens):
            scored = _scored(model, [questions[place] for place in places], pad_id)
            for place, own in zip(places, scored, strict=True):
                sums[place] = own
    return Likelihoods(questions, sums)


def _batches(questions: Sequence[Choices], tokens: int) -> Iterator[list[int]]:
    """Questions of a similar length of prompt together; those whose choices share nothing by themselves."""
    order = sorted(range(len(questions)), key=lambda i: (questions[i].shared, questions[i].longest), reverse=True)
    batch: list[int] = []
    rows, longest = 0, 0
    for place in order:
        question = questions[place]
        rows, longest = rows + len(question.rows), max(longest, question.longest)
        mixed = batch and not question.shared and questions[batch[0]].shared
        if batch and (mixed or rows * longest > tokens):
            yield batch
            batch, rows, longest = [], len(question.rows), question.longest
        batch.append(place)
    if batch:
        yield batch


def _scored(model: nn.Module, questions: Sequence[Choices], pad_id: int) -> list[Floats]:
    """The sums of a batch of questions."""
    device = next(model.parameters()).device
    whose = [place for place, question in enumerate(questions) for _ in question.rows]
    rest = [row[question.shared :] for question in questions for row in question.rows]
    starts = [start - question.shared for question in questions for start in question.starts]
    ids, mask = filled(rest, pad_id, left=False)
    position = torch.arange(ids.shape[1])
    asked = mask.bool() & (position >= torch.tensor(starts)[:, None])
    labels = torch.where(asked, ids, IGNORED)
    call: dict[str, Any] = {}
    if questions[0].shared:
        prompts, before = filled([question.rows[0][: question.shared] for question in questions], pad_id, left=True)
        call = _remembered(model, prompts.to(device), before.to(device), torch.tensor(whose, device=device))
        mask = torch.cat([before[whose], mask], 1)
    found = model(**_inputs(model, ids.to(device), mask.to(device)), **call, use_cache=bool(call))
    sums = -losses(found.logits, labels).double().cpu().numpy()
    return np.split(sums, np.cumsum([len(question.rows) for question in questions])[:-1])


def _remembered(model: nn.Module, ids: Tensor, mask: Tensor, rows: Tensor) -> dict[str, Any]:
    """Keys and values of the prompts, for each of `rows`, as the model takes them."""
    takes = _takes(model)
    name = "cache" if "cache" in takes else "past_key_values"
    last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    kept = getattr(model(**_inputs(model, ids, mask), **last, use_cache=True), name)
    kept.batch_select_indices(rows)
    return {name: kept}


def _inputs(model: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Token ids with the mask of all positions so far, and the positions, counted without padding."""
    place = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    counted = {"position_ids": place} if "position_ids" in _takes(model) else {}
    return {"input_ids": ids, "attention_mask": mask, **counted}


def _takes(model: nn.Module) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def filled(rows: Sequence[Sequence[int]], pad_id: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Rows of token ids of one length, and a mask of what is no padding, both int64."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_id)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        own = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[place, own] = torch.tensor(row, dtype=torch.int64)
        mask[place, own] = 1
    return ids, mask
