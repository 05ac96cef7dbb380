"""Charts as plain data. What draws them, on paper or on a page, adds nothing to what they say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from polyrank.report.styles import Style

Kind = Literal["number", "percent"]
MOST_ROWS = 60
MOST_POINTS = 400


@dataclass(frozen=True)
class Axis:
    """A title with its unit, and how numbers are written; ``percent`` numbers are shares of 1."""

    title: str
    kind: Kind = "number"


@dataclass(frozen=True)
class Line:
    """A curve, with a band around it where there are several seeds: `y` - `spread` to `y` + `spread`."""

    label: str
    style: Style
    x: tuple[float, ...]
    y: tuple[float, ...]
    spread: tuple[float, ...] = ()


@dataclass(frozen=True)
class Point:
    """A measurement with its standard deviations (0: unknown), and the values it is the mean of."""

    label: str
    style: Style
    x: float
    y: float
    x_spread: float = 0.0
    y_spread: float = 0.0
    text: str = ""


@dataclass(frozen=True)
class Dot:
    """A row of a dot plot: the mean, its standard deviation, and the single values."""

    label: str
    style: Style
    value: float
    spread: float
    single: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Frame:
    """One state of a map: rows x columns, NaN where there is nothing."""

    label: str
    values: np.ndarray


@dataclass(frozen=True)
class Panel:
    """The map of one run: its rows and columns, and its frames over time.

    Attributes:
        label: whose it is.
        rows, columns: names.
        frames: at least one.
        starts, row_starts: columns and rows at which a group of them begins, and the group's name.
    """

    label: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    frames: tuple[Frame, ...]
    starts: tuple[tuple[int, str], ...] = ()
    row_starts: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Chart:
    """What every chart has: a key (its file name), a title, and a sentence that says what it shows."""

    key: str
    title: str
    says: str
    x: Axis
    y: Axis


@dataclass(frozen=True)
class Lines(Chart):
    """Curves; `levels` are horizontal lines for what has no rounds."""

    lines: tuple[Line, ...]
    levels: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Points(Chart):
    """Measurements in the plane; `front` joins those that nothing beats; `levels` are horizontal lines."""

    points: tuple[Point, ...]
    front: tuple[tuple[float, float], ...] = ()
    levels: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Dots(Chart):
    """Rows of one measurement each, the best on top; `y` names the rows."""

    dots: tuple[Dot, ...]


@dataclass(frozen=True)
class Heat(Chart):
    """Maps: one panel a run, each with its frames.

    Attributes:
        panels: at least one.
        value: what a colour stands for.
        categories: names of the values 0, 1, ... where they are no quantities.
        top: the largest value of the scale; None: the largest that occurs.
        counts: whether cells are few enough to be written out.
    """

    panels: tuple[Panel, ...]
    value: Axis
    categories: tuple[str, ...] = ()
    top: float | None = None


def scaled(
    title: str, values: Iterable[float], unit: Literal["bytes", "memory", "seconds", "link"]
) -> tuple[Axis, float]:
    """An axis in the largest unit that keeps its largest value above 1, and the number of base units in it."""
    top = max(values, default=0.0)
    steps = {
        "bytes": (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)),
        "memory": (("GiB", 2.0**30), ("MiB", 2.0**20)),
        "seconds": (("h", 3600.0), ("min", 60.0), ("s", 1.0)),
        "link": (("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3)),
    }[unit]
    name, factor = next((step for step in steps if top >= 2 * step[1]), steps[-1])
    return Axis(f"{title} ({name})"), factor


def thinned(count: int, most: int) -> list[int]:
    """At most `most` places of `count`, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
