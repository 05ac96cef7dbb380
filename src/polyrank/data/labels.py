"""Labels become class numbers, alike in all splits: by the values that occur, or by a list of names."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from polyrank.data.source import DataError, unknown

log = logging.getLogger(__name__)


class Labels(NamedTuple):
    """The labels of a split as they are written: integers, or text as objects."""

    where: str
    values: np.ndarray

    @property
    def are_numbers(self) -> bool:
        """Whether they are integers."""
        return self.values.dtype.kind in "iu"


def number_by_value(splits: Sequence[Labels]) -> tuple[list[np.ndarray], list[str]]:
    """Class numbers, and class names: the values that occur in any split, as they are written.

    Whole numbers are sorted as numbers if all splits hold them, and everything else as text.

    Raises:
        DataError: for a split without examples, and a label below 0, naming its row.
    """
    for split in splits:
        _check_numbers(split, None)
    numeric = all(split.are_numbers for split in splits)
    values: list[list[Any]] = [split.values.tolist() if numeric else _names(split) for split in splits]
    present = sorted(set().union(*values))
    number = {value: index for index, value in enumerate(present)}
    strange = set().union(*values[1:]).difference(values[0])
    if strange:
        shown = ", ".join(map(str, sorted(strange)[:10])) + (", ..." if len(strange) > 10 else "")
        log.warning("%s: nothing is learnt of classes that other splits alone have: %s", splits[0].where, shown)
    return [_array(number[value] for value in split) for split in values], [str(value) for value in present]


def number_by_name(splits: Sequence[Labels], names: Sequence[str]) -> list[np.ndarray]:
    """Class numbers: whole numbers, if all splits hold them, are indices into `names`; anything else is a name.

    Raises:
        DataError: for a split without examples, and a label that is neither, naming its row.
    """
    numeric = all(split.are_numbers for split in splits)
    for split in splits:
        _check_numbers(split, len(names) if numeric else None)
    if numeric:
        return [split.values.astype(np.int64) for split in splits]
    number = {name: index for index, name in enumerate(names)}
    for split in splits:
        for row, name in enumerate(_names(split), 1):
            if name not in number:
                raise unknown("class", name, names, f"{split.where}: row {row}: label")
    return [_array(number[name] for name in _names(split)) for split in splits]


def check_names(splits: Sequence[Labels], names: Sequence[str]) -> None:
    """Refuses names that are given to classes, and do not say which label is which.

    Raises:
        DataError: for a name that stands twice; and where labels and names are whole numbers, and a label might be the
            index of one name or be another.
    """
    if len(set(names)) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise DataError(f"data.classes: {twice!r} stands twice; every class has a name of its own")
    if not all(split.are_numbers for split in splits):
        return
    values = set().union(*(np.unique(split.values).tolist() for split in splits))
    strange = sorted(value for value in values if names[value : value + 1] != [str(value)])
    if strange and {str(value) for value in values} <= set(names):
        raise DataError(
            f"data.classes: label {strange[0]} may be the class {str(strange[0])!r} or an index, from 0, into"
            f" {', '.join(names[:10])}; leave data.classes out to name classes by their labels, or choose other names"
        )


def _check_numbers(split: Labels, classes: int | None) -> None:
    if not len(split.values):
        raise DataError(f"{split.where}: no examples")
    if not split.are_numbers:
        return
    valid = "labels are whole numbers from 0, or text" if classes is None else f"labels are 0 to {classes - 1}"
    low, high = int(split.values.min()), int(split.values.max())
    if low < 0:
        hidden = " (a hidden test label? choose another split)" if low == -1 else ""
        raise DataError(f"{split.where}: row {split.values.argmin() + 1}: label {low}{hidden}; {valid}")
    if classes is not None and high >= classes:
        raise DataError(
            f"{split.where}: row {split.values.argmax() + 1}: label {high}, but there are {classes} classes; {valid}"
        )


def _names(split: Labels) -> list[str]:
    return list(map(str, split.values.tolist()))


def _array(numbers: Iterable[int]) -> np.ndarray:
    return np.fromiter(numbers, np.int64)
