"""The page: one HTML file that holds its charts, its script and its style, and asks nothing of any network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml

from polyrank import __version__
from polyrank.report import charts, tables
from polyrank.report.answers import answers
from polyrank.report.charts.curves import looks
from polyrank.report.gather import Gathered, flatten
from polyrank.report.styles import Style, style_of
from polyrank.report.tables import Table
from polyrank.report.text import visible
from polyrank.report.web import embedded, spec

MARKER = "<!-- polyrank report: made by a command, may be replaced by it -->"
"""How a report is recognised, wherever it lies. Nothing else is ever replaced."""
_MOST_DIFFERENCES = 200
_MOST_SAMPLES = 10


@dataclass(frozen=True)
class Legend:
    """One method in the legend of all charts."""

    label: str
    style: Style


def page(gathered: Gathered, table: Table) -> str:
    """The report as HTML; the same text from the same records.

    Raises:
        ImportError: naming the package to install, if Jinja2 or Plotly is missing.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        missing = (error.name or "plotly").split(".")[0]
        raise ImportError(f"a report needs one more package: pip install {missing} (the extra 'report')") from None
    environment = Environment(
        loader=PackageLoader("polyrank.report.page", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.finalize = _shown
    environment.globals |= {"written": tables.written, "title_of": tables.title, "swatch": _swatch}
    sections, missing = charts.sections(gathered, table)
    hero = charts.hero(gathered, table)
    drawn = [spec(chart) for chart in (*hero, *(c for section in sections for c in section.charts))]
    shared, differing = _configuration(gathered)
    return environment.get_template("page.html").render(
        marker=MARKER,
        version=__version__,
        gathered=gathered,
        answers=answers(gathered, table),
        table=table,
        best=tables.leaders(table.columns, tables.federated(table)),
        has_settings=any(row.setting for row in table.rows),
        ordering=tables.ordering(table),
        styles=_styles(gathered, table),
        hero=hero,
        sections=sections,
        missing=missing,
        samples=_samples(gathered),
        legend=_legend(gathered, drawn),
        shared=shared,
        differing=differing,
        environment=_environment(gathered),
        data=embedded(drawn),
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
        script=_text("page.js"),
        style=_text("page.css"),
    )


def _shown(value: Any) -> Any:
    """What a template prints: text without characters that act. What is meant to be HTML stays as it is."""
    return value if hasattr(value, "__html__") or not isinstance(value, str) else visible(value)


def _samples(gathered: Gathered) -> list[tuple[str, Sequence[Mapping[str, str]]]]:
    """What the model of each method answers, of its first seed."""
    shown = ((entry.label, entry.example.samples[:_MOST_SAMPLES]) for entry in gathered.entries)
    return [(label, rows) for label, rows in shown if rows]


def _text(name: str) -> str:
    return (files("polyrank.report.page") / name).read_text(encoding="utf-8")


def _styles(gathered: Gathered, table: Table) -> dict[str, Style]:
    return {row.label: style_of(row.method) for row in table.rows} | looks(gathered)


def _legend(gathered: Gathered, drawn: Sequence[dict[str, Any]]) -> list[Legend]:
    """The entries that any curve or point shows."""
    shown = {trace.get("meta") for chart in drawn if chart["kind"] == "plane" for trace in chart["traces"]}
    return [Legend(label, style) for label, style in looks(gathered).items() if label in shown]


_SHAPES = {
    "circle": '<circle cx="17" cy="7" r="4.2"/>',
    "square": '<rect x="13.2" y="3.2" width="7.6" height="7.6"/>',
    "diamond": '<path d="M17 1.8 22.2 7 17 12.2 11.8 7z"/>',
    "triangle-up": '<path d="M17 2 22 11H12z"/>',
    "triangle-down": '<path d="M17 12 22 3H12z"/>',
    "x": '<path d="m13.6 3.6 6.8 6.8m0-6.8-6.8 6.8" stroke-width="3"/>',
    "cross": '<path d="M17 2.4v9.2M12.4 7h9.2" stroke-width="3"/>',
    "star": '<path d="m17 1.6 1.6 3.6 3.9.4-2.9 2.6.8 3.9-3.4-2-3.4 2 .8-3.9-2.9-2.6 3.9-.4z"/>',
}
_STROKES = {"dash": "6 3", "dot": "2 2.4", "dashdot": "6 2.4 2 2.4", "longdash": "10 3", "longdashdot": "10 3 2 3"}


def _swatch(style: Style) -> Any:
    """The line and marker of a method as a small picture."""
    from markupsafe import Markup

    dash = f' stroke-dasharray="{_STROKES[style.dash]}"' if style.dash in _STROKES else ""
    line = f'<path d="M1 7h32"{dash} stroke-width="2"/>'
    shape = _SHAPES[style.marker]
    paint = f'fill="{style.color}" stroke="{style.color}"'
    return Markup(f'<svg class="swatch" viewBox="0 0 34 14" aria-hidden="true" {paint}>{line}{shape}</svg>')


def _configuration(gathered: Gathered) -> tuple[str, list[tuple[str, Sequence[tuple[str, str]]]]]:
    """What all runs share, as YAML; and each key that differs, with its value by method."""
    plain = [run.experiment for run in gathered.runs]
    shared = yaml.safe_dump(_common(plain), sort_keys=False, allow_unicode=True)
    known = set(flatten(_common(plain)))
    differing: dict[str, list[tuple[str, str]]] = {}
    for entry in gathered.entries:
        for key, value in flatten(entry.runs[0].experiment).items():
            if key not in known and key != "seed":
                differing.setdefault(key, []).append((entry.label, json.dumps(value, default=str)))
    return shared, list(differing.items())[:_MOST_DIFFERENCES] if len(gathered.entries) > 1 else []


def _common(plain: Sequence[Any]) -> dict[str, Any]:
    """The keys on which all agree."""
    found = {}
    for key, value in plain[0].items():
        others = [p.get(key) for p in plain[1:]]
        if all(other == value for other in others):
            found[key] = value
        elif all(isinstance(other, dict) for other in [value, *others]) and (inner := _common([value, *others])):
            found[key] = inner
    return found


def _environment(gathered: Gathered) -> list[tuple[str, str]]:
    """What the runs were made with; every value that occurs."""
    found: dict[str, dict[str, None]] = {}
    for run in gathered.runs:
        for key, value in ((run.summary or {}).get("environment") or {}).items():
            found.setdefault(key, {})[str(value) if value is not None else "none"] = None
    return [(key, ", ".join(values)) for key, values in found.items()]
