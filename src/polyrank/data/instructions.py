"""Instructions and their responses, or plain text: what a causal language model is fine-tuned on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from polyrank.core.rng import stream
from polyrank.data.formats import check_columns, read_table
from polyrank.data.hub import hub_tables
from polyrank.data.plain import plain_column
from polyrank.data.prompts import CHAT, Template, check_template
from polyrank.data.source import DataError, Dataset, Prompting, Source, Turn, stratified
from polyrank.data.tables import text_column


class Fields(NamedTuple):
    """Which columns are the parts of a turn, its category, and what else to keep."""

    response: str
    instruction: str | None
    input: str | None
    label: str | None
    others: list[str]

    @property
    def texts(self) -> list[str]:
        """The columns that hold text."""
        return [name for name in (self.instruction, self.input, self.response) if name is not None]

    @property
    def needed(self) -> list[str]:
        """The columns that every split must have, once each."""
        return list(dict.fromkeys([*self.texts, *([self.label] if self.label else [])]))

    @property
    def all(self) -> list[str]:
        """The columns of train, which is shared by some of them, once each."""
        return list(dict.fromkeys([*self.needed, *self.others]))


def instructions(
    *,
    train: Path,
    test: Path | None = None,
    validation: Path | None = None,
    response: str = "output",
    instruction: str | None = "instruction",
    input: str | None = None,
    label: str | None = None,
    columns: list[str] | None = None,
    template: Template = "alpaca",
    train_on_inputs: bool = False,
    test_share: float = 0.1,
) -> Dataset:
    """Instructions with responses, or plain text, from local parquet, CSV, JSON or JSON-lines files.

    Args:
        train: the file that is split among the clients.
        test: the file for reporting; without it, part of train is set aside.
        validation: the file for selection; without it, part of train is held out.
        response: the column of responses; of the texts, where `instruction` is None.
        instruction: the column of instructions; None: plain text, all of it learnt.
        input: the column of what an instruction is about; empty where it stands alone.
        label: a column of categories, by which partitioners such as `dirichlet` split; no model learns it.
        columns: other columns of train to keep, for example the one that names natural clients.
        template: ``alpaca``, ``alpaca_short``, ``vigogne``, ``plain``, ``chat`` (the tokenizer's own), or a JSON file
            with ``with_input`` and ``without_input``.
        train_on_inputs: whether prompts are learnt as well.
        test_share: of train, what is set aside where there is no `test`: the same examples whatever the seed.

    Raises:
        DataError: for a file, a column, a template or a value that cannot be used.
    """
    fields = Fields(response, instruction, input, label, list(columns or []))
    prompting = _prompting(template, train_on_inputs, fields)
    wanted = {Path(path): fields.needed for path in (validation, test) if path is not None} | {Path(train): fields.all}
    for path, names in wanted.items():
        check_columns(path, names)
    paths = [Path(path) for path in (train, validation, test) if path is not None]
    tables = [(str(path), read_table(path, wanted[path], fields.texts)) for path in paths]
    made = of_turns("instructions", tables, fields, prompting, validated=validation is not None)
    return made if test else with_test(made, test_share)


def hub_instructions(
    *,
    path: str,
    config: str | None = None,
    response: str = "output",
    instruction: str | None = "instruction",
    input: str | None = None,
    label: str | None = None,
    columns: list[str] | None = None,
    template: Template = "alpaca",
    train_on_inputs: bool = False,
    train: str = "train",
    validation: str | None = None,
    test: str | None = None,
    test_share: float = 0.1,
    revision: str | None = None,
    data_files: dict[str, str] | None = None,
) -> Dataset:
    """Instructions with responses, or plain text, from the Hugging Face hub (needs the extra `hub`).

    Args:
        path: the name on the hub, a local folder, or a builder such as "parquet" (with `data_files`).
        config: the configuration (subset) of the data set.
        response: the column of responses; of the texts, where `instruction` is None.
        instruction: the column of instructions; None: plain text, all of it learnt.
        input: the column of what an instruction is about; empty where it stands alone.
        label: a column of categories, by which partitioners such as `dirichlet` split; no model learns it.
        columns: other columns of train to keep, for example the one that names natural clients.
        template: as in `instructions`.
        train_on_inputs: whether prompts are learnt as well.
        train: the split that is divided among the clients.
        validation: the split for selection; without it, part of train is held out.
        test: the split for reporting; without it, part of train is set aside.
        test_share: of train, what is set aside where there is no `test`: the same examples whatever the seed.
        revision: a branch, tag or commit.
        data_files: split name to file, as in `datasets.load_dataset`.

    Raises:
        DataError: if the data set cannot be loaded, or for a split, column, template or value that cannot be used.
    """
    fields = Fields(response, instruction, input, label, list(columns or []))
    prompting = _prompting(template, train_on_inputs, fields)
    wanted = [(train, fields.all), *((split, fields.needed) for split in (validation, test) if split is not None)]
    options = {"name": config, "revision": revision, "data_files": data_files}
    tables = hub_tables(path, wanted, **options)
    made = of_turns(path, tables, fields, prompting, validated=validation is not None)
    return made if test else with_test(made, test_share)


def of_turns(
    name: str, tables: list[tuple[str, pa.Table]], fields: Fields, prompting: Prompting, *, validated: bool
) -> Dataset:
    """A data set of train, validation (if `validated`) and test (if there is one more), each with where it is from."""
    found = [_categories(table, fields.label, where) for where, table in tables]
    names = sorted({str(value) for values in found for value in np.unique(values)})
    number = {category: index for index, category in enumerate(names)}
    sources = []
    for (where, table), values in zip(tables, found, strict=True):
        if not len(table):
            raise DataError(f"{where}: no examples")
        labels = np.array([number[str(value)] for value in values.tolist()], np.int64)
        kept = {
            other: plain_column(table[other], other, where) for other in fields.others if other in table.column_names
        }
        sources.append(Source(_turns(table, fields, where), labels, kept))
    nothing = sources[0].select(np.empty(0, np.int64))
    validation = sources[1] if validated else nothing
    test = sources[-1] if len(sources) == 2 + validated else nothing
    return Dataset(name, "causal", sources[0], validation, test, tuple(names), prompting=prompting)


def with_test(dataset: Dataset, share: float) -> Dataset:
    """A data set of whose train a stratified share is the test split, the same one whatever the seed of a run.

    Raises:
        DataError: if that would leave nothing to train or nothing to report on.
    """
    whole = dataset.train
    count = round(share * len(whole))
    if not 0 < count < len(whole):
        raise DataError(
            f"{dataset.name}: data.test_share: {share} of {len(whole)} training examples is {count}; it must leave at"
            " least one on each side"
        )
    aside = stratified(whole.labels, count, stream(0, "test", dataset.name))
    left = np.setdiff1d(np.arange(len(whole)), aside, assume_unique=True)
    return replace(dataset, train=whole.select(left), test=whole.select(aside))


def _prompting(template: Template, train_on_inputs: bool, fields: Fields) -> Prompting:
    check_template(str(template))
    if fields.instruction is None and fields.input is not None:
        raise DataError(f"data.input: {fields.input!r} needs data.instruction, the column of what is asked about it")
    if fields.instruction is None and template == CHAT:
        raise DataError("data.template: chat needs data.instruction, the column of what the user says")
    return Prompting(str(template), train_on_inputs)


def _categories(table: pa.Table, label: str | None, where: str) -> np.ndarray:
    return np.zeros(len(table), np.int64) if label is None else plain_column(table[label], label, where)


def _turns(table: pa.Table, fields: Fields, where: str) -> list[Turn]:
    parts = []
    for name in (fields.instruction, fields.input, fields.response):
        parts.append([""] * len(table) if name is None else text_column(table[name], name, where))
    return [Turn(*row) for row in zip(*parts, strict=True)]
