"""Which runs a site takes part in: what was announced to it, and what its operator, or its policy, has decided."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from polyrank.deploy.document import Document
from polyrank.deploy.policy import PolicyConfig, RefusalError
from polyrank.engines.announcement import Announcement, announcement_of
from polyrank.engines.wire import WireError
from polyrank.errors import InputError, shortened

Approve = Literal["auto", "ask", "policy"]
State = Literal["waiting", "approved", "denied"]

_MOST = 1000
"""Runs that are remembered; of more, the oldest that nobody has decided on are forgotten."""


@dataclass(frozen=True)
class Known:
    """A run that a site has heard of.

    Attributes:
        run: as it was announced.
        state: whether the site takes part.
        why: who decided, and why.
        epsilon: that all its rounds would cost; infinite where its answers tell everything; None where nobody counts.
        since: when it was announced first.
    """

    run: Announcement
    state: State
    why: str
    epsilon: float | None
    since: str


class Consent:
    """The file of a site's decisions.

    Args:
        path: of the file.
        approve: who decides on a new run: it is approved (``auto``), its operator is asked (``ask``), or it is approved
            if the policy allows it and its operator asked otherwise (``policy``).
        policy: what that allows.
    """

    def __init__(self, path: Path, approve: Approve = "auto", policy: PolicyConfig | None = None) -> None:
        self.path, self.document = path, Document(path)
        self.approve, self.policy = approve, policy or PolicyConfig()

    def known(self) -> dict[str, Known]:
        """Runs by id, the oldest first."""
        return dict(self._runs(self.document.read()))

    def pause(self, reason: str) -> None:
        """The site answers nothing until `resume`."""
        with self.document.change() as plain:
            plain["paused"] = reason

    def resume(self) -> None:
        """The site answers again."""
        with self.document.change() as plain:
            plain.pop("paused", None)

    @property
    def paused(self) -> str | None:
        """Why the site is paused; None where it is not."""
        reason = self.document.read().get("paused")
        return None if reason is None else str(reason)

    def decide(self, word: str, state: State, why: str) -> Known:
        """Sets what is decided on a run.

        Args:
            word: its id, or how it begins.
            state: whether the site takes part.
            why: for the log, and where it does not, for the server.

        Raises:
            InputError: if no run, or more than one, begins so.
        """
        with self.document.change() as plain:
            ids = [id_ for id_ in plain.get("runs", {}) if id_.startswith(word)]
            if len(ids) != 1 or not word:
                there = ", ".join(plain.get("runs", {})) or "none yet"
                raise InputError(f"run {word!r}: {len(ids)} runs begin so; there are: {there}")
            plain["runs"][ids[0]] |= {"state": state, "why": why}
            return dict(self._runs(plain))[ids[0]]

    def meet(self, run: Announcement, epsilon: float | None) -> Known | None:
        """Notes an announcement, and decides on it; the run if it is new.

        Args:
            run: as it was announced.
            epsilon: that it would cost.
        """
        if run.id in self.document.read().get("runs", {}):
            return None
        with self.document.change() as plain:
            runs = plain.setdefault("runs", {})
            state, why = self._decision(run, epsilon)
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            # JSON has no infinity.
            cost = "all" if epsilon is not None and math.isinf(epsilon) else epsilon
            runs[run.id] = {"run": run.plain(), "state": state, "why": why, "epsilon": cost, "since": now}
            for id_ in [id_ for id_, each in runs.items() if each["state"] == "waiting"][: max(len(runs) - _MOST, 0)]:
                del runs[id_]
            return dict(self._runs({"runs": {run.id: runs[run.id]}}))[run.id] if run.id in runs else None

    def require(self, id_: Any) -> Announcement:
        """The announcement of a run that the site takes part in.

        Raises:
            RefusalError: if it does not, with the reason.
        """
        plain = self.document.read()
        if "paused" in plain:
            raise RefusalError(f"this site is paused: {plain['paused']}")
        known = dict(self._runs(plain)).get(id_) if isinstance(id_, str) else None
        if known is None:
            raise RefusalError("this run has not been announced to this site")
        if known.state == "denied":
            raise RefusalError(f"this site's operator has denied the run: {known.why}")
        if known.state == "waiting":
            raise RefusalError(f"this site's operator has not approved the run yet: {known.why}")
        return known.run

    def _decision(self, run: Announcement, epsilon: float | None) -> tuple[State, str]:
        if self.approve == "auto":
            return "approved", "approve: auto"
        if self.approve == "ask":
            return "waiting", "approve: ask"
        exceptions = list(self.policy.exceptions(run, math.inf if epsilon is None else epsilon))
        return ("waiting", "; ".join(exceptions)) if exceptions else ("approved", "approve: policy")

    def _runs(self, plain: dict[str, Any]) -> Iterator[tuple[str, Known]]:
        try:
            for id_, each in plain.get("runs", {}).items():
                epsilon = math.inf if each["epsilon"] == "all" else each["epsilon"]
                if each["state"] not in ("waiting", "approved", "denied"):
                    raise ValueError(f"state: {shortened(each['state'])} is none of waiting, approved, denied")
                run = announcement_of(each["run"])
                if run.id != id_:
                    raise ValueError(f"run {shortened(id_)} is not what was announced")
                yield id_, Known(run, each["state"], str(each["why"]), epsilon, str(each["since"]))
        except (AttributeError, KeyError, TypeError, ValueError, WireError) as error:
            raise InputError(f"{self.path}: not as it was written, so nothing is answered: {error}") from None
