"""Rows of a batch filled up to one length."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np


class Padding(NamedTuple):
    """How the texts of a batch are filled up.

    Attributes:
        side: where.
        width: positions of every batch; None: those of its longest text. A model whose logits depend on how far a
            text is filled up has one width for all.
    """

    side: Literal["right", "left"] = "right"
    width: int | None = None

    def lengths(self, tokens: np.ndarray) -> np.ndarray:
        """The input positions that texts of so many tokens take, int64 (N,)."""
        return tokens if self.width is None else np.maximum(tokens, self.width)

    def rows(
        self, ids: np.ndarray, offsets: np.ndarray, indices: np.ndarray, token: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Some of many texts that stand end to end, a row each, int64; and where their tokens are.

        Args:
            ids: all tokens.
            offsets: text i is ``ids[offsets[i]:offsets[i + 1]]``.
            indices: of the texts.
            token: fills them up.
        """
        starts, tokens = offsets[indices], offsets[indices + 1] - offsets[indices]
        width = int(self.lengths(tokens).max())
        position = np.arange(width) - (width - tokens[:, None] if self.side == "left" else 0)
        mask = (position >= 0) & (position < tokens[:, None])
        where = np.clip(starts[:, None] + position, 0, len(ids) - 1)
        return np.where(mask, ids[where], token).astype(np.int64), mask


RIGHT = Padding()
