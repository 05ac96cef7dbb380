"""The tables that a configuration draws from: polyrank's own, and what installed packages add.

A package adds an entry through an entry point of the group ``polyrank.TABLE``, for example

    [project.entry-points."polyrank.aggregators"]
    my_rule = "my_package:my_rule"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from polyrank import data, methods
from polyrank.experiment import loggers

Table = Mapping[str, Callable[..., Any]]


def _extended(group: str, own: Table) -> dict[str, Callable[..., Any]]:
    added = {point.name: point for point in entry_points(group=f"polyrank.{group}")}
    for name in sorted(added.keys() & own.keys()):
        raise ImportError(
            f"entry point polyrank.{group}: {name!r} ({added[name].value}) is a name polyrank has already"
        )
    return dict(sorted({**own, **{name: point.load() for name, point in added.items()}}.items()))


AGGREGATORS = _extended("aggregators", methods.AGGREGATORS)
ALLOCATORS = _extended("allocators", methods.ALLOCATORS)
DATASETS = _extended("datasets", data.DATASETS)
DISPATCHERS = _extended("dispatchers", methods.DISPATCHERS)
ESTIMATORS = _extended("estimators", methods.ESTIMATORS)
LOGGERS = _extended("loggers", loggers.LOGGERS)
METHODS = _extended("methods", methods.METHODS)
PARTITIONERS = _extended("partitioners", data.PARTITIONERS)
SCHEDULES = _extended("schedules", methods.SCHEDULES)
SCORERS = _extended("scorers", methods.SCORERS)

SLOTS = {
    "estimate": ESTIMATORS,
    "score": SCORERS,
    "allocate": ALLOCATORS,
    "dispatch": DISPATCHERS,
    "factors": SCHEDULES,
    "aggregate": AGGREGATORS,
}
"""The table behind each of a method's six answers."""

TABLES: dict[str, Table] = {
    "aggregators": AGGREGATORS,
    "allocators": ALLOCATORS,
    "datasets": DATASETS,
    "dispatchers": DISPATCHERS,
    "estimators": ESTIMATORS,
    "loggers": LOGGERS,
    "methods": METHODS,
    "partitioners": PARTITIONERS,
    "schedules": SCHEDULES,
    "scorers": SCORERS,
}
"""All tables, by the name that ``polyrank list`` takes."""
