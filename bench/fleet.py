"""What `bench/round.py` trains: models with random weights, and ten clients of ranks 4 to 24 who hold random data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from polyrank.core.lowrank import Adapter, fresh
from polyrank.core.rng import stream
from polyrank.core.types import ClientProfile, LocalTraining, ServerState
from polyrank.data import ImageSplit, TextSplit
from polyrank.local import hf
from polyrank.local.base import Base
from polyrank.local.trainer import Examples, Indices

RANKS = (4, 6, 8, 11, 13, 15, 17, 20, 22, 24)
CLASSES, TOKENS, WORDS, SEED = 10, 32, 30522, 0

Row = dict[str, Tensor]


@dataclass(frozen=True)
class Fleet:
    """One model, ten clients who hold as many examples as a round of `local` takes, and the server's own examples.

    Attributes:
        base: the frozen model.
        local: how clients train.
        state: the server's, in round 0.
        data: the clients' examples.
        shares: each client's indices into `data`.
        holdout: to measure importance on.
        test: to evaluate on.
    """

    base: Base
    local: LocalTraining
    state: ServerState
    data: Examples
    shares: Mapping[str, Indices]
    holdout: Examples
    test: Examples

    @property
    def profiles(self) -> dict[str, ClientProfile]:
        return {c: ClientProfile(len(own), r) for (c, own), r in zip(self.shares.items(), RANKS, strict=True)}

    def rows(self, client: str) -> list[Row]:
        """A client's examples one by one, in the order in which `polyrank.local.trainer` takes them."""
        return rows_of(self.data, stream(SEED, "fit", 0, client).permutation(self.shares[client]))


def rows_of(data: Examples, indices: Indices) -> list[Row]:
    """Examples as a data set of the usual kind: a dict of tensors each."""
    batch = data.batch(indices)
    return [{name: tensor[i] for name, tensor in batch.items()} for i in range(len(indices))]


def fleet(model: str, local: LocalTraining, test: int, holdout: int, device: str, shortest: int = TOKENS) -> Fleet:
    """The fleet of one of `MODELS`.

    Args:
        model: its name.
        local: how clients train; `steps` is given.
        test, holdout: examples to evaluate and to measure importance on.
        device: where the model runs.
        shortest: words of the shortest text; lengths are uniform from there to `TOKENS`.
    """
    kind, config, targets, vary = MODELS[model]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        base = hf.base_from_config(config(), targets, kind=kind, classes=CLASSES, tokens=TOKENS, device=device)
    rng = stream(SEED, "adapter")
    layers = {name: fresh(shape, max(RANKS), 1.0, rng) for name, shape in base.spec.modules.items()}
    assert local.steps is not None
    own = local.steps * local.batch
    shares = {f"client_{k}": np.arange(k * own, (k + 1) * own) for k in range(len(RANKS))}
    draw = partial(vary, base, shortest)
    splits = draw(own * len(RANKS), "train"), draw(holdout, "holdout"), draw(test, "test")
    return Fleet(base, local, ServerState(0, Adapter(layers, base.initial_head())), splits[0], shares, *splits[1:])


def texts(base: Base, shortest: int, count: int, name: str) -> Examples:
    """Texts of `shortest` to `TOKENS` random words; the first has as many as there may be."""
    rng = stream(SEED, name)
    lengths = np.append(TOKENS, rng.integers(shortest, TOKENS + 1, count - 1))
    ids = rng.integers(1, base.model.config.vocab_size, lengths.sum(), np.int32)
    return TextSplit(ids, np.append(0, np.cumsum(lengths)), rng.integers(0, CLASSES, count), 0)


def images(base: Base, shortest: int, count: int, name: str) -> Examples:
    """Images of random pixels, all of one size."""
    rng, config = stream(SEED, name), base.model.config
    shape = (count, config.num_channels, config.image_size, config.image_size)
    pixels = rng.integers(0, 256, shape, np.uint8)
    return ImageSplit(pixels, rng.integers(0, CLASSES, count), (0.5,) * 3, (0.5,) * 3)


def bert(layers: int, width: int, heads: int) -> Any:
    """Without dropout in the base, as polyrank runs it; the usual loops would drop, and so do more."""
    return transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def llama() -> Any:
    return transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=8192,
        pad_token_id=0,
        tie_word_embeddings=True,
    )


# What it reads, its config, its targets, its data.
MODELS: dict[str, tuple[str, Any, Sequence[str], Any]] = {
    "minilm": ("text", partial(bert, 6, 384, 12), ["query", "value"], texts),
    "small": ("text", partial(bert, 4, 256, 4), ["query", "value"], texts),
    "vit": ("image", transformers.ViTConfig, ["q_proj", "v_proj"], images),
    "llama": ("text", llama, ["q_proj", "v_proj"], texts),
}
