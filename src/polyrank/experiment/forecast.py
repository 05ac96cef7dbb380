"""What a run will cost, as plain values: ``polyrank plan`` prints and draws them. Nothing is downloaded or trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from polyrank.core.architecture import ModelSpec
from polyrank.core.costs import NoFormulaError, download_bytes, memory, round_seconds, task_memory, upload_bytes
from polyrank.core.federate import plan, scored
from polyrank.core.lokr import lokr_parameters
from polyrank.core.lowrank import Adapter, Factors, LowRank, nbytes
from polyrank.core.method import Method
from polyrank.core.roster import Numbered
from polyrank.core.types import Budget, Client, ClientProfile, Query, ServerState, Task
from polyrank.data import outline
from polyrank.experiment.components import parameters
from polyrank.experiment.config import Experiment
from polyrank.experiment.planning import (
    cautions,
    check_rank,
    check_stated_ranks,
    described,
    from_config,
    group_budgets,
    notes_of,
    profile_of,
    server_rank,
)
from polyrank.experiment.shares import group_sizes, kept_for_importance
from polyrank.experiment.start import check_start
from polyrank.experiment.tables import DATASETS
from polyrank.local import lokr

_MOST_RANKS = 1024  # of a curve that is drawn
_MOST_CLIENTS = 200  # that are planned one by one


class Phase(NamedTuple):
    """Rounds in which the same is trained: the first, how many, which factors, and the first one's tasks."""

    round: int
    factors: Factors
    rounds: int
    tasks: dict[str, Task]


