"""What can go wrong for a user: mistakes in what was given, and training that fails."""


class InputError(ValueError):
    """Something a user gave cannot be used; the message names it, its value, and what would be valid."""


class TrainingError(RuntimeError):
    """A client's loss left the finite numbers."""
