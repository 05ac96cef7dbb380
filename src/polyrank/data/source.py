"""What every data set becomes: three splits of inputs, integer labels and any other columns asked for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from polyrank.errors import InputError

Kind = Literal["text", "image", "causal"]
"""What a model is given and asked: a text's class, an image's class, or a text's next tokens."""


ImageRange = tuple[float, float]
"""The values that are black and white in images of more than 8 bits."""


class DataError(InputError):
    """Data that cannot be used; the message names the file, the key, the value and what would be valid."""


def unknown(what: str, value: object, valid: Iterable[object], where: str = "") -> DataError:
    """The error for a name that is not among `valid`, with the nearest valid names.

    >>> print(unknown("column", "lable", ["label", "text"], "train.parquet"))
    train.parquet: no column 'lable'; did you mean 'label'? There are: label, text
    """
    names = [str(name) for name in valid]
    listed = [name if name == name.strip() else repr(name) for name in names[:20]]
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    shown = ", ".join(listed) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
    return DataError(f"{where + ': ' if where else ''}no {what} {str(value)!r}{hint} There are: {shown or 'none'}")


class Turn(NamedTuple):
    """An example: what is asked, what it is asked about, and what is answered. Plain text is a response alone."""

    instruction: str
    input: str
    response: str


@dataclass(frozen=True)
class Prompting:
    """How examples become text.

    Attributes:
        template: a name in ``templates/``, a JSON file like those, or ``chat``: the tokenizer's own chat template.
        train_on_inputs: whether the prompt is learnt as well, and not the response alone.
    """

    template: str = "alpaca"
    train_on_inputs: bool = False


@dataclass(frozen=True, eq=False)
class Origin:
    """Which rows of which files examples are, so that a message can name one.

    Attributes:
        files: each file with its number of rows.
        rows: of each example, counted from 0 through all files, int64 (N,).
    """

    files: tuple[tuple[str, int], ...]
    rows: np.ndarray

    @classmethod
    def whole(cls, *files: tuple[str, int]) -> Origin:
        """Of all rows of the files, in order."""
        return cls(files, np.arange(sum(rows for _, rows in files)))

    def __str__(self) -> str:
        more = len(self.files) - 1
        return self.files[0][0] + (f" and {more} more" if more else "")

    def place(self, index: int) -> tuple[str, int]:
        """The file of an example, and its row there, counted from 1."""
        row = int(self.rows[index])
        for name, rows in self.files:
            if row < rows:
                return name, row + 1
            row -= rows
        raise IndexError(f"row {row} after the last")


@dataclass(frozen=True, eq=False)
class Source:
    """One split.

    Attributes:
        inputs: texts, encoded images (JPEG, PNG, ...), raw images as uint8 (N, H, W, C), or instructions.
        labels: class numbers, int64 (N,); of instructions, a category that no model learns.
        columns: every other column that was asked for, by name, each (N,); for example natural client names.
        origin: where the examples are from, if that is files.
        image_range: the values of black and white in encoded images of more than 8 bits, if not those by default.
    """

    inputs: list[str] | list[bytes] | list[Turn] | np.ndarray
    labels: np.ndarray
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    origin: Origin | None = None
    image_range: ImageRange | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: np.ndarray) -> Source:
        """The examples at `indices`, in that order."""
        inputs = self.inputs
        chosen: Any = inputs[indices] if isinstance(inputs, np.ndarray) else [inputs[i] for i in indices.tolist()]
        columns = {name: column[indices] for name, column in self.columns.items()}
        origin = self.origin and replace(self.origin, rows=self.origin.rows[indices])
        return replace(self, inputs=chosen, labels=self.labels[indices], columns=columns, origin=origin)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A task: classes to tell, or texts to go on with. `validation` may be empty until `hold_out`; `test` never is.

    Selection (of rounds, of options) reads `validation`; `test` is for reporting. `importance` is what the server keeps
    of the training data to measure on which layers matter, if anything (`set_apart`). `prompting` makes texts of
    instructions.
    """

    name: str
    kind: Kind
    train: Source
    validation: Source
    test: Source
    classes: tuple[str, ...]
    importance: Source | None = None
    prompting: Prompting | None = None


def stratified(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` sorted indices in which each class has its share: floor or ceiling of count n_k / n.

    Args:
        labels: int64 (N,).
        count: how many to draw, at most N.
        rng: decides which examples, and which classes get the ceiling where remainders tie.
    """
    _, dense, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    share = sizes * count / max(len(labels), 1)
    quota = np.floor(share).astype(np.int64)
    largest_first = np.lexsort((rng.permutation(len(sizes)), quota - share))
    quota[largest_first[: count - quota.sum()]] += 1
    shuffled = rng.permutation(len(labels))
    ordered = shuffled[np.argsort(dense[shuffled], kind="stable")]
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    rank_in_class = np.arange(len(labels)) - starts
    return np.sort(ordered[rank_in_class < np.repeat(quota, sizes)])


def hold_out(dataset: Dataset, fraction: float, rng: np.random.Generator) -> Dataset:
    """A data set with a validation split: its own, or a stratified `fraction` taken from train.

    Test is never touched.

    Raises:
        DataError: if the fraction would leave nothing to train or nothing to validate on.
    """
    if len(dataset.validation):
        return dataset
    count = round(fraction * len(dataset.train))
    if not 0 < count < len(dataset.train):
        raise DataError(
            f"{dataset.name}: a validation fraction of {fraction} of {len(dataset.train)} training examples is"
            f" {count}; it must leave at least one on each side"
        )
    held = stratified(dataset.train.labels, count, rng)
    kept = np.setdiff1d(np.arange(len(dataset.train)), held, assume_unique=True)
    return replace(dataset, train=dataset.train.select(kept), validation=dataset.train.select(held))


def set_apart(dataset: Dataset, count: int, rng: np.random.Generator) -> Dataset:
    """A data set of which the server keeps `count` training examples, drawn uniformly, to measure importance on.

    Raises:
        DataError: if that would leave nothing to train on.
    """
    if not 0 < count < len(dataset.train):
        raise DataError(
            f"{dataset.name}: {count} of {len(dataset.train)} training examples cannot be kept for importance (set"
            " data.importance): at least one must be, and one be left"
        )
    kept = np.sort(rng.choice(len(dataset.train), count, replace=False))
    left = np.setdiff1d(np.arange(len(dataset.train)), kept, assume_unique=True)
    return replace(dataset, train=dataset.train.select(left), importance=dataset.train.select(kept))


def limit(dataset: Dataset, limits: Mapping[str, int], rng: np.random.Generator) -> Dataset:
    """A stratified random subset of the named splits; a split that is already small enough is left alone.

    A split's subset does not depend on which other splits are limited.

    Args:
        dataset: the data set to cut.
        limits: largest number of examples by split name ("train", "validation", "test").
        rng: decides which examples stay.
    """
    splits = ("train", "validation", "test")
    cut: dict[str, Source] = {}
    for split in limits:
        if split not in splits:
            raise unknown("split", split, splits, dataset.name)
    for split, own in zip(splits, rng.spawn(len(splits)), strict=True):
        source: Source = getattr(dataset, split)
        bound = limits.get(split, len(source))
        if bound < 1 and len(source):
            raise DataError(f"{dataset.name}: limit of split {split!r} is {bound}; it must be at least 1")
        if bound < len(source):
            cut[split] = source.select(stratified(source.labels, bound, own))
    return replace(dataset, **cut)
