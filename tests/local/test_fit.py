"""Texts against the model they are for: positions, rows of the embedding, and later tokens that nobody may see."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tiny
from polyrank.local.lengths import check_length, positions, table_positions, trained_positions

SMALL = {"vocab_size": tiny.ROWS, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
GPT = {"vocab_size": tiny.ROWS, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 20}
LAYERS = {**SMALL, "intermediate_size": 24, "max_position_embeddings": 20, "pad_token_id": 1}

# Models with a table of positions, and how many texts may have.
TABLES: dict[str, tuple[Any, str, int]] = {
    "bert": (transformers.BertConfig(**LAYERS), "text", 20),
    "roberta": (transformers.RobertaConfig(**LAYERS), "text", 18),
    "mpnet": (transformers.MPNetConfig(**LAYERS), "text", 18),
    "electra": (transformers.ElectraConfig(**LAYERS), "text", 20),
    "deberta": (transformers.DebertaConfig(**LAYERS), "text", 20),
    "nystromformer": (transformers.NystromformerConfig(**LAYERS, num_landmarks=2, segment_means_seq_len=2), "text", 20),
    "gpt2": (transformers.GPT2Config(**GPT), "causal", 20),
    "gptj": (transformers.GPTJConfig(**GPT, rotary_dim=4), "causal", 20),
    "gpt_neo": (
        transformers.GPTNeoConfig(
            vocab_size=tiny.ROWS,
            hidden_size=16,
            num_layers=1,
            num_heads=2,
            attention_types=[[["global"], 1]],
            max_position_embeddings=20,
        ),
        "causal",
        20,
    ),
    "opt": (
        transformers.OPTConfig(**SMALL, word_embed_proj_dim=16, ffn_dim=24, max_position_embeddings=20),
        "causal",
        20,
    ),
}


@pytest.mark.parametrize("family", TABLES)
def test_the_longest_text_is_the_one_that_the_model_itself_takes(family: str) -> None:
    config, kind, most = TABLES[family]
    with torch.random.fork_rng(devices=[]):
        model = tiny.AUTO[kind].from_config(config).eval()
    assert positions(model) == most
    with torch.device("meta"):
        assert positions(tiny.AUTO[kind].from_config(config)) == most
    ids = torch.full((1, most + 1), 5)
    with torch.no_grad():
        model(input_ids=ids[:, :most], attention_mask=torch.ones_like(ids[:, :most]))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    check_length(model, most, family)
    with pytest.raises(ValueError, match=f"model.max_length: {most + 1}: '{family}'.*Valid: 1 to {most}"):
        check_length(model, most + 1, family)


def test_positions_without_a_table() -> None:
    def trained(**rope: Any) -> int | None:
        return trained_positions(tiny.llama(rope_parameters={"rope_theta": 10000.0, **rope}))

    assert trained(rope_type="default") == 32
    assert trained(rope_type="linear", factor=4.0) == 128
    assert trained(rope_type="yarn", factor=4.0, original_max_position_embeddings=32) == 128
    with torch.device("meta"):
        t5 = transformers.T5EncoderModel(transformers.T5Config(d_model=16, num_layers=1, num_heads=2, d_ff=24, d_kv=8))
        wide = {**LAYERS, "relative_attention": True, "position_biased_input": False}
        deberta = transformers.DebertaV2Model(transformers.DebertaV2Config(**wide))
        mamba = transformers.MambaModel(transformers.MambaConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1))
    for model in (t5, deberta, mamba):
        assert table_positions(model) is None
        check_length(model, 100_000, "no end")


@pytest.mark.parametrize(("kind", "config"), [("text", tiny.bert()), ("causal", tiny.llama())])
def test_texts_beyond_the_positions_are_refused(kind: str, config: Any, tmp_path: Path) -> None:
    folder = tiny.saved(tmp_path / "model", config, kind)
    said = tiny.refused(tiny.experiment(tmp_path, folder, kind, max_length=33), "plan", "run", "profile")
    assert "model.max_length: 33" in said
    assert "Valid: 1 to 32" in said
    assert tiny.polyrank("plan", tiny.experiment(tmp_path, folder, kind, max_length=32)).exit_code == 0


# --- tokens


def grown(folder: Path, token: str, **options: Any) -> Path:
    """The tokenizer of a model's folder with one token more than the model has rows."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([token], **options)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["text", "causal"])
