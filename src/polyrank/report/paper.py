"""Charts for papers: PDF, SVG and PNG, the same bytes from the same records. Needs the extra ``report``."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from polyrank.report.charts.shapes import Axis, Chart, Dots, Heat, Line, Lines, Panel, Points, thinned
from polyrank.report.styles import NEUTRAL
from polyrank.report.text import in_figure

FORMATS = ("pdf", "svg", "png")
_MARKERS = dict(
    zip(
        ("circle", "square", "diamond", "triangle-up", "x", "cross", "triangle-down", "star"),
        ("o", "s", "D", "^", "X", "P", "v", "*"),
        strict=True,
    )
)
_DASHES: Mapping[str, Any] = {
    "solid": "-",
    "dash": (0, (5, 2)),
    "dot": (0, (1.2, 1.6)),
    "dashdot": (0, (5, 1.8, 1.2, 1.8)),
    "longdash": (0, (9, 2.5)),
    "longdashdot": (0, (9, 2, 1.2, 2)),
}
_STATES = ("#F1F2F4", "#9CC7E4", "#E69F00", "#B3261E")
_RC = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#5B616B",
    "axes.grid": True,
    "grid.color": "#E2E5EA",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "pdf.fonttype": 42,
    "svg.hashsalt": "polyrank",
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign begins no formula
}
_METADATA: Mapping[str, dict[str, Any]] = {
    "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    "svg": {"Date": None, "Creator": None},
    "png": {"Software": None},
}
_MOST_LABELS = 30
_MOST_WRITTEN = 225


def drawn(chart: Chart) -> Iterator[tuple[str, bytes]]:
    """A chart in every format: a file name and its bytes. A map has a file for each of its panels.

    Raises:
        ImportError: naming the package to install, if matplotlib is missing.
    """
    if isinstance(chart, Heat) and len(chart.panels) > 1:
        for number, panel in enumerate(chart.panels, 1):
            yield from _files(
                f"{chart.key}-{number:02d}", lambda figure, panel=panel: _map(figure, chart, panel), chart
            )
    else:
        yield from _files(chart.key, lambda figure: _draw(figure, chart), chart)


def _files(name: str, draw: Callable[[Any], None], chart: Chart) -> Iterator[tuple[str, bytes]]:
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("figures need one more package: pip install matplotlib (the extra 'report')") from None
    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a name in letters that the font has not
        figure = Figure(figsize=(5.4, 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # it stays as it was laid out, in every format
        for form in FORMATS:
            file = io.BytesIO()
            figure.savefig(file, format=form, dpi=170, metadata=_METADATA[form])
            yield f"{name}.{form}", file.getvalue()


def _draw(figure, chart: Chart) -> None:
    if isinstance(chart, Heat):
        _map(figure, chart, chart.panels[0])
        return
    axes = figure.add_subplot()
    if isinstance(chart, Dots):
        _dots(figure, axes, chart)
    else:
        for mark in chart.lines if isinstance(chart, Lines) else ():
            _line(axes, mark)
        if isinstance(chart, Points):
            _points(axes, chart)
        for level in chart.levels:
            axes.axhline(
                level.y, color=level.style.color, linestyle=_DASHES[level.style.dash], label=in_figure(level.label)
            )
        _legend(figure, axes)
    _labels(axes, chart.x, chart.y)


def _line(axes, line: Line) -> None:
    every = max(1, -(-len(line.x) // 8))
    axes.plot(
        *(line.x, line.y),
        color=line.style.color,
        linestyle=_DASHES[line.style.dash],
        marker=_MARKERS[line.style.marker],
        markevery=every,
        markersize=4.5,
        linewidth=1.6,
        label=in_figure(line.label),
    )
    if line.spread:
        low, high = (np.array(line.y) + sign * np.array(line.spread) for sign in (-1, 1))
        axes.fill_between(line.x, low, high, color=line.style.color, alpha=0.16, linewidth=0)


def _points(axes, chart: Points) -> None:
    if chart.front:
        x, y = zip(*chart.front, strict=True)
        axes.step(x, y, where="post", color=NEUTRAL, linewidth=1.2, label="beaten by none")
        axes.plot(x, y, "o", markersize=13, markerfacecolor="none", markeredgecolor=NEUTRAL, markeredgewidth=1)
    seen: set[str] = set()
    for point in chart.points:
        label = None if point.label in seen else in_figure(point.label)
        seen.add(point.label)
        axes.errorbar(
            *(point.x, point.y),
            xerr=point.x_spread or None,
            yerr=point.y_spread or None,
            fmt=_MARKERS[point.style.marker],
            color=point.style.color,
            markersize=7,
            capsize=3,
            linewidth=1,
            label=label,
        )
        if point.text:
            note = point.text.split(":")[0]
            axes.annotate(in_figure(note), (point.x, point.y), (6, 4), textcoords="offset points", fontsize=7)
    axes.set_xlim(left=0)


def _dots(figure, axes, chart: Dots) -> None:
    figure.set_size_inches(5.4, 1.0 + 0.3 * len(chart.dots))
    for place, dot in enumerate(reversed(chart.dots)):
        axes.plot(dot.single, [place] * len(dot.single), ".", color=dot.style.color, alpha=0.45, markersize=5)
        marker = _MARKERS[dot.style.marker]
        error = dot.spread or None
        axes.errorbar(dot.value, place, xerr=error, fmt=marker, color=dot.style.color, markersize=7, capsize=3)
    axes.set_yticks(range(len(chart.dots)), [in_figure(dot.label) for dot in reversed(chart.dots)])
    axes.grid(axis="y", visible=False)


def _map(figure, chart: Heat, panel: Panel) -> None:
    """The panel's frames side by side: the first, the middle and the last."""
    frames = [panel.frames[i] for i in thinned(len(panel.frames), 3)]
    rows, columns = len(panel.rows), len(panel.columns)
    width = min(max(2.2 + 0.12 * columns, 4.4), 9.0)
    figure.set_size_inches(width, min(max(1.6 + 0.16 * rows, 2.4), 9.0) * len(frames))
    image = None
    for axes, frame in zip(np.atleast_1d(figure.subplots(len(frames), 1, squeeze=True)), frames, strict=True):
        image = axes.imshow(
            np.ma.masked_invalid(frame.values),
            cmap=_colours(chart.categories),
            aspect="auto",
            interpolation="nearest",
            vmin=0,
            vmax=_top(chart, panel),
        )
        axes.grid(visible=False)
        if panel.row_starts:
            axes.set_yticks(
                [p - 0.5 for p, _ in panel.row_starts],
                [in_figure(n) for _, n in panel.row_starts],
                fontsize=7,
                va="top",
            )
        else:
            _names(axes.set_yticks, panel.rows)
        if panel.starts:
            shown = [panel.starts[i] for i in thinned(len(panel.starts), 14)]
            axes.set_xticks([p - 0.5 for p, _ in shown], [in_figure(n) for _, n in shown], fontsize=7, ha="left")
        else:
            _names(axes.set_xticks, panel.columns, rotation=90 if max(map(len, panel.columns), default=0) > 3 else 0)
        axes.set_title(in_figure(panel.label if len(frames) == 1 else f"{panel.label}, {frame.label}"), fontsize=9)
        axes.set_xlabel(chart.x.title)
        axes.set_ylabel(chart.y.title)
        if rows * columns <= _MOST_WRITTEN and not chart.categories:
            _written(axes, frame.values, chart, _top(chart, panel))
    _scale(figure, image, chart)


