"""Hugging Face hub data sets, through the same tables as local files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from polyrank.data.formats import require_columns
from polyrank.data.source import DataError, Dataset, ImageRange, unknown
from polyrank.data.tables import from_table, to_dataset, wanted_columns


def hub(
    *,
    path: str,
    config: str | None = None,
    text: str | list[str] | None = None,
    image: str | None = None,
    label: str = "label",
    columns: list[str] | None = None,
    classes: list[str] | None = None,
    train: str = "train",
    validation: str | None = None,
    test: str = "test",
    revision: str | None = None,
    data_files: dict[str, str] | None = None,
    image_range: ImageRange | None = None,
) -> Dataset:
    """A Hugging Face hub data set by name (needs the extra `hub`).

    Args:
        path: the name on the hub, a local folder, or a builder such as "parquet" (with `data_files`).
        config: the configuration (subset) of the data set.
        text: the text column; several are joined in order with one space, empty ones left out.
        image: the image column.
        label: the class column.
        columns: other columns to keep, for example the one that names natural clients.
        classes: the class names in order; by default the data set's own.
        train: the split that is divided among the clients.
        validation: the split for selection; without it, part of train is held out.
        test: the split for reporting; it must have labels.
        revision: a branch, tag or commit.
        data_files: split name to file, as in `datasets.load_dataset`.
        image_range: the values of black and white in images of more than 8 bits, as in `files`.

    Raises:
        DataError: if the data set cannot be loaded, or for a split, column or value that cannot be used.
    """
    wanted = wanted_columns(text, image, label, columns, image_range)
    splits = [split for split in (train, validation, test) if split is not None]
    options = {"name": config, "revision": revision, "data_files": data_files}
    tables = hub_tables(path, [(split, wanted.all) for split in splits], **options)
    return to_dataset(path, wanted.kind, [from_table(table, wanted, where) for where, table in tables], classes)


def hub_tables(path: str, wanted: Sequence[tuple[str, list[str]]], **options: Any) -> list[tuple[str, pa.Table]]:
    """What each wanted split is called in messages, and its columns.

    Args:
        path: the name on the hub.
        wanted: splits, each with the columns to read.
        options: of `datasets.load_dataset`.

    Raises:
        DataError: if the data set cannot be loaded, or for a split or column that it does not have.
    """
    loaded = _load(path, **options)
    for split, columns in wanted:
        if split not in loaded:
            raise unknown("split", split, loaded, path)
        require_columns(columns, loaded[split].column_names, f"{path}, split {split!r}")
    return [
        (f"{path}, split {split!r}", loaded[split].select_columns(columns).with_format("arrow")[:])
        for split, columns in wanted
    ]


def _load(path: str, **options: Any) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise DataError("data from the hub needs one more package: pip install datasets (the extra 'hub')") from error
    try:
        return datasets.load_dataset(path, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{path}: the data set could not be loaded: {error}") from error
