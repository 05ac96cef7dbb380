"""``polyrank report``: one page, figures and tables of runs and studies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from polyrank.cli.app import Json, app, mistakes, out


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN_OR_STUDY...", help="Folders of runs or studies.")],
    path: Annotated[
        Path | None,
        typer.Option("--out", help="The page; report.html in the folder if left out, or here if there are several."),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also draw every chart for papers: PDF, SVG and PNG.")
    ] = None,
    tables: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write the summary as Markdown, LaTeX and CSV.")
    ] = None,
    json_: Json = False,
) -> None:
    """Make one HTML page of runs and studies: which method won, by how much, at what cost, and why."""
    with mistakes():
        from polyrank.report.make import make

        page = path or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))
        written = make(folders, page, figures, tables)
        if json_:
            print(json.dumps({key: str(value) for key, value in written.items()}))
            return
        for what, where in written.items():
            out.say(f"{what}: {where}")
