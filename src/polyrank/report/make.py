"""A report, from folders to files. Only what a report wrote is ever replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from polyrank.errors import InputError
from polyrank.files import encoded, from_json, write_bytes, write_json, write_text
from polyrank.report import charts, tables
from polyrank.report.gather import Gathered, gather
from polyrank.report.page import MARKER, page
from polyrank.report.tables import Table

_LIST = "written-by-polyrank-report.json"


def make(
    folders: Sequence[Path], html: Path, figures: Path | None = None, table_folder: Path | None = None
) -> dict[str, Path]:
    """Writes the page and, where a folder is given, the figures and the tables.

    Args:
        folders: of runs and studies.
        html: the page's file; replaced only if it is a report.
        figures: a folder for every chart as PDF, SVG and PNG.
        table_folder: a folder for the summary as Markdown, LaTeX and CSV.

    Returns:
        What was written: ``page``, ``figures``, ``tables``.

    Raises:
        InputError: if a folder holds neither run nor study, or a file is in the way.
        ImportError: naming the package to install.
    """
    _check_page(html)
    gathered = gather(folders)
    table = tables.summarise(gathered)
    written = {"page": html}
    texts: dict[Path, Mapping[str, bytes]] = {}
    if table_folder is not None:
        texts[table_folder] = {name: encoded(text) for name, text in _tables(table).items()}
        written["tables"] = table_folder
    if figures is not None:
        texts[figures] = {**texts.get(figures, {}), **_figures(gathered, table)}
        written["figures"] = figures
    for folder, files in texts.items():
        _check_folder(folder, files)
    write_text(html, page(gathered, table))
    for folder, files in texts.items():
        _write(folder, files)
    return written


def _tables(table: Table) -> dict[str, str]:
    return {
        "summary.md": tables.markdown(table),
        "summary.tex": tables.latex(table),
        "summary.csv": tables.as_csv(table),
    }


def _figures(gathered: Gathered, table: Table) -> dict[str, bytes]:
    from polyrank.report.paper import all_files

    sections, _ = charts.sections(gathered, table)
    return all_files([*charts.hero(gathered, table), *(chart for section in sections for chart in section.charts)])


def _check_page(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"--out: {path} is a folder; name a file in it, for example {path / 'report.html'}")
    if path.exists():
        with open(path, "rb") as file:
            if file.readline().strip() != MARKER.encode():
                raise InputError(f"--out: {path} exists and is no report of polyrank; choose another name")


def _check_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file, not a folder")
    strange = [name for name in sorted(files) if (folder / name).exists() and name not in _listed(folder)]
    if strange:
        raise InputError(f"{folder / strange[0]}: exists and was not written by a report; choose another folder")


def _listed(folder: Path) -> list[str]:
    path = folder / _LIST
    try:
        return list(map(str, from_json(path.read_text(encoding="utf-8")))) if path.is_file() else []
    except (ValueError, TypeError):
        return []


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """The list first: what is half written is a report's own, too."""
    write_json(folder / _LIST, sorted({*_listed(folder), *files}))
    for name, data in files.items():
        write_bytes(folder / name, data)
