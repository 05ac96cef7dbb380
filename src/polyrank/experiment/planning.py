"""What can be known before anything is downloaded: the model's costs, each group's budget, the server's rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, ValidationError

from polyrank.core.architecture import Calibration, ModelSpec
from polyrank.core.costs import FAMILIES, NoFormulaError
from polyrank.core.method import Method
from polyrank.core.types import Budget, ClientProfile, LocalTraining
from polyrank.data import Outline, outline
from polyrank.data.source import Kind
from polyrank.experiment.components import Strict, parameters
from polyrank.experiment.config import ConfigError, Experiment, Resources
from polyrank.experiment.tables import DATASETS
from polyrank.local import hf
from polyrank.local.base import Base
from polyrank.local.digits_base import digits_config, digits_vit
from polyrank.local.lengths import check_length
from polyrank.local.measure import device_memory
from polyrank.local.peft_layers import loss, lost_layers
from polyrank.local.pretrained import ModelError
from polyrank.local.vocabulary import check_tokenizer

_MOSTLY = 0.5  # of the backbone: more than this beyond the reach of adapters is said
_NAMED = 3  # kinds of weights that a note names

BUILT_IN_MODELS = {"digits-vit": (digits_config, digits_vit)}
"""Models that polyrank makes itself, by name: their config, and the folder of their weights."""


class CalibrationFile(Strict):
    """What ``polyrank profile`` writes; keys beside these say where it comes from."""

    overhead: float
    scale: float = 1.0
    constant: float | None = None
    per_rank: float | None = None
    measured: dict[str, Any] = Field(default_factory=dict)


def describe(experiment: Experiment, method: Method) -> ModelSpec:
    """The model's spec from its config alone, with the head's part in the traffic and what was calibrated.

    Raises:
        InputError: if the model's folder is not whole, or the tokenizer's words or the texts' length are beyond it.
    """
    return described(from_config(experiment, "meta"), experiment, method)


def described(base: Base, experiment: Experiment, method: Method) -> ModelSpec:
    """The spec of a model that is not loaded."""
    spec = completed(base.spec, experiment, method)
    assert spec.architecture is not None
    return replace(spec, architecture=replace(spec.architecture, quantization=experiment.model.quantize))


def outlined(experiment: Experiment) -> Outline:
    """What is known of the experiment's data before it is read."""
    options = {key: getattr(experiment.data, key) for key in parameters(DATASETS[experiment.data.name])}
    return outline(experiment.data.name, options)


def kind_of(experiment: Experiment) -> Kind:
    """What the experiment's data are: ``text``, ``image`` or ``causal``."""
    return outlined(experiment).kind


def cautions(base: Base, export: Literal["adapter", "merged"]) -> list[str]:
    """What there is to say of a model before it is loaded. The base, on the meta device, is of no use after.

    Raises:
        ModelError: if PEFT would lose layers of the adapter, and an adapter is to be published.
    """
    notes = check_tokenizer(base.model, str(base.info.base)) if base.info.task else []
    if lost := lost_layers(base):
        message = loss(lost, len(base.spec.modules), base)
        if export == "adapter":
            raise ModelError(f"model.targets: {message}. Name other targets, or say `model.export: merged`")
        notes.append(message)
    return notes


def from_config(experiment: Experiment, device: str) -> Base:
    """The experiment's model from its config alone, without weights on ``meta``, with random ones elsewhere."""
    config = experiment.model
    data = outlined(experiment)
    made, _ = BUILT_IN_MODELS.get(config.name, (None, None))
    name = made() if made else hf.locate(str(config.config or config.name))
    if not made:
        hf.check_files(name, data.kind)
    base = hf.base_from_config(
        name,
        config.targets,
        kind=data.kind,
        classes=data.classes,
        tokens=config.max_length,
        device=device,
        dtype=config.dtype,
        image_size=config.image_size,
        attention=config.attention,
    )
    if data.kind != "image":
        check_length(base.model, config.max_length, config.name)
        check_tokenizer(base.model, name)
    return base


def completed(spec: ModelSpec, experiment: Experiment, method: Method) -> ModelSpec:
    """A spec with what the experiment says beside the model."""
    trained = experiment.model.head == "train" and method.dense != "freeze"
    lokr = method.rank if method.form == "lokr" else None
    return replace(spec, head_trained=trained, calibration=calibration(experiment), lokr=lokr)


def calibration(experiment: Experiment) -> Calibration:
    """What was measured, and the overhead that the file states.

    Raises:
        ConfigError: if the calibration cannot be read.
    """
    path, found = experiment.costs.calibration, Calibration()
    if path is not None:
        try:
            read = CalibrationFile.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValidationError) as error:
            raise ConfigError(f"costs.calibration: {path}: not a calibration of `polyrank profile`: {error}") from None
        found = Calibration(read.overhead, read.scale, read.constant, read.per_rank)
    overhead = experiment.costs.overhead
    return found if overhead is None else replace(found, overhead=overhead)


def notes_of(spec: ModelSpec) -> list[str]:
    """What a user should know of the model before training: what no formula tells, and what no adapter reaches."""
    model, notes = spec.architecture, []
    if model is None:
        return notes
    if model.family not in FAMILIES:
        measured = spec.calibration.constant is not None
        notes.append(
            f"{model.kind}: no formula for its activations, so "
            + ("memory is as `polyrank profile` measured it, and training time is not predicted" if measured else
               "memory and training time are not predicted; `polyrank profile` measures memory (costs.calibration)")
        )  # fmt: skip
    beyond, share = sum(model.others.values()), spec.covered
    if share is not None and beyond > _MOSTLY * model.backbone:
        kinds = list(model.others)
        more = f" and {len(kinds) - _NAMED} more" if len(kinds) > _NAMED else ""
        notes.append(
            f"an adapter covers {share:.1%} of the backbone's parameters: {', '.join(kinds[:_NAMED])}{more} "
            f"({beyond / model.backbone:.1%}) are no linear layers, take no adapter and stay as they are"
        )
    return notes


