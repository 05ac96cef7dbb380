"""Text from a language model: greedy, or drawn from a seed, until it ends; and how close that comes to references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from polyrank.local.choices import filled
from polyrank.local.data import by_length


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Attributes:
        max_tokens: of an answer, at most.
        temperature: 0: always the most likely token; above: drawn, from logits divided by it.
        top_p: draws among the most likely tokens that together have this probability.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    ends: Sequence[int],
    pad_id: int,
    seeds: Sequence[int] = (),
    tokens: int = 8192,
) -> list[list[int]]:
    """What the model goes on with after each prompt, without the token that ends it.

    Args:
        model: a causal language model of Transformers, with whatever is attached to it.
        prompts: token ids, each at least one.
        decoding: how tokens are chosen.
        ends: the tokens that end an answer.
        pad_id: fills up a batch, on the left.
        seeds: of each prompt's draws, which therefore do not depend on the other prompts; not needed at temperature 0.
        tokens: positions of a batch.
    """
    found: list[list[int]] = [[] for _ in prompts]
    lengths = np.array([len(prompt) + decoding.max_tokens for prompt in prompts], np.int64)
    most = 1 if decoding.temperature else None
    for places in by_length(np.arange(len(prompts)), lengths, tokens, most):
        batch = [prompts[place] for place in places]
        seed = int(seeds[places[0]]) if decoding.temperature else 0
        for place, answer in zip(places, _answers(model, batch, decoding, list(ends), pad_id, seed), strict=True):
            found[place] = answer
    return found


def _answers(
    model: nn.Module, prompts: Sequence[Sequence[int]], decoding: Decoding, ends: list[int], pad_id: int, seed: int
) -> list[list[int]]:
    device = next(model.parameters()).device
    ids, mask = filled(prompts, pad_id, left=True)
    drawn = decoding.temperature > 0
    how = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0} if drawn else _GREEDY
    gpus = [device] if device.type == "cuda" else []
    with torch.inference_mode(), torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=decoding.max_tokens,
            do_sample=drawn,
            num_beams=1,
            use_cache=True,
            pad_token_id=pad_id,
            eos_token_id=ends or None,
            **how,
        )
    return [_ended(row, ends) for row in out[:, ids.shape[1] :].tolist()]


_GREEDY = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
"""Transformers' defaults: a model's own, which are for drawing, would only make it warn."""


def _ended(row: Sequence[int], ends: Sequence[int]) -> list[int]:
    """A row up to its first end."""
    stop = next((place for place, token in enumerate(row) if token in ends), len(row))
    return list(row[:stop])


def closeness(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """``exact_match``, and the F measures ``rouge1``, ``rouge2`` and ``rougeL`` where rouge-score is installed.

    Space around texts does not count for an exact match. ROUGE is Google's, with its stemmer, which knows the letters
    and digits of English only.
    """
    pairs = list(zip(answers, references, strict=True))
    exact = float(np.mean([answer.strip() == reference.strip() for answer, reference in pairs]))
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        return {"exact_match": exact}
    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(list(names), use_stemmer=True)
    scores = [scorer.score(reference, answer) for answer, reference in pairs]
    return {"exact_match": exact, **{name: float(np.mean([s[name].fmeasure for s in scores])) for name in names}}
