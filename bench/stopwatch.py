"""Wall and process CPU seconds of routes that take turns, and of the phases of one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

CLOCKS = ("wall", "cpu")

Seconds = tuple[float, float]
Runs = dict[str, list[Seconds]]


def now() -> Seconds:
    """Both clocks, once the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


class Stopwatch:
    """Adds up the seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, Seconds] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around a part of the phase."""
        wall, cpu = now()
        yield
        ended, (before_wall, before_cpu) = now(), self.seconds.get(name, (0.0, 0.0))
        self.seconds[name] = before_wall + ended[0] - wall, before_cpu + ended[1] - cpu


def in_turns(routes: Mapping[str, Callable[[], object]], repeats: int) -> Runs:
    """Runs all routes in alternation, after one run of each to warm up."""
    for route in routes.values():
        route()
    runs: Runs = {name: [] for name in routes}
    for _ in range(repeats):
        for name, route in routes.items():
            watch = Stopwatch()
            with watch.phase(name):
                route()
            runs[name].append(watch.seconds[name])
    return runs


def medians(runs: list[Seconds]) -> dict[str, float]:
    return {clock: median(run[i] for run in runs) for i, clock in enumerate(CLOCKS)}


def ratios(slow: list[Seconds], fast: list[Seconds]) -> dict[str, dict[str, Any]]:
    """How many times as long `slow` takes as `fast`, turn by turn: the median, the least and the most, by clock."""
    found = {}
    for i, clock in enumerate(CLOCKS):
        turns = [a[i] / b[i] for a, b in zip(slow, fast, strict=True)]
        found[clock] = {"ratio": median(turns), "least": min(turns), "most": max(turns)}
    return found
