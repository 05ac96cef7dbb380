"""A run for others: ``polyrank export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyrank.cli.app import Json, app, mistakes, out

if TYPE_CHECKING:
    from polyrank.experiment.publishing import Export


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder to write; must not exist, or be empty.")],
    best: Annotated[
        bool, typer.Option("--best", help="The validation-selected adapter instead of the final one.")
    ] = False,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Compress every layer to at most this rank; lossless if left out.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="The whole model, with the adapter in its weights.")] = False,
    dtype: Annotated[
        str | None, typer.Option(help="Of merged weights: float32, bfloat16 or float16; the base's if left out.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base model's name on the hub, where the run has loaded a copy.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--license", help="The hub's name of a licence; the card states none if left out.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="REPO", help="Also upload it to this repository of the hub, USER/NAME.")
    ] = None,
    json_: Json = False,
) -> None:
    """Write a run's adapter, or the model with it merged in, with a model card, for use without polyrank."""
    with mistakes():
        from polyrank.experiment.publishing import chosen, write
        from polyrank.experiment.store import Run, check_free
        from polyrank.files import whole_folder, write_text
        from polyrank.local.upload import check_online, upload
        from polyrank.report.card import model_card

        check_free(folder)
        if push is not None:
            check_online()
        picked = chosen(Run.open(run), best=best, rank=rank, merge=merge, dtype=dtype)
        with whole_folder(folder) as unfinished:
            picked = write(picked, unfinished, base)
            card = model_card(picked, base=base, licence=licence, repo=push)
            write_text(unfinished / "README.md", card)
        address = None if push is None else upload(folder, push)
        found = _outcome(picked, folder, address)
        if json_:
            print(json.dumps(found))
            return
        for line in _lines(found):
            out.say(line)


def _outcome(export: Export, folder: Path, address: str | None) -> dict[str, Any]:
    worst, error = export.cut.worst
    return {
        "folder": str(folder),
        "selected": export.selected,
        "merged": export.merged,
        "ranks": {name: x.rank for name, x in export.adapter.layers.items()},
        "error": export.cut.overall,
        "worst": {"layer": worst, "error": error},
        "errors": dict(export.cut.errors),
        "verified": export.verified,
        "pushed": address,
    }


def _lines(found: dict[str, Any]) -> list[str]:
    ranks = sorted(set(found["ranks"].values()))
    held = f"{len(found['ranks'])} layers of rank {', '.join(map(str, ranks))}" if ranks else "LoKr factors"
    what = f"the base with {held} merged in, {found['merged']}" if found["merged"] else held
    lost = "lossless"
    if found["error"]:
        worst = found["worst"]
        lost = f"relative error {found['error']:.2e} overall, {worst['error']:.2e} in the worst layer, {worst['layer']}"
    lines = [f"{found['folder']}: {what}; {lost}", found["verified"]]
    return [*lines, f"uploaded to {found['pushed']}"] if found["pushed"] else lines
