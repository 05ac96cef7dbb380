"""Adapters from disk: ``polyrank merge``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from polyrank.cli.app import Json, app, mistakes, numbers, out


@app.command()
def merge(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help="PEFT adapter folders of one model.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder for the merged adapter.")],
    method: Annotated[str, typer.Option(help="A method of `polyrank list methods`.")] = "rb_lora",
    weights: Annotated[str | None, typer.Option(help="Examples behind each adapter: n1,n2,...")] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, max=2**31 - 1, help="Compress to this rank; lossless if left out.")
    ] = None,
    client_ranks: Annotated[
        str | None, typer.Option(help="One adapter per rank r1,r2,... instead: OUT/client_0, ... (with --rank, both).")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override an option of the rule, for example --set layers=zero.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base of all adapters, whatever they call it; named in the result.")
    ] = None,
    json_: Json = False,
) -> None:
    """Merge adapters of unequal ranks into one, by the rule of a method. No base model is needed."""
    with mistakes():
        from polyrank.experiment.loading import method_with
        from polyrank.experiment.merging import crowded
        from polyrank.experiment.merging import merge as merge_adapters
        from polyrank.experiment.store import check_free
        from polyrank.local.adapters import write_adapter

        check_free(folder)
        counts = numbers("--weights", weights, len(adapters), least=0)
        ranks = [
            int(r) for r in numbers("--client-ranks", client_ranks, None, least=1, most=2**31 - 1, whole=True) or []
        ]
        merged = merge_adapters(adapters, method_with(method, set_ or []), counts, base)
        written = [(folder / f"client_{index}", merged.client(r)) for index, r in enumerate(ranks)]
        if not ranks or rank is not None:
            written.insert(0, (folder, merged.whole(rank)))
        for path, adapter in written:
            write_adapter(path, adapter, merged.info)
        notes = [*merged.notes, *crowded(merged, rank, ranks)]
        report = [
            {"folder": str(path), "ranks": {name: x.rank for name, x in adapter.layers.items()}, "notes": notes}
            for path, adapter in written
        ]
        if json_:
            print(json.dumps(report))
            return
        for path, adapter in written:
            kinds = ", ".join(map(str, sorted({x.rank for x in adapter.layers.values()})))
            out.say(f"{path}: {len(adapter.layers)} layers of rank {kinds}")
        for note in notes:
            out.say(note)
