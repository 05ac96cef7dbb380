"""Clients that train the top third of the blocks: a step's cost against a full client's, without and with a cache.

    python bench/prefix.py             # writes bench/results/prefix.json
    python bench/prefix.py --check     # and fails where a goal is missed
    python bench/prefix.py --quick     # a few seconds, to see that it works; writes nothing

    full      adapters in all blocks
    top       adapters in the top third: the backward pass ends at the lowest of them
    cached    the same, and hidden states below it are computed once: `polyrank.local.prefix`, by a cache that is empty
    again     the same in a later round in which nothing below has changed

All are rounds of one client over the same examples, in turns; ratios are those of medians of the process's CPU time,
which other work on the machine disturbs less than wall time. The models are BERTs with random weights, the texts have 8
to 64 tokens. `expected` counts a forward pass and a backward pass of a block as one unit each: (L + k) / 2L for `top`,
((L - k) / E + 2k) / 2L for `cached`, k / L for `again`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from machine import machine
from polyrank.core.lowrank import Adapter, fresh
from polyrank.core.rng import stream
from polyrank.core.types import LocalTraining, Task
from polyrank.data import TextSplit
from polyrank.local import hf
from polyrank.local.base import Base
from polyrank.local.prefix import Prefixes
from polyrank.local.trainer import train
from records import store
from stopwatch import in_turns, medians
from verdicts import Verdict, shown, verdict

RESULTS = Path(__file__).parent / "results" / "prefix.json"
MODELS = {
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024},
}
TOP = {"minilm": 2, "small": 1}
GOALS = {"top": 0.65, "cached": 0.4}
"""Largest ratios to a full client: a third of the blocks, five epochs. They are set for minilm."""
EPOCHS, TOKENS, WORDS, CLASSES, RANK = 5, 64, 30522, 10, 16

Figures = dict[str, Any]


def base_of(name: str) -> Base:
    config = transformers.BertConfig(vocab_size=WORDS, **MODELS[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return hf.base_from_config(
            config, ["query", "value"], kind="text", classes=CLASSES, tokens=TOKENS, device="cpu"
        )


def texts(samples: int) -> TextSplit:
    rng = stream(0, "texts")
    offsets = np.concatenate([[0], np.cumsum(rng.integers(8, TOKENS + 1, samples))])
    ids, labels = rng.integers(1, WORDS, offsets[-1], np.int32), rng.integers(0, CLASSES, samples)
    return TextSplit(ids, offsets, labels, 0)


def task_of(base: Base, blocks: int) -> Task:
    """A round that trains the top `blocks`."""
    rng, least = stream(0, "adapter"), len(base.blocks) - blocks
    layers = {n: fresh(shape, RANK, 1.0, rng) for n, shape in base.spec.modules.items() if base.spec.blocks[n] >= least}
    local = LocalTraining(epochs=EPOCHS, batch=16)
    return Task(0, Adapter(layers, base.initial_head()), Adapter(), "AB", local, None, 0)


def measure(name: str, samples: int, repeats: int) -> Figures:
    """All rounds in alternation, after one of each to warm up: seconds a step, ratios to the full client."""
    base, data, everything = base_of(name), texts(samples), np.arange(samples)
    full, top = task_of(base, len(base.blocks)), task_of(base, TOP[name])
    kept = Prefixes(base, data, 2**30)
    steps = EPOCHS * -(-samples // full.local.batch)

    def round_of(task: Task, prefixes: Callable[[], Prefixes] | None = None) -> None:
        train(base, task, "c", data, everything, prefixes().of(task, "c", everything) if prefixes else None)

    routes = {
        "full": partial(round_of, full),
        "top": partial(round_of, top),
        "cached": partial(round_of, top, lambda: Prefixes(base, data, 2**30)),
        "again": partial(round_of, top, lambda: kept),
    }
    taken = {route: medians(runs) for route, runs in in_turns(routes, repeats).items()}
    seconds, passed = ({route: x[clock] / steps for route, x in taken.items()} for clock in ("cpu", "wall"))
    deep, k = len(base.blocks), TOP[name]
    return {
        "model": name,
        "blocks": deep,
        "trained": k,
        "examples": samples,
        "steps": steps,
        "cpu_seconds_per_step": seconds,
        "wall_seconds_per_step": passed,
        "ratio": {route: seconds[route] / seconds["full"] for route in routes},
        "wall_ratio": {route: passed[route] / passed["full"] for route in routes},
        "expected": {
            "top": (deep + k) / (2 * deep),
            "cached": ((deep - k) / EPOCHS + 2 * k) / (2 * deep),
            "again": k / deep,
        },
        "cache_bytes": kept.nbytes,
    }


def verdicts(found: Sequence[Figures]) -> Iterator[Verdict]:
    """Figures beside goals."""
    for figures in found:
        name = f"{figures['model']}, top {figures['trained']} of {figures['blocks']}"
        for route, ratio in figures["ratio"].items():
            if route == "full":
                continue
            goal = GOALS.get(route) if figures["model"] == "minilm" else None
            yield verdict(f"{name}: {route} / full", ratio, "at most", goal)
        for route, ratio in figures["expected"].items():
            yield verdict(f"{name}: {route} / full, by the cost model", ratio)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="alternations of the rounds")
    parser.add_argument("--samples", type=int, default=96, help="examples of the client")
    parser.add_argument("--threads", type=int, default=1, help="one is steady on a machine that does other work too")
    parser.add_argument("--quick", action="store_true", help="few examples, one repeat, nothing written")
    parser.add_argument("--check", action="store_true", help="fail where a goal is missed")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    samples, repeats = (16, 1) if options.quick else (options.samples, options.repeats)
    found = [measure(name, samples, repeats) for name in MODELS]
    said = list(verdicts(found))
    met = shown(said)
    if not options.quick:
        result = {
            "machine": machine(),
            "goals": {"model": "minilm", "ratios": GOALS},
            "models": found,
            "verdicts": said,
        }
        store(options.out, result)
    return 0 if met or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
