"""From a configuration to the things that run: data, clients, base model, method and first state.

Cheap checks come first: a wrong column or an impossible split is found before a model is loaded.
"""

from __future__ import annotations

import hmac
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from polyrank.core.architecture import ModelSpec
from polyrank.core.costs import download_bytes
from polyrank.core.method import Method
from polyrank.core.rng import stream
from polyrank.core.types import Client, Query, ServerState
from polyrank.data import CausalSplit, warn_of_silent
from polyrank.engines.announcement import Announcement, digest_of
from polyrank.engines.audit import Audit
from polyrank.engines.exchange import Remote
from polyrank.engines.post import Post
from polyrank.engines.simulator import Simulator
from polyrank.engines.watched import Watched
from polyrank.engines.workers import Workers
from polyrank.experiment.config import ConfigError, Experiment
from polyrank.experiment.language import Language, language
from polyrank.experiment.machine import cache_memory, default_threads, operator, pick_device, positions_for, workers
from polyrank.experiment.models import Split, load_base, preparer, prompting_of
from polyrank.experiment.planning import (
    cautions,
    check_rank,
    check_stated_ranks,
    completed,
    described,
    from_config,
    group_budgets,
    notes_of,
    planned_with,
    server_rank,
    unused_of,
)
from polyrank.experiment.shares import Shares, fleet_profiles, share_data
from polyrank.experiment.start import check_start, first_state
from polyrank.local.adapters import AdapterInfo
from polyrank.local.base import Base
from polyrank.local.data import Indices
from polyrank.local.dp import require_opacus
from polyrank.local.dpsgd import refuse_unsound
from polyrank.local.importance import measured
from polyrank.local.packing import check_packing
from polyrank.local.padding import filled_up
from polyrank.local.prefix import Prefixes
from polyrank.local.probe import side_by_side
from polyrank.local.quantized import check_quantization
from polyrank.local.vocabulary import check_splits
from polyrank.text import one_line

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    """All that a run needs besides its state.

    Attributes:
        base: the frozen model.
        spec: what planning knows of it, costs included.
        rank: the server's rank per module.
        clients: in this process, in several, or on other machines.
        method: the six answers.
        splits: prepared data.
        held_out: each client's own examples of the training split that nobody trains on, where clients evaluate.
        classes: their names.
        start: the first state.
        info: what an exported adapter's config says.
        language: what a language model is asked besides its test split, if anything.
        notes: what is said of the model before training.
    """

    base: Base
    spec: ModelSpec
    rank: int
    clients: Simulator | Workers | Watched | Remote
    method: Method
    splits: Mapping[str, Split]
    held_out: Mapping[Client, Indices] | None
    classes: tuple[str, ...]
    start: ServerState
    info: AdapterInfo
    language: Language | None = None
    notes: tuple[str, ...] = ()