def forecast(experiment: Experiment, scores: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The plan of an experiment.

    Args:
        experiment: what is to be run.
        scores: importance per layer, as an earlier run measured it; None: layers whose importance only a run can tell
            are taken for alike.

    Returns:
        ``model`` (what costs are computed from), ``server_rank`` (LoKr's r where it is trained), ``groups`` (one object
        a device group: its budget and the limits behind it; of its first client the ranks by layer, memory by part,
        traffic and seconds by what is trained), ``clients`` (each client's first ranks), ``blocks`` (of the adapted
        modules), ``scores``, ``trained`` (by what is trained: the first round, how many
        there are, and the parameters that all clients together train), ``curves``
        (budget against memory and link speed), ``notes`` and ``seconds`` (that planning took).
    """
    started = time.perf_counter()
    method = experiment.build_method()
    check_stated_ranks(experiment)
    base = from_config(experiment, "meta")
    spec = described(base, experiment, method)
    budgets = group_budgets(experiment, method, spec)
    rank = server_rank(experiment, budgets)
    check_rank(rank, spec, experiment)
    unknown = check_start(experiment, method, spec.modules, rank, base.info)
    examples, notes = _examples(experiment)
    notes += unknown
    names = [group.name or f"group {index}" for index, group in enumerate(experiment.fleet)]
    profiles = [profile_of(group, examples or 0) for group in experiment.fleet]
    sizes, clients = _clients(experiment)
    phases, unscored = _phases(experiment, method, spec, rank, {c: budgets[g] for c, g in clients.items()}, scores)
    notes += _boost(experiment, method) + unscored + notes_of(spec) + cautions(base, experiment.model.export)
    firsts = [next((c for c, of in clients.items() if of == g), "") for g in range(len(names))]
    groups = [
        {
            "name": name,
            "share": group.share,
            "clients": size,
            "memory": profile.memory,
            "uplink": profile.uplink,
            "downlink": profile.downlink,
            "flops": profile.flops,
            **_budget(budget, rank if method.form == "lora" else None),
            **_tasks(key, phases, spec, profile, timed=bool(examples)),
        }
        for key, name, size, group, profile, budget in zip(
            firsts, names, sizes, experiment.fleet, profiles, budgets, strict=True
        )
    ]
    first = phases[0].tasks
    return {
        "model": _model(experiment, spec),
        "method": experiment.method.name,
        "server_rank": method.rank or rank,
        "groups": groups,
        "clients": [
            {"name": client, "group": names[group], "ranks": _ranks(first.get(client))}
            for client, group in clients.items()
        ],
        "blocks": {name: spec.blocks.get(name) for name in spec.modules},
        "scores": dict(scores) if scores is not None else None,
        "trained": [
            {
                "round": phase.round,
                "rounds": phase.rounds,
                "factors": phase.factors,
                "parameters": sum(nbytes(task.adapter, phase.factors) // 4 for task in phase.tasks.values()),
            }
            for phase in phases
        ],
        "curves": _curves(experiment, spec),
        "notes": notes + _warnings(groups),
        "seconds": round(time.perf_counter() - started, 4),
    }


def _clients(experiment: Experiment) -> tuple[list[int | None], dict[Client, int]]:
    """Clients per group, and each client's group; one client a group where they are too many or not known yet."""
    fleet, count = experiment.fleet, experiment.data.clients
    if count is None:
        return [None] * len(fleet), {f"{group:06d}": group for group in range(len(fleet))}
    sizes = group_sizes(fleet, count)
    if count > _MOST_CLIENTS:
        return [*sizes], {f"{group:06d}": group for group in range(len(fleet))}
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    return [*sizes], dict(zip(Numbered(count), groups, strict=True))


def _ranks(task: Task | None) -> dict[str, int]:
    return {} if task is None else {name: x.rank for name, x in task.adapter.layers.items()}


def _model(experiment: Experiment, spec: ModelSpec) -> dict[str, Any]:
    model = spec.architecture
    assert model is not None
    return {
        "name": experiment.model.name,
        "family": model.family or None,
        "parameters": model.parameters,
        "adapted_modules": len(spec.modules),
        "blocks": len(model.blocks),
        "tokens": model.tokens or None,
        "batch": experiment.local.batch,
        "attention": model.attention,
        "backbone_parameters": model.backbone,
        "adapted_share": spec.covered,
        "beyond_adapters": dict(model.others),
        "head_parameters": sum(spec.head.values()),
        "head_trained": spec.head_trained,
    }


def _examples(experiment: Experiment) -> tuple[int | None, list[str]]:
    """Training examples of an average client, as far as they are known without the data."""
    options = {key: getattr(experiment.data, key) for key in parameters(DATASETS[experiment.data.name])}
    known, clients = outline(experiment.data.name, options).examples, experiment.data.clients
    if known is None or clients is None:
        return None, ["the data was not looked at: seconds are those of messages alone"]
    limit = experiment.data.limit.get("train")
    return max((min(known, limit or known) - kept_for_importance(experiment)) // clients, 1), []


def _boost(experiment: Experiment, method: Method) -> list[str]:
    """That a method overspends its budget, and until when."""
    if method.boost is None or not method.boost.rounds:
        return []
    last = min(method.boost.rounds, experiment.rounds)
    times = f"{method.boost.factor} times its budget in rounds 1-{last}"
    return [f"{experiment.method.name} trains {times}, where the server's ranks allow it"]


def _phases(
    experiment: Experiment,
    method: Method,
    spec: ModelSpec,
    rank: int,
    budgets: Mapping[str, Budget],
    scores: Mapping[str, float] | None,
) -> tuple[list[Phase], list[str]]:
    """What the method has trained, by each choice of factors it makes. Tensors have no content.

    A boosted warm-up counts as a choice of its own. Layers whose importance only a run can tell are taken for alike,
    and a note says so.
    """
    state = _empty_state(experiment, method, spec, rank)
    local = experiment.local_training()
    phases: list[Phase] = []
    asked: list[Query] = []

    def known(query: Query, state: ServerState) -> dict[str, float]:
        asked.append(query)
        return dict.fromkeys(spec.modules, 1.0) if scores is None else dict(scores)

    rounds: dict[tuple[Factors, bool], list[int]] = {}  # the first with a choice, and how many
    for round_ in range(experiment.rounds):
        choice = method.factors(round_), method.boost is not None and round_ < method.boost.rounds
        rounds.setdefault(choice, [round_, 0])[1] += 1
    first = {start: (factors, count) for (factors, _), (start, count) in rounds.items()}
    learnt = ServerState(0, Adapter())  # nothing, as far as a scorer can see
    for round_ in range(experiment.rounds):
        learnt = scored(method, replace(learnt, round=round_), list(budgets), spec, experiment.seed, known)
        if round_ in first:
            now = replace(state, round=round_, scores=learnt.scores, memory=learnt.memory)
            tasks = plan(method, now, budgets, list(budgets), spec, local, experiment.seed)
            phases.append(Phase(round_, *first[round_], tasks))
        if asked and len(phases) == len(first):
            break
    unscored = scores is None and (asked or not any(learnt.scores.values()))
    note = "importance is measured in the run; the ranks shown are those of equal scores"
    return phases, [note] if unscored else []


def _empty_state(experiment: Experiment, method: Method, spec: ModelSpec, rank: int) -> ServerState:
    """What `first_state` makes, on the meta device."""
    head = {name: torch.empty(count, device="meta") for name, count in spec.head.items()}
    layers: dict[str, LowRank] = {}
    factors, scales = {}, {}
    if method.form == "lokr":
        assert method.rank is not None
        shapes = lokr_parameters(spec.modules, method.rank)
        factors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        scales = lokr.scales(spec.modules, (experiment.model.alpha or method.rank) / method.rank)
    else:
        scale = (experiment.model.alpha or rank) / rank
        layers = {
            name: LowRank(torch.empty(own, d_in, device="meta"), torch.empty(d_out, own, device="meta"), scale)
            for (name, own), (d_out, d_in) in zip(spec.at(rank).items(), spec.modules.values(), strict=True)
        }
    if not spec.head_trained:
        return ServerState(0, Adapter(layers, factors), Adapter({}, {**head, **scales}))
    return ServerState(0, Adapter(layers, {**head, **factors}), Adapter({}, scales))


def _budget(budget: Budget, server: int | None) -> dict[str, Any]:
    return {
        "budget": budget.total,
        "rank": budget.rank,
        "limit": budget.limit if server is None or budget.rank <= server else "server rank",
        "limits": [asdict(limit) for limit in budget.limits],
    }


def _tasks(
    key: str,
    phases: list[Phase],
    spec: ModelSpec,
    profile: ClientProfile,
    *,
    timed: bool,
) -> dict[str, Any]:
    """What a group's client gets and sends, by what is trained."""
    first = phases[0].tasks.get(key)
    if first is None:
        return {"ranks": {}, "peak": None, "peak_memory": None, "traffic": []}
    traffic = []
    for phase in phases:
        task = phase.tasks[key]
        up, down = nbytes(task.adapter, phase.factors), task.nbytes
        seconds = round_seconds(
            profile if timed else replace(profile, flops=None), spec, task.local, _ranks(task), phase.factors, down, up
        )
        traffic.append(
            {
                "round": phase.round,
                "factors": phase.factors,
                "bytes_down": down,
                "bytes_up": up,
                "seconds": asdict(seconds),
            }
        )
    try:
        worst = max((task_memory(spec, phase.tasks[key]) for phase in phases), key=lambda parts: parts.total)
        parts, peak = asdict(worst), worst.total
    except NoFormulaError:
        parts, peak = None, None
    return {"ranks": _ranks(first), "peak": parts, "peak_memory": peak, "traffic": traffic}


def _warnings(groups: list[dict[str, Any]]) -> list[str]:
    found = []
    for group in groups:
        for limit in group["limits"]:
            if limit["advice"]:
                found.append(f"{group['name']}: not even rank 1 fits its {limit['name']}; would help: "
                             + ", or ".join(limit["advice"]))  # fmt: skip
        if group["memory"] and group["peak_memory"] and group["peak_memory"] > group["memory"]:
            found.append(
                f"{group['name']}: needs {group['peak_memory'] / 2**20:,.0f} MiB at its peak, "
                f"more than its {group['memory'] / 2**20:,.0f} MiB"
            )
    return found


def _curves(experiment: Experiment, spec: ModelSpec) -> dict[str, Any]:
    """Budgets as steps: ``[what a rank needs, its budget]`` for memory in bytes and for links in bit/s (in one second).

    A client's budget is that of the last step at or below what it has.
    """
    local, modules = experiment.local_training(), len(spec.modules)

    def link(size: Callable[[dict[str, int]], int]) -> list[list[float]]:
        return [[8.0 * size(spec.at(r)), float(r * modules)] for r in range(1, min(spec.full_rank, _MOST_RANKS) + 1)]

    ranks = sorted(set(np.linspace(1, spec.full_rank, 24).astype(int).tolist()))
    try:
        by_memory = [[memory(spec, local, spec.at(rank)).total, float(rank * modules)] for rank in ranks]
    except NoFormulaError:
        by_memory = []
    return {
        "memory": by_memory,
        "upload": link(lambda ranks: upload_bytes(spec, ranks)),
        "download": link(lambda ranks: download_bytes(spec, ranks)),
    }
