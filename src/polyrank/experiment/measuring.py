"""What a run's models are worth: on a split, on each client's own examples, and beside the baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polyrank.core.lowrank import Adapter, combine
from polyrank.core.rng import stream
from polyrank.core.roster import ascending
from polyrank.core.types import Client
from polyrank.engines.events import Phase, Tell, ignore
from polyrank.experiment.build import World
from polyrank.experiment.config import Experiment
from polyrank.experiment.regimes import EVERYBODY, Models, course
from polyrank.local.data import Indices
from polyrank.local.evaluate import Predictions, predictions, worth

Metrics = Mapping[str, float]


def said(world: World, parts: Sequence[Adapter], split: str, indices: Indices | None = None) -> Predictions:
    """What the base with adapters added says of a split, or of some of its examples."""
    with world.base.attached(combine(parts)) as model:
        return predictions(model, world.splits[split], indices, output=world.base.output)


def averaged(metrics: Sequence[Metrics]) -> dict[str, float]:
    """The mean of every metric."""
    return {key: float(np.mean([each[key] for each in metrics])) for key in metrics[0]}


def clients_evaluated(experiment: Experiment, world: World) -> list[Client]:
    """The clients that evaluate on their own examples: those that have some, or as many as were asked for."""
    if world.held_out is None:
        return []
    everybody, asked = ascending(world.held_out), experiment.evaluate.clients
    if asked is not True and asked < len(everybody):
        drawn = stream(experiment.seed, "evaluate", "clients").choice(len(everybody), asked, replace=False)
        everybody = [everybody[number] for number in sorted(drawn.tolist())]
    return [client for client in everybody if len(world.held_out[client])]


def on_own_data(world: World, models: Models, clients: Sequence[Client]) -> dict[Client, dict[str, float]]:
    """Accuracy and loss by client, on its own examples: of its own model if it has one, or of everybody's."""
    assert world.held_out is not None
    if EVERYBODY not in models:
        return {c: said(world, models[c], "train", world.held_out[c]).brief() for c in clients}
    own = [world.held_out[client] for client in clients]
    everything = said(world, models[EVERYBODY], "train", np.concatenate(own))
    ends = np.cumsum([len(indices) for indices in own]).tolist()
    return {
        client: everything.part(end - len(indices), end).brief()
        for client, indices, end in zip(clients, own, ends, strict=True)
    }


def run_baselines(experiment: Experiment, world: World, tell: Tell = ignore) -> dict[str, Any]:
    """Test metrics of the baselines that the experiment names, trained here and now; `tell` hears how far they are."""
    results: dict[str, Any] = {}
    for regime in experiment.baselines:
        chosen = course(experiment, world, regime)
        for state, _ in chosen.steps(chosen.start):
            tell(Phase(f"baseline {regime}", state.round, chosen.rounds))
        found = {client: said(world, parts, "test").metrics() for client, parts in chosen.models(state).items()}
        if EVERYBODY in found:
            results[regime] = {"test": found[EVERYBODY]}
            continue
        best = max(found, key=lambda client: worth(found[client]))
        mean = averaged(list(found.values()))
        results[regime] = {"best": best, "test": found[best], "mean": mean, "clients": found}
        results[regime]["mean_accuracy"] = mean["accuracy"]
    return results
