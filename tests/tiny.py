"""Tiny models of random weights with a tokenizer of whole words, and tables for them: inputs that a test spoils."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from typer.testing import CliRunner, Result

from polyrank.cli import app

WORDS = [f"w{number}" for number in range(40)]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
ROWS = len(SPECIAL) + len(WORDS)
NUMBERS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
ENCODER = {
    "vocab_size": ROWS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    **NUMBERS,
}
AUTO = {
    "text": transformers.AutoModelForSequenceClassification,
    "causal": transformers.AutoModelForCausalLM,
    "image": transformers.AutoModelForImageClassification,
    "body": transformers.AutoModel,
}


def tokenizer(folder: Path, *, ends: bool = False, **named: str | None) -> Any:
    """Whole words; `ends`: every text ends with ``</s>``; `named`: special tokens, None for none."""
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends:
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 3)])
    usual = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, **{key: token for key, token in (usual | named).items() if token is not None}
    )
    fast.save_pretrained(folder)
    return fast


def saved(folder: Path, config: Any, kind: str, **special: Any) -> Path:
    """A model of this config with a tokenizer, in a folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AUTO[kind].from_config(config)
    model.save_pretrained(folder)
    tokenizer(folder, **special)
    return folder


def llama(**changes: Any) -> Any:
    return transformers.LlamaConfig(**{**ENCODER, "num_key_value_heads": 2, "tie_word_embeddings": False, **changes})


def bert(**changes: Any) -> Any:
    return transformers.BertConfig(**{**ENCODER, **changes})


def vit() -> Any:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "initializer_range")
    return transformers.ViTConfig(**{name: ENCODER[name] for name in names}, image_size=8, patch_size=4, num_channels=1)


def restated(folder: Path, **changes: Any) -> Path:
    """A model's folder whose config.json says something else."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def spoilt(folder: Path, key: Callable[[str], str | None]) -> Path:
    """A model's folder whose tensors have other names; those whose name becomes None are left out."""
    path = folder / "model.safetensors"
    tensors = {new: x.clone() for name, x in load_file(path).items() if (new := key(name))}
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def experiment(folder: Path, model: Path, kind: str, text: Callable[[int], str] | None = None, **options: Any) -> Path:
    """An experiment of one round on a table of its own; `text` makes the texts of the rows."""
    rng = np.random.default_rng(0)
    say = text or (lambda row: " ".join(rng.choice(WORDS, int(rng.integers(1, 9)))))
    path = folder / f"{kind}.jsonl"
    if kind == "image":
        path = folder / "images.npz"
        images = rng.integers(0, 255, (24, 8, 8, 1), dtype=np.uint8)
        np.savez(path, image=images, label=np.arange(24) % 2)
    else:
        texts = [say(row) for row in range(24)]
        rows = [{"text": x, "output": x, "instruction": "w1", "label": f"c{i % 2}"} for i, x in enumerate(texts)]
        path.write_text("\n".join(map(json.dumps, rows)))
    files = {"name": "files", "train": str(path), "test": str(path), "clients": 2}
    data = {
        "causal": {"name": "instructions", "train": str(path), "template": "plain", "clients": 2},
        "text": {**files, "text": "text"},
        "image": {**files, "image": "image"},
    }[kind]
    written = {
        "rounds": 1,
        "device": "cpu",
        "threads": 1,
        "model": {"name": str(model), "targets": "attention", "max_length": 16, **options},
        "data": data,
        "fleet": [{"rank": 2}],
        "local": {"batch": 8, "lr": 0.01},
        "log": [],
    }
    file = folder / "experiment.yaml"
    file.write_text(json.dumps(written))
    return file


def polyrank(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)


def refused(file: Path, *commands: str) -> str:
    """What the commands say that refuse an experiment: exit code 2, and the same message."""
    texts = set()
    for command in commands:
        out = ["--out", file.parent / f"{command}-out"] if command == "run" else []
        result = polyrank(command, file, *out)
        assert result.exit_code == 2, result.output
        texts.add(" ".join(result.stderr.split()))
    assert len(texts) == 1, texts
    return texts.pop()


def logits_one_by_one(model: nn.Module, texts: list[list[int]]) -> torch.Tensor:
    """Transformers' own call, a text at a time, without padding or mask."""
    with torch.no_grad():
        return torch.cat([model.eval()(input_ids=torch.tensor([ids])).logits for ids in texts])
