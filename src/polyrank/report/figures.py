"""Figures, as pure functions of records. Needs the extra ``report``."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from polyrank.files import write_bytes
from polyrank.report.text import in_figure

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_MOST_ROWS = 60


@contextmanager
def _drawing() -> Iterator[None]:
    """Names are text: a dollar sign begins no formula, and letters that the font has not are no reason to warn."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("figures need one more package: pip install matplotlib (the extra 'report')") from None
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


@_drawing()
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
    rows, columns = counts.shape
    figure = _figure(min(3.5 + 0.32 * columns, 22), min(1.8 + 0.26 * rows, 24))
    axes = figure.add_subplot()
    image = axes.imshow(counts, cmap="viridis", aspect="auto", interpolation="nearest")
    axes.set_title(in_figure(title))
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
    _save(figure, path)


@_drawing()
def plan_figure(path: Path, planned: Mapping[str, Any], title: str) -> None:
    """What ``polyrank plan`` knows as a PNG: budget against memory and links, and each group's memory by part.

    Args:
        path: the file to write.
        planned: a forecast.
        title: above the picture.

    Raises:
        ImportError: naming the extra to install, if matplotlib is missing.
    """
    shown = planned["clients"][:_MOST_ROWS]
    figure = _figure(15, 5.6 + 0.2 * len(shown))
    above, below = figure.subfigures(2, 1, height_ratios=[4.4, 1.2 + 0.2 * len(shown)])
    by_memory, by_link, parts = above.subplots(1, 3)
    figure.suptitle(in_figure(title))
    _rank_map(below.subplots(), planned, shown)
    groups, curves = planned["groups"], planned["curves"]
    colors = {group["name"]: _COLORS[index % len(_COLORS)] for index, group in enumerate(groups)}
    most = max((group["memory"] or 0 for group in groups), default=0)
    plateau = [[most, curves["memory"][-1][1]]] if curves["memory"] and most > curves["memory"][-1][0] else []
    _steps(by_memory, [*curves["memory"], *plateau], 2**30, "largest rank that fits", "#444444")
    for group in groups:
        if group["memory"] is not None:
            _mark(by_memory, group["memory"] / 2**30, group, colors)
    by_memory.set_xlabel("memory, GiB")
    by_memory.set_ylabel("rank budget (sum over modules)")
    for name, style in (("upload", "-"), ("download", ":")):
        _steps(by_link, curves[name], 1e6, f"{name} in one second", "#444444", style)
    for group in groups:
        if group["uplink"] is not None:
            _mark(by_link, group["uplink"] / 1e6, group, colors)
    by_link.set_xlabel("link, Mbit/s")
    fastest = max((group["uplink"] or 0 for group in groups), default=0) / 1e6
    if fastest:
        by_link.set_xlim(0, 8 * fastest)
        inside = [budget for need, budget in curves["upload"] if need / 1e6 <= 8 * fastest]
        by_link.set_ylim(0, 1.1 * max([*inside, *(group["budget"] for group in groups)], default=1) + 1)
    for axes, place in ((by_memory, "center right"), (by_link, "upper left")):
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, loc=place)
    _stacked_memory(parts, groups)
    _save(figure, path)


def _rank_map(axes, planned: Mapping[str, Any], clients) -> None:
    """Ranks in round 1, clients x adapted modules: what a client does not train is blank."""
    modules = list(planned["blocks"])
    ranks = np.array([[client["ranks"].get(name, 0) for name in modules] for client in clients], float)
    image = axes.imshow(np.ma.masked_equal(ranks, 0), cmap="viridis", aspect="auto", interpolation="nearest", vmin=0)
    _ticks(axes.set_yticks, [f"{client['name']} ({client['group']})" for client in clients], _MOST_ROWS)
    blocks = ["-" if block is None else str(block) for block in planned["blocks"].values()]
    starts = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
    axes.set_xticks([start - 0.5 for start in starts], [blocks[start] for start in starts], fontsize=8, ha="left")
    axes.grid(axis="x", color="white", linewidth=1.5)
    axes.set_xlabel("adapted modules, by block")
    axes.set_title("ranks in round 1", fontsize=10)
    axes.figure.colorbar(image, ax=axes, label="rank", pad=0.01)


def _stacked_memory(axes, groups) -> None:
    shown = [{**group, "peak": _present(group["peak"])} for group in groups if group["peak"] is not None]
    bottom = np.zeros(len(shown))
    for index, part in enumerate(shown[0]["peak"] if shown else ()):
        heights = np.array([group["peak"][part] / 2**20 for group in shown])
        axes.bar(range(len(shown)), heights, 0.6, bottom=bottom, label=part, color=_COLORS[index % len(_COLORS)])
        bottom += heights
    for place, group in enumerate(shown):
        if group["memory"] is not None:
            axes.hlines(group["memory"] / 2**20, place - 0.36, place + 0.36, color="#444444", linestyle="--")
    axes.set_xticks(range(len(shown)), [in_figure(group["name"]) for group in shown])
    axes.set_ylabel("peak memory, MiB (dashed: what it has)")
    axes.margins(x=0.1, y=0.15)
    if shown:
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], fontsize=8, loc="upper left")


def _present(parts: Mapping[str, float]) -> dict[str, float]:
    """The parts of a peak as they are at that moment: without what is never there together."""
    found, apart = {**parts}, -parts["apart"]
    del found["apart"]
    for part in ("gradients", "working", "activations"):
        less = min(found[part], apart)
        found[part], apart = found[part] - less, apart - less
    return found


def _steps(axes, steps, unit: float, label: str, color: str, style: str = "-") -> None:
    if steps:
        needs, budgets = zip(*steps, strict=True)
        axes.step(np.array(needs) / unit, budgets, where="post", label=label, color=color, linestyle=style)


def _mark(axes, x: float, group, colors) -> None:
    label = in_figure(f"{group['name']}: {group['budget']} ({group['limit']})")
    axes.plot([x], [group["budget"]], "o", color=colors[group["name"]], label=label)


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path: Path) -> None:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
    write_bytes(path, file.getvalue())


def _ticks(setter, names: list[str], most: int, **options) -> None:
    step = -(-len(names) // most)
    places = list(range(0, len(names), step))
    setter(places, [in_figure(names[place])[:24] for place in places], fontsize=8, **options)
