"""`compress` against the matrix products it cannot avoid, and all layers of a model against dense SVDs.

    python bench/compress.py             # writes bench/results/compress.json; exits with 1 if a goal is missed
    python bench/compress.py --quick     # small layers, nothing stored: whether it runs

**Unavoidable products.** Ten clients of ranks 4 to 256 (m = 936, 256 kept). Whatever the route, how the stacked columns
lie to each other must be found on both sides, and two factors must come out:

    B^T B,  A A^T          m^2 d multiplications and additions each, as full products (not by halves)
    B T,    T' A           m r d each

`products` does these and nothing else: the first two in float64, because float32 loses singular values below 3e-4 of
the factors' norms and so is no exact route; the last two in float32. `products32` does all four in float32, the
strictest reading; it has no goal. The goal, twice the products, is for both layers together. What is beyond them is
m x m: an eigenproblem and two products.

**All layers.** 24 modules of 768 x 768, ten clients of ranks 4 to 24: stack and `compress_all`, against forming the
product and `torch.linalg.svd` in float32, layer by layer.

Routes alternate in one process of one thread; figures are medians of CPU seconds, ratios are of medians.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from aggregate import RANKS, SHARES, Figures, cohort, relative_error
from machine import machine
from polyrank.core.compress import compress, compress_all, costs, route
from polyrank.core.lowrank import LowRank, stack
from records import store
from stopwatch import in_turns, medians
from verdicts import Verdict, shown, verdict

RESULTS = Path(__file__).parent / "results" / "compress.json"
GOALS = {"products": 2.0, "speedup": 15.0, "error": 1e-5}
MODULES, WIDTH, CLIENT_RANKS = 24, 768, [4, 6, 8, 10, 12, 14, 18, 20, 22, 24]


def products(A: Tensor, B: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The four products, the Gram matrices in `dtype`."""
    wide, tall = A.to(dtype), B.to(dtype)
    T = torch.ones(A.shape[0], rank)
    return tall.T @ tall, wide @ wide.T, B @ T, T.T @ A


def against_products(shape: str, repeats: int) -> Figures:
    x, rank = stack(cohort(shape), SHARES), max(RANKS)
    routes = {
        "compress": lambda: compress(x, rank),
        "products": lambda: products(x.A, x.B, rank, torch.float64),
        "products32": lambda: products(x.A, x.B, rank, torch.float32),
    }
    seconds = {name: medians(runs)["cpu"] for name, runs in in_turns(routes, repeats).items()}
    exact = compress(LowRank(x.A.double(), x.B.double()), rank)
    return {
        "shape": shape,
        "route": route(x.shape, x.rank, rank),
        "predicted": costs(x.shape, x.rank, rank),
        "seconds": seconds,
        "ratio": seconds["compress"] / seconds["products"],
        "ratio32": seconds["compress"] / seconds["products32"],
        "error": relative_error(compress(x, rank), exact),
    }


def all_layers(modules: int, width: int, repeats: int) -> Figures:
    def update(rank: int, seed: int) -> LowRank:
        generator = torch.Generator().manual_seed(seed)
        A, B = (torch.randn(size, generator=generator) / width**0.5 for size in ((rank, width), (width, rank)))
        return LowRank(A, B, 16.0 / rank)

    share = [1 / len(CLIENT_RANKS)] * len(CLIENT_RANKS)
    layers = [[update(r, 100 * i + k) for k, r in enumerate(CLIENT_RANKS)] for i in range(modules)]

    def dense(xs: list[LowRank]) -> tuple[Tensor, Tensor, Tensor]:
        total = torch.zeros(xs[0].shape)
        for x, weight in zip(xs, share, strict=True):
            total += weight * x.scale * (x.B @ x.A)
        return tuple(torch.linalg.svd(total, full_matrices=False))

    routes = {
        "together": lambda: compress_all({str(i): stack(xs, share) for i, xs in enumerate(layers)}, max(CLIENT_RANKS)),
        "one by one": lambda: [compress(stack(xs, share), max(CLIENT_RANKS)) for xs in layers],
        "dense": lambda: [dense(xs) for xs in layers],
    }
    seconds = {name: medians(runs)["cpu"] for name, runs in in_turns(routes, repeats).items()}
    return {"modules": modules, "width": width, "seconds": seconds, "speedup": seconds["dense"] / seconds["together"]}


def verdicts(layers: list[Figures], model: Figures) -> Iterator[Verdict]:
    """Figures beside goals."""
    for f in layers:
        yield verdict(f"{f['shape']} by {f['route']}: compress / products", f["ratio"])
        yield verdict(f"{f['shape']}: compress / products, all in float32", f["ratio32"])
        yield verdict(f"{f['shape']}: error", f["error"], "at most", GOALS["error"])
    spent, unavoidable = (sum(f["seconds"][name] for f in layers) for name in ("compress", "products"))
    yield verdict("both: compress / products", spent / unavoidable, "at most", GOALS["products"])
    name = f"{model['modules']} modules of {model['width']}: dense / ours"
    yield verdict(name, model["speedup"], "at least", GOALS["speedup"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small layers, nothing stored")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    repeats = 1 if options.quick else options.repeats
    layers = [against_products(s, repeats) for s in (["512x512"] if options.quick else ["4096x4096", "1024x4096"])]
    model = all_layers(*((2, 96) if options.quick else (MODULES, WIDTH)), repeats)
    said = list(verdicts(layers, model))
    met = shown(said)
    if options.quick:
        return 0
    result = {"machine": machine(1), "goals": GOALS, "layers": layers, "model": model, "verdicts": said}
    store(options.out, result)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
