"""Whether a model predicts each token from those before it alone: by its config, and by the model itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyrank.errors import InputError
from polyrank.local.base import Base
from polyrank.local.describe import quantization_of

_PROBE = 12  # tokens
_ROUNDING = 1e-5
"""Of the largest logit, in float32: experts of a mixture sum in another order when other tokens change."""


def check_causal_config(config: Any, name: str, masked: bool) -> None:
    """Refuses what a config says is no causal language model.

    Args:
        config: the model's.
        name: the model's.
        masked: whether models of this type predict masked tokens, unless the config says otherwise.

    Raises:
        InputError: for an encoder-decoder, or an encoder.
    """
    what = f"model.name: {name!r}: {config.model_type}"
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{what} is an encoder-decoder; texts are learnt by decoders alone, such as Llama or GPT-2")
    if masked and not getattr(config, "is_decoder", False) and not getattr(config, "causal", False):
        raise InputError(
            f"{what} predicts masked tokens and sees later ones; a causal language model is a decoder, such as Llama "
            "or GPT-2"
        )


def check_causal(base: Base) -> None:
    """Asks a causal language model whether the logits at a position depend on later tokens.

    Raises:
        InputError: if they do, or the model takes more than token ids.
    """
    name = f"model.name: {base.info.base!r}: {base.model.config.model_type}"
    size = int(base.model.get_input_embeddings().num_embeddings)  # type: ignore[operator, union-attr]
    ids = torch.randint(size, (1, _PROBE), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, _PROBE // 2 :] = (other[:, _PROBE // 2 :] + 1 + size // 2) % size
    try:
        one, two = _logits(base, ids), _logits(base, other)
    except Exception as error:  # whatever a model says that wants images or a decoder's input besides
        raise InputError(f"{name} cannot be run on token ids alone: {error}") from None
    gap = (one - two)[:, : _PROBE // 2].abs().max() / one.abs().max().clamp(min=1e-30)
    exact = base.model.dtype == torch.float32 and quantization_of(base.model) is None
    near = _ROUNDING if exact else 1e-2
    if gap > near:
        raise InputError(
            f"{name} is no causal language model: its logits at a position change by {float(gap):.1e} of the largest "
            "with later tokens"
        )


@torch.no_grad()
def _logits(base: Base, ids: Tensor) -> Tensor:
    return base.logits({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {}).float()
