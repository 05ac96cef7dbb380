"""From a configuration to the things that run: data, clients, base model, method and first state.

Cheap checks come first: a wrong column or an impossible split is found before a model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from polyrank.core.architecture import ModelSpec
from polyrank.core.lowrank import Adapter, fresh, pad, rescale
from polyrank.core.method import Method
from polyrank.core.rng import stream
from polyrank.core.types import ServerState
from polyrank.data import (
    Dataset,
    ImageSplit,
    TextSplit,
    prepare_images,
    prepare_text,
)
from polyrank.engines.simulator import Simulator
from polyrank.engines.workers import Workers
from polyrank.experiment.config import ConfigError, Experiment
from polyrank.experiment.machine import cache_memory, default_threads, pick_device, positions_for, workers
from polyrank.experiment.planning import (
    BUILT_IN_MODELS,
    check_stated_ranks,
    completed,
    describe,
    group_budgets,
    server_rank,
)
from polyrank.experiment.shares import fleet_profiles, share_data
from polyrank.local import hf, lokr
from polyrank.local.adapters import AdapterError, AdapterInfo, read_adapter
from polyrank.local.base import Base
from polyrank.local.dp import require_opacus
from polyrank.local.dpsgd import refuse_unsound
from polyrank.local.prefix import Prefixes

Split = TextSplit | ImageSplit


@dataclass(frozen=True)
class World:
    """All that a run needs besides its state.

    Attributes:
        base: the frozen model.
        spec: what planning knows of it, costs included.
        rank: the server's rank per module.
        simulator: the clients, in this process or in several.
        method: the six answers.
        splits: prepared data.
        start: the first state.
        info: what an exported adapter's config says.
    """

    base: Base
    spec: ModelSpec
    rank: int
    simulator: Simulator | Workers
    method: Method
    splits: Mapping[str, Split]
    start: ServerState
    info: AdapterInfo


def load_base(experiment: Experiment, dataset: Dataset) -> tuple[Base, dict[str, Split]]:
    """The frozen model with a head for the data's classes, and the splits prepared for it."""
    config = experiment.model
    if config.quantize is not None:
        raise ConfigError(f"model.quantize: {config.quantize}: plans account for it, but it cannot be run yet")
    _, folder = BUILT_IN_MODELS.get(config.name, (None, None))
    name = folder() if folder else hf.locate(config.name)
    base = hf.load_base(
        name,
        config.targets,
        kind=dataset.kind,
        classes=dataset.classes,
        rng=stream(experiment.seed, "head"),
        device=pick_device(experiment.device),
        dtype=config.dtype,
        image_size=config.image_size,
        attention=config.attention,
        tokens=config.max_length,
    )
    sources = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    if dataset.importance is not None:
        sources["importance"] = dataset.importance
    splits: dict[str, Split] = {}
    if dataset.kind == "text":
        text = hf.text_processor(name, config.max_length)
        for split, source in sources.items():
            splits[split] = prepare_text(source, text.encode, text.pad_id, text.fingerprint)
    else:
        image = hf.image_processor(name, config.image_size)
        for split, source in sources.items():
            splits[split] = prepare_images(source, image.size, image.channels, image.mean, image.std)
    return base, splits


