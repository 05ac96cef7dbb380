"""The token that pads a batch is the one that the model is told of, wherever it comes from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import tiny
from polyrank.core.rng import stream
from polyrank.data import Source, prepare_text
from polyrank.data.source import Prompting
from polyrank.local import hf
from polyrank.local.processors import causal_processor, text_processor
from polyrank.local.prompter import Prompter
from polyrank.local.saved import save_config, save_tokenizer

PAD, UNK, BOS, EOS = 0, 1, 2, 3

# What the config says, what the tokenizer has, and which token pads.
CASES = {
    "both": ({"pad_token_id": PAD}, {}, PAD),
    "config": ({"pad_token_id": UNK}, {"pad_token": None}, UNK),
    "tokenizer": ({"pad_token_id": None}, {}, PAD),
    "they differ": ({"pad_token_id": UNK}, {"pad_token": "<pad>"}, UNK),
    "the config's is a word": ({"pad_token_id": 9}, {}, PAD),
    "neither": ({"pad_token_id": None}, {"pad_token": None}, EOS),
    "a list of ends": ({"pad_token_id": None, "eos_token_id": [EOS, BOS]}, {"pad_token": None}, EOS),
    "minus one": ({"pad_token_id": -1}, {"pad_token": None}, EOS),
    "beyond the rows": ({"pad_token_id": tiny.ROWS + 3}, {}, PAD),
    "every text ends": ({"pad_token_id": None}, {"pad_token": None, "ends": True}, BOS),
    "every text ends, the config pads so": ({"pad_token_id": EOS}, {"pad_token": None, "ends": True}, EOS),
    "no end": ({"pad_token_id": None, "eos_token_id": None}, {"pad_token": None, "eos_token": None}, BOS),
}


def texts(rows: int = 24) -> list[str]:
    rng = np.random.default_rng(0)
    words = [*tiny.WORDS, *tiny.SPECIAL]
    return [" ".join(rng.choice(words, int(rng.integers(1, 9)))) for _ in range(rows)]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, int]:
    """A decoder's folder, and the token that is to pad."""
    stated, special, pad = CASES[request.param]
    folder = tiny.saved(tmp_path / "model", tiny.llama(), "text", **special)
    return tiny.restated(folder, **stated), pad


def load(folder: Path, kind: str = "text") -> Any:
    classes = () if kind == "causal" else ("a", "b")
    return hf.load_base(str(folder), "attention", kind=kind, classes=classes, rng=stream(0, "head"), tokens=8)


def test_one_token_pads_everywhere(case: tuple[Path, int], tmp_path: Path) -> None:
    folder, pad = case
    save_config(str(folder), tmp_path / "out", ["a", "b"])
    save_tokenizer(str(folder), tmp_path / "out", 16)
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert load(folder).model.config.pad_token_id == pad
    assert text_processor(str(folder), 16).pad_id == pad
    assert causal_processor(str(folder), 16, Prompting("plain")).pad_id == pad
    assert Prompter(str(folder)).pad_id == pad
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == pad
    assert exported.pad_token_id == pad
    assert exported.padding_side == "right"
    before = transformers.AutoTokenizer.from_pretrained(folder)
    assert [exported(text)["input_ids"] for text in texts()] == [before(text)["input_ids"] for text in texts()]


def test_a_padded_batch_gives_what_each_text_gives_alone(case: tuple[Path, int], tmp_path: Path) -> None:
    """Against Transformers' own call without padding, with the exported config: texts hold every special token."""
    folder, _ = case
    base, processor = load(folder), text_processor(str(folder), 16)
    split = prepare_text(Source(texts(), np.zeros(24, np.int64)), processor.encode, processor.pad_id, str(folder))
    batch = split.batch(np.arange(24))
    assert (batch["attention_mask"] == 0).any()
    save_config(str(folder), tmp_path / "out", ["a", "b"])
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    alone = transformers.AutoModelForSequenceClassification.from_pretrained(folder, config=config)
    expected = tiny.logits_one_by_one(alone, processor.encode(texts()))
    with torch.no_grad():
        torch.testing.assert_close(base.logits(batch, {}), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("ends", [False, True])
def test_a_config_without_padding_reads_the_last_token(ends: bool, tmp_path: Path) -> None:
    """Against Transformers' own call with the checkpoint's own config, which takes a text's last token."""
    folder = tiny.saved(tmp_path / "model", tiny.llama(), "text", pad_token=None, ends=ends)
    tiny.restated(folder, pad_token_id=None)
    base, processor = load(folder), text_processor(str(folder), 16)
    said = [f"{text} w1" for text in texts()]
    split = prepare_text(Source(said, np.zeros(24, np.int64)), processor.encode, processor.pad_id, str(folder))
    alone = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert alone.config.pad_token_id is None
    expected = tiny.logits_one_by_one(alone, processor.encode(said))
    with torch.no_grad():
        torch.testing.assert_close(base.logits(split.batch(np.arange(24)), {}), expected, atol=1e-5, rtol=0)


FAMILIES: dict[str, Callable[[], Any]] = {
    "bert": tiny.bert,
    "roberta": lambda: transformers.RobertaConfig(**tiny.ENCODER),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=tiny.ROWS, n_embd=16, n_layer=2, n_head=2, n_positions=32, **tiny.NUMBERS
    ),
    "bart": lambda: transformers.BartConfig(
        vocab_size=tiny.ROWS,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
        decoder_start_token_id=3,
        **tiny.NUMBERS,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_classifier(family: str, tmp_path: Path) -> None:
    folder = tiny.saved(tmp_path / "model", FAMILIES[family](), "text", ends=True)
    base, processor = load(folder), text_processor(str(folder), 16)
    said = [" ".join(word for word in text.split() if word in tiny.WORDS) or "w0" for text in texts()]
    split = prepare_text(Source(said, np.zeros(24, np.int64)), processor.encode, processor.pad_id, str(folder))
    alone = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, ignore_mismatched_sizes=True
    )
    alone.load_state_dict(base.model.state_dict())  # BART's checkpoint has a head of three classes
    expected = tiny.logits_one_by_one(alone, processor.encode(said))
    with torch.no_grad():
        torch.testing.assert_close(base.logits(split.batch(np.arange(24)), {}), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["causal", "text"])
def test_a_list_of_ends_is_planned_run_and_profiled(kind: str, tmp_path: Path) -> None:
    folder = tiny.saved(tmp_path / "model", tiny.llama(), kind, pad_token=None)
    tiny.restated(folder, eos_token_id=[EOS, BOS], pad_token_id=None)
    file = tiny.experiment(tmp_path, folder, kind)
    assert tiny.polyrank("plan", file).exit_code == 0
    assert tiny.polyrank("profile", file).exit_code == 0
    assert tiny.polyrank("run", file, "--out", tmp_path / "run").exit_code == 0
    assert tiny.polyrank("evaluate", tmp_path / "run").exit_code == 0
