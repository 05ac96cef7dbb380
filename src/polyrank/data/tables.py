"""Tables of examples, from local files: parquet, CSV, JSON lines and .npz, all through one path to `Source`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from polyrank.data.formats import check_columns, kind_of, read_arrays, read_table
from polyrank.data.images import raw_images
from polyrank.data.labels import Labels, check_names, number_by_name, number_by_value
from polyrank.data.plain import as_text, plain_array, plain_column
from polyrank.data.source import DataError, Dataset, ImageRange, Origin, Source
from polyrank.files import from_json, read_text


class Columns(NamedTuple):
    """Which columns are the inputs, the label, and what else to keep; of images, the values of black and white."""

    kind: Literal["text", "image"]
    inputs: list[str]
    label: str
    others: list[str]
    image_range: ImageRange | None = None

    @property
    def all(self) -> list[str]:
        """Every column to read, once each."""
        return list(dict.fromkeys([*self.inputs, self.label, *self.others]))


class Raw(NamedTuple):
    """One split before its labels are class numbers: `labels` holds what is written, integers or text."""

    where: str
    inputs: list[str] | list[bytes] | np.ndarray
    labels: np.ndarray
    columns: dict[str, np.ndarray]
    class_names: list[str] | None = None
    origin: Origin | None = None
    image_range: ImageRange | None = None


def files(
    *,
    train: Path | None = None,
    test: Path,
    validation: Path | None = None,
    text: str | list[str] | None = None,
    image: str | None = None,
    label: str = "label",
    columns: list[str] | None = None,
    classes: Path | list[str] | None = None,
    image_range: ImageRange | None = None,
) -> Dataset:
    """Local parquet, CSV, JSON-lines or .npz files, one for each split.

    Exactly one of `text` and `image` names the inputs. In an .npz file the names are those of its arrays, and
    images are numbers (N, H, W) or (N, H, W, C).

    Args:
        train: the file that is split among the clients; not needed on a server whose clients are on other machines.
        test: the file for reporting.
        validation: the file for selection; without it, part of train is held out.
        text: the text column; several are joined in order with one space, empty ones left out.
        image: the image column: encoded bytes, or the hub's {bytes, path} pairs.
        label: the class column: whole numbers from 0, or text. Without `classes`, the classes are the values that
            occur in any split, in order; with it, whole numbers are indices into it.
        columns: other columns to keep, for example the one that names natural clients.
        classes: the class names in order, as a list or as a JSON file that holds one.
        image_range: the values of black and white in images of more than 8 bits; without it, 0 and 65535 of whole
            numbers, 0 and 1 of floating-point ones.

    Raises:
        DataError: for a file, a column or a value that cannot be used.
    """
    wanted = wanted_columns(text, image, label, columns, image_range)
    if train is None and validation is None:
        raise DataError("data.validation: missing; where there is no data.train, nothing can be held out of it")
    paths = [Path(path) for path in (train, validation, test) if path is not None]
    for path in paths:
        check_columns(path, wanted.all)
    names = _read_classes(classes)
    splits = [read_raw(path, wanted) for path in paths]
    dataset = to_dataset("files", wanted.kind, splits, names)
    if train is None:
        nothing = dataset.train.select(np.empty(0, np.int64))
        dataset = replace(dataset, train=nothing, validation=dataset.train)
    return dataset


def wanted_columns(
    text: str | list[str] | None,
    image: str | None,
    label: str,
    columns: list[str] | None,
    image_range: tuple[float, ...] | None = None,
) -> Columns:
    """The columns to read, from the options that `files` and `hub` share."""
    if bool(text) == bool(image):
        raise DataError(f"data: exactly one of text and image names a column; got text={text!r}, image={image!r}")
    if image_range is not None:
        numbers = all(isinstance(value, int | float) for value in image_range)
        if not image or not numbers or len(image_range) != 2 or image_range[0] == image_range[1]:
            raise DataError(
                f"data.image_range: {list(image_range)}: it is two different values, of black and of white in images;"
                " for example [0, 4095]"
            )
        image_range = (float(image_range[0]), float(image_range[1]))
    inputs = [image] if image else [text] if isinstance(text, str) else list(text or [])
    return Columns("image" if image else "text", inputs, label, list(columns or []), image_range)


def from_table(table: pa.Table, wanted: Columns, where: str) -> Raw:
    """One split from an Arrow table that has the wanted columns."""
    read = _texts if wanted.kind == "text" else _encoded_images
    others = {name: plain_column(table[name], name, where) for name in wanted.others}
    labels = plain_column(table[wanted.label], wanted.label, where)
    names = _class_names(table.schema, wanted.label)
    inputs = read(table, wanted.inputs, where)
    return Raw(where, inputs, labels, others, names, Origin.whole((where, len(table))), wanted.image_range)


def to_dataset(name: str, kind: Literal["text", "image"], splits: list[Raw], classes: list[str] | None) -> Dataset:
    """Numbers the labels alike in all splits; `splits` are train, (validation,) test.

    Class names come from `classes`, else from the data's own metadata, else from the labels.
    """
    written = [Labels(split.where, split.labels) for split in splits]
    if classes:
        check_names(written, classes)
    names = classes or _agreed(splits)
    numbers, names = (number_by_name(written, names), names) if names else number_by_value(written)
    sources = [
        Source(s.inputs, values, s.columns, s.origin, s.image_range) for s, values in zip(splits, numbers, strict=True)
    ]
    train, test = sources[0], sources[-1]
    validation = sources[1] if len(sources) == 3 else train.select(np.empty(0, np.int64))
    return Dataset(name, kind, train, validation, test, tuple(names))


def read_raw(path: Path, wanted: Columns) -> Raw:
    """One split from a file that has the wanted columns."""
    if kind_of(path) != "npz":
        return from_table(read_table(path, wanted.all, wanted.inputs), wanted, str(path))
    arrays = read_arrays(path, wanted.all)
    for name, values in arrays.items():
        rows = arrays[wanted.label].shape[:1]
        if values.shape[:1] != rows:
            raise DataError(f"{path}: array {name!r} has shape {values.shape}, but the labels have {rows}")
    if wanted.kind == "text":
        raise DataError(f"{path}: an .npz file holds images, not texts; name their array with data.image")
    images = raw_images(arrays[wanted.inputs[0]], wanted.image_range, wanted.inputs[0], str(path))
    labels = plain_array(arrays[wanted.label], wanted.label, str(path))
    return Raw(str(path), images, labels, {name: plain_array(arrays[name], name, str(path)) for name in wanted.others})


def _texts(table: pa.Table, names: list[str], where: str) -> list[str]:
    columns = [text_column(table[name], name, where) for name in names]
    if len(columns) == 1:
        return columns[0]
    return [" ".join(part for part in row if part) for row in zip(*columns, strict=True)]


def text_column(column: pa.ChunkedArray, name: str, where: str) -> list[str]:
    """A column of text as strings, empty ones where there is none."""
    text = as_text(column)
    if text is None:
        raise DataError(f"{where}: text column {name!r} holds {column.type}; it must hold strings")
    return [value or "" for value in text.to_pylist()]


def _encoded_images(table: pa.Table, names: list[str], where: str) -> list[bytes]:
    column = table[names[0]].combine_chunks()
    kind = column.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        column = column.field("bytes")
    elif not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise DataError(f"{where}: image column {names[0]!r} holds {kind}; it must hold encoded bytes")
    images = column.to_pylist()
    if None in images:
        raise DataError(f"{where}: image column {names[0]!r} has no bytes in row {images.index(None) + 1}")
    return images


def _class_names(schema: pa.Schema, label: str) -> list[str] | None:
    """Class names that the `datasets` library left in a table's metadata, if it did."""
    note = (schema.metadata or {}).get(b"huggingface")
    features = from_json(note).get("info", {}).get("features", {}) if note else {}
    return (features.get(label) or {}).get("names")


def _agreed(splits: list[Raw]) -> list[str] | None:
    """The class names of train's metadata; those of other splits, where they have any, must be the same."""
    first, *others = splits
    for split in others:
        if first.class_names and split.class_names and split.class_names != first.class_names:
            raise DataError(
                f"{split.where}: its metadata has other class names than {first.where}'s, or another order:"
                f" {', '.join(split.class_names[:10])}; and there {', '.join(first.class_names[:10])}"
            )
    return first.class_names


def _read_classes(classes: Path | list[str] | None) -> list[str] | None:
    if classes is None or isinstance(classes, list):
        return classes
    path = Path(classes)
    try:
        names = from_json(read_text(path))
    except (OSError, ValueError) as error:
        raise DataError(f"classes: {path} is not a readable JSON file: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"classes: {path} must hold a JSON list of names")
    return names
