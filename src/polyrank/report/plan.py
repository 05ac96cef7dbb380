"""What ``polyrank plan`` and ``polyrank profile`` print, made from their plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.text import Text

from polyrank.report.screen import Rows
from polyrank.report.terminal import size, span

PARTS = ("base", "adapter", "gradients", "optimizer", "activations", "working", "apart", "overhead")


def plan_report(planned: Mapping[str, Any]) -> Iterator[Rows | str]:
    """The plan, top to bottom: the model, budgets and limits, memory, traffic, notes."""
    model, groups = planned["model"], planned["groups"]
    yield (
        f"{model['name']}: {model['parameters']:,} parameters, {model['adapted_modules']} adapted modules in "
        f"{model['blocks']} blocks{_share(model)}"
    )
    positions = f" of {model['tokens']} positions" if model["tokens"] else ""
    yield (
        f"method {planned['method']}, server rank {planned['server_rank']}; batch {model['batch']}{positions}, "
        f"{model['attention']} attention"
    )
    yield ""
    yield _budgets(groups, planned["server_rank"])
    yield ""
    yield _memory(groups)
    yield ""
    yield _traffic(groups)
    if planned["scores"]:
        yield ""
        yield _importance(planned)
    if any(len(set(ranks)) > 1 for ranks in zip(*_by_block(planned).values(), strict=True)):
        yield ""
        yield _ranks(planned)
    yield ""
    for entry in planned["trained"]:
        what = {"AB": "A and B", "A": "A alone", "B": "B alone"}[entry["factors"]]
        yield f"from round {entry['round'] + 1}, {what}: {entry['parameters']:,} parameters trained by all clients"
    for note in planned["notes"]:
        yield f"note: {note}"
    yield f"planned in {planned['seconds']:.2f} s"


def _share(model: Mapping[str, Any]) -> str:
    """How much of the backbone gets an adapter."""
    return "" if model["adapted_share"] is None else f", {model['adapted_share']:.1%} of the backbone's parameters"


def profile_report(measured: Mapping[str, Any]) -> Iterator[Rows | str]:
    """Predicted against measured, part by part, for each rank."""
    found = measured["measured"]
    yield f"{found['model']} on {found['device']}: batch {found['batch']} of {found['tokens']} positions"
    table = _table("rank", "part", "predicted", "measured", "error")
    for step in found["steps"]:
        for part, got in step["measured"].items():
            predicted = step["predicted"].get(part)
            error = "-" if not predicted or not got else f"{predicted / got - 1:+z.1%}"
            table.add_row(str(step["rank"]), part, "-" if predicted is None else _mib(predicted), _mib(got), error)
    yield table
    yield f"peak resident memory of this process: {_mib(found['resident'])}"
    yield (
        f"overhead {_mib(measured['overhead'])}, activations {measured['scale']:.3f} of the formula"
        if measured["constant"] is None
        else f"no formula for this family; activations {size(measured['constant'])} an example and "
        f"{size(measured['per_rank'])} per unit of rank; overhead {_mib(measured['overhead'])}"
    )


def _budgets(groups: Sequence[Mapping[str, Any]], server: int) -> Rows:
    """A line for each limit of each group; the one that binds is bold."""
    table = _table("group", "clients", "budget", "limit", "rank", "has", "next rank needs")
    for group in groups:
        clients = "-" if group["clients"] is None else str(group["clients"])
        head: list[str | Text] = [group["name"], clients, Text(str(group["budget"]), "bold")]
        limits = group["limits"]
        if all(limit["name"] != group["limit"] for limit in limits):
            limits = [{"name": group["limit"], "rank": min(group["rank"], server)}, *limits]
        for limit in limits:
            cells = [limit["name"], str(limit["rank"]), _has(limit), _next(limit)]
            binds = limit["name"] == group["limit"]
            table.add_row(*head, *(Text(cell, "bold" if binds else "") for cell in cells))
            head = ["", "", ""]
    return table


def _has(limit: Mapping[str, Any]) -> str:
    return "-" if limit.get("have") is None else _amount(limit["have"], limit["unit"])


def _next(limit: Mapping[str, Any]) -> str:
    """What the next rank needs of a limit, and how far away that is."""
    if limit.get("more") is None or limit.get("have") is None:
        return "-"
    return f"{_amount(limit['more'], limit['unit'])} ({limit['more'] / limit['have'] - 1:+.1%})"


def _amount(value: float, unit: str) -> str:
    if unit == "B":
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
    return f"{value / 1e6:.2f} Mbit/s"


def _memory(groups: Sequence[Mapping[str, Any]]) -> Rows:
    """Parts down, groups across."""
    table = _table("peak memory, MiB", *(group["name"] for group in groups))

    def row(name: str, values: list[float | None], style: str = "") -> None:
        table.add_row(name, *("-" if value is None else f"{value / 2**20:z,.1f}" for value in values), style=style)

    for part in PARTS:
        row(part, [group["peak"] and group["peak"][part] for group in groups])
    row("total", [group["peak_memory"] for group in groups], "bold")
    row("has", [group["memory"] for group in groups])
    return table


def _traffic(groups: Sequence[Mapping[str, Any]]) -> Rows:
    table = _table("a round", "trains", "from round", "down", "up", "download", "compute", "upload")
    for group in groups:
        for entry in group["traffic"]:
            seconds = entry["seconds"]
            table.add_row(
                group["name"],
                entry["factors"],
                str(entry["round"] + 1),
                size(entry["bytes_down"]),
                size(entry["bytes_up"]),
                *("-" if seconds[part] is None else span(seconds[part]) for part in ("download", "compute", "upload")),
            )
    return table


def _by_block(planned: Mapping[str, Any]) -> dict[str, list[str]]:
    """Each group's ranks in each block: one number where its modules are alike, none where it trains nothing there."""
    blocks: dict[str, list[str]] = {}
    for name, block in planned["blocks"].items():
        blocks.setdefault("elsewhere" if block is None else f"block {block}", []).append(name)

    def cell(group: Mapping[str, Any], names: Sequence[str]) -> str:
        found = [group["ranks"].get(name, 0) for name in names]
        return ", ".join(map(str, dict.fromkeys(found))) if any(found) else "·"

    return {block: [cell(group, names) for group in planned["groups"]] for block, names in blocks.items()}


def _importance(planned: Mapping[str, Any]) -> Rows:
    """Importance by block, as a share of the whole."""
    blocks: dict[Any, float] = {}
    for name, block in planned["blocks"].items():
        blocks[block] = blocks.get(block, 0.0) + planned["scores"].get(name, 0.0)
    total = sum(blocks.values()) or 1.0
    table = _table("importance", "share", "")
    for block, score in blocks.items():
        bar = "█" * round(40 * score / max(blocks.values()))
        table.add_row("elsewhere" if block is None else f"block {block}", f"{score / total:.1%}", Text(bar, "dim"))
    return table


def _ranks(planned: Mapping[str, Any]) -> Rows:
    table = _table("ranks in round 1", *(group["name"] for group in planned["groups"]))
    for block, cells in _by_block(planned).items():
        table.add_row(block, *cells)
    return table


def _table(*columns: str) -> Rows:
    table = Rows()
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 or name in ("limit", "part", "") else "right")
    return table


def _mib(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB"
