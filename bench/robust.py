"""Robust rules on one layer of a large model, beside the exact mean of products.

    python bench/robust.py             # writes bench/results/robust.json; exits with 1 if the goal is missed; minutes
    python bench/robust.py --quick     # small layers, nothing stored: whether it runs

Ten clients of ranks 4 to 64 who moved the first rows of a server's layer of rank 64; one process of one thread, rules
in turns, figures are medians of CPU seconds. And how much further from the trimmed mean its approximation at rank 64 is
than the best one, which is found by forming the matrix; of clients that have nothing in common, the hardest case. The
goal is on that.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from machine import machine
from polyrank.core.lowrank import Adapter, LowRank, delta, truncate
from polyrank.core.rng import stream
from polyrank.core.types import ServerState, Update
from polyrank.methods import AGGREGATORS
from polyrank.methods.aggregate.trimmed_mean import middle_mean, robust_mean
from records import store
from stopwatch import in_turns, medians
from verdicts import Verdict, shown, verdict

RANKS = [4, 4, 8, 8, 16, 16, 32, 32, 64, 64]
ALPHA = 16.0
SHAPES = [(4096, 4096), (1024, 4096)]
RULES = ("flexlora", "norm_clipping", "krum", "trimmed_mean", "median")
TRIM = 0.2
RESULTS = Path(__file__).parent / "results" / "robust.json"
GOALS = {"beyond": 0.01}


def noise(shape: tuple[int, int], rank: int, seed: int) -> LowRank:
    """Unit normal factors, over the square roots of their longer sides."""
    d_out, d_in = shape
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
    return LowRank(A / d_in**0.5, B / d_out**0.5, ALPHA / max(RANKS))


def moved(x: LowRank, step: LowRank) -> LowRank:
    return LowRank(x.A + 0.1 * step.A, x.B + 0.1 * step.B, x.scale)


def seconds(shape: tuple[int, int], repeats: int) -> dict[str, float]:
    """What each rule takes for the layer."""
    server = noise(shape, max(RANKS), 0)
    sent = [moved(truncate(server, rank), noise(shape, rank, i)) for i, rank in enumerate(RANKS, start=1)]
    state = ServerState(0, Adapter({"l": server}))
    updates = [Update(f"c{i}", Adapter({"l": x}), 1) for i, x in enumerate(sent)]
    routes = {name: partial(AGGREGATORS[name], state, updates, stream(0, "bench")) for name in RULES}
    return {name: medians(runs)["cpu"] for name, runs in in_turns(routes, repeats).items()}


def beyond(shape: tuple[int, int]) -> float:
    """How much further than the best approximation is the one that blocks found, relatively."""
    xs, kept = [noise(shape, rank, i) for i, rank in enumerate(RANKS)], min(max(RANKS), min(shape) // 4)
    M = middle_mean([delta(x) for x in xs], TRIM)
    short = M if M.shape[0] <= M.shape[1] else M.T
    energy = torch.linalg.eigvalsh(short @ short.T).clamp(min=0)
    best = float(energy[:-kept].sum() / energy.sum()) ** 0.5
    x, _ = robust_mean(xs, kept, TRIM)
    return float((M - delta(x)).norm() / M.norm()) / best - 1


def figures(shape: tuple[int, int], repeats: int) -> Iterator[Verdict]:
    name = f"{shape[0]}x{shape[1]}"
    for rule, spent in seconds(shape, repeats).items():
        yield verdict(f"{name}: {rule}, CPU seconds", spent)
    yield verdict(f"{name}: trimmed_mean, distance / the best - 1", beyond(shape), "at most", GOALS["beyond"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small layers, nothing stored")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    repeats = 1 if options.quick else options.repeats
    said = [v for s in ([(256, 128)] if options.quick else SHAPES) for v in figures(s, repeats)]
    met = shown(said)
    if options.quick:
        return 0
    store(options.out, {"machine": machine(1), "goals": GOALS, "verdicts": said})
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
