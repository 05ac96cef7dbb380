"""`compress(stack(...))` against a dense SVD per receiver, for ten clients of ranks 4 to 256.

    python bench/aggregate.py            two dense SVDs per run, scaled to ten receivers; a few minutes
    python bench/aggregate.py --full     all ten
    python bench/aggregate.py --quick    small layers, nothing stored: whether it runs

Both routes start from the clients' float32 factors and end with the factors of every receiver. They alternate, each run
in a process of its own, so that the peak of its resident memory is its own too. Exits with 1 if a goal is missed.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from machine import machine
from polyrank.core.compress import compress
from polyrank.core.lowrank import LowRank, norm, stack, truncate
from records import store

RANKS = [4, 4, 16, 16, 64, 64, 128, 128, 256, 256]
SHARES = [(100 + 50 * i) / 3250 for i in range(len(RANKS))]  # unequal data sizes
SHAPES = {"4096x4096": (4096, 4096), "1024x4096": (1024, 4096)}
QUICK = {"512x512": (512, 512)}
ALPHA = 16.0
RESULTS = Path(__file__).parent / "results" / "aggregate.json"
GOALS = {"speedup": 150.0, "error": 1e-5, "memory": 0.25}

Figures = dict[str, Any]


def cohort(shape: str, dtype: torch.dtype = torch.float32) -> list[LowRank]:
    """The clients' updates: one alpha for all, so that scales go from 4 to 1/16."""
    d_out, d_in = (SHAPES | QUICK)[shape]
    generator = torch.Generator().manual_seed(0)

    def update(rank: int) -> LowRank:
        A = torch.randn(rank, d_in, generator=generator) / d_in**0.5
        B = torch.randn(d_out, rank, generator=generator) / d_out**0.5
        return LowRank(A.to(dtype), B.to(dtype), ALPHA / rank)

    return [update(rank) for rank in RANKS]


class Factored:
    """One factorisation of the stacked factors; its truncations serve all receivers."""

    @staticmethod
    def prepare(xs: Sequence[LowRank]) -> LowRank:
        return compress(stack(xs, SHARES), max(RANKS))

    @staticmethod
    def serve(whole: LowRank, rank: int) -> LowRank:
        return truncate(whole, rank)


class Dense:
    """The d_out x d_in sum, and its full SVD once for every receiver, as released code does."""

    @staticmethod
    def prepare(xs: Sequence[LowRank]) -> Tensor:
        total = torch.zeros(xs[0].shape)
        for x, share in zip(xs, SHARES, strict=True):
            total += (share * x.scale) * (x.B @ x.A)
        return total

    @staticmethod
    def serve(total: Tensor, rank: int) -> LowRank:
        U, S, Vt = torch.linalg.svd(total, full_matrices=False)
        return LowRank(Vt[:rank].clone(), U[:, :rank] * S[:rank])


ROUTES: dict[str, type[Factored] | type[Dense]] = {"factored": Factored, "dense": Dense}


def clocks() -> Tensor:
    """Wall and CPU seconds."""
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


def timed(route: type[Factored] | type[Dense], xs: Sequence[LowRank], receivers: int) -> tuple[LowRank, Tensor]:
    """What the receiver of the largest rank gets; the seconds for ten, from those of the last `receivers`."""
    begin = clocks()
    prepared: Any = route.prepare(xs)
    ready = clocks()
    for rank in RANKS[-receivers:]:
        handed_out = route.serve(prepared, rank)
    return handed_out, ready - begin + (clocks() - ready) * len(RANKS) / receivers


def worker(name: str, shape: str, receivers: int, out: Path) -> None:
    """Runs a route once; prints its seconds and how far its peak memory rose above where it started."""
    xs = cohort(shape)
    timed(ROUTES[name], [LowRank(x.A[:2, :64], x.B[:64, :2], x.scale) for x in xs], 1)  # loads the libraries
    resident = psutil.Process().memory_info().rss
    result, (wall, cpu) = timed(ROUTES[name], xs, receivers)
    peak = peak_resident() - resident
    save_file({"A": result.A.contiguous(), "B": result.B.contiguous()}, out)
    print(json.dumps({"seconds": float(wall), "cpu_seconds": float(cpu), "peak_bytes": peak}))


