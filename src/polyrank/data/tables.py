"""Tables of examples, from local files: parquet, CSV, JSON lines and .npz, all through one path to `Source`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from polyrank.data.formats import column_names, kind_of, read_arrays, read_table, require_columns
from polyrank.data.source import DataError, Dataset, Source, unknown
from polyrank.files import from_json


class Columns(NamedTuple):
    """Which columns are the inputs, the label, and what else to keep."""

    kind: Literal["text", "image"]
    inputs: list[str]
    label: str
    others: list[str]

    @property
    def all(self) -> list[str]:
        """Every column to read, once each."""
        return list(dict.fromkeys([*self.inputs, self.label, *self.others]))


class Raw(NamedTuple):
    """One split before its labels are numbers: `labels` holds integers or strings."""

    where: str
    inputs: list[str] | list[bytes] | np.ndarray
    labels: np.ndarray
    columns: dict[str, np.ndarray]
    class_names: list[str] | None = None


def files(
    *,
    train: Path,
    test: Path,
    validation: Path | None = None,
    text: str | list[str] | None = None,
    image: str | None = None,
    label: str = "label",
    columns: list[str] | None = None,
    classes: Path | list[str] | None = None,
) -> Dataset:
    """Local parquet, CSV, JSON-lines or .npz files, one for each split.

    Exactly one of `text` and `image` names the inputs. In an .npz file the names are those of its arrays, and
    images are uint8 (N, H, W) or (N, H, W, C).

    Args:
        train: the file that is split among the clients.
        test: the file for reporting.
        validation: the file for selection; without it, part of train is held out.
        text: the text column; several are joined in order with one space, empty ones left out.
        image: the image column: encoded bytes, or the hub's {bytes, path} pairs.
        label: the class column: whole numbers from 0, or strings, numbered in sorted order over all splits.
        columns: other columns to keep, for example the one that names natural clients.
        classes: the class names in order, as a list or as a JSON file that holds one.

    Raises:
        DataError: for a file, a column or a value that cannot be used.
    """
    wanted = wanted_columns(text, image, label, columns)
    paths = [Path(path) for path in (train, validation, test) if path is not None]
    for path in paths:
        require_columns(wanted.all, column_names(path), str(path))
    names = _read_classes(classes)
    splits = [read_raw(path, wanted) for path in paths]
    return to_dataset("files", wanted.kind, splits, names)


def wanted_columns(text: str | list[str] | None, image: str | None, label: str, columns: list[str] | None) -> Columns:
    """The columns to read, from the options that `files` and `hub` share."""
    if bool(text) == bool(image):
        raise DataError(f"data: exactly one of text and image names a column; got text={text!r}, image={image!r}")
    inputs = [image] if image else [text] if isinstance(text, str) else list(text or [])
    return Columns("image" if image else "text", inputs, label, list(columns or []))


def from_table(table: pa.Table, wanted: Columns, where: str) -> Raw:
    """One split from an Arrow table that has the wanted columns."""
    read = _texts if wanted.kind == "text" else _encoded_images
    others = {name: plain_column(table[name], name, where) for name in wanted.others}
    labels = plain_column(table[wanted.label], wanted.label, where)
    return Raw(where, read(table, wanted.inputs, where), labels, others, _class_names(table.schema, wanted.label))


def to_dataset(name: str, kind: Literal["text", "image"], splits: list[Raw], classes: list[str] | None) -> Dataset:
    """Numbers the labels alike in all splits; `splits` are train, (validation,) test.

    Class names come from `classes`, else from the data's own metadata, else from the labels.
    """
    classes = classes or splits[0].class_names
    if any(split.labels.dtype.kind not in "iu" for split in splits):
        classes = classes or sorted({str(value) for split in splits for value in np.unique(split.labels)})
        number = {value: index for index, value in enumerate(classes)}
        labels = [_numbered(split, number) for split in splits]
    else:
        labels = [split.labels.astype(np.int64) for split in splits]
        top = max((int(values.max()) for values in labels if len(values)), default=0)
        classes = classes or [str(index) for index in range(top + 1)]
    for split, values in zip(splits, labels, strict=True):
        _check_labels(split.where, values, classes)
    sources = [Source(s.inputs, values, s.columns) for s, values in zip(splits, labels, strict=True)]
    train, test = sources[0], sources[-1]
    validation = sources[1] if len(sources) == 3 else train.select(np.empty(0, np.int64))
    return Dataset(name, kind, train, validation, test, tuple(classes))


def read_raw(path: Path, wanted: Columns) -> Raw:
    """One split from a file that has the wanted columns."""
    if kind_of(path) != "npz":
        return from_table(read_table(path, wanted.all, wanted.inputs), wanted, str(path))
    arrays = read_arrays(path, wanted.all)
    for name, values in arrays.items():
        rows = arrays[wanted.label].shape
        if values.shape[:1] != rows:
            raise DataError(f"{path}: array {name!r} has shape {values.shape}, but the labels have {rows}")
    inputs = arrays[wanted.inputs[0]]
    if wanted.kind == "text" or inputs.dtype != np.uint8 or inputs.ndim not in (3, 4):
        raise DataError(
            f"{path}: array {wanted.inputs[0]!r} is {inputs.dtype} {inputs.shape}; an .npz file holds images, uint8"
            " (N, H, W) or (N, H, W, C)"
        )
    images = inputs[..., None] if inputs.ndim == 3 else inputs
    return Raw(str(path), images, arrays[wanted.label], {name: arrays[name] for name in wanted.others})


def _texts(table: pa.Table, names: list[str], where: str) -> list[str]:
    for name in names:
        kind = table.schema.field(name).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
            raise DataError(f"{where}: text column {name!r} holds {kind}; it must hold strings")
    if len(names) == 1:
        return [value or "" for value in table[names[0]].to_pylist()]
    rows = zip(*(table[name].to_pylist() for name in names), strict=True)
    return [" ".join(part for part in row if part) for row in rows]


def _encoded_images(table: pa.Table, names: list[str], where: str) -> list[bytes]:
    column = table[names[0]].combine_chunks()
    kind = column.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        column = column.field("bytes")
    elif not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise DataError(f"{where}: image column {names[0]!r} holds {kind}; it must hold encoded bytes")
    images = column.to_pylist()
    if None in images:
        raise DataError(f"{where}: image column {names[0]!r} has no bytes in row {images.index(None)}")
    return images


def plain_column(column: pa.ChunkedArray, name: str, where: str) -> np.ndarray:
    """A column of integers or strings as an array; anything else is refused."""
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise DataError(f"{where}: column {name!r} is empty in row {row}")
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int64())
    if pa.types.is_integer(column.type):
        return column.to_numpy()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column.to_numpy()
    raise DataError(f"{where}: column {name!r} holds {column.type}; it must hold whole numbers or strings")


def _class_names(schema: pa.Schema, label: str) -> list[str] | None:
    """Class names that the `datasets` library left in a table's metadata, if it did."""
    note = (schema.metadata or {}).get(b"huggingface")
    features = from_json(note).get("info", {}).get("features", {}) if note else {}
    return (features.get(label) or {}).get("names")


def _read_classes(classes: Path | list[str] | None) -> list[str] | None:
    if classes is None or isinstance(classes, list):
        return classes
    path = Path(classes)
    try:
        names = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"classes: {path} is not a readable JSON file: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"classes: {path} must hold a JSON list of names")
    return names


def _numbered(split: Raw, number: dict[str, int]) -> np.ndarray:
    values, inverse = np.unique(split.labels.astype(str), return_inverse=True)
    for value in values.tolist():
        if value not in number:
            raise unknown("class", value, number, f"{split.where}: label")
    return np.array([number[value] for value in values.tolist()], np.int64)[inverse]


def _check_labels(where: str, labels: np.ndarray, classes: list[str]) -> None:
    if not len(labels):
        raise DataError(f"{where}: no examples")
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        hidden = " (a hidden test label? choose another split)" if low == -1 else ""
        raise DataError(f"{where}: label {low}{hidden}; labels are 0 to {len(classes) - 1}")
    if high >= len(classes):
        raise DataError(f"{where}: label {high}, but there are {len(classes)} classes, 0 to {len(classes) - 1}")
