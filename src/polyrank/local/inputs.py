"""Inputs of random content that a model can be called with: to measure it, and to hold an export against it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyrank.local.configs import numbers, vocabulary
from polyrank.local.images import Images


def random_images(images: Images, size: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """A batch of `size` images, as the model takes them."""
    shape = (size, images.channels, images.size, images.size)
    return {"pixel_values": torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))}


def random_texts(config: Any, size: int, tokens: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """A batch of `size` texts of so many tokens; every other one is a token short, so that a mask is due.

    None of the tokens pads or ends a text, but for the last one of each for an encoder-decoder, whose classifier reads
    there.

    Args:
        config: the model's.
        size: texts.
        tokens: positions of each.
        rng: draws the tokens.
    """
    pad, ends = (numbers(config, f"{kind}_token_id") for kind in ("pad", "eos"))
    usual = np.setdiff1d(np.arange(vocabulary(config)), [*pad, *ends])
    ids = torch.from_numpy(usual[rng.integers(len(usual), size=(size, tokens))])
    mask = torch.ones_like(ids)
    mask[1::2, -1] = 0
    if getattr(config, "is_encoder_decoder", False) and ends:
        ids[torch.arange(size), mask.sum(1) - 1] = ends[0]
    return {"input_ids": ids * mask + (1 - mask) * next(iter(pad), 0), "attention_mask": mask}
