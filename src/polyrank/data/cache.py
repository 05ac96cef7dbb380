"""Prepared data kept on disk between runs, under a name that is a hash of what it was made from."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)

# Part of every name: raise it when the same inputs come to mean another result.
_VERSION = "1"


def cache_dir() -> Path | None:
    """Where prepared data is kept, or None if it is not.

    POLYRANK_CACHE names the folder, and an empty value turns the cache off; otherwise it is `polyrank` in
    XDG_CACHE_HOME, or in ~/.cache.
    """
    chosen = os.environ.get("POLYRANK_CACHE")
    if chosen is not None:
        return Path(chosen).expanduser() if chosen else None
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "polyrank"


def cache_path(inputs: list[str] | list[bytes] | np.ndarray, *arguments: object, suffix: str) -> Path | None:
    """The file for these inputs prepared with these arguments, in a folder that exists; None without a cache."""
    folder = cache_dir()
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("it cannot be written to")
    except OSError as error:
        log.warning("cannot use the cache folder %s (%s); going on without it", folder, error)
        return None
    digest = hashlib.sha256(repr((_VERSION, *arguments)).encode())
    if isinstance(inputs, np.ndarray):
        digest.update(repr((inputs.dtype.str, inputs.shape)).encode())
        digest.update(np.ascontiguousarray(inputs).data)
    else:
        for item in inputs:
            data = item.encode("utf-8", "surrogatepass") if isinstance(item, str) else item
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
    return folder / f"{digest.hexdigest()[:32]}{suffix}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it becomes `path` only if the block ends well."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
