"""What Transformers reads again: merged weights, configs, tokenizers and image processors, written to a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import nn

from polyrank.files import write_json
from polyrank.local.base import Base
from polyrank.local.hf import ModelError, padded, quiet
from polyrank.local.images import Images
from polyrank.local.processors import ImageProcessor, image_processor

_SHARD = "2GB"
"""Of a file of weights: safetensors before 0.8 copy one in memory."""


def save_merged(base: Base, folder: Path) -> None:
    """Writes a base whose weights hold an adapter, as Transformers reads it: safetensors and config.json.

    Images keep the size that they had in training: position embeddings are interpolated once and for all.

    Raises:
        ModelError: if they are interpolated in a way of the model's own.
    """
    model: Any = base.model
    config = model.config
    if base.images is not None and base.images.extra:
        _resize(base, base.images)
    with quiet():
        usual = transformers.AutoConfig.from_pretrained(str(base.info.base))
        if hasattr(usual, "use_cache"):
            config.use_cache = usual.use_cache
        model.save_pretrained(folder, max_shard_size=_SHARD)


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
    labels = dict(enumerate(classes or ()))
    named = {"id2label": labels, "label2id": {text: index for index, text in labels.items()}}
    with quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(name, **({} if classes is None else named))
        except (OSError, ValueError) as error:
            raise ModelError(f"{name!r}: no config of the base model: {error}") from None
        padded(config)
        config.save_pretrained(folder)


def save_tokenizer(name: str, folder: Path, max_length: int | None) -> None:
    """Writes the model's tokenizer. It pads with what the model takes for padding, and cuts at `max_length` if any."""
    with quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        if tokenizer.pad_token_id is None:
            pad = padded(transformers.AutoConfig.from_pretrained(name)).pad_token_id
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
        tokenizer.model_max_length = min(tokenizer.model_max_length, max_length or tokenizer.model_max_length)
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
