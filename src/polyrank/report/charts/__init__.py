"""All charts of a report, as plain data, in the order of the page; and why others are not there."""

from __future__ import annotations

from dataclasses import dataclass

from polyrank.report.charts.curves import over_costs, over_rounds
from polyrank.report.charts.layers import attendance, budgets, importance, rank_maps
from polyrank.report.charts.outcomes import confusion, fairness, front, ranking
from polyrank.report.charts.shapes import Chart, Heat
from polyrank.report.gather import Gathered
from polyrank.report.tables import Table


@dataclass(frozen=True)
class Section:
    """A heading and its charts."""

    key: str
    title: str
    charts: tuple[Chart, ...]


_SECTIONS = {
    "learning": ("Learning", ("accuracy", "accuracy_over_bytes", "accuracy_over_seconds", "loss")),
    "cost": ("Cost", ("front", "budget_memory", "budget_uplink")),
    "clients": ("Clients", ("client_accuracy", "clients", "worst_client", "client_spread", "attendance")),
    "layers": ("Layers", ("ranks", "importance", "aggregation_error")),
    "privacy": ("Privacy", ("epsilon_clients", "epsilon_examples")),
    "errors": ("Errors", ("confusion",)),
}
_NEEDS = {
    "ranking": "final figures of two methods or baselines",
    "accuracy": "rounds that were evaluated on validation data",
    "accuracy_over_bytes": "federated rounds that were evaluated",
    "accuracy_over_seconds": "simulated seconds: groups of the fleet that state uplink and downlink",
    "loss": "local losses, which protected clients do not report",
    "front": "a finished federated run",
    "budget_memory": "groups of the fleet that state their memory, and a run that records them (setting.json)",
    "budget_uplink": "groups of the fleet that state their uplink, and a run that records them (setting.json)",
    "client_accuracy": "evaluation on each client's own data (evaluate: {clients: true})",
    "clients": "evaluation on each client's own data, and no more than 60 clients",
    "worst_client": "evaluation on each client's own data in every round",
    "client_spread": "evaluation on each client's own data in every round",
    "attendance": "a client that dropped out or was refused: nobody did or was",
    "ranks": "a federated round",
    "importance": "rounds that measured importance, and recorded it",
    "aggregation_error": "rounds that measured it (evaluate: {aggregation: true})",
    "confusion": "a finished run with confusion.json, of at most 200 classes",
}


def hero(gathered: Gathered, table: Table) -> tuple[Chart, ...]:
    """What stands beside the answer."""
    return tuple(ranking(gathered, table))


def sections(gathered: Gathered, table: Table) -> tuple[tuple[Section, ...], tuple[tuple[str, str], ...]]:
    """The charts by section, and those left out: what they are, and what they need."""
    made: tuple[Chart, ...] = (
        *over_rounds(gathered),
        *over_costs(gathered),
        *front(gathered, table),
        *budgets(gathered),
        *fairness(gathered),
        *attendance(gathered),
        *rank_maps(gathered),
        *importance(gathered),
        *confusion(gathered),
    )
    by_key = {chart.key: chart for chart in made}
    found = []
    for key, (title, keys) in _SECTIONS.items():
        own = [by_key[k] for k in keys if k in by_key]
        if own:
            found.append(Section(key, title, tuple(sorted(own, key=lambda chart: isinstance(chart, Heat)))))
    missing = tuple(
        (key.replace("_", " "), why) for key, why in _NEEDS.items() if key not in by_key and key != "ranking"
    )
    return tuple(found), missing
