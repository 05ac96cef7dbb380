"""What all tests share: an offline, single-threaded process, tiny models built from a config, and a tiny experiment."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read by libraries when they are imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # what a run takes as its number of threads
os.environ["GOMP_SPINCOUNT"] = "10000"  # as polyrank has it, which here is imported after torch

import numpy as np
import pytest
import torch
import transformers
import yaml
from torch import Tensor, nn

from polyrank.core.lowrank import Adapter, LowRank
from polyrank.core.rng import stream, torch_generator
from polyrank.core.types import ModelSpec
from polyrank.data import TextSplit

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background; processes that tests start would, too
    signal.signal(signal.SIGINT, signal.default_int_handler)

Batch = dict[str, Tensor]
CLASSES, VOCABULARY = 3, 40


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache for this session, shared by its workers, unless the environment names one."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    own = "POLYRANK_CACHE" not in os.environ
    if own:
        os.environ["POLYRANK_CACHE"] = str(folder / "cache")
    yield
    if own:
        del os.environ["POLYRANK_CACHE"]


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=CLASSES,
        initializer_range=0.2,
    )
    return transformers.BertForSequenceClassification(config)


def _vit() -> nn.Module:
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=CLASSES,
        initializer_range=0.2,
    )
    return transformers.ViTForImageClassification(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=16,
        num_labels=CLASSES,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    return transformers.GPT2ForSequenceClassification(config)


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        num_labels=CLASSES,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    return transformers.LlamaForSequenceClassification(config)


def _bloom() -> nn.Module:
    config = transformers.BloomConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        n_layer=2,
        n_head=2,
        num_labels=CLASSES,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    return transformers.BloomForSequenceClassification(config)


_FAMILIES = {"bert": _bert, "bloom": _bloom, "gpt2": _gpt2, "llama": _llama, "vit": _vit}


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[str], nn.Module]:
    """family -> a new classifier with random weights, the same ones every time."""

    def build(family: str) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _FAMILIES[family]().eval()

    return build


@pytest.fixture(scope="session")
def tiny_batch() -> Callable[[str], Batch]:
    """family -> five random examples; texts differ in length and are padded on the right."""

    def build(family: str) -> Batch:
        generator = torch.Generator().manual_seed(1)
        labels = torch.arange(5) % CLASSES
        if family == "vit":
            return {"pixel_values": torch.randn(5, 1, 8, 8, generator=generator), "labels": labels}
        lengths = torch.tensor([7, 4, 6, 3, 7])
        mask = (torch.arange(7) < lengths[:, None]).long()
        ids = torch.randint(3, VOCABULARY, (5, 7), generator=generator) * mask
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return build


@pytest.fixture(scope="session")
def random_adapter() -> Callable[..., Adapter]:
    """(spec, ranks in turn, seed, head) -> an adapter in which every layer has a rank and a scale of its own."""

    def build(spec: ModelSpec, ranks: tuple[int, ...] = (3, 1, 2), seed: int = 0, head: Any = None) -> Adapter:
        generator = torch_generator(stream(seed, "test"))

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator) * 0.3

        layers = {
            name: LowRank(normal(ranks[i % len(ranks)], d_in), normal(d_out, ranks[i % len(ranks)]), 0.5 + 0.25 * i)
            for i, (name, (d_out, d_in)) in enumerate(spec.modules.items())
            if ranks[i % len(ranks)]
        }
        return Adapter(layers, {name: tensor + normal(*tensor.shape) for name, tensor in (head or {}).items()})

    return build


@pytest.fixture(scope="session")
def toy_texts() -> TextSplit:
    """48 short texts; the class is given by which third of the vocabulary the tokens come from."""
    rng = np.random.default_rng(0)
    labels = np.arange(48) % CLASSES
    texts = [rng.integers(3 + 12 * label, 15 + 12 * label, size=rng.integers(3, 9)) for label in labels]
    offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts])])
    return TextSplit(np.concatenate(texts).astype(np.int32), offsets, labels.astype(np.int64), 0)


@pytest.fixture(scope="session")
def digits_config() -> dict[str, Any]:
    """A digits experiment that takes about a second. Not to be changed: copy it."""
    return {
        "seed": 0,
        "rounds": 3,
        "model": {"name": "digits-vit", "targets": ["q_proj", "v_proj"], "rank": 4},
        "data": {
            "name": "digits",
            "clients": 4,
            "limit": {"train": 96, "validation": 40, "test": 60},
            "partition": {"name": "dirichlet", "alpha": 1.0},
        },
        "fleet": [
            {"name": "small", "share": 0.5, "rank": 2, "uplink": "1 Mbit/s", "downlink": "4 Mbit/s"},
            {"name": "large", "share": 0.5, "rank": 4, "uplink": "2 Mbit/s", "downlink": "8 Mbit/s"},
        ],
        "method": {"name": "fedit"},
        "local": {"epochs": 1, "batch": 16, "lr": 5e-3},
    }


@pytest.fixture(scope="session")
def digits_file(tmp_path_factory: pytest.TempPathFactory, digits_config: dict[str, Any]) -> Path:
    """`digits_config` as a file."""
    path = tmp_path_factory.mktemp("experiments") / "tiny.yaml"
    path.write_text(yaml.safe_dump(digits_config, sort_keys=False))
    return path
