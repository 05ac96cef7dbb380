"""What is known of a data set before it is read or downloaded: enough to plan with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet

from polyrank.data.formats import kind_of
from polyrank.data.per_client import read_manifest
from polyrank.data.source import DataError, Kind
from polyrank.files import from_json, read_text


@dataclass(frozen=True)
class Outline:
    """A data set from afar.

    Attributes:
        kind: ``text``, ``image`` or ``causal``.
        classes: how many; None where only the data itself would tell.
        examples: of the training split; None likewise.
    """

    kind: Kind
    classes: int | None = None
    examples: int | None = None


_KNOWN = {
    "ag_news": Outline("text", 4, 120_000),
    "alpaca": Outline("causal", 1, 46_802),
    "banking77": Outline("text", 77, 10_003),
    "cifar100": Outline("image", 100, 50_000),
    "digits": Outline("image", 10, 718),
    "dolly": Outline("causal", 8, 13_510),
    "ledgar": Outline("text", 100, 60_000),
    "natural_instructions": Outline("causal", 1),
    "sst2": Outline("text", 2, 67_349),
}


def outline(name: str, options: Mapping[str, Any]) -> Outline:
    """The outline of an entry of `DATASETS` with its options. Files are looked at where they are present.

    Args:
        name: the entry.
        options: its options, as a configuration gives them.
    """
    if name in _KNOWN:
        return _KNOWN[name]
    if name in ("hub_instructions", "instructions"):
        return Outline("causal", None, _left(_rows(options.get("train")), options))
    if name == "per_client":
        return _exported(options.get("folder"))
    kind: Kind = "image" if options.get("image") else "text"
    return Outline(kind, _classes(options.get("classes")), _rows(options.get("train")))


def _exported(folder: Path | None) -> Outline:
    if folder is None:
        return Outline("text")
    manifest = read_manifest(folder)
    examples = sum(entry["examples"] for entry in manifest["clients"].values())
    classes = manifest["data"].get("classes")
    return Outline(manifest["kind"], len(classes) if classes else None, examples)


def _left(rows: int | None, options: Mapping[str, Any]) -> int | None:
    """What of the training rows is not set aside for testing."""
    return rows if rows is None or options.get("test") else rows - round(options.get("test_share", 0.1) * rows)


def _classes(given: Path | list[str] | None) -> int | None:
    if isinstance(given, list):
        return len(given)
    try:
        return len(from_json(read_text(given))) if given is not None else None
    except (OSError, ValueError):
        return None  # loading the data will say what is wrong with it


def _rows(path: Any) -> int | None:
    try:
        if isinstance(path, Path) and kind_of(path) == "parquet":
            return int(pyarrow.parquet.read_metadata(path).num_rows)
    except (DataError, pyarrow.ArrowException, OSError):
        pass
    return None
