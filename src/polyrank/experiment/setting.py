"""What rounds do not change of a run, as plain values for reports: who takes part, with what, and which layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyrank.core.roster import kinds
from polyrank.core.types import Client, ClientProfile
from polyrank.data import CausalSplit
from polyrank.experiment.build import World
from polyrank.experiment.config import Experiment

MOST_MEMBERS = 1000


def setting(experiment: Experiment, world: World, profiles: Mapping[Client, ClientProfile]) -> dict[str, Any]:
    """The facts of a run.

    Args:
        experiment: what is run.
        world: what it is run with.
        profiles: who is known.

    Returns:
        ``data`` (its name), ``classes`` (their names), ``clients`` (how many), ``groups`` (an object for all clients
        that report the same: how many, memory in bytes, links in bit/s, flops, and the budget with the limit that
        binds), ``members`` (group and training examples by client; None above 1,000 clients), ``modules`` (shape and
        block of each adapted module, in the model's order), ``dense`` (dense parameters in training) and, of a causal
        model, ``silent`` (texts by split of which nothing is asked).
    """
    alike = kinds(profiles)
    budgets = world.method.estimate(profiles, world.spec, experiment.local_training())
    counts = [int((alike.kind == kind).sum()) for kind in range(len(alike.each))]
    groups = []
    for kind, (profile, count) in enumerate(zip(alike.each, counts, strict=True)):
        budget = budgets[alike.first(kind)]
        groups.append(
            {
                "name": profile.group or f"group {kind}",
                "clients": count,
                "memory": profile.memory,
                "uplink": profile.uplink,
                "downlink": profile.downlink,
                "flops": profile.flops,
                "budget": budget.total,
                "rank": budget.rank,
                "limit": budget.limit,
            }
        )
    spec = world.spec
    modules = {name: {"shape": list(shape), "block": spec.blocks.get(name)} for name, shape in spec.modules.items()}
    members = None
    if len(profiles) <= MOST_MEMBERS:
        members = {
            client: {"group": groups[alike.kind[alike.names.number(client)]]["name"], "examples": profile.examples}
            for client, profile in profiles.items()
        }
    causal = {name: split for name, split in world.splits.items() if isinstance(split, CausalSplit)}
    return {
        "data": experiment.data.name,
        "classes": list(world.classes),
        "clients": len(profiles),
        "groups": groups,
        "members": members,
        "modules": modules,
        "dense": sum(tensor.numel() for tensor in world.start.adapter.dense.values()),
        **({"silent": {name: split.silent for name, split in causal.items()}} if causal else {}),
    }
