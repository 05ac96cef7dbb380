"""A client's round: a visible training loop, and evaluation. Everything random comes from the client's own stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from polyrank.core.lowrank import Adapter, LowRank, truncate
from polyrank.core.rng import stream
from polyrank.core.types import Client, LocalTraining, Precision, TailPenalty, Task, Update
from polyrank.errors import TrainingError
from polyrank.local.attach import Attachment, Batch
from polyrank.local.base import Base
from polyrank.local.measure import Meter

Indices = npt.NDArray[np.int64]


class Examples(Protocol):
    """Prepared data that gives batches."""

    @property
    def labels(self) -> Indices: ...

    @property
    def lengths(self) -> Indices: ...

    def batch(self, indices: Indices) -> dict[str, Tensor]: ...


class Reuse(Protocol):
    """What forward passes need not compute again (`polyrank.local.prefix.Prefix`)."""

    def resumed(self, chosen: Indices) -> AbstractContextManager[None]:
        """Around a forward pass of these examples."""
        ...


def train(
    base: Base, task: Task, client: Client, data: Examples, indices: Indices, reuse: Reuse | None = None
) -> Update:
    """Trains the task's adapter on the client's examples and returns its factors.

    A client with no examples, or nothing to train, returns what it was sent.
    """
    local, rng = task.local, stream(task.seed, "fit", task.round, client)
    dropout, again = local.dropout, local.checkpointing
    with base.attached(task.adapter, task.frozen, task.factors, dropout, rng, again) as model:
        parameters = model.parameters()
        steps = list(_steps(indices, local, rng)) if parameters else []
        optimizer = optimizer_of(parameters, local) if steps else None
        before = _tails(model, task.penalty)
        losses: list[float] = []
        meter = Meter(base.model, base.device, model.tensors(), parameters)
        for step in steps:
            assert optimizer is not None
            optimizer.zero_grad()
            with meter.forward():
                losses.append(_backward(model, data, step, task, base.device, reuse))
            if not math.isfinite(losses[-1]):
                raise _diverged(task, client, f"loss is {losses[-1]} in step {len(losses)}")
            if local.clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, local.clip)
            optimizer.step()
        if not all(bool(torch.isfinite(tensor).all()) for tensor in parameters):
            raise _diverged(task, client, f"weights are not finite after step {len(losses)}")
        adapter = model.adapter()
        if task.penalty is not None and task.penalty.prune and losses:
            adapter = _pruned(adapter, before, _tails(model, task.penalty), task.penalty)
    adapter = _with_frozen_factor(adapter, task)
    metrics = {"steps": float(len(losses))}
    if losses:
        metrics |= {"loss": float(np.mean(losses)), "memory": meter.peak(optimizer)}
    return Update(client, adapter, len(indices), task.factors, metrics)


def evaluate(
    predict: Callable[[Batch], Tensor], data: Examples, indices: Indices | None = None, *, tokens: int = 2048
) -> dict[str, float]:
    """Accuracy and mean cross-entropy of a model, given as batch -> logits, over `data` (or `indices` of it).

    Batches hold examples of similar length, at most `tokens` input positions each.
    """
    everything = np.arange(len(data.labels)) if indices is None else indices
    correct, loss = 0, 0.0
    with torch.inference_mode():
        for chosen in by_length(everything, data.lengths, tokens):
            batch = data.batch(chosen)
            logits = predict(batch).float().cpu()
            correct += int((logits.argmax(-1) == batch["labels"]).sum())
            loss += float(F.cross_entropy(logits, batch["labels"], reduction="sum"))
    count = len(everything)
    return {"accuracy": correct / count, "loss": loss / count}


def _diverged(task: Task, client: Client, what: str) -> TrainingError:
    advice = f"lower local.lr ({task.local.lr:g}) or set local.clip"
    return TrainingError(f"round {task.round}, client {client!r}: {what}; {advice}")


def _steps(indices: Indices, local: LocalTraining, rng: np.random.Generator) -> Iterator[list[Indices]]:
    """Optimizer steps, each a list of batches; data is reshuffled every epoch."""
    if not len(indices):
        return
    per_step = local.batch * local.accumulate
    done, epoch = 0, 0
    while local.steps is not None or epoch < local.epochs:
        order = rng.permutation(indices)
        for start in range(0, len(order), per_step):
            if local.steps is not None and done == local.steps:
                return
            chunk = order[start : start + per_step]
            yield [chunk[at : at + local.batch] for at in range(0, len(chunk), local.batch)]
            done += 1
        epoch += 1


def _backward(
    model: Attachment, data: Examples, step: list[Indices], task: Task, device: torch.device, reuse: Reuse | None
) -> float:
    """Gradients of one step; returns its mean loss, without the penalty."""
    count, total = sum(len(chosen) for chosen in step), 0.0
    for chosen in step:
        batch = data.batch(chosen)
        with autocast(task.local, device), reuse.resumed(chosen) if reuse else nullcontext():
            logits = model(batch)
        loss = F.cross_entropy(logits.float(), batch["labels"].to(device)) * (len(chosen) / count)
        total += float(loss.detach())
        loss.backward()
    if task.penalty is not None and model.A:
        penalty = torch.stack([_tail(model, name, task.penalty) for name in model.A]).sum() * task.penalty.weight
        if penalty.requires_grad:
            penalty.backward()
    return total


def optimizer_of(parameters: list[Tensor], local: LocalTraining) -> torch.optim.Optimizer:
    """The optimizer of a client's round."""
    if local.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=local.lr, weight_decay=local.weight_decay, fused=True)
    return torch.optim.SGD(parameters, lr=local.lr, momentum=local.momentum, weight_decay=local.weight_decay)


