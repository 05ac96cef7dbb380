"""Multiple choice: shared prompts and batches change no score of any family."""

import numpy as np
import pytest
import torch

from local.test_causal import FAMILIES, VOCABULARY, adapter_of, base_of
from polyrank.core.lowrank import Adapter
from polyrank.local.choices import Choices, Likelihoods, likelihoods


def questions(count: int = 9) -> list[Choices]:
    """Two to four choices each; the choices of the last share nothing but the first token."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        prompt = [1, *rng.integers(3, VOCABULARY, size=rng.integers(1, 9)).tolist()]
        prompt = [1] if number == count - 1 else prompt
        ends = [rng.integers(3, VOCABULARY, size=rng.integers(1, 5)).tolist() for _ in range(rng.integers(2, 5))]
        ends[-1] = [*ends[0], 5]  # begins as another one does
        rows = tuple((*prompt, *end) for end in ends)
        sizes = tuple(len(end) * 3 + 1 for end in ends)
        found.append(Choices(rows, (len(prompt),) * len(rows), sizes, number % len(rows), ["even", "odd"][number % 2]))
    return found


def naive(model: torch.nn.Module, question: Choices) -> list[float]:
    sums = []
    for row, start in zip(question.rows, question.starts, strict=True):
        with torch.no_grad():
            told = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
        sums.append(sum(float(told[place - 1, row[place]]) for place in range(start, len(row))))
    return sums


@pytest.mark.parametrize("tokens", [1, 60, 10_000])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_shared_prompt_changes_no_score(family: str, tokens: int) -> None:
    """Alone, in small and in large batches; with an adapter attached, whose hooks see the same positions."""
    base, asked = base_of(family), questions()
    adapter = adapter_of(base)
    moved = Adapter({name: type(x)(x.A, torch.ones_like(x.B) * 0.05, x.scale) for name, x in adapter.layers.items()})
    without = likelihoods(base.model, asked, 0, tokens=tokens)
    with base.attached(moved):
        found = likelihoods(base.model, asked, 0, tokens=tokens)
        due = [naive(base.model, question) for question in asked]
    for own, expected in zip(found.sums, due, strict=True):
        assert own == pytest.approx(expected, abs=1e-4)
    assert not np.allclose(np.concatenate(found.sums), np.concatenate(without.sums), atol=1e-2)


def test_accuracies() -> None:
    """By hand: the sum prefers long choices less than the mean over characters or tokens does."""
    one = Choices(((1, 4), (1, 5, 6, 7)), (1, 1), (2, 9), 1, "a")
    two = Choices(((1, 4, 4), (1, 5)), (1, 1), (8, 1), 0, "b")
    found = Likelihoods([one, two], [np.array([-2.0, -3.0]), np.array([-4.0, -4.5])]).metrics()
    assert found["accuracy"] == 0.5
    assert found["accuracy_norm"] == found["accuracy_token"] == 1.0
    assert found["error"] == pytest.approx(np.std([0, 1], ddof=1) / 2**0.5)
    assert found["chance"] == 0.5
    assert found["questions"] == 2
    assert found["subjects"]["a"] == {"accuracy": 0.0, "accuracy_norm": 1.0, "accuracy_token": 1.0, "questions": 1}
