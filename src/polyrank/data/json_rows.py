"""JSON files of examples: one object a line, or one array of objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from polyrank.data.source import DataError
from polyrank.errors import shortened
from polyrank.files import from_json, read_text


def first_keys(path: Path) -> list[str]:
    """The keys of a file's first object; none where there is no object."""
    return list(next(read_rows(path), {}))


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file, in order; lines are read as they are asked for.

    Raises:
        ValueError: for what is not JSON or no object, naming the row, from 1.
    """
    for number, row in enumerate(_array(path) if _is_array(path) else _lines(path), 1):
        if not isinstance(row, dict):
            raise ValueError(
                f"row {number} is not a JSON object (one object a line, or one array of them, is expected)"
            )
        yield row


def read_columns(path: Path, columns: Sequence[str], text: Sequence[str]) -> pa.Table:
    """The named columns; those in `text` hold text, the others whole numbers or text. A missing key is null.

    Raises:
        DataError: for a value of another kind, naming the row and the column.
        ValueError: as `read_rows`.
    """
    values: dict[str, list[Any]] = {name: [] for name in columns}
    for row in read_rows(path):
        for name, column in values.items():
            column.append(row.get(name))
    return pa.table(
        {
            name: _texts(path, name, column) if name in text else _plain(path, name, column)
            for name, column in values.items()
        }
    )


def _is_array(path: Path) -> bool:
    with path.open(encoding="utf-8-sig") as file:
        while (first := file.read(1)).isspace():
            pass
    return first == "["


def _array(path: Path) -> list[Any]:
    return list(from_json(read_text(path), unique=True, characters=True))


def _lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate((line for line in lines if not line.isspace()), 1):
            try:
                yield from_json(line, unique=True, characters=True)
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from None


def _texts(path: Path, name: str, values: list[Any]) -> pa.Array:
    for row, value in enumerate(values, 1):
        if not (value is None or isinstance(value, str)):
            raise DataError(
                f"{path}: row {row}: column {name!r} holds {shortened(value)}; it must hold text, in quotes"
            )
    return pa.array(values, pa.string())


def _plain(path: Path, name: str, values: list[Any]) -> pa.Array:
    """Values of one kind, whatever it is."""
    kinds = {type(value): row for row, value in reversed(list(enumerate(values))) if value is not None}
    if len(kinds) > 1:
        first, second = (f"{shortened(values[row])} in row {row + 1}" for row in sorted(kinds.values())[:2])
        raise DataError(
            f"{path}: column {name!r} holds {first} and {second}; it must hold whole numbers or text, and not both"
        )
    try:
        return pa.array(values, pa.uint64() if int in kinds and max(v or 0 for v in values) >= 2**63 else None)
    except OverflowError:
        raise DataError(
            f"{path}: column {name!r} holds whole numbers of more than 64 bits; write them as text"
        ) from None
