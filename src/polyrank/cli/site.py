"""At a site: ``polyrank site ...``, which runs it takes part in, and what it has answered. Needs no Flower."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyrank.cli.app import Json, app, mistakes, out

if TYPE_CHECKING:
    from polyrank.deploy.consent import Consent

site = typer.Typer(
    name="site",
    help="At a site of a deployment: decide which runs it takes part in, and see what it has answered.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(site)

Place = Annotated[Path, typer.Argument(metavar="NODE_DIR", help="The node's folder, or the site's file itself.")]
RunId = Annotated[
    str, typer.Argument(metavar="RUN", help="The run's id, as `polyrank site runs` shows it, or its start.")
]


@site.command()
def runs(folder: Place, json_: Json = False) -> None:
    """Show every run that the site has heard of, what it would cost, and what is decided; and what is spent."""
    with mistakes():
        from polyrank.deploy.site import cost_text

        consent = consent_of(folder)
        known, paused = consent.known(), consent.paused
        if json_:
            plain = {id_: {**run.run.plain(), "state": run.state, "why": run.why} for id_, run in known.items()}
            print(json.dumps({"paused": paused, "runs": plain}))
            return
        for id_, each in known.items():
            run, cost = each.run, cost_text(each.epsilon)
            out.say(f"{id_}  {each.state} ({each.why})")
            extent = f"{run.rounds} rounds of {run.method}, {run.nbytes:,} bytes a round each way at most"
            out.say(f"  {run.name or 'without a name'}: {run.by} asks for {extent}; {cost}")
        if paused is not None:
            out.say(f"paused: {paused}; `polyrank site resume {folder}`")
        out.say(budget_of(folder))


@site.command()
def approve(
    folder: Place,
    run: RunId,
    reason: Annotated[str, typer.Option(help="For the log.")] = "by the operator",
) -> None:
    """Take part in a run from now on."""
    with mistakes():
        known = consent_of(folder).decide(run, "approved", reason)
        out.say(f"{known.run.id}: approved; its server asks again within about a minute")


@site.command()
def deny(
    folder: Place,
    run: RunId,
    reason: Annotated[str, typer.Option(help="Told to the server.")] = "by the operator",
) -> None:
    """Take no part in a run from now on; it goes on without this site."""
    with mistakes():
        out.say(f"{consent_of(folder).decide(run, 'denied', reason).run.id}: denied")


@site.command()
def pause(folder: Place, reason: Annotated[str, typer.Option(help="Told to the server.")] = "by the operator") -> None:
    """Answer nothing until `resume`; a round of training that has begun is finished."""
    with mistakes():
        consent_of(folder).pause(reason)
        out.say(f"paused: {reason}")


@site.command()
def resume(folder: Place) -> None:
    """Answer again."""
    with mistakes():
        consent_of(folder).resume()
        out.say("answers again")


@site.command()
def log(
    folder: Place,
    lines: Annotated[int, typer.Option(min=1, help="How many lines from the end.")] = 40,
    json_: Json = False,
) -> None:
    """Show who asked what, what was answered or refused, and under which protection."""
    with mistakes():
        from polyrank.engines.audit import Journal

        tail = list(Journal(file_of(folder).with_name("history.jsonl")).lines())[-lines:]
        if json_:
            print(json.dumps(tail))
            return
        for line in tail:
            out.say("  ".join(_words(line)))


def consent_of(folder: Path) -> Consent:
    """The decisions of a site."""
    from polyrank.deploy.consent import Consent

    return Consent(file_of(folder).with_name("runs.json"))


def file_of(folder: Path) -> Path:
    """A site's file, from its folder or itself."""
    from polyrank.errors import InputError

    path = folder / "site.yaml" if folder.is_dir() else folder
    if not path.is_file():
        raise InputError(f"{path}: no such file; name a node's folder, which has site.yaml, or the site's file")
    return path


def budget_of(folder: Path) -> str:
    """What a site has spent."""
    from polyrank.deploy.ledger import PrivacyLedger, spent
    from polyrank.deploy.site_file import read_site

    path = file_of(folder)
    budget = read_site(path).budget
    if budget is None:
        return "budget: none is stated, so epsilon is counted and not bounded"
    total = spent(PrivacyLedger(path.resolve().parent / budget.ledger).entries(), budget.unit, budget.delta)
    now = "all of it, by answers without protection" if math.isinf(total) else f"{total:.4g}"
    return f"budget: epsilon {budget.epsilon:g} ({budget.unit}, delta {budget.delta:g}), of which is spent: {now}"


def _words(line: dict[str, Any]) -> Iterator[str]:
    """A line of the history as people read it."""
    for key in ("time", "question", "run", "by", "round", "protection", "epsilon"):
        if (value := line.get(key)) is not None:
            number = f"{value:.4g}" if isinstance(value, float) else json.dumps(value)
            text = value if isinstance(value, str) else number
            yield text if key in ("time", "question") else f"{key} {text}"
    reasons = [f"{key}: {line[key]}" for key in ("refused", "failed", "state") if key in line]
    yield reasons[0] if reasons else f"{line.get('bytes', 0):,} bytes sent"