def precision_on(device: torch.device, wanted: Precision) -> Precision:
    """What ``auto`` means on a device: bf16 where its accelerator has it."""
    if wanted != "auto":
        return wanted
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def autocast(local: LocalTraining, device: torch.device) -> AbstractContextManager[object]:
    """The precision of a client's forward pass."""
    wanted = precision_on(device, local.precision) == "bf16"
    return torch.autocast(device.type, torch.bfloat16) if wanted else nullcontext()


def _tail(model: Attachment, name: str, penalty: TailPenalty) -> Tensor:
    keep = math.floor(penalty.decay * model.A[name].shape[0])
    norm = torch.linalg.vector_norm
    return norm(model.B[name][:, keep:]) * norm(model.A[name][keep:])


def _tails(model: Attachment, penalty: TailPenalty | None) -> dict[str, float]:
    if penalty is None:
        return {}
    with torch.no_grad():
        return {name: float(_tail(model, name, penalty)) for name in model.A}


def _pruned(adapter: Adapter, before: dict[str, float], after: dict[str, float], penalty: TailPenalty) -> Adapter:
    """Drops the tail rows of layers where their product of norms has become smaller; rank 1 stays."""

    def cut(name: str, x: LowRank) -> LowRank:
        keep = max(math.floor(penalty.decay * x.rank), 1)
        return truncate(x, keep) if after[name] < before[name] else x

    return Adapter({name: cut(name, x) for name, x in adapter.layers.items()}, adapter.dense)


def _with_frozen_factor(adapter: Adapter, task: Task) -> Adapter:
    """The factor that was not trained is the very one that was sent: it does not travel back."""

    def restore(x: LowRank, sent: LowRank) -> LowRank:
        A = x.A if "A" in task.factors else sent.A[: x.rank]
        B = x.B if "B" in task.factors else sent.B[:, : x.rank]
        return LowRank(A, B, x.scale)

    layers = {name: restore(x, task.adapter.layers[name]) for name, x in adapter.layers.items()}
    return Adapter(layers, adapter.dense)


def by_length(indices: Indices, lengths: Indices, tokens: int, most: int | None = None) -> Iterator[Indices]:
    """Batches of examples of similar length: at most `tokens` positions each, and `most` examples."""
    order = indices[np.argsort(lengths[indices], kind="stable")[::-1]]
    start = 0
    while start < len(order):
        size = max(1, min(tokens // int(max(lengths[order[start]], 1)), most or len(order)))
        yield order[start : start + size]
        start += size
