"""A server as a site sees it: announcements, tasks and questions, honest or not."""

from collections.abc import Mapping
from typing import Any

from polyrank.core.lowrank import Adapter
from polyrank.core.privacy import Privacy
from polyrank.core.types import LocalTraining, Query, ServerState, Task
from polyrank.engines.announcement import Announcement, digest_of
from polyrank.engines.letters import ask_profile, ask_scores
from polyrank.engines.wire import encode_task

MODEL = {"targets": "attention", "dtype": "float32", "attention": "auto", "max_length": 128, "image_size": None}
DIGITS = {**MODEL, "kind": "image", "classes": [str(digit) for digit in range(10)]}


class Asker:
    """One run of one server."""

    def __init__(
        self,
        model: Mapping[str, Any] = DIGITS,
        local: LocalTraining | None = None,
        privacy: Privacy | None = None,
        **about: Any,
    ) -> None:
        self.model, self.local, self.privacy = model, local or LocalTraining(steps=1), privacy or Privacy()
        plain = {"name": "trial", "method": "fedit", "by": "eve@server", "rounds": 100, "nbytes": 1000, "mark": "x"}
        self.run = Announcement(
            **{**plain, **about}, local=self.local, privacy=self.privacy, model=digest_of(dict(model))
        )

    def hello(self) -> bytes:
        """Asks a client whether it takes part."""
        return ask_profile(self.model, self.run)

    def task(self, adapter: Adapter, round_: int = 0, **changes: Any) -> bytes:
        """A round's task; `changes` are what the announcement did not say."""
        local, privacy = changes.pop("local", self.local), changes.pop("privacy", self.privacy)
        task = Task(round_, adapter, Adapter(), "AB", local, changes.pop("penalty", None), 0, privacy)
        return encode_task(task, "a", **{"model": self.model, "run": self.run.id, **changes}).blob

    def question(self, state: ServerState, **options: Any) -> bytes:
        """Asks for importance on a client's own data."""
        query = Query(**{"kind": "gradient", "on": "clients", **options})
        return ask_scores(query, state, "a", self.model, run=self.run.id)
