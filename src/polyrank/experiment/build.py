"""From a configuration to the things that run: data, clients, base model, method and first state.

Cheap checks come first: a wrong column or an impossible split is found before a model is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from polyrank.core.lowrank import Adapter, fresh, pad, rescale
from polyrank.core.method import Method
from polyrank.core.rng import stream
from polyrank.core.types import ClientProfile, ModelSpec, ServerState
from polyrank.data import (
    Dataset,
    ImageSplit,
    TextSplit,
    prepare_images,
    prepare_text,
)
from polyrank.engines.simulator import Simulator
from polyrank.experiment.config import ConfigError, Experiment
from polyrank.experiment.shares import fleet_profiles, share_data
from polyrank.local import hf
from polyrank.local.adapters import AdapterError, read_adapter
from polyrank.local.digits_base import digits_vit

Split = TextSplit | ImageSplit
BUILT_IN_MODELS = {"digits-vit": digits_vit}


@dataclass(frozen=True)
class World:
    """All that a run needs besides its state."""

    base: hf.Base
    simulator: Simulator
    method: Method
    splits: Mapping[str, Split]
    start: ServerState


def on_this_machine(experiment: Experiment) -> Experiment:
    """The experiment with its device and threads decided, so that a resumed run computes as it began."""
    threads = experiment.threads or default_threads()
    return experiment.model_copy(update={"device": pick_device(experiment.device), "threads": threads})


def load_base(experiment: Experiment, dataset: Dataset) -> tuple[hf.Base, dict[str, Split]]:
    """The frozen model with a head for the data's classes, and the three splits prepared for it."""
    config = experiment.model
    name = BUILT_IN_MODELS[config.name]() if config.name in BUILT_IN_MODELS else hf.locate(config.name)
    base = hf.load_base(
        name,
        config.targets,
        kind=dataset.kind,
        classes=dataset.classes,
        rng=stream(experiment.seed, "head"),
        device=pick_device(experiment.device),
        dtype=config.dtype,
        image_size=config.image_size,
    )
    sources = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
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
    shares = share_data(experiment)
    profiles = fleet_profiles(experiment.fleet, shares)
    _check_ranks(experiment, method)
    base, splits = load_base(experiment, shares.dataset)
    simulator = Simulator(
        base,
        splits["train"],
        shares.indices(),
        profiles,
        absent=experiment.absent,
        seed=experiment.seed,
    )
    return World(base, simulator, method, splits, first_state(experiment, base))


def server_rank(experiment: Experiment) -> int:
    """The server's rank per module: as configured, or the largest rank in the fleet."""
    ranks = [group.rank for group in experiment.fleet if group.rank is not None]
    given = experiment.model.rank or max(ranks, default=None)
    if given is None:
        raise ConfigError("model.rank: missing, and no group of the fleet states a rank")
    return given


def first_state(experiment: Experiment, base: hf.Base) -> ServerState:
    """Round 0: fresh low-rank layers (or an adapter to start from), and the head."""
    rank = server_rank(experiment)
    scale = (experiment.model.alpha or rank) / rank
    rng = stream(experiment.seed, "adapter")
    too_small = {name: shape for name, shape in base.spec.modules.items() if min(shape) < rank}
    if too_small:
        name, shape = next(iter(too_small.items()))
        raise ConfigError(f"model.rank: {rank} exceeds the smaller dimension of {name} ({shape[0]} x {shape[1]})")
    layers = {name: fresh(shape, rank, scale, rng) for name, shape in base.spec.modules.items()}
    head = base.initial_head()
    if experiment.model.adapter is not None:
        given, _ = read_adapter(experiment.model.adapter)
        _check_adapter(given, layers, head, experiment)
        layers |= {name: rescale(pad(x, rank, rng), scale) for name, x in given.layers.items()}
        head |= {name: tensor.float() for name, tensor in given.dense.items()}
    if experiment.model.head == "freeze":
        return ServerState(0, Adapter(layers), Adapter({}, head))
    return ServerState(0, Adapter(layers, head))


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


def _check_ranks(experiment: Experiment, method: Method) -> None:
    rank = server_rank(experiment)
    for index, group in enumerate(experiment.fleet):
        if group.rank is not None and group.rank > rank:
            raise ConfigError(f"fleet.{index}.rank: {group.rank} exceeds model.rank, {rank}")
    probes = {f"fleet.{index}": ClientProfile(1, rank=group.rank) for index, group in enumerate(experiment.fleet)}
    try:
        budgets = method.estimate(probes, ModelSpec({"module": (1, 1)}), experiment.local_training())
    except ValueError as error:
        raise ConfigError(str(error)) from None
    largest = max(budget.rank for budget in budgets.values())
    if largest > rank:
        raise ConfigError(f"method.estimate: gives a rank of {largest}, above model.rank, {rank}")


def _check_adapter(given: Adapter, layers: Mapping, head: Mapping, experiment: Experiment) -> None:  # type: ignore[type-arg]
    folder, rank = experiment.model.adapter, server_rank(experiment)
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
