"""Importance of layers: gradients of single examples in one pass, against a backward pass per example.

    python bench/importance.py             # writes bench/results/importance.json
    python bench/importance.py --check     # and fails where a goal is missed

All routes compute the trace of the Fisher information of every layer from the same examples, in turns; ratios are
those of medians.

    one pass      `polyrank.local.importance`: a copy of the factors per example
    through       a forward pass per 32 examples, and a backward pass through its graph per example, as released code
    one by one    a forward and a backward pass per example, without padding

minilm is a BERT of MiniLM's size (6 blocks, width 384) on texts of 8 to 64 tokens; digits the small ViT of the digits
experiment (4 blocks, width 64). Adapters have rank 16 on query and value; weights are random. One by one has the float
operations of one pass and no padding, so beside a model whose products keep the processor busy it loses little; its
goal is on the small one, where what is lost is the overhead of many small steps.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers

from machine import machine
from polyrank.core.lowrank import Adapter, LowRank
from polyrank.core.rng import stream, torch_generator
from polyrank.core.types import Query, ServerState
from polyrank.data import ImageSplit, TextSplit
from polyrank.local import hf
from polyrank.local.base import Base
from polyrank.local.data import Examples
from polyrank.local.digits_base import digits_config
from polyrank.local.importance import importance
from records import store

RESULTS = Path(__file__).parent / "results" / "importance.json"
SPEEDUPS = {("minilm", "through"): 5, ("digits", "through"): 5, ("digits", "one by one"): 5}
ERROR = 1e-5
SAMPLES, TOKENS, WORDS, CLASSES, RANK = 64, 64, 30522, 10, 16

Scores = dict[str, float]
Figures = dict[str, Any]


def minilm() -> tuple[Base, Examples]:
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
    )
    rng = stream(0, "texts")
    offsets = np.concatenate([[0], np.cumsum(rng.integers(8, TOKENS + 1, SAMPLES))])
    ids, labels = rng.integers(1, WORDS, offsets[-1], np.int32), rng.integers(0, CLASSES, SAMPLES)
    return random_base(config, "text"), TextSplit(ids, offsets, labels, 0)


def digits() -> tuple[Base, Examples]:
    rng, config = stream(0, "images"), digits_config()
    pixels = rng.integers(0, 256, (SAMPLES, config.num_channels, config.image_size, config.image_size), np.uint8)
    return random_base(config, "image"), ImageSplit(pixels, rng.integers(0, CLASSES, SAMPLES), (0.5,), (0.5,))


def random_base(config: Any, kind: str) -> Base:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return hf.base_from_config(config, ["query", "value"], kind=kind, classes=CLASSES, tokens=TOKENS, device="cpu")


def state_of(base: Base) -> ServerState:
    generator = torch_generator(stream(0, "adapter"))

    def layer(d_out: int, d_in: int) -> LowRank:
        A = torch.randn(RANK, d_in, generator=generator) / d_in**0.5
        return LowRank(A, torch.randn(d_out, RANK, generator=generator) / d_out**0.5, 1.0)

    layers = {name: layer(*shape) for name, shape in base.spec.modules.items()}
    return ServerState(0, Adapter(layers, base.initial_head()))


def in_one_pass(base: Base, state: ServerState, data: Examples) -> Scores:
    return importance(base, state, data, np.arange(SAMPLES), Query("fisher"), stream(0, "labels"))


def by_example(base: Base, state: ServerState, data: Examples, size: int) -> Scores:
    """A forward pass per `size` examples, and a backward pass through its graph for each of them."""
    sums = dict.fromkeys(base.spec.modules, 0.0)
    with base.attached(Adapter(state.adapter.layers), Adapter({}, state.adapter.dense), "AB") as live:
        factors, names = [*live.A.values(), *live.B.values()], [*live.A, *live.B]
        for start in range(0, SAMPLES, size):
            batch = data.batch(np.arange(start, min(start + size, SAMPLES)))
            values = live(batch).log_softmax(-1).gather(-1, batch["labels"][:, None])
            for value in values:
                gradients = torch.autograd.grad(value, factors, retain_graph=True)
                for name, gradient in zip(names, gradients, strict=True):
                    sums[name] += float(gradient.square().sum())
    return {name: total / SAMPLES for name, total in sums.items()}


ROUTES: dict[str, Callable[[Base, ServerState, Examples], Scores]] = {
    "one pass": in_one_pass,
    "through": partial(by_example, size=32),
    "one by one": partial(by_example, size=1),
}
MODELS = {"minilm": minilm, "digits": digits}


def measure(name: str, repeats: int) -> Figures:
    """All routes in alternation, after one run of each to warm up: seconds, ratios, and how far they differ."""
    base, data = MODELS[name]()
    state = state_of(base)
    scores = {route: compute(base, state, data) for route, compute in ROUTES.items()}
    seconds: dict[str, list[float]] = {route: [] for route in ROUTES}
    for _ in range(repeats):
        for route, compute in ROUTES.items():
            begin = time.perf_counter()
            compute(base, state, data)
            seconds[route].append(time.perf_counter() - begin)
    medians = {route: median(values) for route, values in seconds.items()}
    ours = scores.pop("one pass")
    return {
        "model": name,
        "samples": SAMPLES,
        "seconds": medians,
        "runs": seconds,
        "speedup": {route: medians[route] / medians["one pass"] for route in scores},
        "error": max(abs(ours[layer] / theirs[layer] - 1) for theirs in scores.values() for layer in ours),
    }


def report(found: Sequence[Figures]) -> bool:
    """Prints figures beside goals; whether all are met."""
    met = True
    for figures in found:
        print(f"{figures['model']}, {SAMPLES} examples in one pass: {figures['seconds']['one pass']:.3f} s")
        for route, ratio in figures["speedup"].items():
            goal = SPEEDUPS.get((figures["model"], route))
            print(f"  {route:12}{figures['seconds'][route]:8.3f} s: {ratio:.1f}x", f"(goal: {goal}x)" if goal else "")
            met &= goal is None or ratio >= goal
        print(f"  largest relative difference of a score: {figures['error']:.1e} (goal: {ERROR:.0e})")
        met &= figures["error"] <= ERROR
    print(f"The goals are {'met' if met else 'MISSED'}.")
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="alternations of the routes")
    parser.add_argument("--threads", type=int, default=1, help="one is steady on a machine that does other work too")
    parser.add_argument("--check", action="store_true", help="fail where a goal is missed")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = [measure(name, options.repeats) for name in MODELS]
    met = report(found)
    goals = [{"model": model, "against": route, "speedup": goal} for (model, route), goal in SPEEDUPS.items()]
    result = {"machine": machine(), "goals": {"speedups": goals, "error": ERROR}, "models": found}
    store(options.out, result)
    return 0 if met or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
