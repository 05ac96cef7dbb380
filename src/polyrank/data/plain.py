"""Columns that name things (labels, sites, categories): whole numbers or text, and never empty."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from polyrank.data.source import DataError
from polyrank.errors import shortened


def as_text(column: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """A column of text as strings, however Arrow keeps it; None for a column of something else."""
    column = _decoded(column)
    if pa.types.is_null(column.type) or str(column.type) == "string_view":
        return column.cast(pa.large_string())
    return column if str(column.type) in ("string", "large_string") else None


def plain_column(column: pa.ChunkedArray, name: str, where: str) -> np.ndarray:
    """A column of whole numbers or text as an array, integers or objects; true and false are 1 and 0.

    Raises:
        DataError: for a value that is missing, empty or of spaces alone, naming its row, and for other types.
    """
    text = as_text(column)
    values = _decoded(column) if text is None else text
    empty = values.is_null() if text is None else pc.equal(pc.utf8_trim_whitespace(pc.fill_null(text, "")), "")
    if (row := pc.index(empty, True).as_py()) >= 0:
        raise DataError(f"{where}: column {name!r} is empty in row {row + 1}")
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.int64())
    if text is None and not pa.types.is_integer(values.type):
        shown = f", such as {shortened(values[0].as_py())} in row 1" if len(values) else ""
        raise DataError(f"{where}: column {name!r} holds {values.type}{shown}; it must hold whole numbers or text")
    found: np.ndarray = values.to_numpy()
    return found


def plain_array(values: np.ndarray, name: str, where: str) -> np.ndarray:
    """`plain_column` of an array, as .npz files have them."""
    if values.ndim != 1:
        raise DataError(f"{where}: array {name!r} has shape {values.shape}; it must have one value for each example")
    if values.dtype.kind in "SU":
        try:
            texts = values.astype(str).tolist()
        except UnicodeDecodeError:
            raise DataError(f"{where}: array {name!r} holds bytes that are no text; save it as strings") from None
        return plain_column(pa.chunked_array([pa.array(texts, pa.string())]), name, where)
    if values.dtype.kind not in "biuf":
        raise DataError(f"{where}: array {name!r} holds {values.dtype}; it must hold whole numbers or text")
    return plain_column(pa.chunked_array([pa.array(values)]), name, where)


def _decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
