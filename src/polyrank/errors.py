"""What can go wrong for a user: mistakes in what was given, and training that fails."""

from __future__ import annotations

import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxstring, _SHORT.maxother = 5, 8, 20, 200, 200


def shortened(value: object) -> str:
    """A value as a message shows it: as Python writes it, and long ones with a gap in the middle."""
    return _SHORT.repr(value)


class InputError(ValueError):
    """Something a user gave cannot be used; the message names it, its value, and what would be valid."""


class TrainingError(RuntimeError):
    """A client's loss left the finite numbers."""
