"""Experiments that come with polyrank. Importing this loads no library."""

from __future__ import annotations

from pathlib import Path


def embedded(name: str) -> Path:
    """An experiment that ships with polyrank, in an installed package or in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "experiments", package.parents[1] / "experiments"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"polyrank was installed without {name}")