def test_a_word_without_a_row_is_refused(kind: str, tmp_path: Path) -> None:
    folder = grown(tiny.saved(tmp_path / "model", tiny.llama(), kind), "extra")
    said = tiny.refused(tiny.experiment(tmp_path, folder, kind), "plan", "run")
    assert f"the token 'extra', number {tiny.ROWS}, has no embedding: the model has {tiny.ROWS} rows" in said


@pytest.mark.parametrize("kind", ["text", "causal"])
def test_a_special_token_without_a_row_is_refused_where_it_occurs(kind: str, tmp_path: Path) -> None:
    """Gemma 3's token of images never occurs in texts; who adds one and uses it has to resize the model."""
    folder = grown(tiny.saved(tmp_path / "model", tiny.llama(), kind), "<extra>", special_tokens=True)
    file = tiny.experiment(tmp_path, folder, kind)
    planned = tiny.polyrank("plan", file)
    assert planned.exit_code == 0
    assert "'<extra>'" in planned.stdout
    assert tiny.polyrank("run", file, "--out", tmp_path / "run").exit_code == 0
    file = tiny.experiment(tmp_path, folder, kind, lambda row: "w1 w2 <extra>" if row == 3 else "w3")
    said = tiny.refused(file, "run")
    assert f"'<extra>', number {tiny.ROWS}" in said


def test_a_larger_embedding_than_the_tokenizer_is_usual(tmp_path: Path) -> None:
    folder = tiny.saved(tmp_path / "model", tiny.llama(vocab_size=tiny.ROWS + 7), "text")
    assert tiny.polyrank("plan", tiny.experiment(tmp_path, folder, "text")).exit_code == 0


# --- later tokens

ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": tiny.bert,
    "roberta": lambda: transformers.RobertaConfig(**tiny.ENCODER),
    "electra": lambda: transformers.ElectraConfig(**tiny.ENCODER),
    "xlm": lambda: transformers.XLMConfig(vocab_size=tiny.ROWS, emb_dim=16, n_layers=1, n_heads=2),
}


@pytest.mark.parametrize("family", ENCODERS)
def test_models_that_see_later_tokens_are_not_causal(family: str, tmp_path: Path) -> None:
    folder = tiny.saved(tmp_path / "model", ENCODERS[family](), "causal")
    said = tiny.refused(tiny.experiment(tmp_path, folder, "causal"), "plan", "run")
    assert "predicts masked tokens" in said


def test_a_model_whose_config_does_not_tell_is_asked(tmp_path: Path) -> None:
    """XLNet sees all tokens unless it is told an order."""
    config = transformers.XLNetConfig(
        vocab_size=tiny.ROWS, d_model=16, n_layer=1, n_head=2, d_inner=24, initializer_range=0.2
    )
    folder = tiny.saved(tmp_path / "model", config, "causal")
    said = tiny.refused(tiny.experiment(tmp_path, folder, "causal", targets="all-linear"), "run")
    assert "xlnet is no causal language model" in said


def test_an_encoder_that_is_told_to_decode_is_causal(tmp_path: Path) -> None:
    folder = tiny.saved(tmp_path / "model", tiny.bert(is_decoder=True), "causal")
    file = tiny.experiment(tmp_path, folder, "causal")
    assert tiny.polyrank("run", file, "--out", tmp_path / "run").exit_code == 0


T5 = {"vocab_size": tiny.ROWS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
SEQUENCES: dict[str, Callable[[], Any]] = {
    "t5": lambda: transformers.T5Config(**T5, decoder_start_token_id=0),
    "bart": lambda: transformers.BartConfig(vocab_size=tiny.ROWS, d_model=16, encoder_layers=1, decoder_layers=1),
    "whisper": lambda: transformers.WhisperConfig(vocab_size=tiny.ROWS, d_model=16, encoder_layers=1, decoder_layers=1),
    "marian": lambda: transformers.MarianConfig(vocab_size=tiny.ROWS, d_model=16, encoder_layers=1, decoder_layers=1),
}


@pytest.mark.parametrize("family", SEQUENCES)
def test_encoder_decoders_are_refused_by_name(family: str, tmp_path: Path) -> None:
    SEQUENCES[family]().save_pretrained(tmp_path / "model")
    tiny.tokenizer(tmp_path / "model")
    said = tiny.refused(tiny.experiment(tmp_path, tmp_path / "model", "causal"), "plan", "run")
    assert f"{family} is an encoder-decoder" in said
    assert len(said) < 300
