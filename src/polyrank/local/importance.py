"""Which layers matter, measured: gradients of single examples with respect to every A and B, many in one pass.

Every example of a batch runs through a copy of the factors of its own (`polyrank.local.attach`), so one backward pass
of the summed log-likelihood leaves the gradient of each example in its copy, at about the cost of the gradient of the
batch. What is computed is in `polyrank.methods.importance`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from polyrank.core.lowrank import Adapter
from polyrank.core.rng import stream
from polyrank.core.types import Client, Query, ServerState
from polyrank.local.attach import Attachment
from polyrank.local.base import Base
from polyrank.local.data import Examples, Indices, by_length
from polyrank.local.losses import asked, asked_alone
from polyrank.local.probe import side_by_side

POSITIONS = 1024
"""Most input positions of a batch."""

ELEMENTS = 2**26
"""Most elements of a batch's gradients: 256 MiB."""

Sums = dict[str, list[Tensor]]
Uniforms = Mapping[int, npt.NDArray[np.float64]]


def measured(
    base: Base, query: Query, state: ServerState, data: Examples, indices: Indices, *who: Client
) -> dict[str, float]:
    """The importance that a query asks for, on as many of the examples at `indices` as it says.

    Args:
        base: the frozen model.
        query: what to measure, with the round and the seed of its draws.
        state: the server's model.
        data: prepared examples with their labels.
        indices: those that whoever measures holds.
        who: the client, unless it is the server.
    """
    rng = stream(query.seed, "importance", query.round, *who)
    if query.samples is not None and query.samples < len(indices):
        indices = rng.choice(indices, query.samples, replace=False)
    return importance(base, state, data, indices, query, rng)


def importance(
    base: Base, state: ServerState, data: Examples, indices: Indices, query: Query, rng: np.random.Generator
) -> dict[str, float]:
    """The importance of every adapted module of a state's model, on the examples at `indices`.

    The model runs at the server's rank, without dropout or autocast; folds and the head only run.

    Args:
        base: the frozen model.
        state: its adapter and folds.
        data: prepared examples with their labels.
        indices: those to measure on, at least one, each once.
        query: what to measure.
        rng: draws labels from the model's predictions, where the query says so.
    """
    indices = np.sort(indices)
    # Each example has draws of its own, whatever batch it is in.
    uniforms = {index: rng.random(int(data.targets[index])) for index in indices.tolist()}
    sums = (_gradient if query.kind == "gradient" else _fisher)(base, state, data, indices, query, uniforms)
    scores = dict.fromkeys(base.spec.modules, 0.0)
    return scores | {name: _score([t / len(indices) for t in pair], query) for name, pair in sums.items()}


def _fisher(base: Base, state: ServerState, data: Examples, indices: Indices, query: Query, uniforms: Uniforms) -> Sums:
    """The squared gradients of all examples, added up: for every layer one tensor like A and one like B."""
    sums: Sums = {}
    size = sum(x.A.numel() + x.B.numel() for x in state.adapter.layers.values())
    most = max(1, ELEMENTS // max(size, 1))
    if len(indices) > 1 and side_by_side(base, data) is not None:
        most = 1
    for chosen in by_length(indices, data.lengths, POSITIONS, most):
        with base.attached(*_parts(state), "AB", copies=len(chosen)) as model:
            _backward(base, model, data, chosen, query, uniforms)
            found = {name: [t.grad for t in pair if t.grad is not None] for name, pair in _factors(model).items()}
        for name, gradients in found.items():
            now = [g.square().sum(0).cpu().double() for g in gradients]
            sums[name] = [a + b for a, b in zip(sums[name], now, strict=True)] if name in sums else now
    return sums


def _gradient(
    base: Base, state: ServerState, data: Examples, indices: Indices, query: Query, uniforms: Uniforms
) -> Sums:
    """The gradients of all examples, added up: nothing to keep apart, so one copy of the factors does."""
    with base.attached(*_parts(state), "AB") as model:
        for chosen in by_length(indices, data.lengths, POSITIONS):
            _backward(base, model, data, chosen, query, uniforms)
        return {
            name: [t.grad.cpu().double() for t in pair if t.grad is not None] for name, pair in _factors(model).items()
        }


def _parts(state: ServerState) -> tuple[Adapter, Adapter]:
    """What gradients are taken of, and what only runs: folds and the head."""
    frozen = Adapter(state.folded.layers, {**state.folded.dense, **state.adapter.dense})
    return Adapter(state.adapter.layers), frozen


def _factors(model: Attachment) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (model.A[name], model.B[name]) for name in model.A}


def _backward(base: Base, model: Attachment, data: Examples, chosen: Indices, query: Query, uniforms: Uniforms) -> None:
    """Gradients of the sum over examples of the log-likelihood of what is asked, or of its logit."""
    batch = data.batch(chosen)
    with asked_alone(base.output, batch["labels"]):
        logits, labels, _ = asked(model(batch), batch["labels"])
    logits = logits.float()
    if query.labels == "sampled":
        labels = _sampled(logits.detach(), torch.from_numpy(np.concatenate([uniforms[i] for i in chosen.tolist()])))
    values = logits.log_softmax(-1) if query.target == "log_likelihood" else logits
    values.gather(-1, labels[:, None]).sum().backward()


def _sampled(logits: Tensor, uniforms: Tensor) -> Tensor:
    """A label for each row, drawn from its softmax: the first whose cumulative probability exceeds the uniform."""
    cumulative = logits.cpu().double().softmax(-1).cumsum(-1)
    labels = (cumulative <= uniforms[:, None]).sum(-1).clamp(max=logits.shape[-1] - 1)
    return labels.to(logits.device)


def _score(means: list[Tensor], query: Query) -> float:
    """A layer's score, from the means over examples for its A and its B."""
    squares = [float(t.square().sum()) for t in means]
    if query.kind == "gradient":
        return float(np.sqrt(sum(squares)))
    if query.form == "trace":
        return float(sum(t.sum() for t in means))
    return float(sum(squares if query.form == "squared" else np.sqrt(squares)))
