"""Round 0: what a run starts from, fresh or from an adapter that is given."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from polyrank.core.compress import compress
from polyrank.core.lokr import Shape
from polyrank.core.lowrank import Adapter, fresh, pad, rescale
from polyrank.core.method import Method
from polyrank.core.rng import stream
from polyrank.core.types import ServerState
from polyrank.experiment.config import Experiment
from polyrank.local import lokr
from polyrank.local.adapters import AdapterError, AdapterInfo, read_adapter
from polyrank.local.base import Base
from polyrank.local.fingerprint import fingerprint
from polyrank.local.same_model import under_names


def first_state(experiment: Experiment, method: Method, base: Base, rank: int) -> ServerState:
    """Round 0: fresh low-rank layers or LoKr factors (or an adapter to start from), and the head."""
    if method.form == "lokr":
        return _first_lokr(experiment, method, base)
    scale = (experiment.model.alpha or rank) / rank
    rng = stream(experiment.seed, "adapter")
    shapes = base.spec.modules
    layers = {name: fresh(shapes[name], own, scale, rng) for name, own in base.spec.at(rank).items()}
    head = base.initial_head()
    if experiment.model.adapter is not None:
        given = under_names(read_adapter(experiment.model.adapter)[0], [*layers, *head])
        _check_layers(given, base.spec.modules, experiment, rank)
        _check_head(given, head, experiment)
        for name, x in given.layers.items():  # a rank above a module's room is more rows than its update has
            room = layers[name].rank
            layers[name] = rescale(pad(compress(x, room) if x.rank > room else x, room, rng), scale)
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
        given = under_names(read_adapter(experiment.model.adapter)[0], [*factors, *head])
        _check_lokr(given, {**factors, **head}, experiment)
        for name, tensor in given.dense.items():
            if not lokr.is_scale(name):
                (factors if lokr.is_part(name) else head)[name] = tensor.float()
        for name, x in lokr.grouped(given.dense).items():  # the same update under the experiment's scale
            factors[f"{name}.lokr_w1"] = factors[f"{name}.lokr_w1"] * (x.scale / scale)
    if experiment.model.head == "freeze":
        return ServerState(0, Adapter({}, factors), Adapter({}, {**head, **fixed}))
    return ServerState(0, Adapter({}, {**head, **factors}), Adapter({}, fixed))


def check_start(
    experiment: Experiment, method: Method, modules: Mapping[str, Shape], rank: int, model: AdapterInfo
) -> list[str]:
    """Refuses an adapter to start from that does not fit the model, before any weights of it are loaded.

    Args:
        experiment: what is to be run.
        method: what it trains.
        modules: (d_out, d_in) of the targets.
        rank: the server's.
        model: what an adapter of the experiment's model would say of it.

    Returns:
        What is not known of the adapter, as sentences.

    Raises:
        AdapterError: if it cannot be read, is of another kind than the method trains, or is of another model or task.
    """
    if experiment.model.adapter is None:
        return []
    given, info = read_adapter(experiment.model.adapter)
    if method.form != "lokr":
        _check_layers(under_names(given, modules), modules, experiment, rank)
    elif given.layers:
        raise AdapterError(f"model.adapter: {experiment.model.adapter}: is a LoRA; the method lokr starts from a LoKr")
    return _check_origin(info, model, experiment)


def _check_origin(info: AdapterInfo, model: AdapterInfo, experiment: Experiment) -> list[str]:
    """Its task is the experiment's, and so are the weights of its base; what cannot be compared is said."""
    folder = experiment.model.adapter
    if info.task and model.task and info.task != model.task:
        raise AdapterError(f"model.adapter: {folder}: its task_type is {info.task}, the experiment's is {model.task}")
    if not info.base or not model.base or info.base == model.base:
        return []
    prints = fingerprint(info.base, info.revision), fingerprint(model.base)
    if None in prints:
        return [f"model.adapter: {folder}: is of {info.base} by its config; taken to be the same as {model.base}"]
    if len(set(prints)) > 1:
        raise AdapterError(f"model.adapter: {folder}: is of {info.base}, whose weights are not those of {model.base}")
    return []


def _check_layers(given: Adapter, modules: Mapping[str, Shape], experiment: Experiment, rank: int) -> None:
    folder = experiment.model.adapter
    if lokr.grouped(given.dense):
        raise AdapterError(f"model.adapter: {folder}: is a LoKr, which only the method lokr can start from")
    if not given.layers:
        raise AdapterError(f"model.adapter: {folder}: holds no LoRA layer")
    for name, x in given.layers.items():
        if name not in modules:
            raise AdapterError(f"model.adapter: {folder}: layer {name} is none of the model's targets: another model?")
        if x.shape != modules[name]:
            raise AdapterError(f"model.adapter: {folder}: {name} is {x.shape}, the model's is {modules[name]}")
        if min(x.rank, *x.shape) > rank:
            raise AdapterError(f"model.adapter: {folder}: {name} has rank {x.rank}, above model.rank, {rank}")


def _check_head(given: Adapter, head: Mapping[str, torch.Tensor], experiment: Experiment) -> None:
    for name, tensor in given.dense.items():
        if name not in head or head[name].shape != tensor.shape:
            raise AdapterError(f"model.adapter: {experiment.model.adapter}: {name} does not fit the model's head")


def _check_lokr(given: Adapter, own: Mapping[str, torch.Tensor], experiment: Experiment) -> None:
    folder = experiment.model.adapter
    if given.layers:
        raise AdapterError(f"model.adapter: {folder}: is a LoRA; the method lokr starts from a LoKr")
    for name, tensor in given.dense.items():
        if not lokr.is_scale(name) and (name not in own or own[name].shape != tensor.shape):
            raise AdapterError(f"model.adapter: {folder}: {name} does not fit the model's LoKr factors or head")
