"""Charts as what Plotly draws in a browser: plain values, with the page's own JavaScript adding theme and size.

Text from users' files is escaped: Plotly reads tags in labels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from polyrank.report import text
from polyrank.report.charts.shapes import Axis, Chart, Dot, Dots, Heat, Line, Lines, Panel, Point, Points
from polyrank.report.styles import NEUTRAL, Style

ALPHABET = "".join(chr(code) for code in range(35, 127) if chr(code) not in "\\\"<>&'")
_DIGITS = 5
_MARKERS_ALONG = 8


def spec(chart: Chart) -> dict[str, Any]:
    """What the page's script needs to draw a chart."""
    common = {"key": chart.key, "x": _axis(chart.x), "y": _axis(chart.y)}
    if isinstance(chart, Lines):
        levels = _span([x for line in chart.lines for x in line.x])
        traces = [t for line in chart.lines for t in _line(line, chart.x, chart.y)]
        traces += [_level(level, levels, chart.y) for level in chart.levels]
        return {**common, "kind": "plane", "traces": traces}
    if isinstance(chart, Points):
        across = _span([0.0, *(1.04 * p.x for p in chart.points)])
        traces = [_level(level, across, chart.y) for level in chart.levels]
        traces += [_front(chart.front)] if chart.front else []
        traces += [_point(point, chart.x, chart.y) for point in chart.points]
        return {**common, "kind": "plane", "traces": traces, "zero": True}
    if isinstance(chart, Dots):
        rows = list(reversed(chart.dots))
        names = [text.label(dot.label) for dot in rows]
        traces = [t for place, dot in enumerate(rows) for t in _dot(dot, place, chart.x)]
        return {**common, "kind": "dots", "traces": traces, "names": names}
    if isinstance(chart, Heat):
        return {**common, "kind": "heat", **_heat(chart)}
    raise TypeError(f"no way to draw a {type(chart).__name__}")


