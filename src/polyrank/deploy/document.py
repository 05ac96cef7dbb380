"""A JSON file that several processes of a site change: whole or not at all, and on disk before anything follows."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from polyrank.errors import InputError
from polyrank.files import from_json, write_bytes


class Document:
    """A file that holds one JSON object; none where there is no file.

    Nothing is appended: a file that ends early, after a crash or a disk's fault, is not taken for a shorter one.

    Args:
        path: the file. Beside it, a hidden file ending in ``.lock`` keeps two processes from changing it at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """The object.

        Raises:
            InputError: if the file is not one.
        """
        if not self.path.exists():
            return {}
        try:
            value = from_json(self.path.read_bytes(), finite=True)
        except ValueError as error:
            raise InputError(f"{self.path}: not as it was written, so it is not used: {error}") from None
        if not isinstance(value, dict):
            raise InputError(f"{self.path}: not as it was written, so it is not used: holds no object")
        return value

    @contextmanager
    def change(self) -> Iterator[dict[str, Any]]:
        """The object to be changed, which is on disk once the context ends well, and as it was otherwise."""
        with open(self.path.with_name(f".{self.path.name}.lock"), "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            value = self.read()
            yield value
            write_bytes(self.path, json.dumps(value, indent=1, allow_nan=False).encode() + b"\n")
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the name of the new file, as well
            finally:
                os.close(folder)
