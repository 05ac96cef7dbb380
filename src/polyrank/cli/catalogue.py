"""What there is: ``polyrank list`` and ``schema``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from polyrank.cli.app import Json, app, mistakes, out
from polyrank.report.screen import Rows


@app.command("list")
def list_(
    table: Annotated[
        str, typer.Argument(help="A table: methods, aggregators, partitioners, datasets, ...")
    ] = "methods",
    json_: Json = False,
) -> None:
    """List the entries of a table, each with a line and its source."""
    with mistakes():
        from rich.text import Text

        from polyrank.experiment.catalogue import entries

        found = entries(table)
        if json_:
            print(json.dumps(found))
            return
        shown = Rows()
        shown.add_column(table)
        shown.add_column("")
        for entry in found:
            source = "" if entry["reference"] in entry["description"] else f"\n{entry['reference']}"
            shown.add_row(entry["name"], Text.assemble(entry["description"], (source, "dim")))
        out.print(shown)


@app.command()
def schema() -> None:
    """Print the JSON schema of experiment files, for editors."""
    from polyrank.experiment.config import json_schema

    print(json.dumps(json_schema(), indent=2))