def embedded(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    plain = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _axis(axis: Axis) -> dict[str, str]:
    return {"title": text.label(axis.title), "kind": axis.kind}


def short(value: float) -> float | None:
    """A number with as many digits as a screen can show; what is not finite is nothing."""
    if not math.isfinite(value):
        return None
    return float(f"{value:.{_DIGITS}g}")


def _shorts(values: Iterable[float]) -> list[float | None]:
    return [short(value) for value in values]


def _format(axis: Axis, sign: str) -> str:
    return f"%{{{sign}:.2%}}" if axis.kind == "percent" else f"%{{{sign}:.4~g}}"


def _hover(label: str, x: Axis, y: Axis) -> str:
    names = [text.label(axis.title) for axis in (x, y)]
    name = text.label(label)
    return f"<b>{name}</b><br>{names[0]} {_format(x, 'x')}<br>{names[1]} {_format(y, 'y')}<extra></extra>"


def _line(line: Line, x: Axis, y: Axis) -> list[dict[str, Any]]:
    along, values = _shorts(line.x), _shorts(line.y)
    every = max(1, math.ceil(len(along) / _MARKERS_ALONG))
    marks = range(0, len(along), every)
    main = {
        "type": "scatter",
        "mode": "lines",
        "x": along,
        "y": values,
        "meta": line.label,
        "name": text.label(line.label),
        "line": {"color": line.style.color, "dash": line.style.dash, "width": 2.2},
        "hovertemplate": _hover(line.label, x, y),
    }
    markers = {
        **{"type": "scatter", "mode": "markers", "meta": line.label, "showlegend": False, "hoverinfo": "skip"},
        **{"x": [along[i] for i in marks], "y": [values[i] for i in marks], "marker": _marker(line.style, 7)},
    }
    if not line.spread:
        return [main, markers]
    low = _shorts(a - b for a, b in zip(line.y, line.spread, strict=True))
    high = _shorts(a + b for a, b in zip(line.y, line.spread, strict=True))
    band = {
        **{"type": "scatter", "mode": "lines", "x": along + along[::-1], "y": high + low[::-1]},
        **{"fill": "toself", "fillcolor": _faint(line.style.color), "line": {"width": 0}, "hoverinfo": "skip"},
        **{"meta": line.label, "showlegend": False},
    }
    return [band, main, markers]


def _point(point: Point, x: Axis, y: Axis) -> dict[str, Any]:
    made: dict[str, Any] = {
        **{"type": "scatter", "mode": "markers", "x": [short(point.x)], "y": [short(point.y)]},
        **{"meta": point.label, "name": text.label(point.label), "marker": _marker(point.style, 12)},
        "hovertemplate": _hover(f"{point.label}: {point.text}" if point.text else point.label, x, y),
    }
    if point.text:
        made |= {
            "mode": "markers+text",
            "text": [text.label(point.text.split(":")[0])],
            "textposition": "top center",
            "cliponaxis": False,
        }
    for axis, spread in (("error_x", point.x_spread), ("error_y", point.y_spread)):
        if spread:
            made[axis] = {"array": [short(spread)], "color": point.style.color, "thickness": 1.4, "width": 4}
    return made


def _dot(dot: Dot, place: int, x: Axis) -> list[dict[str, Any]]:
    value, spread = _format(x, "x"), f" ± {_number(dot.spread, x)}" if dot.spread else ""
    mean = {
        **{"type": "scatter", "mode": "markers", "x": [short(dot.value)], "y": [place], "meta": dot.label},
        **{"marker": _marker(dot.style, 13), "showlegend": False},
        "hovertemplate": f"<b>{text.label(dot.label)}</b><br>{value}{spread}<extra></extra>",
    }
    if dot.spread:
        mean["error_x"] = {"array": [short(dot.spread)], "color": dot.style.color, "thickness": 2, "width": 6}
    if len(dot.single) < 2:
        return [mean]
    marker = {"color": dot.style.color, "size": 6, "opacity": 0.45}
    seeds = {
        **{"type": "scatter", "mode": "markers", "x": _shorts(dot.single), "y": [place] * len(dot.single)},
        **{
            "meta": dot.label,
            "marker": marker,
            "showlegend": False,
            "hovertemplate": f"one seed: {value}<extra></extra>",
        },
    }
    return [seeds, mean]


def _number(value: float, axis: Axis) -> str:
    return f"{value:.2%}" if axis.kind == "percent" else f"{value:.4g}"


def _level(level: Point, across: tuple[float, float], y: Axis) -> dict[str, Any]:
    return {
        **{"type": "scatter", "mode": "lines", "x": list(across), "y": [short(level.y)] * 2, "meta": level.label},
        **{"name": text.label(level.label), "line": {"color": level.style.color, "dash": level.style.dash}},
        "hovertemplate": f"<b>{text.label(level.label)}</b><br>{_format(y, 'y')}<extra></extra>",
    }


def _front(places: Sequence[tuple[float, float]]) -> dict[str, Any]:
    x, y = zip(*places, strict=True)
    ring = {"symbol": "circle-open", "size": 21, "color": NEUTRAL, "line": {"width": 1.5}}
    return {
        **{"type": "scatter", "mode": "lines+markers", "x": _shorts(x), "y": _shorts(y), "hoverinfo": "skip"},
        **{"marker": ring, "line": {"color": NEUTRAL, "width": 1.5, "shape": "hv"}},
    }


def _span(values: Sequence[float]) -> tuple[float, float]:
    return (min(values, default=0.0), max(values, default=1.0))


def _marker(style: Style, width: int) -> dict[str, Any]:
    return {"color": style.color, "symbol": style.marker, "size": width}


def _faint(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.16)"


def _heat(chart: Heat) -> dict[str, Any]:
    values = [frame.values for panel in chart.panels for frame in panel.frames]
    known = np.unique(np.concatenate([v[np.isfinite(v)].ravel() for v in values]))
    digits = {short(float(v)) for v in known}
    codes = sorted(d for d in digits if d is not None)
    coded = len(codes) < len(ALPHABET)
    top = chart.top if chart.top is not None else float(known[-1]) if len(known) else 1.0
    return {
        "value": _axis(chart.value),
        "categories": list(chart.categories),
        "top": short(top),
        "codes": codes if coded else None,
        "panels": [_panel(panel, codes if coded else None) for panel in chart.panels],
    }


def _panel(panel: Panel, codes: Sequence[float] | None) -> dict[str, Any]:
    return {
        "label": panel.label,
        "rows": [text.label(name) for name in panel.rows],
        "columns": [text.label(name) for name in panel.columns],
        "starts": [[place, text.label(name)] for place, name in panel.starts],
        "row_starts": [[place, text.label(name)] for place, name in panel.row_starts],
        "frames": [{"label": frame.label, "rows": _cells(frame.values, codes)} for frame in panel.frames],
    }


def _cells(values: np.ndarray, codes: Sequence[float] | None) -> list[Any]:
    """Rows of cells: a character a cell where few values occur (the first of the alphabet: nothing)."""
    if codes is None:
        return [_shorts(row) for row in values.tolist()]
    letters = {code: ALPHABET[place + 1] for place, code in enumerate(codes)}
    known = {value: letters[short(value)] for value in np.unique(values[np.isfinite(values)]).tolist()}
    return ["".join(known[v] if v == v else ALPHABET[0] for v in row) for row in values.tolist()]