def peak_resident() -> int:
    """Bytes of this process's memory at its peak. On Linux from /proc: there `ru_maxrss` starts at the parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run(route: str, shape: str, options: argparse.Namespace, out: Path) -> Figures:
    """One route on one layer, in a process of its own."""
    receivers = len(RANKS) if options.full else options.receivers
    command = [sys.executable, __file__, "--worker", route, "--shape", shape, "--receivers", str(receivers)]
    threads = {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    environment = {**os.environ, **threads}
    command += ["--out", str(out)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    figures: Figures = json.loads(done.stdout)
    print(f"  {shape} {route}: {figures['seconds']:.2f} s, {figures['peak_bytes'] / 2**20:.0f} MiB", flush=True)
    return figures


def relative_error(x: LowRank, y: LowRank) -> float:
    """``||delta(x) - delta(y)||_F / ||delta(y)||_F``, from Gram matrices in float64."""
    return norm(stack([x, y], [1.0, -1.0])) / norm(y)


def errors(shape: str, folder: Path) -> dict[str, float]:
    """The largest error over the receivers: between the routes, and of each against the same in float64."""
    found = {route: LowRank(**load_file(folder / f"{shape}-{route}")) for route in ROUTES}
    found["float64"] = compress(stack(cohort(shape, torch.float64), SHARES), max(RANKS))
    pairs = {"between": ("factored", "dense"), "factored": ("factored", "float64"), "dense": ("dense", "float64")}
    return {
        name: max(relative_error(truncate(found[a], rank), truncate(found[b], rank)) for rank in set(RANKS))
        for name, (a, b) in pairs.items()
    }


def measure(shape: str, options: argparse.Namespace, folder: Path) -> Figures:
    """Both routes on one layer, in alternation: medians of seconds, largest peaks, ratios and errors."""
    runs: dict[str, list[Figures]] = {route: [] for route in ROUTES}
    for _ in range(options.repeats):
        for route in ROUTES:
            runs[route].append(run(route, shape, options, folder / f"{shape}-{route}"))
    figures: Figures = {"shape": shape, "errors": errors(shape, folder)}
    for route, done in runs.items():
        seconds = {kind: median(r[kind] for r in done) for kind in ("seconds", "cpu_seconds")}
        figures[route] = {**seconds, "peak_bytes": max(r["peak_bytes"] for r in done), "runs": done}
    return with_ratios(figures)


def with_ratios(figures: Figures) -> Figures:
    fast, slow = figures["factored"], figures["dense"]
    return {
        **figures,
        "speedup": slow["seconds"] / fast["seconds"],
        "cpu_speedup": slow["cpu_seconds"] / fast["cpu_seconds"],
        "memory": fast["peak_bytes"] / slow["peak_bytes"],
        "error": figures["errors"]["factored"],
    }


def together(layers: list[Figures]) -> Figures:
    """Both layers, one after the other: seconds add up, the peak is the larger one."""
    figures: Figures = {"shape": "together"}
    for route in ROUTES:
        sums = {kind: sum(layer[route][kind] for layer in layers) for kind in ("seconds", "cpu_seconds")}
        figures[route] = {**sums, "peak_bytes": max(layer[route]["peak_bytes"] for layer in layers)}
    figures["errors"] = {k: max(layer["errors"][k] for layer in layers) for k in layers[0]["errors"]}
    return with_ratios(figures)


def report(layers: list[Figures], dense_run: str) -> bool:
    """Prints goals and figures side by side; whether the goals are met."""
    print(f"\nTen receivers; dense: {dense_run}.")
    print("Error: the largest over the receivers, relative, against the same in float64.")
    print(f"{'':12}{'faster, wall':>14}{'faster, CPU':>13}{'error':>10}{'of dense':>10}{'memory':>9}", end="")
    print(f"{'factored':>18}{'dense':>20}")
    for f in layers:
        fast, slow = (f"{f[r]['seconds']:.2f} s {f[r]['peak_bytes'] / 2**20:.0f} MiB" for r in ROUTES)
        print(f"{f['shape']:12}{f['speedup']:13.0f}x{f['cpu_speedup']:12.0f}x", end="")
        print(f"{f['error']:10.1e}{f['errors']['dense']:10.1e}{f['memory']:9.3f}{fast:>18}{slow:>20}")
    print(f"{'goal':12}{'>= ' + format(GOALS['speedup'], '.0f'):>13}x{'':13}", end="")
    print(f"{'<= ' + format(GOALS['error'], '.0e'):>10}{'':10}{'<= ' + str(GOALS['memory']):>9}")
    f = layers[-1]
    met = f["speedup"] >= GOALS["speedup"] and f["error"] <= GOALS["error"] and f["memory"] <= GOALS["memory"]
    print(f"The goals are for both layers together, and are {'met' if met else 'MISSED'}.")
    return met


def options_of(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2, help="alternations of the two routes")
    parser.add_argument("--receivers", type=int, default=2, help="dense SVDs per alternation, scaled to ten")
    parser.add_argument("--full", action="store_true", help="a dense SVD for each of the ten receivers")
    parser.add_argument("--quick", action="store_true", help="on layers of an eighth of the size, to see that it runs")
    parser.add_argument("--threads", type=int, default=1, help="one is steady on a machine that does other work too")
    parser.add_argument("--shape", choices=SHAPES | QUICK, action="append", help="one layer only (again: several)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", choices=ROUTES, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    options = options_of(sys.argv[1:])
    if options.worker:
        worker(options.worker, options.shape[0], options.receivers, options.out)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        layers = [
            measure(shape, options, Path(folder)) for shape in options.shape or (QUICK if options.quick else SHAPES)
        ]
    layers.append(together(layers))
    dense_run = f"{options.receivers} SVDs per run, scaled to ten"
    dense_run = "ten SVDs per run" if options.full else dense_run
    met = report(layers, dense_run)
    result = {"machine": machine(options.threads), "ranks": RANKS, "dense": dense_run, "goals": GOALS, "layers": layers}
    if options.quick:
        return 0
    store(options.out, result)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
