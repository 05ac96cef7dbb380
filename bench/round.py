"""A federated round against a centralised run on the same examples, and against the loops that people write today.

    python bench/round.py                  # all cores; adds its figures to bench/results/round.json
    python bench/round.py --threads 1      # steadier on a machine that does other work too
    python bench/round.py --quick --out F  # one small model, few turns, to see that everything runs
    python bench/round.py --check          # fails where a goal is missed

Ten clients of ranks 4 to 24 train the queries and values, three steps each, of a BERT of MiniLM's size (6 blocks,
width 384) and of a smaller one (4 blocks, width 256), on texts of 32 words; on a GPU of ViT-base and a Llama of 1.2
billion parameters. Weights are random. All routes see the same examples in the same order, in steps of the same size
and the same precision, and take turns; ratios are medians over the turns, of process CPU seconds at one thread and of
wall seconds otherwise. `bench/usual.py` has the other routes.

Around the training of a whole round is what released code does: importance from 32 examples, the server's step, and
the evaluation of 512 examples. Texts of whole rounds have 8 to 32 words, as real ones are of many lengths; the usual
round pads them all to the longest there may be, as released code does, and ours to the longest of a batch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from fleet import MODELS as ALL_MODELS
from fleet import RANKS, SEED, TOKENS, Fleet, fleet
from machine import machine
from polyrank.core.federate import absorb, federate, plan
from polyrank.core.lowrank import combine, nbytes
from polyrank.core.types import Client, LocalTraining, Query, ServerState, Task, Update
from polyrank.engines.simulator import Simulator
from polyrank.local.evaluate import evaluate
from polyrank.local.grouping import TOGETHER, grouped
from polyrank.local.measure import model_bytes, peak_of
from polyrank.local.optimizer import autocast
from polyrank.local.trainer import prepare
from polyrank.methods import METHODS
from polyrank.methods.importance import fisher
from records import store
from stopwatch import Stopwatch, in_turns, medians, ratios
from usual import Centralised, Round, WithAccelerate, WithTrainer, stacked
from verdicts import Verdict, lines, verdict

RESULTS = Path(__file__).parent / "results" / "round.json"
STEPS, TEST, HOLDOUT = 3, 512, 32
SHORTEST = 8  # words of a text, in whole rounds
MODELS = {"cpu": ("minilm", "small"), "cuda": ("vit", "llama")}
BATCHES = {"cpu": (1, 4, 8, 16), "cuda": (1, 4, 8)}
PARTS = ("training", "whole", "memory")
WHOLE = (1, 4, 8)  # batches of whole rounds

# Route, batch: the most that ours may take of a centralised run, the least that others must take of ours.
AT_MOST = {("centralised", 1): 0.6, ("centralised", 4): 0.9, ("centralised", 8): 1.05, ("centralised", 16): 1.05}
AT_LEAST = {
    ("Trainer", 1): 5.0,
    ("Trainer", 8): 1.5,
    ("Accelerate", 1): 2.5,
    **{("usual round", b): 3.0 for b in WHOLE},
}
ADAPTERS = 3  # of the cohort, at most, beside the base and one batch
LOSSES = {
    "Trainer": 1e-3,
    "Accelerate": 1e-3,
    "usual": 1e-3,
    "centralised": 0.25,
}  # relative; one centralised model learns for all

Figures = dict[str, Any]


def simulator(world: Fleet) -> Simulator:
    """The clients. How many train at once is said here and nowhere else."""
    together = TOGETHER[world.base.device.type]
    return Simulator(world.base, world.data, world.shares, world.profiles, holdout=world.holdout, together=together)


def examples_at_once(world: Fleet) -> int:
    """Examples of one forward pass of `simulator`."""
    jobs = [prepare(task, client, world.shares[client], world.data) for client, task in tasks_of(world).items()]
    together, threads = TOGETHER[world.base.device.type], torch.get_num_threads()
    return world.local.batch * max(map(len, grouped(jobs, world.base, world.data.lengths, together, threads)))


METHOD = replace(METHODS["rb_lora"](), score=partial(fisher, samples=HOLDOUT))


def tasks_of(world: Fleet) -> dict[Client, Task]:
    spec, profiles = world.base.spec, world.profiles
    return plan(
        METHOD, world.state, METHOD.estimate(profiles, spec, world.local), list(profiles), spec, world.local, SEED
    )


def train(clients: Simulator, tasks: Mapping[Client, Task]) -> float:
    """The training of a round; the mean loss."""
    return float(np.mean([update.metrics["loss"] for update in clients.fit(tasks)]))


@dataclass(frozen=True)
class Watched:
    """The simulator, with the seconds of training and of importance noted as `federate` asks for them."""

    clients: Simulator
    watch: Stopwatch

    def profiles(self) -> Mapping[Client, Any]:
        return self.clients.profiles()

    def fit(self, tasks: Mapping[Client, Task]) -> Iterator[Update]:
        updates = iter(self.clients.fit(tasks))
        while True:
            with self.watch.phase("training"):
                update = next(updates, None)
            if update is None:
                return
            yield update

    def measure(self, query: Query, state: ServerState) -> dict[str, float]:
        with self.watch.phase("importance"):
            return self.clients.measure(query, state)


def our_round(world: Fleet, watch: Stopwatch) -> float:
    """A round as `polyrank run` does it, and its evaluation; the clients' mean loss. The rest is the server's step."""
    clients = Watched(simulator(world), watch)
    whole = Stopwatch()
    with whole.phase("round"):
        steps = federate(METHOD, world.state, clients, world.base.spec, world.local, rounds=1, measure=clients.measure)
        ((state, record),) = steps
    rest = [whole.seconds["round"][i] - sum(s[i] for s in watch.seconds.values()) for i in range(2)]
    watch.seconds["server"] = rest[0], rest[1]
    with watch.phase("evaluation"), world.base.attached(combine([state.folded, state.adapter])) as model:
        evaluate(model, world.test)
    return float(np.mean(list(record.losses.values())))


def training(model: str, batch: int, world: Fleet, repeats: int) -> Figures:
    """The training of a round by all routes."""
    clients, tasks = simulator(world), tasks_of(world)
    losses: dict[str, float] = {}

    def noting(name: str, route: Callable[[], float]) -> None:
        losses.setdefault(name, route())  # of the first time: one centralised model goes on learning

    routes: dict[str, Callable[[], float]] = {
        "ours": partial(train, clients, tasks),
        "centralised": Centralised(world),
        "Trainer": WithTrainer(world),
        "Accelerate": WithAccelerate(world),
    }
    runs = in_turns({name: partial(noting, name, route) for name, route in routes.items()}, repeats)
    compared = {name: ratios(runs[name], runs["ours"]) for name in ("Trainer", "Accelerate")}
    return {
        "model": model,
        "batch": batch,
        "seconds": {name: medians(found) for name, found in runs.items()},
        "ratios": {"centralised": ratios(runs["ours"], runs["centralised"]), **compared},
        "losses": losses,
        "runs": runs,
    }


def whole(model: str, batch: int, world: Fleet, repeats: int) -> Figures:
    """Whole rounds, ours and the usual one, with the seconds of their phases in every turn."""
    theirs = Round(world)
    watches: dict[str, list[Stopwatch]] = {"ours": [], "usual": []}
    losses: dict[str, float] = {}

    def one(name: str, round_: Callable[[Stopwatch], float]) -> None:
        watches[name].append(Stopwatch())
        losses[name] = round_(watches[name][-1])

    routes = {"ours": partial(one, "ours", partial(our_round, world)), "usual": partial(one, "usual", theirs)}
    runs = in_turns(routes, repeats)
    phases = {
        name: {phase: medians([w.seconds[phase] for w in found[1:]]) for phase in found[0].seconds}
        for name, found in watches.items()
    }
    bare = {n: [minus(run, w, "importance") for run, w in zip(runs[n], watches[n][1:], strict=True)] for n in runs}
    return {
        "model": model,
        "batch": batch,
        "seconds": {name: medians(found) for name, found in runs.items()},
        "phases": phases,
        "ratios": {
            "usual round": ratios(runs["usual"], runs["ours"]),
            "usual round without importance": ratios(bare["usual"], bare["ours"]),
        },
        "losses": losses,
        "runs": runs,
    }


def minus(run: tuple[float, float], watch: Stopwatch, phase: str) -> tuple[float, float]:
    return run[0] - watch.seconds[phase][0], run[1] - watch.seconds[phase][1]


def memory(model: str, batch: int, world: Fleet) -> Figures:
    """Bytes at the peak of a round's training and aggregation, beyond the base and the server's state."""
    tasks, clients, device = tasks_of(world), simulator(world), world.base.device
    peak = peak_of(lambda: absorb(METHOD, world.state, clients.fit(tasks), SEED) and None, device)
    return {
        "model": model,
        "batch": batch,
        "peak": peak,
        "base": model_bytes(world.base.model),
        "adapters": sum(nbytes(task.adapter) for task in tasks.values()),
        "one_batch": one_batch(world, examples_at_once(world)),
    }


def one_batch(world: Fleet, examples: int) -> int:
    """Bytes that a forward and a backward pass of the centralised model take, beside the gradients they leave."""
    floor = Centralised(world)
    rows = [row for client in world.shares for row in world.rows(client)][:examples]
    batch = {name: tensor.to(world.base.device) for name, tensor in stacked(rows).items()}
    left = sum(p.numel() * p.element_size() for p in floor.model.parameters() if p.requires_grad)

    def passes() -> None:
        with autocast(world.local, world.base.device):
            loss = floor.model(**batch).loss
        loss.backward()

    return peak_of(passes, world.base.device) - left


def verdicts(run: Figures) -> Iterator[Verdict]:
    """Every figure, beside its goal where it has one."""
    clock = run["clock"]
    for row in (*run["training"], *run["whole"]):
        where = f"{row['model']}, batch {row['batch']}"
        for route, found in row["ratios"].items():
            key, ratio, spread = (route, row["batch"]), found[clock]["ratio"], found[clock]
            if route == "centralised":
                name = f"{where}: ours / centralised"
                yield verdict(name, ratio, "at most", AT_MOST.get(key), part="centralised", spread=spread)
            else:
                name = f"{where}: {route} / ours"
                yield verdict(name, ratio, "at least", AT_LEAST.get(key), part="usual", spread=spread)
        for route in sorted(LOSSES.keys() & row["losses"].keys()):
            apart = abs(row["losses"][route] / row["losses"]["ours"] - 1)
            yield verdict(f"{where}: loss against {route}", apart, "at most", LOSSES[route], part="losses")
    for row in run["whole"]:
        share = row["phases"]["ours"]["evaluation"][clock] / row["seconds"]["ours"][clock]
        yield verdict(f"{row['model']}, batch {row['batch']}: evaluation / our round", share, part="evaluation")
    for row in run["memory"]:
        bound = ADAPTERS * row["adapters"] + row["one_batch"]
        name = f"{row['model']}, batch {row['batch']}: peak / ({ADAPTERS} x adapters + a batch)"
        yield verdict(name, row["peak"] / bound, "at most", 1.0, part="memory")


def measure(options: argparse.Namespace) -> Figures:
    """All figures of one run of the bench."""
    run: Figures = {"clock": "cpu" if options.threads == 1 and options.device == "cpu" else "wall"}
    run |= {"training": [], "whole": [], "memory": []}
    precision = "bf16" if options.device == "cuda" else "fp32"
    for model in options.models:
        for batch in options.batches:
            local = LocalTraining(steps=STEPS, batch=batch, precision=precision)
            world = fleet(model, local, options.test, options.holdout, options.device)
            run["training"].append(training(model, batch, world, options.repeats))
            if batch in WHOLE:
                texts = fleet(model, local, options.test, options.holdout, options.device, SHORTEST)
                run["whole"].append(whole(model, batch, texts, options.rounds))
            run["memory"].append(memory(model, batch, world))
            latest = {name: [r for r in run[name] if (r["model"], r["batch"]) == (model, batch)] for name in PARTS}
            print("\n".join(lines(verdicts({"clock": run["clock"], **latest}))), flush=True)
    return run


def options_of(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=ALL_MODELS, action="append", dest="models", help="again: several")
    parser.add_argument("--batch", type=int, action="append", dest="batches", help="a local batch; again: several")
    parser.add_argument("--repeats", type=int, default=5, help="turns of the training routes")
    parser.add_argument("--rounds", type=int, default=3, help="turns of whole rounds")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--device", choices=MODELS, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one small model, few turns, fewer examples")
    parser.add_argument("--check", action="store_true", help="fail where a goal is missed")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    options.test, options.holdout = TEST, HOLDOUT
    if options.quick:
        options.models, options.batches = options.models or ["small"], options.batches or [1, 4]
        options.repeats, options.rounds, options.test, options.holdout = 1, 1, 64, 8
    options.models, options.batches = (
        options.models or MODELS[options.device],
        options.batches or BATCHES[options.device],
    )
    return options


def main() -> int:
    options = options_of(sys.argv[1:])
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # what Transformers itself still calls
    run = measure(options)
    run = {"machine": machine(), "device": options.device, **run, "verdicts": list(verdicts(run))}
    kept = json.loads(options.out.read_text())["runs"] if options.out.exists() else []
    kept = [old for old in kept if identity(old) != identity(run)]
    settings = {"ranks": RANKS, "steps": STEPS, "tokens": TOKENS, "test": options.test, "holdout": options.holdout}
    store(options.out, {"settings": settings, "runs": [*kept, run]})
    missed = [v["name"] for v in run["verdicts"] if v["met"] is False]
    print(f"{len(missed)} goals are MISSED." if missed else "The goals are met.")
    return 1 if missed and options.check else 0


def identity(run: Figures) -> tuple[str, int]:
    """Of a run: a later one on the same kind of device with as many threads takes its place."""
    return run["device"], run["machine"]["threads"]


if __name__ == "__main__":
    sys.exit(main())
