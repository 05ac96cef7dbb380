"""Texts for a causal language model, made ready once: token ids, and from which on the next one is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from polyrank.data.cache import cache_path, log, replacing
from polyrank.data.padding import RIGHT, Padding
from polyrank.data.prepare import read_arrays_of
from polyrank.data.source import DataError, Source, Turn

IGNORED = -100
"""The label of a token that nothing is asked of."""

_TURNS_AT_ONCE = 1000

Encode = Callable[[Sequence[Turn]], list[tuple[list[int], int]]]
"""Turns to their token ids, and the position of the first token that is learnt."""


@dataclass(frozen=True, eq=False)
class CausalSplit:
    """Tokenised texts, end to end: text i is ``ids[offsets[i]:offsets[i + 1]]``, learnt from token ``starts[i]`` on.

    Attributes:
        ids: all token ids, int32.
        offsets: int64 (N + 1,).
        starts: int64 (N,).
        labels: each text's category, which no model learns, int64 (N,).
        pad_id: the token that fills up a batch.
        padding: how it does.
    """

    ids: np.ndarray
    offsets: np.ndarray
    starts: np.ndarray
    labels: np.ndarray
    pad_id: int
    padding: Padding = RIGHT

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Input positions per text, int64 (N,): its tokens, but where all texts are filled up to one width."""
        return self.padding.lengths(np.diff(self.offsets))

    @cached_property
    def targets(self) -> np.ndarray:
        """Tokens of each text that are asked for, int64 (N,): those from `starts` on, but never the first of all."""
        return np.maximum(np.diff(self.offsets) - np.maximum(self.starts, 1), 0)

    @property
    def silent(self) -> int:
        """Texts of which nothing is asked, because their response is empty or was cut off."""
        return int((self.targets == 0).sum())

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask and labels (all b x longest, int64)."""
        ids, mask = self.padding.rows(self.ids, self.offsets, indices, self.pad_id)
        learnt = mask & (mask.cumsum(1) > self.starts[indices][:, None])
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
            "labels": torch.from_numpy(np.where(learnt, ids, IGNORED)),
        }

    def packed(self, rows: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """input_ids, position_ids and labels (all b x longest, int64) of rows that texts share, end to end.

        Positions begin anew with each text; a row's last goes on over what fills it up.

        Args:
            rows: the texts of each row.
        """
        width = max(int(self.lengths[row].sum()) for row in rows)
        ids = np.full((len(rows), width), self.pad_id, np.int64)
        labels = np.full_like(ids, IGNORED)
        positions = np.zeros_like(ids)
        for row, texts in enumerate(rows):
            start = 0
            for text in texts:
                own = self.ids[self.offsets[text] : self.offsets[text + 1]]
                stop, learnt = start + len(own), max(int(self.starts[text]), 1)  # nothing before asks for the first
                ids[row, start:stop] = own
                labels[row, start + learnt : stop] = own[learnt:]
                positions[row, start:] = np.arange(width - start)
                start = stop
        made = {"input_ids": ids, "position_ids": positions, "labels": labels}
        return {name: torch.from_numpy(values) for name, values in made.items()}


def prepare_causal(source: Source, encode: Encode, pad_id: int, fingerprint: str) -> CausalSplit:
    """Tokenises a split once; the next call with the same turns and fingerprint reads the result from disk.

    Args:
        source: turns.
        encode: turns to token ids and the position of the first that is learnt, cut as the model needs.
        pad_id: the padding token.
        fingerprint: says all that decides what `encode` returns.
    """
    turns: list[Turn] = source.inputs  # type: ignore[assignment]
    path = cache_path([part for turn in turns for part in turn], "causal", fingerprint, pad_id, suffix=".npz")
    ready = read_arrays_of(path, len(source), "ids", "offsets", "starts") if path else None
    if ready is None:
        ready = _tokenise(turns, encode, pad_id)
        if path:
            with replacing(path) as temporary:
                np.savez(temporary, ids=ready[0], offsets=ready[1], starts=ready[2])
    return CausalSplit(ready[0], ready[1], ready[2], source.labels, pad_id)


def warn_of_silent(split: CausalSplit, name: str, max_length: int) -> None:
    """A warning that counts the texts of a split of which nothing is asked.

    Raises:
        DataError: if those are all.
    """
    if not split.silent or not len(split):
        return
    said = f"{name}: of {split.silent} of {len(split)} texts nothing is asked: their response is empty, or cut off"
    advice = f"model.max_length is {max_length} tokens"
    if split.silent == len(split):
        raise DataError(f"{said}; {advice}, and data.response names the column of responses")
    log.warning("%s (%s)", said, advice)


def _tokenise(turns: Sequence[Turn], encode: Encode, pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    pieces, lengths, starts = [np.empty(0, np.int32)], [0], []
    for at in range(0, len(turns), _TURNS_AT_ONCE):
        for ids, first in encode(turns[at : at + _TURNS_AT_ONCE]):
            pieces.append(np.array(ids or [pad_id], np.int32))
            lengths.append(len(pieces[-1]))
            starts.append(first)
    return np.concatenate(pieces), np.cumsum(lengths).astype(np.int64), np.array(starts, np.int64)
