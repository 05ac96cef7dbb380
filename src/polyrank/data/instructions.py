"""Instructions and their responses, or plain text: what a causal language model is fine-tuned on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from polyrank.data.formats import column_names, read_table, require_columns
from polyrank.data.prompts import check_template
from polyrank.data.source import DataError, Dataset, Prompting, Source, Turn
from polyrank.data.tables import plain_column


def instructions(
    *,
    train: Path,
    test: Path,
    validation: Path | None = None,
    response: str = "output",
    instruction: str | None = "instruction",
    input: str | None = None,
    label: str | None = None,
    columns: list[str] | None = None,
    template: str = "alpaca",
    train_on_inputs: bool = False,
) -> Dataset:
    """Instructions with responses, or plain text, from local parquet, CSV, JSON or JSON-lines files.

    Args:
        train: the file that is split among the clients.
        test: the file for reporting.
        validation: the file for selection; without it, part of train is held out.
        response: the column of responses; of the texts, where `instruction` is None.
        instruction: the column of instructions; None: plain text, all of it learnt.
        input: the column of what an instruction is about; empty where it stands alone.
        label: a column of categories, by which partitioners such as `dirichlet` split; no model learns it.
        columns: other columns to keep, for example the one that names natural clients.
        template: ``alpaca``, ``alpaca_short``, ``vigogne``, ``plain``, ``chat`` (the tokenizer's own), or a JSON file
            with ``with_input`` and ``without_input``.
        train_on_inputs: whether prompts are learnt as well.

    Raises:
        DataError: for a file, a column, a template or a value that cannot be used.
    """
    prompting = Prompting(template, train_on_inputs)
    check_template(template)
    wanted = [name for name in (instruction, input, response) if name is not None]
    others = list(columns or [])
    every = list(dict.fromkeys([*wanted, *([label] if label else []), *others]))
    paths = [Path(path) for path in (train, validation, test) if path is not None]
    for path in paths:
        require_columns(every, column_names(path), str(path))
    tables = [read_table(path, every, wanted) for path in paths]
    categories = [_categories(table, label, str(path)) for table, path in zip(tables, paths, strict=True)]
    names = sorted({str(value) for found in categories for value in np.unique(found)})
    number = {name: index for index, name in enumerate(names)}
    sources = []
    for table, path, found in zip(tables, paths, categories, strict=True):
        turns = _turns(table, instruction, input, response, str(path))
        labels = np.array([number[str(value)] for value in found.tolist()], np.int64)
        kept = {name: plain_column(table[name], name, str(path)) for name in others}
        sources.append(Source(turns, labels, kept))
    nothing = sources[0].select(np.empty(0, np.int64))
    middle = sources[1] if len(sources) == 3 else nothing
    return Dataset("instructions", "causal", sources[0], middle, sources[-1], tuple(names), prompting=prompting)


def _categories(table: pa.Table, label: str | None, where: str) -> np.ndarray:
    return np.zeros(len(table), np.int64) if label is None else plain_column(table[label], label, where)


def _turns(table: pa.Table, instruction: str | None, about: str | None, response: str, where: str) -> list[Turn]:
    parts = []
    for name in (instruction, about, response):
        if name is None:
            parts.append([""] * len(table))
            continue
        kind = table.schema.field(name).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
            raise DataError(f"{where}: column {name!r} holds {kind}; it must hold strings")
        parts.append([value or "" for value in table[name].to_pylist()])
    return [Turn(*row) for row in zip(*parts, strict=True)]