def build(experiment: Experiment) -> World:
    """Everything; where several processes train, they start with the first round."""
    world, count = build_here(experiment), workers(experiment)
    if count == 1:
        return world
    assert isinstance(world.clients, Simulator)
    threads = max((experiment.threads or default_threads()) // count, 1)
    factory = partial(clients_of_worker, experiment.resolved(), count, threads)
    return replace(world, clients=Workers(world.clients, factory, count, threads))


def clients_of_worker(resolved: dict[str, Any], count: int, threads: int, number: int) -> Simulator:
    """The clients of an experiment as one worker of `count` has them, on a GPU of its own where there are enough.

    Args:
        resolved: the experiment, as `Experiment.resolved` has it; its classes are made at run time and do not travel.
        count: how many workers there are.
        threads: the worker's.
        number: of the worker, from 0.
    """
    experiment = Experiment.model_validate(resolved)
    device, sharing = pick_device(experiment.device), count
    if device == "cuda":
        gpus = torch.cuda.device_count()
        device, sharing = f"cuda:{number % gpus}", math.ceil(count / gpus)
    asked = experiment.evaluate.model_copy(update={"choices": None, "generate": None})  # the run's own process asks
    own = experiment.model_copy(update={"device": device, "threads": threads, "evaluate": asked})
    clients = build_here(own, sharing).clients
    assert isinstance(clients, Simulator)
    return clients


def build_here(experiment: Experiment, sharing: int = 1) -> World:
    """Everything, with the clients in this process.

    Args:
        experiment: what to build.
        sharing: how many processes that train share the device's memory.
    """
    ground = _ground(experiment)
    base, splits, spec = ground.base, ground.splits, ground.spec
    cache = cache_memory(experiment)
    simulator = Simulator(
        base,
        splits["train"],
        ground.shares.indices(),
        fleet_profiles(experiment.fleet, ground.shares),
        spec=spec,
        absent=experiment.absent,
        together=_shared(experiment, ground, positions_for(spec, experiment, ground.rank, base.device, sharing)),
        seed=experiment.seed,
        holdout=splits.get("importance"),
        prefixes=None if cache == "off" else Prefixes(base, splits["train"], cache / sharing),
    )
    return ground.world(experiment, simulator)


def _shared(experiment: Experiment, ground: _Ground, positions: int) -> int:
    """Most input positions of a step that clients share; 0 where the model does not take adapters side by side.

    Raises:
        ConfigError: if it does not, and the file asks for it.
    """
    reason = side_by_side(ground.base, ground.splits["train"], experiment.local.dropout) if positions else None
    if reason is not None and experiment.simulation.together != "auto":
        raise ConfigError(f"simulation.together: {positions}: clients cannot share a pass of this model: {reason}")
    return positions if reason is None else 0


def build_server(experiment: Experiment, post: Post, audit: Audit, secret: bytes, name: str = "") -> World:
    """Everything, with the clients on other machines; of the data, what the server itself holds is used.

    Args:
        experiment: what to build.
        post: carries messages to clients.
        audit: where all that arrives is noted.
        secret: of the run.
        name: of the run, which clients are told.

    Raises:
        ConfigError: for what needs the clients' data here.
    """
    if experiment.baselines:
        named = ", ".join(experiment.baselines)
        raise ConfigError(f"baselines: {named}: need the clients' data, which stays with them")
    if experiment.evaluate.clients:
        raise ConfigError("evaluate.clients: needs the clients' data here, and it stays with them")
    ground = _ground(experiment, remote=True)
    dataset, holdout = ground.shares.dataset, ground.splits.get("importance")
    kept = {"targets", "dtype", "attention", "quantize", "image_size", "max_length"}
    model = experiment.model.model_dump(include=kept) | {"kind": dataset.kind, "classes": list(dataset.classes)}
    if dataset.prompting is not None:  # a causal model has no classes; the site's file names columns and template
        model |= {"classes": [], "prompting": prompting_of(dataset.prompting)}

    def measure(query: Query, state: ServerState) -> dict[str, float]:
        if holdout is None:
            raise ConfigError("data.importance: missing; the server keeps no examples to measure importance on")
        return measured(ground.base, query, state, holdout, np.arange(len(holdout.labels)))

    terms, run = experiment.terms(), announced(experiment, ground, model, secret, name)
    local = experiment.local_training()
    plannable = partial(planned_with, rank=ground.rank, method=ground.method, spec=ground.spec, local=local)
    base = ground.base.fingerprint()
    return ground.world(experiment, Remote(post, model, base, terms, audit, measure, secret, run, plannable))


def announced(
    experiment: Experiment, ground: _Ground, model: Mapping[str, Any], secret: bytes, name: str
) -> Announcement:
    """What clients are told of a run before they take part in it."""
    ranks = {module: min(ground.rank, *shape) for module, shape in ground.spec.modules.items()}
    return Announcement(
        name=one_line(name, 100),
        method=one_line(experiment.label, 100),
        by=one_line(operator(), 100),
        rounds=experiment.rounds,
        local=experiment.local_training(),
        privacy=experiment.protection(),
        nbytes=download_bytes(ground.spec, ranks),
        model=digest_of(model),
        mark=hmac.new(secret, b"announcement", "sha256").hexdigest()[:32],
    )


@dataclass(frozen=True)
class _Ground:
    """What a world has besides its clients."""

    base: Base
    spec: ModelSpec
    rank: int
    method: Method
    shares: Shares
    splits: Mapping[str, Split]
    language: Language | None

    def world(self, experiment: Experiment, clients: Simulator | Workers | Remote) -> World:
        start = first_state(experiment, self.method, self.base, self.rank)
        if experiment.privacy.examples is not None:
            frozen = self.base.head if self.method.dense == "freeze" else ()
            refuse_unsound(self.base, [name for name in start.adapter.dense if name not in frozen])
        info = replace(self.base.info, rank=self.method.rank)
        held_out = self.shares.held_out() if experiment.evaluate.clients else None
        classes = tuple(self.shares.dataset.classes)
        spec, rank, method, splits = self.spec, self.rank, self.method, self.splits
        said = self.language, tuple(notes_of(spec) + unused_of(self.base))
        return World(self.base, spec, rank, clients, method, splits, held_out, classes, start, info, *said)


def _ground(experiment: Experiment, *, remote: bool = False) -> _Ground:
    """All but the clients, in an order in which cheap mistakes surface first."""
    torch.set_num_threads(experiment.threads or default_threads())
    method = experiment.build_method()
    if experiment.protection():
        require_opacus()
    if experiment.model.quantize is not None:
        check_quantization(experiment.model.quantize, pick_device(experiment.device))
    check_stated_ranks(experiment)
    empty = from_config(experiment, "meta")
    planned = described(empty, experiment, method)
    budgets = group_budgets(experiment, method, planned)
    rank = server_rank(experiment, budgets)
    check_rank(rank, planned, experiment)
    unknown = check_start(experiment, method, planned.modules, rank, empty.info)
    for caution in unknown + cautions(empty, experiment.model.export):
        _log.warning("%s", caution)
    shares = share_data(experiment, remote=remote)
    dataset, device = shares.dataset, pick_device(experiment.device)
    base = load_base(experiment.model, dataset.kind, dataset.classes, device, stream(experiment.seed, "head"))
    if experiment.local.pack:
        check_packing(base)
    prepare = preparer(experiment.model, dataset.kind, dataset.prompting)
    sources = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    if dataset.importance is not None:
        sources["importance"] = dataset.importance
    splits = {split: prepare(source) for split, source in sources.items()}
    for name, split in splits.items():
        if isinstance(split, CausalSplit):
            warn_of_silent(split, name, experiment.model.max_length)
    asked = language(experiment, dataset, base)
    check_splits(splits, base.model, str(base.info.base))
    if not experiment.local.pack:
        splits = filled_up(base, splits, experiment.model.max_length)
    spec = completed(base.spec, experiment, method)
    return _Ground(base, spec, rank, method, shares, splits, asked)
