"""Generation with an adapter attached, against Transformers' own on the adapter that PEFT has loaded."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from local.test_causal import FAMILIES, VOCABULARY, adapter_of, base_of
from polyrank.core.lowrank import Adapter
from polyrank.local.adapters import write_adapter
from polyrank.local.generate import Decoding, closeness, generate
from polyrank.local.hf import load_exported

END = 2


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [[1, *rng.integers(3, VOCABULARY, size=size).tolist()] for size in (1, 7, 4, 4, 2)]


@pytest.mark.parametrize("tokens", [1, 10_000])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_peft_generates(family: str, tokens: int, tmp_path: Path) -> None:
    """One by one and batched, padded on the left; some answers end before others."""
    base = base_of(family)
    rng = np.random.default_rng(0)
    layers = {
        name: type(x)(x.A, torch.from_numpy(rng.normal(0, 0.3, x.B.shape).astype(np.float32)), x.scale)
        for name, x in adapter_of(base).layers.items()
    }
    adapter = Adapter(layers)
    with base.attached(adapter):
        found = generate(base.model, prompts(), Decoding(12), ends=[END], pad_id=0, tokens=tokens)
    write_adapter(tmp_path / "adapter", adapter, base.info)
    other: Any = base_of(family)
    load_exported(other, tmp_path / "adapter")
    for prompt, answer in zip(prompts(), found, strict=True):
        out = other.model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=END,
            pad_token_id=0,
        )
        due = out[0, len(prompt) :].tolist()
        assert answer == (due[: due.index(END)] if END in due else due)


def test_an_answer_stops_at_the_end_of_text() -> None:
    base = base_of("llama")
    (whole,) = generate(base.model, [[1, 7]], Decoding(8), ends=[], pad_id=0)
    assert len(whole) == 8
    (cut,) = generate(base.model, [[1, 7]], Decoding(8), ends=[whole[3]], pad_id=0)
    assert cut == whole[: whole.index(whole[3])]


def test_draws_follow_from_each_prompts_seed() -> None:
    base, decoding = base_of("llama"), Decoding(8, temperature=1.5, top_p=0.95)
    state = torch.random.get_rng_state()

    def drawn(rows: list[list[int]], seeds: list[int]) -> list[list[int]]:
        return generate(base.model, rows, decoding, ends=[END], pad_id=0, seeds=seeds)

    rows = prompts()
    found = drawn(rows, [1, 2, 3, 4, 5])
    assert found == drawn(rows, [1, 2, 3, 4, 5])
    assert found != drawn(rows, [6, 7, 8, 9, 10])
    assert drawn(rows[1:2], [2]) == found[1:2]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_closeness(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rouge_score")
    found = closeness([" the cat sat ", "a dog"], ["the cat sat", "the cats sit"])
    assert found == {"exact_match": 0.5, "rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5}
    found = closeness(["the cats"], ["the cat sat on a mat"])  # stems; 2 of 2 and 2 of 6 words
    assert found["rouge1"] == pytest.approx(0.5)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    assert closeness(["yes"], ["yes\n"]) == {"exact_match": 1.0}
