"""Whether a text's logits depend on what else is in its batch: the model is asked, and batches are made to suit it.

Where padding leaks (a convolution over positions, landmarks of attention, a class that is read at the last position),
a text's class would depend on the texts beside it. Padding on the left, or every batch at one width, mends that.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from polyrank.data import CausalSplit, ImageSplit, TextSplit
from polyrank.data.padding import Padding
from polyrank.local.base import Base
from polyrank.local.probe import distinct

_log = logging.getLogger(__name__)

_EXTRA = (1, 7)  # positions that a text is filled up by
_NEAR = {torch.float32: 3e-5}
_COARSE = 2e-2


Split = TextSplit | ImageSplit | CausalSplit


def filled_up(base: Base, splits: Mapping[str, Split], width: int) -> dict[str, Split]:
    """The splits of one data set, with texts filled up so that the model does not notice; what is unusual is logged.

    Args:
        base: the model.
        splits: the first one that has texts asks.
        width: positions of the longest text there can be.
    """
    sample = next((split for split in splits.values() if len(split)), None)
    if sample is None or isinstance(sample, ImageSplit):
        return dict(splits)
    padding = padding_of(base, sample, width)
    if padding.side == "left":
        _log.warning("%s: texts are filled up on the left: on the right, their logits change", base.info.base)
    if padding.width is not None:
        what = "a text's logits depend on how far it is filled up, so every batch has %d positions"
        _log.warning(f"%s: {what}", base.info.base, width)
    return {
        name: split if isinstance(split, ImageSplit) else replace(split, padding=padding)
        for name, split in splits.items()
    }


def padding_of(base: Base, data: TextSplit | CausalSplit, width: int) -> Padding:
    """How the texts of a batch are to be filled up, so that none of them notices.

    On the right, up to the longest; or on the left; or, where the model notices both, every batch up to `width`.

    Args:
        base: the model.
        data: texts to ask with.
        width: positions of the longest text there can be.
    """
    for padding in (Padding(), Padding("left")):
        if not _leaks(base, data, padding, width):
            return padding
    return Padding(width=width)


def _leaks(base: Base, data: TextSplit | CausalSplit, padding: Padding, width: int) -> bool:
    """Whether logits of single texts change with how far they are filled up."""
    for example in distinct(data, 2):
        tokens = int(np.diff(data.offsets)[example])
        alone = _logits(base, replace(data, padding=padding), example)
        for positions in {min(tokens + extra, width) for extra in (*_EXTRA, width)} - {tokens}:
            filled = _logits(base, replace(data, padding=Padding(padding.side, positions)), example)
            if float((filled - alone).abs().max()) > _tolerance(base) * float(alone.abs().max()):
                return True
    return False


def _tolerance(base: Base) -> float:
    return _NEAR.get(next(base.model.parameters()).dtype, _COARSE)


@torch.no_grad()
def _logits(base: Base, data: TextSplit | CausalSplit, example: int) -> Tensor:
    """One text's, at its tokens where every position has some."""
    batch = data.batch(np.array([example]))
    logits = base.logits(batch, {}).float()
    return logits[:, batch["attention_mask"][0].bool()] if logits.ndim == 3 else logits
