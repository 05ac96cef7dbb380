"""Figures, as pure functions of records. Needs the extra ``report``."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def split_heat_map(path: Path, counts: np.ndarray, clients: list[str], classes: list[str], title: str) -> None:
    """Client x class counts as a PNG.

    Args:
        path: the file to write.
        counts: examples, clients x classes.
        clients: row names.
        classes: column names.
        title: above the picture.

    Raises:
        ImportError: naming the extra to install, if matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("figures need one more package: pip install matplotlib (the extra 'report')") from None
    rows, columns = counts.shape
    figure = Figure(figsize=(min(3.5 + 0.32 * columns, 22), min(1.8 + 0.26 * rows, 24)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(counts, cmap="viridis", aspect="auto", interpolation="nearest")
    axes.set_title(title)
    axes.set_xlabel("class")
    _ticks(axes.set_xticks, classes, 60, rotation=90 if columns > 12 else 0)
    _ticks(axes.set_yticks, clients, 60)
    if rows * columns <= 400:
        middle = counts.max() / 2
        for (row, column), value in np.ndenumerate(counts):
            if value:
                color = "black" if value > middle else "white"
                axes.text(column, row, str(value), ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, label="examples")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _ticks(setter, names: list[str], most: int, **options) -> None:
    step = -(-len(names) // most)
    places = list(range(0, len(names), step))
    setter(places, [names[place][:24] for place in places], fontsize=8, **options)
