"""Questions with choices, from files of the usual layouts: the answer by index, by letter or in its own words."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from polyrank.data.formats import check_columns, read_rows
from polyrank.data.source import DataError
from polyrank.files import from_json

_FIRST = re.compile(r"(?:^|\s)A[.):]\s")


class Question(NamedTuple):
    """A question and what can be answered.

    Attributes:
        instruction, input: what is asked, as of an instruction.
        lead: how every answer begins.
        choices: what it goes on with.
        answer: which choice is right, from 0.
        subject: what it is about; empty where nothing says.
    """

    instruction: str
    input: str
    lead: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""


@dataclass(frozen=True)
class Layout:
    """Which columns say what. As they are, those of the hub's MMLU.

    Attributes:
        question: the column of questions.
        choices: the column of lists of choices; or a column for each; or None, where the question ends with them, as in
            ``... Options: A. yes, B. no``.
        answer: the column of the right one: its index from 0, its letter, or its text, which may have words before it.
        instruction: the column of instructions; None: there is none.
        subject: the column of subjects, by which accuracy is reported as well; None: it is not.
        letters: whether choices are listed below the question and answered by letter, as papers do with MMLU.
        lead: how every answer begins, where the column of answers does not say.
    """

    question: str = "question"
    choices: str | Sequence[str] | None = "choices"
    answer: str = "answer"
    instruction: str | None = None
    subject: str | None = None
    letters: bool = False
    lead: str = ""


def read_questions(path: Path, layout: Layout) -> list[Question]:
    """All questions of a JSON, JSON-lines, CSV or parquet file.

    Raises:
        DataError: naming the file, the row and what it would have to hold.
    """
    several = [layout.choices] if isinstance(layout.choices, str) else list(layout.choices or [])
    named = [layout.question, layout.answer, *several, layout.instruction, layout.subject]
    check_columns(path, [name for name in named if name is not None])
    rows = read_rows(path)
    if not rows:
        raise DataError(f"{path}: no questions")
    found = []
    for number, row in enumerate(rows, 1):
        try:
            found.append(_question(row, layout))
        except (KeyError, TypeError, ValueError) as error:
            said = f"no column {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{path}: question {number}: {said}") from None
    return found


def chance(questions: Sequence[Question]) -> float:
    """The accuracy of who guesses."""
    return sum(1 / len(q.choices) for q in questions) / len(questions)


def _question(row: Mapping[str, Any], layout: Layout) -> Question:
    asked = str(row[layout.question])
    if layout.choices is None:
        choices = _embedded(asked)
    elif isinstance(layout.choices, str):
        choices = _listed(row[layout.choices])
    else:
        choices = tuple(str(row[name]) for name in layout.choices)
    if len(choices) < 2 or not all(choices):
        raise ValueError(f"{len(choices)} choices, {list(choices)}; at least two are needed, and none may be empty")
    answer, lead = _answer(row[layout.answer], choices)
    if layout.letters:
        marks = string.ascii_uppercase[: len(choices)]
        if layout.choices is not None:
            listed = (f"{mark}. {choice}" for mark, choice in zip(marks, choices, strict=True))
            asked = "\n".join([asked, *listed])
        choices = tuple(marks)
    instruction, subject = (str(row[name]) if name else "" for name in (layout.instruction, layout.subject))
    return Question(instruction, asked, lead or layout.lead, choices, answer, subject)


def _listed(value: Any) -> tuple[str, ...]:
    if isinstance(value, dict):  # as in ARC: {"text": [...], "label": [...]}
        value = value.get("text")
    if isinstance(value, str):  # of a CSV file
        value = from_json(value)
    if not isinstance(value, list):
        raise ValueError(f"choices are {value!r}; they must be a list")
    return tuple(map(str, value))


def _embedded(asked: str) -> tuple[str, ...]:
    """The choices at the end of a question, each with its letter: the last ``A.``, and the letters that follow it."""
    starts = [m.start() + (asked[m.start()] != "A") for m in _FIRST.finditer(asked)]
    if not starts:
        raise ValueError("its question ends with no choices such as 'A. yes, B. no'")
    rest, found = asked[starts[-1] :], []
    for after in string.ascii_uppercase[1:]:
        parts = re.split(rf"[,;]?\s+(?={after}[.):]\s)", rest, maxsplit=1)
        found.append(parts[0].strip())
        if len(parts) == 1:
            break
        rest = parts[1]
    return tuple(found)


def _answer(value: Any, choices: Sequence[str]) -> tuple[int, str]:
    """Which choice is right, and the words before it."""
    text = str(value).strip()
    if isinstance(value, str) and text in choices:
        return choices.index(text), ""
    index = int(text) if text.isdigit() else string.ascii_uppercase.find(text) if len(text) == 1 else -1
    if 0 <= index < len(choices):
        return index, ""
    ending = [choice for choice in choices if text.endswith(choice)]
    if not isinstance(value, str) or not ending:
        raise ValueError(f"the answer {value!r} is none of the choices {list(choices)}, nor an index or a letter")
    longest = max(ending, key=len)
    return choices.index(longest), text[: -len(longest)]
