"""What one client of ten can do to a model, with the server's default trust and without, under every kind of rule.

    python bench/attacks.py             # writes bench/results/attacks.json; minutes
    python bench/attacks.py --quick     # one rule, one seed, one round, nothing stored: whether it runs

Digits, ten clients of unequal data and ranks, one of which attacks. It turns its training round (*flip*), or trains on
images with a bright corner that it calls zeros (*backdoor*), and states 2^53 examples. It knows the defaults: to scale
its update besides would be held back, or refused. Accuracy is on the test split; *planted* is the share of other test
digits that the model calls zeros once they have the corner, which without an attack is what the corner alone does.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from machine import machine
from polyrank.core.lowrank import Adapter, LowRank
from polyrank.core.types import ClientProfile, Task, Update
from polyrank.data.prepare import ImageSplit
from polyrank.engines.simulator import Simulator
from polyrank.experiment.build import World, build
from polyrank.experiment.config import Experiment
from polyrank.experiment.loading import parse
from polyrank.experiment.measuring import said
from polyrank.experiment.regimes import course
from polyrank.experiment.trust import CLIP, SIZE_CAP
from records import store

RESULTS = Path(__file__).parent / "results" / "attacks.json"
RULES = ("fedit", "rb_lora", "flexlora", "norm_clipping", "trimmed_mean", "krum")
SEEDS = (0, 1, 2)
ROUNDS = 5
ATTACKER = "client_9"
CLAIM = 2**53
TARGET = 0
CORNER = 2  # pixels
TRUST: Mapping[str, Mapping[str, Any]] = {
    "off": {"size_cap": "off", "clip": "off"},
    "on": {"size_cap": SIZE_CAP, "clip": CLIP},
}


@dataclass(frozen=True)
class Attack:
    """What the attacker does.

    Attributes:
        times: how far it goes, in units of its own training; backwards where negative.
        planted: whether it trains on images that it has marked.
        claim: how many examples it states; None: those it has.
    """

    times: float = 1.0
    planted: bool = False
    claim: int | None = None


class Clients:
    """A simulator in which one client attacks."""

    def __init__(self, honest: Simulator, attack: Attack) -> None:
        self.honest, self.attack = honest, attack
        own = honest.shares[ATTACKER]
        self.attacker = honest.only([ATTACKER])
        if attack.planted:
            self.attacker.data = marked(honest.data, own[::2])
        self.known = {name: honest.profiles()[name] for name in honest.profiles()}
        if attack.claim is not None:
            self.known[ATTACKER] = replace(self.known[ATTACKER], examples=attack.claim)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.honest, name)

    def profiles(self) -> Mapping[str, ClientProfile]:
        return self.known

    def fit(self, tasks: Mapping[str, Task]) -> Iterator[Update]:
        yield from self.honest.fit({name: task for name, task in tasks.items() if name != ATTACKER})
        if ATTACKER in tasks:
            task = tasks[ATTACKER]
            # It has too few examples for the steps it may have lied itself into, and trains as long as it likes.
            own = replace(task, local=replace(task.local, steps=None))
            for update in self.attacker.fit({ATTACKER: own}):
                adapter = scaled(task.adapter, update.adapter, self.attack.times)
                yield replace(update, adapter=adapter, examples=float(self.known[ATTACKER].examples))


def marked(data: Any, indices: np.ndarray) -> ImageSplit:
    """The same images, some with a bright corner and the attacker's label."""
    pixels, labels = np.array(data.pixels), np.array(data.labels)
    pixels[indices, :, :CORNER, :CORNER] = 255
    labels[indices] = TARGET
    return replace(data, pixels=pixels, labels=labels)


def scaled(sent: Adapter, trained: Adapter, times: float) -> Adapter:
    """The same training, so many times as far."""

    def far(before: Tensor, after: Tensor) -> Tensor:
        return before + times * (after - before)

    layers = {
        name: LowRank(far(sent.layers[name].A, x.A), far(sent.layers[name].B, x.B), x.scale)
        for name, x in trained.layers.items()
    }
    return Adapter(layers, {name: far(sent.dense[name], y) for name, y in trained.dense.items()})


def experiment_of(rule: str, trust: str, seed: int, rounds: int) -> Experiment:
    config = {
        "seed": seed,
        "rounds": rounds,
        "threads": 1,
        "device": "cpu",
        "model": {"name": "digits-vit", "targets": "attention+mlp", "rank": 8, "alpha": 24},
        "data": {"name": "digits", "clients": 10, "partition": {"name": "dirichlet", "alpha": 1.0}},
        "fleet": [{"share": 0.5, "rank": 4}, {"share": 0.5, "rank": 8}],
        "method": rule,
        "local": {"epochs": 1, "batch": 16, "lr": 3e-3},
        "evaluate": {"aggregation": False},
        "trust": TRUST[trust],
    }
    return parse(config, "bench/attacks.py", Path())


def run(world: World, experiment: Experiment, attack: Attack | None) -> dict[str, Any]:
    """Accuracy, planted, in how many rounds the attacker was refused, and how often others were held back."""
    assert isinstance(world.clients, Simulator)
    clients: Any = world.clients if attack is None else Clients(world.clients, attack)
    world = replace(world, method=experiment.build_method(), clients=clients)
    path = course(experiment, world)
    rounds = list(path.steps(path.start))
    state, records = rounds[-1][0], [record for _, record in rounds]
    refused = sum(ATTACKER in record.refused for record in records)
    bounded = sum(len(record.bounded.keys() - {ATTACKER}) for record in records)
    parts = [state.folded, state.adapter]
    test: Any = world.splits["test"]
    others = np.flatnonzero(np.asarray(test.labels) != TARGET)
    turned = replace(world, splits={**world.splits, "test": marked(test, others)})
    accuracy, planted = (
        float(said(w, parts, "test", chosen).metrics()["accuracy"]) for w, chosen in ((world, None), (turned, others))
    )
    return {"accuracy": accuracy, "planted": planted, "refused": refused, "bounded": bounded}


ATTACKS: Mapping[str, Attack | None] = {
    "none": None,
    "flip": Attack(-1.0, claim=CLAIM),
    "backdoor": Attack(planted=True, claim=CLAIM),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one rule, one seed, one round, nothing stored")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rules, seeds, rounds = (RULES[:1], SEEDS[:1], 1) if options.quick else (RULES, SEEDS, ROUNDS)
    began, worlds = time.monotonic(), {seed: build(experiment_of("fedit", "off", seed, rounds)) for seed in seeds}
    rows = []
    for rule in rules:
        for attack, trust in product(ATTACKS, TRUST):
            runs = [run(worlds[seed], experiment_of(rule, trust, seed, rounds), ATTACKS[attack]) for seed in seeds]
            rows.append({"rule": rule, "attack": attack, "trust": trust, "runs": runs})
            figures = (f"{r['accuracy']:.1%}, {r['planted']:.1%} planted" for r in runs)
            print(rule, attack, trust, *figures, sep="  ", flush=True)
    print(f"{time.monotonic() - began:.0f} s")
    if not options.quick:
        store(
            options.out,
            {"machine": machine(1), "settings": {"size_cap": SIZE_CAP, "clip": CLIP}, "rounds": rounds, "rows": rows},
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
