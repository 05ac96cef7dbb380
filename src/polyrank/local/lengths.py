"""How long a text a model takes, read from its modules: tables of positions, and what its config says of others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from polyrank.errors import InputError

_UNTOLD = 2048
"""Positions for answers and choices, of models that state no limit."""
_SIGHT = ("vision", "visual", "image", "audio")


def table_positions(model: nn.Module) -> int | None:
    """The positions that a model has embeddings for; None where it has no table of them.

    RoBERTa's table begins with those up to its padding token's number, OPT's and BART's with two (`offset`); these are
    of no text.
    """
    return min(_tables(model), default=None)


def _tables(model: nn.Module) -> Iterator[int]:
    modules = dict(model.named_modules())
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        if not isinstance(module, nn.Embedding) or not ("position" in leaf or leaf == "wpe"):
            continue
        if any(word in parent for word in _SIGHT):
            continue
        offset = getattr(module, "offset", None)
        if not isinstance(offset, int):
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
        numbers = getattr(modules.get(parent), "position_ids", None)
        yield min(module.num_embeddings - offset, module.num_embeddings if numbers is None else numbers.shape[-1])


def trained_positions(config: Any) -> int | None:
    """The positions that a model without a table is made for, by its config; None where it states none.

    Rotary embeddings that are stretched (``rope_parameters`` with a factor) reach as far as they are stretched.
    Positions relative to each other have no end.
    """
    text = config.get_text_config()
    if getattr(text, "relative_attention", False) or hasattr(text, "relative_attention_num_buckets"):
        return None
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    stated = next((n for name in names if isinstance(n := getattr(text, name, None), int) and n > 0), None)
    if stated is None:
        return None
    rotary = getattr(text, "rope_parameters", None) or {}
    kinds = [kind for kind in (rotary, *rotary.values()) if isinstance(kind, dict)]
    return max([stated, *(_stretched(kind, stated) for kind in kinds)])


def _stretched(rotary: dict[str, Any], stated: int) -> int:
    before = rotary.get("original_max_position_embeddings") or stated
    return int(before * (rotary.get("factor") or 1)) if rotary.get("rope_type", "default") != "default" else 0


def positions(model: nn.Module) -> int:
    """The longest text that a model takes, in tokens; 2048 where it states no limit."""
    return table_positions(model) or trained_positions(model.config) or _UNTOLD


def check_length(model: nn.Module, max_length: int, name: str) -> None:
    """Refuses texts that are longer than the model's positions.

    Raises:
        InputError: saying how many there are.
    """
    table, trained = table_positions(model), trained_positions(model.config)
    most = trained if table is None else table
    if most is None or max_length <= most:
        return
    if table is not None:
        why = f"{name!r} has embeddings for {table} positions"
    else:
        why = f"{name!r} is made for {trained} positions, as its config says (max_position_embeddings)"
    raise InputError(f"model.max_length: {max_length}: {why}. Valid: 1 to {most}")
