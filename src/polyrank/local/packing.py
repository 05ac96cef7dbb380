"""Texts of a batch laid end to end in few rows, each as if it were alone, instead of filled up to the longest.

Models tell the texts of a row apart by their positions, which begin anew with each. What a step learns is the same,
up to rounding: the loss is the mean over tokens, whatever row they are in.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from polyrank.errors import InputError
from polyrank.local.base import Base
from polyrank.local.data import Indices

_PROBE = 4  # tokens of a text


def rows_of(part: Indices, lengths: Indices, pack: bool) -> list[Indices]:
    """A batch's rows, each the examples in it: one, or as many as fit beside each other within the longest.

    Rows are filled by first fit, longest texts first, which takes at most 11/9 of the fewest rows (Johnson 1973).

    Args:
        part: the examples of the batch.
        lengths: of all examples.
        pack: whether rows are shared.
    """
    if not pack:
        return [part[at : at + 1] for at in range(len(part))]
    ordered = part[np.argsort(-lengths[part], kind="stable")]
    rows: list[list[int]] = []
    room: list[int] = []
    for example, length in zip(ordered.tolist(), lengths[ordered].tolist(), strict=True):
        place = next((row for row, free in enumerate(room) if free >= length), None)
        if place is None:
            rows.append([example])
            room.append(int(lengths[ordered[0]]) - length)
        else:
            rows[place].append(example)
            room[place] -= length
    return [np.array(row) for row in rows]


def check_packing(base: Base) -> None:
    """Asks the model itself whether it tells the texts of a row apart.

    Raises:
        InputError: if the second of two texts sees the first, or the model tells classes.
    """
    what = f"local.pack: true: {base.info.base}"
    if not base.causal:
        raise InputError(f"{what} tells classes; packed are the texts of causal language models. Valid: false")
    first, other, second = (torch.arange(_PROBE)[None] + 3 + _PROBE * text for text in range(3))
    ids = [torch.cat([before, second], 1) % base.model.config.vocab_size for before in (first, other)]
    try:
        one, two = (_logits(base, row, torch.arange(_PROBE).repeat(2)[None])[:, _PROBE:] for row in ids)
        alone = _logits(base, ids[0][:, _PROBE:], torch.arange(_PROBE)[None])
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} takes no positions of tokens ({error}). Valid: false") from None
    near = 1e-4 if alone.dtype == torch.float32 else 5e-2
    if not torch.equal(one, two) or not torch.allclose(one, alone, rtol=near, atol=near * float(alone.abs().max())):
        raise InputError(f"{what} does not tell apart the texts of a row. Valid: false")


@torch.no_grad()
def _logits(base: Base, ids: Tensor, positions: Tensor) -> Tensor:
    return base.logits({"input_ids": ids, "position_ids": positions}, {})
