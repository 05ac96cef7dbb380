"""Reading local files: the names of a file's columns first, then only the columns that are needed."""

from __future__ import annotations

import difflib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from polyrank.data.source import DataError, unknown
from polyrank.files import from_json

_FORMATS = {".csv": "csv", ".jsonl": "json", ".json": "json", ".ndjson": "json", ".npz": "npz", ".parquet": "parquet"}

_CSV = pa.csv.ParseOptions(newlines_in_values=True)
_LONGEST_ROW = 2**24  # bytes; of a JSON object
_READ_ERRORS = (pa.ArrowException, OSError, ValueError, EOFError, zipfile.BadZipFile)


def kind_of(path: Path) -> str:
    """The format a path's extension names: "csv", "json", "npz" or "parquet".

    Raises:
        DataError: if there is no such file, or its extension is not one of these.
    """
    if not path.is_file():
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=1)
        raise DataError(f"{path}: no such file" + (f"; did you mean {path.parent / near[0]}?" if near else ""))
    if path.suffix.lower() not in _FORMATS:
        raise unknown("format", path.suffix, sorted(_FORMATS), str(path))
    return _FORMATS[path.suffix.lower()]


def column_names(path: Path) -> list[str]:
    """The columns (or arrays, or keys of the first row) of a file, read from its head only."""
    kind = kind_of(path)
    try:
        if kind == "parquet":
            return pa.parquet.read_schema(path).names
        if kind == "csv":
            with pa.csv.open_csv(path, parse_options=_CSV) as reader:
                return reader.schema.names
        if kind == "npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return list(arrays)
        return _first_keys(path)
    except _READ_ERRORS as error:
        raise _unreadable(path, kind, error) from error


def require_columns(wanted: list[str], present: list[str], where: str) -> None:
    """Nothing, or the error for the first wanted column that is not present."""
    for name in wanted:
        if name not in present:
            raise unknown("column", name, present, where)


def read_table(path: Path, columns: list[str], text: list[str]) -> pa.Table:
    """The named columns of a parquet, CSV or JSON file; those in `text` are never taken for numbers.

    JSON is one object a line, or one array of objects.
    """
    kind = kind_of(path)
    try:
        if kind == "parquet":
            return pa.parquet.read_table(path, columns=columns)
        if kind == "csv":
            types = {name: pa.string() for name in text}
            options = pa.csv.ConvertOptions(include_columns=columns, column_types=types)
            return pa.csv.read_csv(path, parse_options=_CSV, convert_options=options)
        if _is_array(path):
            return _array(path, columns, text)
        schema = pa.schema([(name, pa.string()) for name in text])
        options = pa.json.ParseOptions(explicit_schema=schema)
        blocks = pa.json.ReadOptions(block_size=_LONGEST_ROW)
        return pa.json.read_json(path, read_options=blocks, parse_options=options).select(columns)
    except _READ_ERRORS as error:
        raise _unreadable(path, kind, error) from error


def read_arrays(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """The named arrays of an .npz file."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except _READ_ERRORS as error:
        raise _unreadable(path, "npz", error) from error


def _unreadable(path: Path, kind: str, error: Exception) -> DataError:
    return DataError(f"{path}: not a readable {kind} file: {error}")


def _is_array(path: Path) -> bool:
    with path.open(encoding="utf-8") as file:
        while (first := file.read(1)).isspace():
            pass
    return first == "["


def _array(path: Path, columns: list[str], text: list[str]) -> pa.Table:
    rows = _rows(path)
    read = {name: [row.get(name) for row in rows] for name in columns}
    return pa.table({name: pa.array(read[name], pa.string() if name in text else None) for name in columns})


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = from_json(path.read_text(encoding="utf-8"))
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"entry {number} of its array is not an object")
    return list(rows)


def _first_keys(path: Path) -> list[str]:
    if _is_array(path):
        return list(next(iter(_rows(path)), {}))
    with path.open(encoding="utf-8") as lines:
        first = next((line for line in lines if line.strip()), "")
    row = from_json(first) if first else None
    if not isinstance(row, dict):
        raise ValueError("its first line is not a JSON object (one object a line, or one array of them, is expected)")
    return list(row)
