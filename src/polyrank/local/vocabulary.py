"""Tokens against the rows of a model's embedding: a tokenizer that has grown needs a model that has, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from polyrank.errors import InputError
from polyrank.local.pretrained import tokenizer_at_hand

_REMEDY = "resize the model's embedding and save it with the tokenizer, or take the model's own tokenizer"


def rows_of(model: nn.Module) -> int | None:
    """Tokens that a model has an embedding for; None of a model that takes none."""
    try:
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return getattr(embedding, "num_embeddings", None)


def check_tokenizer(model: nn.Module, name: str) -> list[str]:
    """Holds a tokenizer, if it is on this machine, against a model whose weights need not be there.

    Special tokens that the model lacks may never occur, as Gemma 3's of images, or an added padding token; of these it
    is said only. Words occur in texts.

    Returns:
        What there is to say.

    Raises:
        InputError: if a word of the tokenizer has no row.
    """
    rows, tokenizer = rows_of(model), tokenizer_at_hand(name)
    if rows is None or tokenizer is None or len(tokenizer) <= rows:
        return []
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {*tokenizer.all_special_ids}
    words = [(i, token) for i, token in beyond if i not in special]
    if words:
        raise InputError(_refusal(f"model.name: {name!r}", *words[0], rows, len(words)))
    unneeded = {tokenizer.pad_token_id}
    return [
        f"the tokenizer has the special token {token!r}, number {i}, and the model's embedding {rows} rows: a run is "
        "refused where it occurs"
        for i, token in beyond
        if i not in unneeded
    ][:1]


def check_tokens(ids: np.ndarray | Sequence[int], model: nn.Module, name: str, where: str) -> None:
    """Refuses tokens that a model has no embedding for.

    Args:
        ids: token ids, in any order.
        model: the model.
        name: its name, whose tokenizer names the token.
        where: where the tokens are from.

    Raises:
        InputError: naming the first such token.
    """
    rows, found = rows_of(model), np.asarray(ids)
    if rows is None or not found.size or (found.min() >= 0 and found.max() < rows):
        return
    strange = found[(found < 0) | (found >= rows)]
    tokenizer = tokenizer_at_hand(name)
    token = None if tokenizer is None else tokenizer.convert_ids_to_tokens(int(strange[0]))
    raise InputError(_refusal(where, int(strange[0]), token, rows, len(np.unique(strange))))


def check_splits(splits: Mapping[str, Any], model: nn.Module, name: str, where: str = "data") -> None:
    """Refuses prepared texts with tokens that a model has no embedding for; images pass.

    Raises:
        InputError: naming the split and the first such token.
    """
    for split, prepared in splits.items():
        if hasattr(prepared, "ids"):
            check_tokens(prepared.ids, model, name, f"{where}: {split}")


def _refusal(where: str, number: int, token: str | None, rows: int, count: int) -> str:
    more = f" and {count - 1} more" if count > 1 else ""
    return (
        f"{where}: the token {token!r}, number {number}{more}, has no embedding: the model has {rows} rows, 0 to "
        f"{rows - 1}; {_REMEDY}"
    )
