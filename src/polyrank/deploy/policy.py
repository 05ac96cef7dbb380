"""What a site's operator allows a server to ask, and the refusals of what is more."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from torch import nn

from polyrank.core.architecture import ModelSpec
from polyrank.core.costs import NoFormulaError, task_memory, training_flops
from polyrank.core.lowrank import nbytes
from polyrank.core.privacy import Privacy
from polyrank.core.types import LocalTraining, Task
from polyrank.engines.announcement import Announcement
from polyrank.experiment.components import Count, Strict
from polyrank.experiment.units import Memory
from polyrank.local.dpsgd import pass_bytes
from polyrank.local.poisson import rate, steps

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Unit = Literal["examples", "clients"]


class RefusalError(RuntimeError):
    """What a site does not answer, and why, in words that a server may read."""


class BudgetConfig(Strict):
    """How much all answers together may tell of a site's data.

    Attributes:
        epsilon: of everything that is ever answered from these data.
        delta: of (epsilon, delta).
        run: epsilon of any one run; the whole if left out.
        unit: what must not show: whether any one of the ``examples`` is there, or, of ``clients``, all of the data.
        ledger: the file that counts, seen from the site's file. Sites that hold data of the same people share one.
    """

    epsilon: Positive
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    run: Positive | None = None
    unit: Unit = "examples"
    ledger: Path = Path("ledger.json")

    @model_validator(mode="after")
    def _a_part(self) -> BudgetConfig:
        if self.run is not None and self.run > self.epsilon:
            raise ValueError(f"run: {self.run:g} exceeds epsilon, {self.epsilon:g}")
        return self


class LimitsConfig(Strict):
    """What one task may cost a site.

    Attributes:
        steps: optimizer steps.
        epochs: passes over the site's data, in epochs or in steps.
        seconds: of training. A task that takes longer is ended.
        memory: bytes at the peak of a step, as the cost model has it; None: no limit. Of models that it does not know,
            the bytes of what is sent count alone.
    """

    steps: Count = 100_000
    epochs: Positive = 1_000.0
    seconds: Positive = 86_400.0
    memory: Memory | None = None


class PolicyConfig(Strict):
    """Runs that take part without being asked for, where ``approve: policy``; what is left out is not looked at.

    Attributes:
        methods: names of methods.
        rounds: at most.
        epsilon: that the run would cost, at most.
        bytes: of the adapter, at most.
        by: who asks, as the server says; it has not proved it.
    """

    methods: list[str] | None = None
    rounds: Count | None = None
    epsilon: Positive | None = None
    bytes: Memory | None = None
    by: list[str] | None = None

    def exceptions(self, run: Announcement, epsilon: float) -> Iterator[str]:
        """What of a run the policy does not allow.

        Args:
            run: as it was announced.
            epsilon: that it would cost.
        """
        if self.methods is not None and run.method not in self.methods:
            yield f"policy.methods: {run.method} is none of {', '.join(self.methods)}"
        if self.by is not None and run.by not in self.by:
            yield f"policy.by: {run.by} is none of {', '.join(self.by)}"
        for name, value, most in (
            ("rounds", run.rounds, self.rounds),
            ("epsilon", epsilon, self.epsilon),
            ("bytes", run.nbytes, self.bytes),
        ):
            if most is not None and not value <= most:
                yield f"policy.{name}: {value:.4g} is more than {most:.4g}"


def check_protection(least: Privacy, budget: BudgetConfig | None, task: Privacy) -> None:
    """Refuses a task that protects less than a site agrees to.

    Raises:
        RefusalError: saying what it lacks.
    """
    for kind in ("clients", "examples"):
        floor, offer = getattr(least, kind), getattr(task, kind)
        if floor is None:
            continue
        place = getattr(floor, "where", None)
        if offer is None or not offer.noise >= floor.noise or getattr(offer, "where", None) != place:
            has = "none" if offer is None else f"noise {offer.noise:g}" + (f", {offer.where}" if place else "")
            due = f"noise {floor.noise:g}" + (f", {place}" if place else "")
            raise RefusalError(f"privacy.{kind}: this site agrees to {due} or more; the task has {has}")
    if budget is not None and task.on_client is None and (budget.unit == "clients" or task.examples is None):
        due = "privacy.clients with where: client" + (" or privacy.examples" if budget.unit == "examples" else "")
        raise RefusalError(f"budget: this site counts what its answers tell, so a task must have {due}")


def check_limits(limits: LimitsConfig, local: LocalTraining, examples: int) -> None:
    """Refuses training of more steps or passes than a site allows.

    Raises:
        RefusalError: naming the limit.
    """
    if not examples:
        return
    count = steps(local, examples)
    passes = local.epochs if local.steps is None else count * rate(local, examples)
    for name, value, most in (("steps", count, limits.steps), ("epochs", passes, limits.epochs)):
        if not value <= most:
            raise RefusalError(f"limits.{name}: this site allows {most:g} in a task, and this one takes {value:.10g}")


def check_cost(limits: LimitsConfig, task: Task, examples: int, spec: ModelSpec, flops: float | None) -> None:
    """Refuses a task that, as the cost model has it, needs more memory or time than a site allows.

    Args:
        limits: what it allows.
        task: what is asked.
        examples: that it has.
        spec: its model.
        flops: operations per second of its machine; None: time is not predicted.

    Raises:
        RefusalError: naming the limit.
    """
    if not examples:
        return
    local = replace(task.local, batch=min(task.local.batch, examples))
    ranks = {name: x.rank for name, x in task.adapter.layers.items()}
    try:
        needed = task_memory(spec, replace(task, local=local)).total
        seconds = training_flops(spec, local, ranks, task.factors, examples) / flops if flops else 0.0
    except (NoFormulaError, KeyError):  # a layer that the model lacks is found when it is attached
        needed, seconds = float(nbytes(task.adapter) + nbytes(task.frozen)), 0.0
    if task.privacy.examples is not None:
        needed += pass_bytes(task, local.batch)
    for name, unit, value, most in (
        ("memory", "MiB", needed / 2**20, None if limits.memory is None else limits.memory / 2**20),
        ("seconds", "s", seconds, limits.seconds),
    ):
        if most is not None and not value <= most:
            raise RefusalError(
                f"limits.{name}: this site allows {most:.4g} {unit} in a task, and this one takes {value:.4g}"
            )


@contextmanager
def time_limit(model: nn.Module, seconds: float) -> Iterator[None]:
    """Ends what runs a model inside, at its first forward pass after so many seconds.

    Raises:
        RefusalError: then.
    """
    end = time.monotonic() + seconds

    def look(*_: Any) -> None:
        if time.monotonic() > end:
            raise RefusalError(f"limits.seconds: ended after {seconds:g} s, which is what this site allows in a task")

    handle = model.register_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()
