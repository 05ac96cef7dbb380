"""What Transformers reads again: merged weights, configs, tokenizers and image processors, written to a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from torch import nn

from polyrank.files import write_json
from polyrank.local.base import Base
from polyrank.local.images import Images
from polyrank.local.pretrained import (
    ModelError,
    config_of,
    padding_of,
    padding_token,
    quiet,
    tell_padding,
    tokenizer_at_hand,
    tokenizer_of,
)
from polyrank.local.processors import ImageProcessor, image_processor

_SHARD = "2GB"
"""Of a file of weights: safetensors before 0.8 copy one in memory."""


def save_merged(base: Base, folder: Path) -> None:
    """Writes a base whose weights hold an adapter, as Transformers reads it: safetensors and config.json.

    Images keep the size that they had in training: position embeddings are interpolated once and for all.

    Raises:
        ModelError: if they are interpolated in a way of the model's own.
        OSError: if the disk does not take them; safetensors has an error of its own for it.
    """
    model: Any = base.model
    config = model.config
    if base.images is not None and base.images.extra:
        _resize(base, base.images)
    with quiet():
        usual = transformers.AutoConfig.from_pretrained(str(base.info.base))
        if hasattr(usual, "use_cache"):
            config.use_cache = usual.use_cache
        try:
            model.save_pretrained(folder, max_shard_size=_SHARD)
        except SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from error


def _resize(base: Base, images: Images) -> None:
    """Gives the model the position embeddings of the size that its images have."""
    size = images.size
    config: Any = base.model.config
    having = (m for m in base.modules.values() if hasattr(m, "interpolate_pos_encoding"))
    found = [m for m in having if isinstance(getattr(m, "position_embeddings", None), nn.Parameter)]
    if len(found) != 1:
        own = f"only the model's own, {config.image_size}, can be merged for {config.model_type}"
        raise ModelError(f"model.image_size: {size}: {own}; export the adapter without --merge")
    before = found[0].position_embeddings
    with torch.no_grad():
        tokens = before.new_empty(1, images.tokens, before.shape[-1])
        after = found[0].interpolate_pos_encoding(tokens, size, size)
    found[0].position_embeddings = nn.Parameter(after.contiguous())
    config.image_size = size


def save_config(name: str, folder: Path, classes: Sequence[str] | None) -> None:
    """Writes the config of a base, with these classes if it has any, so that an adapter's folder says what it predicts.

    Raises:
        ModelError: if there is no such config.
    """
    config = config_of(name)
    if classes is not None:
        labels = dict(enumerate(classes))
        config.num_labels, config.id2label = len(labels), labels
        config.label2id = {text: index for index, text in labels.items()}
    if hasattr(config.get_text_config(), "vocab_size"):
        tell_padding(config, padding_token(config, tokenizer_at_hand(name, download=True)))
    with quiet():
        config.save_pretrained(folder)


def save_tokenizer(name: str, folder: Path, max_length: int | None) -> None:
    """Writes the model's tokenizer. It pads with what the model takes for padding; of a classifier, it cuts texts, too.

    Args:
        name: the model's.
        folder: where to.
        max_length: tokens that a classifier's texts are cut to; they are padded on the right, as in training. None: of
            a causal language model.
    """
    tokenizer = tokenizer_of(name)
    pad = padding_of(name, tokenizer)
    if tokenizer.pad_token_id != pad:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    if max_length is not None:
        tokenizer.padding_side = "right"
        tokenizer.model_max_length = min(tokenizer.model_max_length, max_length)
    with quiet():
        tokenizer.save_pretrained(folder)


def save_image_processor(name: str, folder: Path, image_size: int | None) -> ImageProcessor:
    """Writes how images become pixel values, as in training: the whole image, resized, bilinear, normalised."""
    made = image_processor(name, image_size)
    stated = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": made.size, "width": made.size},
        "resample": Image.Resampling.BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": made.mean,
        "image_std": made.std,
        **({"do_convert_rgb": True} if made.channels == 3 else {}),
    }
    write_json(folder / "preprocessor_config.json", stated)
    return made