def build(experiment: Experiment) -> World:
    """Everything; where several processes train, they start with the first round."""
    world, count = build_here(experiment), workers(experiment)
    if count == 1:
        return world
    assert isinstance(world.simulator, Simulator)
    threads = max((experiment.threads or default_threads()) // count, 1)
    factory = partial(clients_of_worker, experiment.resolved(), count, threads)
    return replace(world, simulator=Workers(world.simulator, factory, count, threads))


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
    clients = build_here(experiment.model_copy(update={"device": device, "threads": threads}), sharing).simulator
    assert isinstance(clients, Simulator)
    return clients


def build_here(experiment: Experiment, sharing: int = 1) -> World:
    """Everything, in an order in which cheap mistakes surface first.

    Args:
        experiment: what to build.
        sharing: how many processes that train share the device's memory.
    """
    torch.set_num_threads(experiment.threads or default_threads())
    method = experiment.build_method()
    if experiment.protection():
        require_opacus()
    check_stated_ranks(experiment)
    planned = describe(experiment, method)
    budgets = group_budgets(experiment, method, planned)
    rank = server_rank(experiment, budgets)
    check_rank(rank, planned, experiment)
    shares = share_data(experiment)
    profiles = fleet_profiles(experiment.fleet, shares)
    base, splits = load_base(experiment, shares.dataset)
    spec = completed(base.spec, experiment, method)
    cache = cache_memory(experiment)
    simulator = Simulator(
        base,
        splits["train"],
        shares.indices(),
        profiles,
        spec=spec,
        absent=experiment.absent,
        together=positions_for(spec, experiment, rank, base.device, sharing),
        seed=experiment.seed,
        holdout=splits.get("importance"),
        prefixes=None if cache == "off" else Prefixes(base, splits["train"], cache / sharing),
    )
    start = first_state(experiment, method, base, rank)
    if experiment.privacy.examples is not None:
        frozen = base.head if method.dense == "freeze" else ()
        refuse_unsound(base, [name for name in start.adapter.dense if name not in frozen])
    info = replace(base.info, rank=method.rank)
    return World(base, spec, rank, simulator, method, splits, start, info)


def check_rank(rank: int, spec: ModelSpec, experiment: Experiment) -> None:
    """Refuses a server's rank that a module has no room for."""
    for name, shape in spec.modules.items():
        if min(shape) < rank and experiment.model.rank is not None:
            raise ConfigError(f"model.rank: {rank} exceeds the smaller dimension of {name} ({shape[0]} x {shape[1]})")


def first_state(experiment: Experiment, method: Method, base: Base, rank: int) -> ServerState:
    """Round 0: fresh low-rank layers or LoKr factors (or an adapter to start from), and the head."""
    if method.form == "lokr":
        return _first_lokr(experiment, method, base)
    scale = (experiment.model.alpha or rank) / rank
    rng = stream(experiment.seed, "adapter")
    layers = {name: fresh(shape, rank, scale, rng) for name, shape in base.spec.modules.items()}
    head = base.initial_head()
    if experiment.model.adapter is not None:
        given, _ = read_adapter(experiment.model.adapter)
        _check_adapter(given, layers, head, experiment, rank)
        layers |= {name: rescale(pad(x, rank, rng), scale) for name, x in given.layers.items()}
        head |= {name: tensor.float() for name, tensor in given.dense.items()}
    if experiment.model.head == "freeze":
        return ServerState(0, Adapter(layers), Adapter({}, head))
    return ServerState(0, Adapter(layers, head))


def _first_lokr(experiment: Experiment, method: Method, base: Base) -> ServerState:
    """Kronecker factors among the dense parameters; a scale that is not 1, and a frozen head, are not trained."""
    assert method.rank is not None
    modules = base.spec.modules
    factors = lokr.fresh(modules, method.rank, stream(experiment.seed, "adapter"))
    scale = (experiment.model.alpha or method.rank) / method.rank
    fixed = lokr.scales(modules, scale)
    head = base.initial_head()
    if experiment.model.adapter is not None:
        given, _ = read_adapter(experiment.model.adapter)
        _check_lokr(given, {**factors, **head}, experiment)
        for name, tensor in given.dense.items():
            if not lokr.is_scale(name):
                (factors if lokr.is_part(name) else head)[name] = tensor.float()
        for name, x in lokr.grouped(given.dense).items():  # the same update under the experiment's scale
            factors[f"{name}.lokr_w1"] = factors[f"{name}.lokr_w1"] * (x.scale / scale)
    if experiment.model.head == "freeze":
        return ServerState(0, Adapter({}, factors), Adapter({}, {**head, **fixed}))
    return ServerState(0, Adapter({}, {**head, **factors}), Adapter({}, fixed))


def _check_adapter(given: Adapter, layers: Mapping, head: Mapping, experiment: Experiment, rank: int) -> None:  # type: ignore[type-arg]
    folder = experiment.model.adapter
    if lokr.grouped(given.dense):
        raise AdapterError(f"model.adapter: {folder}: is a LoKr, which only the method lokr can start from")
    for name, x in given.layers.items():
        if name not in layers:
            raise AdapterError(f"model.adapter: {folder}: layer {name} is none of the model's targets: another model?")
        if x.shape != layers[name].shape:
            raise AdapterError(f"model.adapter: {folder}: {name} is {x.shape}, the model's is {layers[name].shape}")
        if x.rank > rank:
            raise AdapterError(f"model.adapter: {folder}: {name} has rank {x.rank}, above model.rank, {rank}")
    for name, tensor in given.dense.items():
        if name not in head or head[name].shape != tensor.shape:
            raise AdapterError(f"model.adapter: {folder}: {name} does not fit the model's head")


def _check_lokr(given: Adapter, own: Mapping[str, torch.Tensor], experiment: Experiment) -> None:
    folder = experiment.model.adapter
    if given.layers:
        raise AdapterError(f"model.adapter: {folder}: is a LoRA; the method lokr starts from a LoKr")
    for name, tensor in given.dense.items():
        if not lokr.is_scale(name) and (name not in own or own[name].shape != tensor.shape):
            raise AdapterError(f"model.adapter: {folder}: {name} does not fit the model's LoKr factors or head")
