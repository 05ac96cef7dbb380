"""An append-only file of what arrived from whom, and what became of it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from polyrank.files import from_json, named

Event = Literal["joined", "received", "accepted", "refused", "declined", "late", "failed", "unanswered", "left out"]


class Journal:
    """An append-only file of JSON objects, one a line, each with its ``time`` (UTC)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, **what: Any) -> None:
        """Appends a line, and flushes it to disk."""
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **what}
        with named(self.path), open(self.path, "ab") as file:
            if file.tell() and not self._ends_whole():
                file.write(b"\n")  # after a line that a crash cut short
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def lines(self) -> Iterator[dict[str, Any]]:
        """All whole lines."""
        if self.path.is_file():
            for line in self.path.read_bytes().splitlines():
                try:
                    yield from_json(line)
                except ValueError:
                    continue  # cut short by a crash

    def _ends_whole(self) -> bool:
        with open(self.path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"


class Audit(Journal):
    """What has reached a server: ``event``, ``round``, ``client``, and what there is to say.

    ``received``, ``refused`` and ``accepted`` have the message's SHA-256 and its bytes; ``refused``, ``declined`` and
    ``failed`` have the ``reason``. A line is on disk before anything that follows from it.
    """

    def note(self, event: Event, round_: int, client: str, **more: Any) -> None:
        """Appends a line."""
        self.append(event=event, round=round_, client=client, **more)
