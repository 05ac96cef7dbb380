"""What federation is held against: one adapter on the pooled data, and every client alone.

Both are the same round loop with one client, the same local settings and the same evaluation. The pooled run takes as
many optimizer steps as the cohorts take together; a client alone trains in every round.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from polyrank.core.federate import federate
from polyrank.core.lowrank import combine
from polyrank.core.method import Method
from polyrank.core.types import ClientProfile, LocalTraining
from polyrank.engines.simulator import Simulator
from polyrank.experiment.build import World
from polyrank.experiment.config import Experiment
from polyrank.local.evaluate import evaluate
from polyrank.methods.named import fedit


def run_baselines(experiment: Experiment, world: World) -> dict[str, Any]:
    """Test metrics of the baselines that the experiment names."""
    results: dict[str, Any] = {}
    if "single" in experiment.baselines:
        everybody = pooled(experiment, world)
        steps = _same_steps(experiment, world, everybody.profiles()["pooled"].examples)
        results["single"] = {"test": _train(experiment, world, everybody, steps, fedit())}
    if "local" in experiment.baselines:
        local = experiment.local_training()
        own_budget = replace(fedit(), estimate=world.method.estimate)
        alone = {
            client: _train(experiment, world, world.clients.only([client]), local, own_budget)
            for client in world.clients.profiles()
        }
        best = max(alone, key=lambda client: alone[client]["accuracy"])
        mean = float(np.mean([metrics["accuracy"] for metrics in alone.values()]))
        results["local"] = {"best": best, "test": alone[best], "mean_accuracy": mean, "clients": alone}
    return results


def pooled(experiment: Experiment, world: World) -> Simulator:
    """A world with one client that holds everybody's examples, at the server's rank."""
    everything = np.sort(np.concatenate(list(world.clients.shares.values())))
    profile = ClientProfile(len(everything), rank=world.rank)
    return Simulator(
        world.base,
        world.splits["train"],
        {"pooled": everything},
        {"pooled": profile},
        spec=world.spec,
        seed=experiment.seed,
    )


def _train(
    experiment: Experiment, world: World, clients: Simulator, local: LocalTraining, method: Method
) -> dict[str, float]:
    rounds = federate(method, world.start, clients, world.spec, local, rounds=experiment.rounds, seed=experiment.seed)
    *_, (state, _) = rounds
    with world.base.attached(combine([state.folded, state.adapter])) as model:
        return evaluate(model, world.splits["test"])


def _same_steps(experiment: Experiment, world: World, examples: int) -> LocalTraining:
    """Local settings under which the pooled run takes the steps that an average cohort takes together."""
    local = experiment.local_training()
    clients = len(world.clients.profiles())
    share = min(experiment.cohort or clients, clients) / clients
    if local.steps is not None:
        return replace(local, steps=max(1, round(local.steps * share * clients)))
    if share == 1:
        return local
    seen = local.epochs * (examples * share)
    return replace(local, steps=max(1, math.ceil(seen / (local.batch * local.accumulate))))
