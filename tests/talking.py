"""A tiny Llama of random weights with a tokenizer of whole words, and instructions for it: an experiment of seconds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{number}" for number in range(24)]
TOPICS = ("colours", "sums", "trees")


def llama(folder: Path) -> Path:
    """The model's folder."""
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS, "###", "Instruction:", "Response:"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Instructions whose response repeats them; every fourth has an input; the category and who asks are known."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        asked = " ".join(rng.choice(WORDS, rng.integers(2, 5)))
        about = "" if number % 4 else str(rng.choice(WORDS))
        topic = TOPICS[int(rng.integers(3))]
        found.append(
            {"instruction": asked, "context": about, "response": asked, "category": topic, "who": int(rng.integers(3))}
        )
    return found


def experiment(folder: Path) -> dict[str, Any]:
    """Three clients of unequal ranks, each training alone in one thread; its files are in the folder."""
    for name, count in (("train", 48), ("test", 12)):
        (folder / f"{name}.json").write_text(json.dumps(rows(count, count)))
    return {
        "rounds": 2,
        "device": "cpu",
        "threads": 1,
        "model": {"name": str(llama(folder / "model")), "targets": "attention", "rank": 4, "max_length": 32},
        "data": {
            "name": "instructions",
            "train": str(folder / "train.json"),
            "test": str(folder / "test.json"),
            "input": "context",
            "response": "response",
            "label": "category",
            "columns": ["who"],
            "template": "alpaca_short",
            "clients": 3,
        },
        "fleet": [{"share": 1 / 3, "rank": rank} for rank in (1, 2, 4)],
        "local": {"batch": 8, "lr": 5e-3},
        "simulation": {"together": "off", "cache": "off"},
        "deployment": {"clients": 3, "poll": 0},
    }
