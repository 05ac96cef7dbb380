"""Reading local files: the names of a file's columns first, then only the columns that are needed."""

from __future__ import annotations

import csv
import difflib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from polyrank.data import csv_columns, json_rows
from polyrank.data.source import DataError, unknown
from polyrank.files import decoded

_FORMATS = {".csv": "csv", ".jsonl": "json", ".json": "json", ".ndjson": "json", ".npz": "npz", ".parquet": "parquet"}

_READ_ERRORS = (pa.ArrowException, OSError, ValueError, EOFError, csv.Error, zipfile.BadZipFile)


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


def check_columns(path: Path, wanted: list[str]) -> None:
    """Refuses a file without the wanted columns (or arrays, or keys of its first row), from its head only.

    Raises:
        DataError: naming the file, the column, and what there is.
    """
    kind, names = kind_of(path), column_names(path)
    if kind == "csv" and len(names) == 1 and wanted != names:
        for sign, called in ((";", "';'"), ("\t", "tabs"), ("|", "'|'")):
            if sign in names[0]:
                raise DataError(
                    f"{path}: no column {wanted[0]!r}: the header, {names[0]!r}, looks separated by {called}; save the"
                    " file with commas between its columns"
                )
    require_columns(wanted, names, f"{path}: row 1" if kind == "json" and names else str(path))


def column_names(path: Path) -> list[str]:
    """The columns (or arrays, or keys of the first row) of a file, read from its head only."""
    kind = kind_of(path)
    with _reading(path, kind):
        if kind == "parquet":
            return list(pa.parquet.read_schema(path).names)
        if kind == "csv":
            return csv_columns.header(path)
        if kind == "npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return list(arrays)
        return json_rows.first_keys(path)


def require_columns(wanted: list[str], present: list[str], where: str) -> None:
    """Refuses the first wanted column that is not present, or is present twice."""
    for name in wanted:
        if name not in present:
            raise unknown("column", name, present, where)
        if (count := present.count(name)) > 1:
            raise DataError(f"{where}: {count} columns are called {name!r}; give each a name of its own")


def read_table(path: Path, columns: list[str], text: list[str]) -> pa.Table:
    """The named columns of a parquet, CSV or JSON file; those in `text` are never taken for numbers.

    JSON is one object a line, or one array of objects.
    """
    kind = kind_of(path)
    with _reading(path, kind):
        if kind == "parquet":
            return pa.parquet.read_table(path, columns=columns, partitioning=None)
        if kind == "npz":
            raise ValueError("it holds arrays; a table is a .parquet, .csv or .jsonl file")
        return (csv_columns if kind == "csv" else json_rows).read_columns(path, columns, text)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a parquet, CSV or JSON file; cells of CSV are text."""
    kind = kind_of(path)
    with _reading(path, kind):
        if kind == "json":
            return list(json_rows.read_rows(path))
        names = column_names(path)
        require_columns(names, names, str(path))
        return list(read_table(path, names, names).to_pylist())


def read_arrays(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """The named arrays of an .npz file."""
    with _reading(path, "npz"), path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in names}


@contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    """Errors inside name the file, and the encoding where it is another than UTF-8."""
    try:
        yield
    except DataError:
        raise
    except _READ_ERRORS as error:
        reason: Exception = error
        if kind in ("csv", "json") and not isinstance(error, OSError):
            try:
                decoded(path.read_bytes())
            except ValueError as better:
                reason = better
        raise DataError(f"{path}: not a readable {kind} file: {reason}") from error
