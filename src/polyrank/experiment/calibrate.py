"""Real training steps on this device, at a few ranks, held against the cost model: ``polyrank profile``."""

from __future__ import annotations

import resource
import sys
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from polyrank import __version__
from polyrank.core.architecture import Calibration, ModelSpec
from polyrank.core.costs import NoFormulaError, memory
from polyrank.core.lowrank import Adapter, fresh
from polyrank.core.rng import stream
from polyrank.core.types import LocalTraining
from polyrank.experiment.config import ConfigError, Experiment
from polyrank.experiment.machine import on_this_machine
from polyrank.experiment.models import load_random
from polyrank.experiment.planning import describe, group_budgets
from polyrank.local.base import Base
from polyrank.local.losses import asked_alone, losses
from polyrank.local.measure import device_memory, model_bytes, peak_of, saved_tensors
from polyrank.local.optimizer import autocast, optimizer_of

_DEFAULT_RANKS = (4, 8, 16)


def calibrate(experiment: Experiment, ranks: list[int] | None = None) -> dict[str, Any]:
    """Measures one training step per rank, with random weights and inputs of the experiment's size.

    Args:
        experiment: names the model, the batch, the optimizer, precision, dropout and checkpointing.
        ranks: to measure; left out, the server's rank, its half and its quarter.

    Returns:
        The keys of a `Calibration` and ``measured``: what was measured, on what, beside what was predicted.

    Raises:
        ConfigError: if a rank exceeds what the modules have room for, or there are fewer than two.
    """
    experiment = on_this_machine(experiment)
    torch.set_num_threads(experiment.threads)
    method, local = experiment.build_method(), experiment.local_training()
    spec = replace(describe(experiment, method), calibration=Calibration(overhead=0.0), lokr=None)  # steps are of LoRA
    chosen = sorted(set(ranks or _ranks(experiment, spec)))
    if len(chosen) < 2 or chosen[-1] > spec.full_rank:
        raise ConfigError(f"--ranks: {chosen} must be at least two ranks between 1 and {spec.full_rank}")
    base = load_random(experiment, experiment.device)
    steps = [_step(base, spec, local, rank, experiment.model.name) for rank in chosen]
    model = spec.architecture
    assert model is not None
    device = device_memory(base.device)
    return {
        **_fit(steps, spec, local),
        "measured": {
            "model": experiment.model.name,
            "device": device.name,
            "device_memory": device.total,
            "batch": local.batch,
            "tokens": model.tokens,
            "local": asdict(local),
            "polyrank": __version__,
            "torch": torch.__version__,
            "resident": _resident(),
            "steps": steps,
        },
    }


def _ranks(experiment: Experiment, spec: ModelSpec) -> list[int]:
    try:
        largest = max(budget.rank for budget in group_budgets(experiment, experiment.build_method(), spec))
    except ConfigError:
        largest = 0  # no formula, or no rank yet: that is what is being measured for
    largest = min(experiment.model.rank or largest, spec.full_rank)
    wanted = [largest // 4, largest // 2, largest] if largest >= 4 else _DEFAULT_RANKS
    return sorted({min(rank, spec.full_rank) for rank in wanted if rank})


def _step(base: Base, spec: ModelSpec, local: LocalTraining, rank: int, name: str) -> dict[str, Any]:
    """One step to warm up, one to measure."""
    ranks = spec.at(rank)
    rng = stream(0, "profile", rank)
    adapter = Adapter({n: fresh(spec.modules[n], own, 1.0, rng) for n, own in ranks.items()}, base.initial_head())
    if not spec.head_trained:
        adapter, frozen = Adapter(adapter.layers), Adapter({}, adapter.dense)
    else:
        frozen = Adapter()
    batch = base.random_batch(local.batch, rng)
    shape = batch["input_ids"].shape if base.causal else (local.batch,)  # every token, or a class
    labels = torch.zeros(shape, dtype=torch.int64, device=base.device)
    asked = int(labels[:, 1:].numel()) if base.causal else local.batch
    with base.attached(adapter, frozen, "AB", local.dropout, rng, local.checkpointing) as live:
        parameters = live.parameters()
        optimizer = optimizer_of(parameters, local)

        def step() -> None:
            optimizer.zero_grad()
            with autocast(local, base.device), asked_alone(base.output, labels):
                scored = [live(batch)]
            (losses(scored.pop(), labels).sum() / asked).backward()
            if local.clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, local.clip)
            optimizer.step()

        with saved_tensors([*base.model.parameters(), *live.tensors()]) as kept:
            step()
        optimizer.zero_grad()
        added = peak_of(step, base.device)
        held = _held(base, live.tensors(), parameters, optimizer)
    measured = {**held, "activations": float(kept.nbytes), "peak": sum(held.values()) - held["gradients"] + added}
    try:
        parts = memory(spec, local, ranks)
        predicted = {**asdict(parts), "peak": parts.total}
    except NoFormulaError:
        predicted = {key: held[key] for key in ("base", "adapter", "gradients", "optimizer")}
    return {"rank": rank, "predicted": predicted, "measured": measured}


def _held(
    base: Base, tensors: list[torch.Tensor], parameters: list[torch.Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, float]:
    def size(values: list[torch.Tensor]) -> float:
        return float(sum(t.numel() * t.element_size() for t in values))

    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    gradients = [p.grad for p in parameters if p.grad is not None]
    return {
        "base": float(model_bytes(base.model)),
        "adapter": size(tensors),
        "gradients": size(gradients),
        "optimizer": size(states),
    }


def _fit(steps: list[dict[str, Any]], spec: ModelSpec, local: LocalTraining) -> dict[str, float | None]:
    """What the measurements say where formulas end."""
    if all("activations" in step["predicted"] for step in steps):
        ratios = [step["measured"]["activations"] / step["predicted"]["activations"] for step in steps]
        excess = [step["measured"]["peak"] - step["predicted"]["peak"] for step in steps]
        return {"overhead": max(0.0, *excess), "scale": float(np.mean(ratios)), "constant": None, "per_rank": None}
    sums = [sum(spec.at(step["rank"]).values()) for step in steps]
    beyond = [
        step["measured"]["peak"] - sum(step["measured"][k] for k in ("base", "adapter", "gradients", "optimizer"))
        for step in steps
    ]
    slope, constant = np.polyfit(sums, beyond, 1)
    line = [constant + slope * total for total in sums]
    overhead = max(0.0, *(b - p for b, p in zip(beyond, line, strict=True)))
    return {
        "overhead": float(overhead),
        "scale": 1.0,
        "constant": float(constant) / local.batch,
        "per_rank": max(float(slope), 0.0) / local.batch,
    }


def _resident() -> int:
    """The process's peak resident memory, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
