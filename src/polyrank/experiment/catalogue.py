"""Every table by name, with what its entries' docstrings say of them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from polyrank.experiment.components import did_you_mean, parameters
from polyrank.experiment.config import ConfigError
from polyrank.experiment.tables import TABLES


def entries(table: str) -> list[dict[str, Any]]:
    """The entries of a table: name, description, reference, options with their defaults.

    Raises:
        ConfigError: if there is no such table.
    """
    if table not in TABLES:
        raise ConfigError(f"list: no table {table!r}.{did_you_mean(table, TABLES)}")
    return [_entry(name, function) for name, function in TABLES[table].items()]


def _entry(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    first, _, rest = (inspect.getdoc(function) or "").partition("\n")
    own = getattr(function, "__name__", name)
    options = {key: default if default is not ... else None for key, (_, default) in parameters(function).items()}
    return {
        "name": name,
        "description": first if own == name else f"Equals {own}. {first}",
        "reference": _reference(first, rest),
        "options": options,
    }


def _reference(first: str, rest: str) -> str:
    """The docstring's section of references, or the paper that its first line names in parentheses."""
    section = re.search(r"References?:\s*\n((?: +.*\n?)+)", rest)
    if section:
        return " ".join(section[1].split())
    return ", ".join(re.findall(r"\(([^()]*\d{4}[^()]*)\)", first))
