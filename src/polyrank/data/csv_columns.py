"""CSV files of examples: columns separated by commas, their names in the first line, values as they are written."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from polyrank.data.source import DataError

_LARGEST_BLOCK = 2**31 - 1
_WHOLE = r"^(0|-?[1-9][0-9]*)$"


def header(path: Path) -> list[str]:
    """The names of the columns, as they are written.

    Raises:
        ValueError: if there is none, or it is not in UTF-8.
    """
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        names = next((row for row in csv.reader(file) if row), None)
    if names is None:
        raise ValueError("it is empty")
    if b"\0" in "".join(names).encode():  # which refuses what is not UTF-8
        raise ValueError("its header has bytes of value 0")
    return names


def read_columns(path: Path, columns: Sequence[str], text: Sequence[str]) -> pa.Table:
    """The named columns as text, as it is written.

    Those that are not in `text` become whole numbers where every value is written as one is: 12, and not 012 or 12.0.

    Raises:
        DataError: for a row of more or fewer cells than the header, and a quote that nothing closes.
        pa.ArrowException: for text that is not UTF-8.
    """
    last = header(path)[-1]
    included = list(dict.fromkeys([*columns, last]))
    options = pa.csv.ConvertOptions(include_columns=included, column_types=dict.fromkeys(included, pa.string()))
    whole = pa.csv.ReadOptions(block_size=min(max(path.stat().st_size, 1), _LARGEST_BLOCK))  # a cell may be that long
    parsing = pa.csv.ParseOptions(newlines_in_values=True)
    try:
        table = pa.csv.read_csv(path, read_options=whole, parse_options=parsing, convert_options=options)
    except pa.ArrowInvalid:
        _refuse_ragged(path, whole.block_size)
        raise
    _refuse_open_quote(path, table[last])
    return pa.table({name: table[name] if name in text else _whole_numbers(table[name]) for name in columns})


def _whole_numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Numbers in place of text that says nothing else, so that they sort as numbers; other text as it is."""
    if not pc.all(pc.match_substring_regex(column, _WHOLE), min_count=0).as_py():
        return column
    for kind in (pa.int64(), pa.uint64()):
        try:
            return column.cast(kind)
        except pa.ArrowInvalid:
            pass
    return column


def _refuse_ragged(path: Path, block: int) -> None:
    rows: list[pa.csv.InvalidRow] = []

    def keep(row: pa.csv.InvalidRow) -> str:
        rows.append(row)
        return "error"

    try:
        pa.csv.read_csv(
            path,
            read_options=pa.csv.ReadOptions(block_size=block, use_threads=False),  # which numbers the rows
            parse_options=pa.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=keep),
        )
    except pa.ArrowInvalid:
        if rows:
            row = rows[0]
            raise DataError(
                f"{path}: row {row.number - 1}: has {row.actual_columns} cells, and the header {row.expected_columns}:"
                f" {_beginning(row.text)} (a cell with a comma, a quote or a new line in it stands in double quotes)"
            ) from None


def _refuse_open_quote(path: Path, column: pa.ChunkedArray) -> None:
    """A quote that nothing closes takes all that follows into the last cell."""
    value = column[-1].as_py() if len(column) else ""
    if "\n" not in value and "\r" not in value:
        return
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, 100), 2)
        end = file.read().rstrip()
    if not end.endswith(b'"'):
        raise DataError(
            f"{path}: row {len(column)}: a double quote begins a cell, and none ends it: {_beginning(value)}"
        )


def _beginning(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "...")
