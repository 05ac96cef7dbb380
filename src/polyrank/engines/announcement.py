"""What a server says of a run before anybody takes part, and what every later message is held against."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from polyrank.core.gate import steps_of
from polyrank.core.privacy import Privacy
from polyrank.core.types import LocalTraining, Task
from polyrank.engines.wire import BROKEN, WireError, local_of, privacy_of, shown
from polyrank.text import one_line

_MOST = 2**53
_LONGEST = 200  # signs of a name


@dataclass(frozen=True)
class Announcement:
    """A run, as its server describes it. A task that differs from it belongs to another run.

    Attributes:
        name: of the run.
        method: what makes one adapter of many.
        by: who asks, in the server's words: nobody has proved it.
        rounds: how many there are.
        local: how clients train, with the learning rate of the first round.
        privacy: what every client has to protect.
        nbytes: bytes of the adapter at the server's rank: at most so many travel each way in a round, beside what a
            method has a client carry.
        model: digest of what a client is told of the model (`digest_of`).
        mark: a word of the run's own.
    """

    name: str
    method: str
    by: str
    rounds: int
    local: LocalTraining
    privacy: Privacy
    nbytes: int
    model: str
    mark: str

    @property
    def id(self) -> str:
        """By which messages name the run: it follows from all that is said of it."""
        return digest_of(self.plain())[:16]

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    def mismatch(self, task: Task, examples: int) -> str | None:
        """What of a task is not as it was announced; None where all is, or where it asks for fewer steps.

        Args:
            task: for a client.
            examples: that it has.
        """
        if not task.round < self.rounds:
            return f"round {task.round}, of {self.rounds} announced"
        if task.privacy != self.privacy:
            return "privacy"
        free: dict[str, Any] = {key: getattr(self.local, key) for key in ("lr", "lr_min", "schedule")}
        if task.local.steps is not None and task.local.steps <= steps_of(self.local, examples):
            free["steps"] = self.local.steps
        local = replace(task.local, **free)
        differences = [key for key, value in asdict(local).items() if value != getattr(self.local, key)]
        return f"local.{differences[0]}" if differences else None


def digest_of(plain: Mapping[str, Any]) -> str:
    """The SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def announcement_of(plain: Any) -> Announcement:
    """An announcement from its JSON; its names as they can be shown.

    Raises:
        WireError: naming what it is not.
    """
    try:
        known = Announcement.__dataclass_fields__
        if not isinstance(plain, dict) or plain.keys() != known.keys():
            raise WireError(f"run: {shown(plain)}: must have {', '.join(known)}, and nothing else")
        for key in ("name", "method", "by", "model", "mark"):
            text = plain[key]
            if not isinstance(text, str) or len(text) > _LONGEST or text != one_line(text):
                raise WireError(f"run: {key}: {shown(text)} is not a line of up to {_LONGEST} signs")
        for key, least in (("rounds", 1), ("nbytes", 0)):
            if type(plain[key]) is not int or not least <= plain[key] <= _MOST:
                raise WireError(f"run: {key}: {shown(plain[key])} is not a whole number from {least}")
        return Announcement(**{**plain, "local": local_of(plain["local"]), "privacy": privacy_of(plain["privacy"])})
    except BROKEN as error:
        raise WireError(f"not an announcement: {one_line(str(error), 300)}") from None
