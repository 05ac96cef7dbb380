"""From a configuration to the things that run: data, clients, base model, method and first state.

Cheap checks come first: a wrong column or an impossible split is found before a model is loaded.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from polyrank.core.architecture import ModelSpec
from polyrank.core.costs import NoFormulaError, memory
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
from polyrank.experiment.components import describe as describe_answer
from polyrank.experiment.config import ConfigError, Experiment
from polyrank.experiment.planning import (
    BUILT_IN_MODELS,
    check_stated_ranks,
    completed,
    describe,
    group_budgets,
    server_rank,
)
from polyrank.experiment.shares import fleet_profiles, share_data
from polyrank.experiment.tables import SLOTS
from polyrank.local import hf, lokr
from polyrank.local.adapters import AdapterError, AdapterInfo, read_adapter
from polyrank.local.base import Base
from polyrank.local.grouping import TOGETHER
from polyrank.local.measure import device_memory
from polyrank.local.optimizer import precision_on
from polyrank.local.prefix import Prefixes

Split = TextSplit | ImageSplit


@dataclass(frozen=True)
class World:
    """All that a run needs besides its state.

    Attributes:
        base: the frozen model.
        spec: what planning knows of it, costs included.
        rank: the server's rank per module.
        simulator: the clients.
        method: the six answers.
        splits: prepared data.
        start: the first state.
        info: what an exported adapter's config says.
    """

    base: Base
    spec: ModelSpec
    rank: int
    simulator: Simulator
    method: Method
    splits: Mapping[str, Split]
    start: ServerState
    info: AdapterInfo


def on_this_machine(experiment: Experiment) -> Experiment:
    """The experiment with device, threads, precision and cache decided: a resumed run computes as it began.

    The cost model then knows whether activations are bfloat16, which ``auto`` leaves to the device.
    """
    threads, device = experiment.threads or default_threads(), pick_device(experiment.device)
    precision = precision_on(torch.device(device), experiment.local.precision)
    local = experiment.local.model_copy(update={"precision": precision})
    chosen = {"cache": cache_memory(experiment), "together": together(experiment)}
    simulation = experiment.simulation.model_copy(update=chosen)
    decided = {"device": device, "threads": threads, "local": local, "simulation": simulation}
    return experiment.model_copy(update=decided)


def cache_memory(experiment: Experiment) -> float | Literal["off"]:
    """Bytes for hidden states that are computed once, or ``off``.

    ``auto`` is off where no example comes again with the same model below: in one epoch of one round, or where each
    round sends the layers that a client does not train as well. Otherwise it is a quarter of what is free, rounded down
    to a power of two, so that it is the same next time, and at most 4 GiB.
    """
    if experiment.simulation.cache != "auto":
        return experiment.simulation.cache
    local, dispatch = experiment.local, experiment.build_method().dispatch
    again_now = local.epochs > 1 or local.steps is not None
    again_later = experiment.rounds > 1 and describe_answer(SLOTS["dispatch"], dispatch)["name"] != "whole"
    free = device_memory(torch.device(pick_device(experiment.device))).free
    return float(2 ** min(int(math.log2(free / 4)), 32)) if again_now or again_later else "off"


def together(experiment: Experiment) -> int | Literal["off"]:
    """Most input positions of a step that clients share."""
    wanted = experiment.simulation.together
    return TOGETHER[torch.device(pick_device(experiment.device)).type] if wanted == "auto" else wanted


def positions_for(spec: ModelSpec, experiment: Experiment, rank: int, device: torch.device) -> int:
    """Most input positions of a shared step on this machine: their activations take at most half of its memory.

    Of all its memory, and not of what is free: the same machine must make the same run.
    """
    most = together(experiment)
    if most == "off":
        return 0
    one = replace(experiment.local_training(), batch=1)
    try:
        example = memory(spec, one, dict.fromkeys(spec.modules, rank)).activations
    except NoFormulaError:
        return most
    assert spec.architecture is not None
    return min(most, int(device_memory(device).total / 2 / example * max(spec.architecture.tokens, 1)))


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
    """Everything, in an order in which cheap mistakes surface first."""
    torch.set_num_threads(experiment.threads or default_threads())
    method = experiment.build_method()
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
        together=positions_for(spec, experiment, rank, base.device),
        seed=experiment.seed,
        holdout=splits.get("importance"),
        prefixes=None if cache == "off" else Prefixes(base, splits["train"], cache),
    )
    start = first_state(experiment, method, base, rank)
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


def pick_device(device: str) -> str:
    """``auto`` is the GPU if there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: {device!r} is not available: {error}") from None
    return device


def default_threads() -> int:
    """Cores this process may use: its affinity and its container's quota, or OMP_NUM_THREADS where that is set."""
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return max(int(os.environ["OMP_NUM_THREADS"]), 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        cores = min(cores, max(int(quota) // int(period), 1)) if quota != "max" else cores
    except (OSError, ValueError):
        pass
    return cores


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
