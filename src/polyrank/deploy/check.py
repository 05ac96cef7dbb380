"""A look at a site before anybody dials: whether its file, model and data go together, and what it will answer."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import NamedTuple

from polyrank.core.lowrank import Adapter, fresh
from polyrank.core.privacy import ClientPrivacy, ExamplePrivacy, Privacy
from polyrank.core.rng import stream
from polyrank.core.types import LocalTraining, Task
from polyrank.deploy.ledger import spent
from polyrank.deploy.site import Site, cost_text
from polyrank.deploy.site_file import SiteConfig
from polyrank.errors import InputError
from polyrank.experiment.config import ModelConfig
from polyrank.experiment.models import located, prompting_of
from polyrank.local import hf
from polyrank.local.base import Base
from polyrank.local.dp import require_opacus
from polyrank.local.lengths import table_positions, trained_positions
from polyrank.local.trainer import train

_RANK, _BATCH = 8, 8  # of the step that is measured, where the file states no rank


class Line(NamedTuple):
    """Something that was found, or that the site will do."""

    what: str
    text: str


def check(path: Path, data: Path | None = None) -> list[Line]:
    """What a site is, and what it will answer. Nothing is sent, and nothing is counted.

    The file is read, the model and the data are loaded, and a step is trained under the least protection that the file
    agrees to.

    Args:
        path: the site's file.
        data: its training data, where that is not as the file says.

    Raises:
        InputError: naming what of the file, the model, the data or the ledger is not as it must be.
    """
    site = Site(path, data)
    config, holdings = site.config, site.holdings
    if not site.examples:
        raise InputError(f"{path}: data: holds no training examples")
    if config.guarded:
        require_opacus()
    base, split = site._model(_description(site))
    task = _task(base, config)
    started, parameters = time.monotonic(), sum(p.numel() for p in base.model.parameters())
    memory = train(base, task, "check", split, holdings.own, secret=bool(task.privacy)).metrics.get("memory")
    seconds = time.monotonic() - started
    step = f"rank {_rank(base, config)}, batch {task.local.batch}: {seconds:.2f} s"
    classes = (
        f", {len(holdings.classes)} classes: {', '.join(holdings.classes[:10])}" if holdings.prompting is None else ""
    )
    return [
        Line("model", f"{config.model}: {type(base.model).__name__}, {parameters:,} parameters, on {base.device}"),
        Line("data", f"{site.examples:,} examples ({holdings.kind}){classes}; fingerprint {site.fingerprint}"),
        Line("one step", step + ("" if memory is None else f", {memory / 2**20:,.0f} MiB")),
        *_answers(site),
    ]


def _answers(site: Site) -> list[Line]:
    config, limits = site.config, site.config.limits
    count = "that there are examples" if site._hides_size else f"{site.examples:,} examples"
    stated = [key for key in ("rank", "memory", "uplink", "downlink", "flops") if getattr(site.holdings.profile, key)]
    memory = "" if limits.memory is None else f", {limits.memory / 2**20:,.0f} MiB"
    most = f"{limits.steps:,} steps, {limits.epochs:g} epochs, {limits.seconds:g} s{memory}"
    return [
        Line("answers: profile", ", ".join([count, *stated, "a fingerprint of the model"])),
        Line("answers: fit", f"{_protection(config)}; at most {most} in a task"),
        Line("answers: measure", "refused: no noise covers it" if config.guarded else "answered, without protection"),
        Line("budget", _budget(site)),
        Line("new runs", _consent(site)),
    ]


def _protection(config: SiteConfig) -> str:
    parts = []
    for kind, due in (("clients", config.floor.clients), ("examples", config.floor.examples)):
        if due is not None:
            parts.append(f"privacy.{kind} with noise of {due.noise:g} or more")
    if not parts and config.budget is not None:
        return "only what the budget can count"
    return "only with " + " and ".join(parts) if parts else "also without any protection"


def _budget(site: Site) -> str:
    budget, entries = site.config.budget, site.ledger.entries()
    before = {entry.data for entry in entries} - {site.fingerprint}
    changed = "; data that were answered from before are not these, and count as well" if before else ""
    if budget is None:
        told = cost_text(site.spent()) if entries else "none"
        return f"none: what the answers tell together is not bounded (so far: {told}){changed}"
    total = spent(entries, budget.unit, budget.delta)
    run = "" if budget.run is None else f", {budget.run:g} in a run"
    if budget.delta > 1 / site.examples:
        changed += f"; delta is more than one over {site.examples:,} examples: choose a smaller one"
    now = (
        "no bound holds any more: answers were given without protection" if math.isinf(total) else f"{total:.4g} spent"
    )
    return f"epsilon {budget.epsilon:g} ({budget.unit}, delta {budget.delta:g}){run}; {now}{changed}"


def _consent(site: Site) -> str:
    who = {
        "auto": "take part without being asked for",
        "ask": "wait until `polyrank site approve`",
        "policy": "take part where policy allows them, and wait until `polyrank site approve` otherwise",
    }
    paused = site.consent.paused
    waiting = sum(known.state == "waiting" for known in site.consent.known().values())
    more = (f"; {waiting} wait now" if waiting else "") + ("" if paused is None else f"; the site is paused: {paused}")
    return f"{who[site.config.approve]} (approve: {site.config.approve}){more}"


def _description(site: Site) -> dict[str, object]:
    """A model as a server with no wishes of its own would ask for it."""
    holdings, model = site.holdings, ModelConfig(name=site.config.model)
    plain = model.model_dump(include={"targets", "dtype", "attention", "quantize", "image_size", "max_length"})
    if holdings.kind != "image":
        plain["max_length"] = min(model.max_length, _positions(site, model))
    if holdings.prompting is not None:
        return plain | {"kind": holdings.kind, "classes": [], "prompting": prompting_of(holdings.prompting)}
    return plain | {"kind": holdings.kind, "classes": list(holdings.classes)}


def _positions(site: Site, model: ModelConfig) -> int:
    """Tokens that the model takes at once."""
    kind, name = site.holdings.kind, located(model)
    classes = None if kind == "causal" else len(site.holdings.classes)
    empty = hf.base_from_config(name, model.targets, kind=kind, classes=classes, tokens=1, device="meta")
    table, trained = table_positions(empty.model), trained_positions(empty.model.config)
    return next((most for most in (table, trained) if most is not None), model.max_length)


def _rank(base: Base, config: SiteConfig) -> int:
    return min(config.rank or _RANK, base.spec.full_rank)


def _task(base: Base, config: SiteConfig) -> Task:
    """A step under the least protection that the file agrees to."""
    rng = stream(0, "check")
    layers = {
        name: fresh(base.spec.modules[name], r, 1.0, rng) for name, r in base.spec.at(_rank(base, config)).items()
    }
    privacy, budget = config.floor, config.budget
    if not privacy and budget is not None:
        examples, clients = ExamplePrivacy(1.0, 1.0), ClientPrivacy(1.0, 1.0, "client")
        privacy = Privacy(examples=examples) if budget.unit == "examples" else Privacy(clients)
    local = LocalTraining(steps=1, batch=_BATCH)
    return Task(0, Adapter(layers, base.initial_head()), Adapter(), "AB", local, None, 0, privacy)
