"""A client's round, alone or together with others: a visible training loop. Everything random is of its own stream."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from polyrank.core.clipping import privately
from polyrank.core.lowrank import Adapter, LowRank, truncate
from polyrank.core.noise import noise_of
from polyrank.core.rng import stream
from polyrank.core.types import Client, LocalTraining, TailPenalty, Task, Update
from polyrank.errors import TrainingError
from polyrank.local.attach import Attachment
from polyrank.local.base import Base
from polyrank.local.cohort import Cohort, Job
from polyrank.local.data import Examples, Indices, Packable, shuffled
from polyrank.local.dpsgd import train_privately
from polyrank.local.losses import asked_alone, losses
from polyrank.local.measure import Meter
from polyrank.local.optimizer import autocast
from polyrank.local.packing import rows_of
from polyrank.local.poisson import poisson
from polyrank.local.prefix import Prefix, resumed


def train(
    base: Base,
    task: Task,
    client: Client,
    data: Examples,
    indices: Indices,
    prefix: Prefix | None = None,
    secret: bool = False,
) -> Update:
    """Trains the task's adapter on the client's examples and returns its factors, protected as the task asks.

    A client with no examples, or nothing to train, returns what it was sent. `secret` is as for `prepare`.
    """
    job = prepare(task, client, indices, data, secret)
    return train_together(base, [job], data, [prefix] if prefix else None)[0]


def prepare(task: Task, client: Client, indices: Indices, data: Examples, secret: bool = False) -> Job:
    """A client's round with everything random drawn: its dropout masks, and the order of its data.

    Args:
        task: what the server asks.
        client: who.
        indices: its examples.
        data: of all clients.
        secret: draw from the operating system's entropy, not from the client's streams, which the server knows: what
            noise and samples protect is protected only then.
    """
    rng = np.random.default_rng() if secret else stream(task.seed, "fit", task.round, client)
    noise = noise_of(secret, task.seed, "privacy", task.round, client) if task.privacy else None
    seed = int(rng.integers(2**63 - 1)) if task.local.dropout else 0
    if not (task.adapter.layers or task.adapter.dense):
        steps = []
    elif task.privacy.examples is not None:
        steps = [[sample] for sample in poisson(indices, task.local, rng)]
    else:
        steps = list(_steps(indices, data.lengths if task.local.group_by_length else None, task.local, rng))
    return Job(client, task, steps, seed, len(indices), noise)


def train_together(
    base: Base, jobs: Sequence[Job], data: Examples, prefixes: Sequence[Prefix] | None = None
) -> list[Update]:
    """Trains clients on one pass of the base for all, each as it would train alone; their updates, in order of `jobs`.

    Args:
        base: the frozen model.
        jobs: those with the most steps first, and such that `polyrank.local.grouping.key` is the same for all; one
            that protects its examples, alone.
        data: prepared examples.
        prefixes: each client's, of one block, to go on from; None: every forward pass is whole.
    """
    if jobs[0].task.privacy.examples is not None:
        return [_train_privately(base, job, data) for job in jobs]
    told: list[list[float]] = [[] for _ in jobs]
    cohort = Cohort(base, jobs)
    with cohort.attached() as model:
        optimizer = cohort.optimizer()
        own, accumulates = model.tensors(), jobs[0].task.local.accumulate > 1
        meter = Meter(base.model, base.device, own, model.parameters(), accumulates) if len(jobs) == 1 else None
        for step in range(len(jobs[0].steps)):
            active = sum(len(job.steps) > step for job in jobs)
            cohort.forget()
            if active < cohort.active:
                cohort.keep(active)
            found = _backward(cohort, data, step, prefixes, meter)
            for so_far, loss, job in zip(told, found, jobs, strict=False):
                so_far.append(loss)
                if not math.isfinite(loss):
                    raise _diverged(job, f"loss is {loss} in step {len(so_far)}")
            cohort.clip()
            cohort.step(optimizer)
    memory = meter.peak(optimizer) if meter else None
    return [_update(cohort, client, own, memory) for client, own in enumerate(told)]


def _train_privately(base: Base, job: Job, data: Examples) -> Update:
    assert job.noise is not None
    samples = [sample for (sample,) in job.steps]
    try:
        adapter = train_privately(base, job.task, samples, job.examples, data, job.seed, job.noise)
    except TrainingError as error:
        raise TrainingError(f"round {job.task.round}, client {job.client!r}: {error}") from None
    return _protected(job, Update(job.client, adapter, job.examples, job.task.factors))


def _protected(job: Job, update: Update) -> Update:
    """The update as the client may send it: its noise covers all of it."""
    if not job.task.privacy:
        return update
    settings = job.task.privacy.on_client
    if settings is not None:
        assert job.noise is not None
        return privately(job.task.adapter, update, settings, job.noise)
    # A server that is trusted with updates bounds them itself; losses and sizes would still be in its records.
    examples = update.examples if job.task.privacy.clients is None else 1.0
    return replace(update, examples=examples, metrics={})


def _update(cohort: Cohort, client: int, losses: list[float], memory: float | None) -> Update:
    job, adapter = cohort.jobs[client], cohort.adapter(client)
    if losses and not cohort.finite[client]:
        raise _diverged(job, f"weights are not finite after step {len(losses)}")
    penalty = job.task.penalty
    if penalty is not None and penalty.prune and losses:
        adapter = _pruned(adapter, job.task.adapter, penalty)
    metrics = {"steps": float(len(losses))}
    if losses:
        metrics |= {"loss": float(np.mean(losses))} | ({"memory": memory} if memory is not None else {})
    return _protected(job, Update(job.client, adapter, job.examples, job.task.factors, metrics))


def _diverged(job: Job, what: str) -> TrainingError:
    advice = f"lower local.lr ({job.task.local.lr:g}) or set local.clip"
    return TrainingError(f"round {job.task.round}, client {job.client!r}: {what}; {advice}")


def _steps(
    indices: Indices, lengths: Indices | None, local: LocalTraining, rng: np.random.Generator
) -> Iterator[list[Indices]]:
    """Optimizer steps, each a list of batches; data is reshuffled every epoch."""
    if not len(indices):
        return
    done, epoch = 0, 0
    while local.steps is not None or epoch < local.epochs:
        for chunk in shuffled(indices, lengths, local.batch * local.accumulate, rng):
            if local.steps is not None and done == local.steps:
                return
            yield [chunk[at : at + local.batch] for at in range(0, len(chunk), local.batch)]
            done += 1
        epoch += 1


def _backward(
    cohort: Cohort, data: Examples, step: int, prefixes: Sequence[Prefix] | None, meter: Meter | None
) -> list[float]:
    """Gradients of one step of the clients that still train; the mean loss of each, without its penalty."""
    jobs = cohort.jobs[: cohort.active]
    batches, local = [job.steps[step] for job in jobs], jobs[0].task.local
    total = torch.zeros(len(jobs))
    for at in range(max(map(len, batches))):
        parts = [rows_of(own[at], data.lengths, local.pack) if at < len(own) else [] for own in batches]
        filled, weights = _side_by_side(parts, batches, data.targets)
        rows = [row for part in filled for row in part]
        batch = cast(Packable, data).packed(rows) if local.pack else data.batch(np.concatenate(rows))
        if local.dropout:
            positions = [max((int(data.lengths[row].sum()) for row in part), default=0) for part in parts]
            texts = batch.get("input_ids")
            cohort.meet(
                list(map(len, parts)), [] if texts is None else positions, 0 if texts is None else texts.shape[1]
            )
        examples = map(np.concatenate, filled)
        going_on = resumed(list(zip(prefixes, examples, strict=False))) if prefixes else nullcontext()
        alone = asked_alone(cohort.base.output, batch["labels"])
        with meter.forward() if meter else nullcontext():
            with autocast(local, cohort.base.device), going_on, alone:
                scored = [cohort.live(batch)]
            each = losses(scored.pop(), batch["labels"])  # no name holds the logits through the backward pass
        loss = (each * weights.to(each.device)).view(len(jobs), -1).sum(1)
        total += loss.detach().cpu()
        loss.sum().backward()
    penalised = [c for c, job in enumerate(jobs) if job.task.penalty is not None and job.task.adapter.layers]
    terms = [_penalty(cohort.live, jobs[client], client) for client in penalised]
    if terms and (penalty := torch.stack(terms).sum()).requires_grad:
        penalty.backward()
    return total.tolist()


def _side_by_side(
    parts: Sequence[list[Indices]], batches: Sequence[list[Indices]], targets: Indices
) -> tuple[list[list[Indices]], Tensor]:
    """Every client's rows of a pass, as many for each, and each row's weight in its client's mean.

    The mean is over what is asked in the whole step: over its examples, or over the tokens of all of them. A part that
    is too short, or a client without a batch in this pass, is filled up with an example of the client's own that has no
    weight.

    Args:
        parts: the rows of each client in this pass.
        batches: all of each client's step.
        targets: what is asked of every example.
    """
    longest = max(map(len, parts))
    filled = [part + [own[0][:1]] * (longest - len(part)) for part, own in zip(parts, batches, strict=True)]
    counts = [int(sum(targets[batch].sum() for batch in own)) for own in batches]
    weights = torch.zeros(len(parts), longest)
    for row, part, count in zip(weights, parts, counts, strict=True):
        row[: len(part)] = 1.0 / max(count, 1)
    return filled, weights.view(-1)


def _penalty(model: Attachment, job: Job, client: int) -> Tensor:
    """A client's terms, on its own rows and columns of the stacks."""
    assert job.task.penalty is not None
    tails = []
    for name, sent in job.task.adapter.layers.items():
        A, B = (model.A[name][client], model.B[name][client]) if model.stacked else (model.A[name], model.B[name])
        tails.append(_tail(A[: sent.rank], B[:, : sent.rank], job.task.penalty))
    return torch.stack(tails).sum() * job.task.penalty.weight


def _tail(A: Tensor, B: Tensor, penalty: TailPenalty) -> Tensor:
    keep = math.floor(penalty.decay * A.shape[0])
    return torch.linalg.vector_norm(B[:, keep:]) * torch.linalg.vector_norm(A[keep:])


def _pruned(adapter: Adapter, sent: Adapter, penalty: TailPenalty) -> Adapter:
    """Drops the tail rows of layers where their product of norms has become smaller; rank 1 stays."""

    def cut(name: str, x: LowRank) -> LowRank:
        before, keep = sent.layers[name], max(math.floor(penalty.decay * x.rank), 1)
        smaller = float(_tail(x.A, x.B, penalty)) < float(_tail(before.A, before.B, penalty))
        return truncate(x, keep) if smaller else x

    return Adapter({name: cut(name, x) for name, x in adapter.layers.items()}, adapter.dense)