def unused_of(base: Base) -> list[str]:
    """That adapters of a loaded model learn nothing, where a pass does not run their layers."""
    unused = base.unused()
    if not unused:
        return []
    more = " and more" if len(unused) > _NAMED else ""
    return [
        f"{len(unused)} of {len(base.spec.modules)} adapted modules do not run in a short pass, and what does not run "
        f"learns nothing: {', '.join(unused[:_NAMED])}{more}"
    ]


def profile_of(has: Resources, examples: int = 1) -> ClientProfile:
    """What a client with these resources reports."""
    memory = free_memory() if has.memory == "detect" else has.memory
    return ClientProfile(examples, has.rank, memory, has.uplink, has.downlink, has.flops)


def free_memory() -> float:
    """Bytes that training may use on this machine: of the GPU if there is one, of main memory otherwise."""
    return float(device_memory().free)


def check_stated_ranks(experiment: Experiment) -> None:
    """Refuses a group's rank above the server's.

    Raises:
        ConfigError: naming the group.
    """
    rank = experiment.model.rank
    for index, group in enumerate(experiment.fleet):
        if rank is not None and group.rank is not None and group.rank > rank:
            raise ConfigError(f"fleet.{index}.rank: {group.rank} exceeds model.rank, {rank}")


def check_rank(rank: int, spec: ModelSpec, experiment: Experiment) -> None:
    """Refuses a server's rank that a module named by itself has no room for, and a stated one that no module has.

    Modules that a group targets take what they have room for.

    Raises:
        ConfigError: naming the module.
    """
    stated = experiment.model.rank is not None
    room = {name: min(shape) for name, shape in spec.modules.items()}
    named = next((name for name in spec.modules if name in spec.exact and room[name] < rank), None)
    widest = max(room, key=lambda name: room[name])
    name = named or (widest if stated and room[widest] < rank else None)
    if name is None or spec.lokr is not None:
        return
    d_out, d_in = spec.modules[name]
    why = "which has the most room of all"
    if named:
        why = f"which model.targets names; {room[name]} is the largest there, or target a group"
    key = "model.rank" if stated else "fleet"
    raise ConfigError(f"{key}: {rank} exceeds the smaller dimension of {name} ({d_out} x {d_in}), {why}")


def group_budgets(experiment: Experiment, method: Method, spec: ModelSpec) -> list[Budget]:
    """What a client of each device group can afford.

    Raises:
        ConfigError: if an estimator lacks something, or a stated rank exceeds the server's.
    """
    probes = {f"fleet.{index:04d}": profile_of(group) for index, group in enumerate(experiment.fleet)}
    try:
        budgets = list(method.estimate(probes, spec, experiment.local_training()).values())
    except NoFormulaError as error:
        raise ConfigError(
            f"model.name: {experiment.model.name}: {error}; measure them with `polyrank profile` and name the file it "
            "writes under costs.calibration"
        ) from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return budgets


def server_rank(experiment: Experiment, budgets: list[Budget]) -> int:
    """The server's rank per module: as configured, or the largest in the fleet.

    Raises:
        ConfigError: if nobody can afford a rank, or a stated one exceeds the configured one.
    """
    largest = max(budget.rank for budget in budgets)
    given = experiment.model.rank or largest
    stated = max((budget.rank for budget in budgets if budget.limit == "stated"), default=0)
    if stated > given:
        raise ConfigError(f"method.estimate: gives a rank of {stated}, above model.rank, {given}")
    if not largest:
        raise ConfigError("fleet: no client can afford rank 1. " + "; ".join(map(helps, budgets)))
    return given


def planned_with(
    profile: ClientProfile, rank: int, method: Method, spec: ModelSpec, local: LocalTraining
) -> ClientProfile:
    """What a client on another machine is planned with, of what it states: its rank is at most the server's.

    Looked at alone, so that no client decides whether the others can be planned with.

    Raises:
        ValueError: if it states a rank that no module can have, or nothing that a rank follows from, or cannot afford
            rank 1; saying which.
    """
    most = spec.full_rank
    if profile.rank is not None and not 1 <= profile.rank <= most:
        raise ValueError(
            f"rank: {profile.rank} is stated, and must be from 1 to {most}, the largest that a module has room for"
        )
    held = replace(profile, rank=None if profile.rank is None else min(profile.rank, rank))
    try:
        budget = method.estimate({"it": held}, spec, local)["it"]
    except ValueError as error:
        reason = str(error).removeprefix("client 'it' ")
        raise ValueError(f"{reason}; a site states this in its site.yaml") from None
    if not budget.total and any(not limit.rank for limit in budget.limits):
        limit = next(limit for limit in budget.limits if not limit.rank)
        need = "" if limit.more is None else f", and it takes {limit.more:.3g}"
        raise ValueError(f"cannot afford rank 1: {limit.name}: has {limit.have or 0:.3g} {limit.unit}{need}")
    return held


def helps(budget: Budget) -> str:
    """What would let a client that can afford nothing take part."""
    advice = [f"{limit.name}: {', or '.join(limit.advice)}" for limit in budget.limits if limit.advice]
    return "it would take " + "; ".join(advice) if advice else f"limit: {budget.limit}"
