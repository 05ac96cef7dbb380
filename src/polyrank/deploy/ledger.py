"""What a site has told of its data, in all runs and through all restarts: the ledger of its privacy budget.

An answer is entered, and is on disk, before anything is computed for it: who is killed between has paid for nothing,
and nobody gets anything for nothing. An entry keeps what composition needs, noise, sampling rate and steps, and no
epsilon, so that sums are exact whatever was asked in between.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from polyrank.core.privacy import Privacy
from polyrank.core.types import LocalTraining
from polyrank.deploy.document import Document
from polyrank.deploy.policy import BudgetConfig, RefusalError, Unit
from polyrank.errors import InputError, shortened
from polyrank.local.dp import Part, epsilon
from polyrank.local.poisson import rate, steps

_LEAST_NOISE = 1e-6
"""A multiplier below which nothing is hidden: one step costs an epsilon of 10^12."""

_MOST_NOISE = 1e3
"""A multiplier beyond which accountants have nothing left but rounding, which may be below 0."""


@dataclass(frozen=True)
class Protection:
    """The mechanisms that stand between a site's data and one answer, by what they hide; None: nothing does.

    Attributes:
        examples: DP-SGD, whose samples are drawn of the site's examples.
        clients: noise on what is sent, which hides all of the data, and so every example as well.
    """

    examples: Part | None = None
    clients: Part | None = None

    def part(self, unit: Unit, delta: float) -> Part | None:
        """The mechanism that counts: of two that hide the same, the one that tells less."""
        parts = [part for part in (self.clients, self.examples if unit == "examples" else None) if part is not None]
        return min(parts, key=lambda part: epsilon([part], delta), default=None)


NOTHING = Protection()
"""An answer as the data have it."""


def protection_of(privacy: Privacy, local: LocalTraining, examples: int) -> Protection:
    """What stands between data of so many examples and one round's update."""
    sampled = rate(local, examples) if examples else 1.0
    own, client = privacy.examples, privacy.on_client
    return Protection(
        None if own is None else _mechanism(own.noise, sampled, steps(local, examples)),
        None if client is None else _mechanism(client.multiplier, 1.0, 1),
    )


def _mechanism(multiplier: float, sampled: float, count: int) -> Part | None:
    """Steps of a mechanism; none where its noise hides nothing, and with less noise than it has where that is much."""
    return Part(min(multiplier, _MOST_NOISE), sampled, count) if multiplier >= _LEAST_NOISE else None


@dataclass(frozen=True)
class Entry:
    """Answers of one kind, to one run, under one protection.

    Attributes:
        data: fingerprint of the data they were made from.
        run: the run's id.
        question: ``fit`` or ``measure``.
        protection: of each.
        answers: how many.
        since, until: when the first and the last were entered.
    """

    data: str
    run: str
    question: str
    protection: Protection
    answers: int = 1
    since: str = ""
    until: str = ""

    def same(self, other: Entry) -> bool:
        """Whether both are entered as one."""
        return (self.data, self.run, self.question, self.protection) == (
            *(other.data, other.run, other.question),
            other.protection,
        )


def spent(entries: Sequence[Entry], unit: Unit, delta: float) -> float:
    """Epsilon of all answers together; infinite where one of them had nothing that hides the unit."""
    parts = []
    for entry in entries:
        part = entry.protection.part(unit, delta)
        if part is None:
            return math.inf
        parts.append(part._replace(steps=part.steps * entry.answers))
    return epsilon(parts, delta)


class PrivacyLedger:
    """The file that counts.

    Everything in it counts against the budget, whichever data it was answered from: a row that was mended does not make
    its person another one. Data of other people get a ledger of their own (`BudgetConfig.ledger`).

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.document = path, Document(path)

    def entries(self) -> list[Entry]:
        """All that was answered.

        Raises:
            InputError: if the file is not whole: what it had counted is not known then, and nothing may be answered.
        """
        return self._entries(self.document.read())

    def enter(self, entry: Entry, budget: BudgetConfig | None) -> None:
        """Enters an answer that is about to be made, in whole or not at all.

        Args:
            entry: the answer.
            budget: what all answers together may tell; None: it is counted only.

        Raises:
            RefusalError: if it would exceed the budget, and is not entered.
            InputError: if the file is not whole.
        """
        with self.document.change() as plain:
            entries = self._entries(plain)
            if budget is not None:
                check_budget([*entries, entry], entry.run, budget)
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            number = next((i for i, other in enumerate(entries) if other.same(entry)), len(entries))
            before = entries[number] if number < len(entries) else replace(entry, answers=0, since=now)
            entries[number : number + 1] = [replace(before, answers=before.answers + entry.answers, until=now)]
            plain["entries"] = [asdict(each) for each in entries]

    def _entries(self, plain: dict[str, Any]) -> list[Entry]:
        if not plain:
            return []
        try:
            if plain.keys() != {"entries"}:
                raise ValueError(f"has {shortened(sorted(plain))}, and not entries alone")
            return [_entry(each) for each in plain["entries"]]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.path}: not as it was written, so what was spent is not known and nothing is answered: {error}; "
                "put a copy of it back, or name a new file under budget.ledger for data of other people"
            ) from None


def check_budget(entries: Sequence[Entry], run: str, budget: BudgetConfig) -> None:
    """Refuses what would exceed a budget.

    Args:
        entries: all answers, with the one in question.
        run: that it is of.
        budget: what they may tell.

    Raises:
        RefusalError: naming the limit.
    """
    own = [entry for entry in entries if entry.run == run]
    for key, among, what, most in (
        ("epsilon", entries, "in all", budget.epsilon),
        ("run", own, "in a run", budget.run),
    ):
        if most is not None and not (total := spent(among, budget.unit, budget.delta)) <= most:
            due = f"this site allows an epsilon of {most:g} {what}"
            raise RefusalError(f"budget.{key}: {due}, and this answer would make it {total:.4g}")


def _entry(plain: dict[str, Any]) -> Entry:
    protection = Protection(**{kind: _part(part) for kind, part in plain["protection"].items()})
    entry = Entry(**{**plain, "protection": protection})
    texts = (entry.data, entry.run, entry.question, entry.since, entry.until)
    if not all(type(text) is str for text in texts) or type(entry.answers) is not int or entry.answers < 1:
        raise ValueError(f"{shortened(plain)} is no entry")
    return entry


def _part(plain: Any) -> Part | None:
    if plain is None:
        return None
    multiplier, sampled, count = plain
    numbers = type(multiplier) is float and type(sampled) is float and type(count) is int
    if not numbers or not (0 < multiplier < math.inf and 0 < sampled <= 1 and count >= 0):
        raise ValueError(f"{shortened(plain)} is no noise, rate and steps")
    return Part(multiplier, sampled, count)
