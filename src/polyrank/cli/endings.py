"""How a command ends that cannot go on: the message, and the exit code."""

from __future__ import annotations

import errno
import os

from polyrank.errors import InputError, TrainingError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_MEMORY = ("out of memory", "can't allocate memory")  # what torch says, on a GPU and on a CPU


def ending(error: BaseException) -> tuple[int, str] | None:
    """The exit code and the message of an error that the user, or more room, can mend; None of any other.

    The code is 2 where the input must change, and 1 where the same command may succeed at another time.
    """
    if isinstance(error, BrokenPipeError):  # nobody reads any more: the application ends quietly
        return None
    if isinstance(error, TrainingError):
        return 1, str(error)
    if isinstance(error, InputError):
        return 2, str(error)
    if isinstance(error, ImportError) and (error.name is None or isinstance(error, ModuleNotFoundError)):
        return 2, str(error)  # a package that is not installed
    if isinstance(error, OSError):
        return (1 if error.errno in _FULL else 2), _noted(error, failure(error))
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    ):
        return 1, _noted(error, f"out of memory: {error}" if str(error) else "out of memory")
    return None


def _noted(error: BaseException, message: str) -> str:
    """The message, and what whoever knew more has added to the error."""
    return "\n".join([message, *getattr(error, "__notes__", ())])


def failure(error: OSError) -> str:
    """What the system says of a file, with the file in front: ``runs/a/summary.json: No space left on device``."""
    if error.strerror is None or error.filename is None:
        return str(error)
    return f"{os.fsdecode(error.filename)}: {error.strerror}"