def _colours(categories: Sequence[str]):
    from matplotlib.colors import ListedColormap

    return ListedColormap(_STATES[: len(categories)]) if categories else "viridis"


def _top(chart: Heat, panel: Panel) -> float:
    if chart.top is not None:
        return chart.top
    return max(float(np.nanmax(f.values)) for f in panel.frames if np.isfinite(f.values).any())


def _written(axes, values: np.ndarray, chart: Heat, top: float) -> None:
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value) and value:
            text = f"{100 * value:.0f}" if chart.value.kind == "percent" else f"{value:g}"
            color = "black" if value > 0.6 * top else "white"
            axes.text(column, row, text, ha="center", va="center", fontsize=6, color=color)


def _scale(figure, image, chart: Heat) -> None:
    if chart.categories:
        from matplotlib.patches import Patch

        patches = [Patch(color=color, label=name) for color, name in zip(_STATES, chart.categories, strict=False)]
        figure.legend(handles=patches, loc="outside lower center", ncols=4)
        return
    bar = figure.colorbar(image, ax=figure.axes, label=chart.value.title)
    if chart.value.kind == "percent":
        from matplotlib.ticker import PercentFormatter

        bar.formatter = PercentFormatter(1)


def _labels(axes, x: Axis, y: Axis) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.set_xlabel(x.title)
    axes.set_ylabel(y.title)
    for axis, setter in ((x, axes.xaxis), (y, axes.yaxis)):
        if axis.kind == "percent":
            setter.set_major_formatter(PercentFormatter(1))
        elif axis.title == "round":
            setter.set_major_locator(MaxNLocator(integer=True))


def _legend(figure, axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        rows = -(-len(labels) // 3)
        figure.set_size_inches(5.4, 3.4 + 0.18 * rows)
        figure.legend(handles, [textwrap.shorten(text, 40) for text in labels], loc="outside lower center", ncols=3)


def _names(setter, names: Sequence[str], **options) -> None:
    places = thinned(len(names), _MOST_LABELS)
    setter(places, [in_figure(names[i])[-28:] for i in places], fontsize=7, **options)


def all_files(charts: Iterable[Chart]) -> dict[str, bytes]:
    """File name -> bytes of every chart in every format."""
    return {name: data for chart in charts for name, data in drawn(chart)}
