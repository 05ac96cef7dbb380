"""A client's round by DP-SGD: Poisson samples, gradients of single examples, clipped, summed, with noise.

Every example of a batch runs through a copy of what is trained (`polyrank.local.attach`), so one backward pass leaves
the gradient of each example in its copy; Opacus' optimizer does the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from polyrank.core.lowrank import Adapter, LowRank
from polyrank.core.noise import Noise
from polyrank.core.privacy import ExamplePrivacy
from polyrank.core.types import Task
from polyrank.errors import InputError, TrainingError
from polyrank.local.attach import Attachment, Masks, hooked, leaf, on_device
from polyrank.local.base import Base
from polyrank.local.data import Examples, Indices
from polyrank.local.dp import private_optimizer
from polyrank.local.heads import owners, stackable
from polyrank.local.lokr import is_part
from polyrank.local.losses import asked_alone, losses
from polyrank.local.optimizer import autocast, optimizer_of
from polyrank.local.poisson import rate
from polyrank.local.probe import side_by_side

ELEMENTS = 2**26
"""Most elements of the gradients of a forward pass: 256 MiB."""

Key = tuple[str, str]


def pass_bytes(task: Task, batch: int) -> float:
    """Bytes of the copies of what a client trains, and of their gradients, for the examples of a forward pass."""
    trained = [getattr(x, factor) for x in task.adapter.layers.values() for factor in task.factors]
    elements = sum(tensor.numel() for tensor in (*trained, *task.adapter.dense.values()))
    return 8.0 * elements * _most(batch, elements)


def _most(batch: int, elements: int) -> int:
    """Examples of a forward pass."""
    return max(1, min(batch, ELEMENTS // max(elements, 1)))


def refuse_unsound(base: Base, dense: Iterable[str]) -> None:
    """Refuses models that mix examples, and trained parameters whose gradients cannot be told apart by example.

    Args:
        base: the frozen model.
        dense: the dense parameters that are trained.

    Raises:
        InputError: naming the module.
    """
    batch_norm = torch.nn.modules.batchnorm._BatchNorm
    for name, module in base.modules.items():
        if isinstance(module, batch_norm):
            raise InputError(
                f"privacy.examples: {name} is a batch normalisation, which mixes examples; use another model"
            )
    own = [name for name in dense if not is_part(name)]
    unable = [name for name in owners(own) if not stackable(base.modules, [f"{name}.weight"])]
    if unable:
        kind = type(base.modules[unable[0]]).__name__
        raise InputError(
            f"privacy.examples: {unable[0]} is a trained {kind}, for which there are no gradients of single examples; "
            "model.head: freeze"
        )


def train_privately(
    base: Base, task: Task, samples: Sequence[Indices], examples: int, data: Examples, seed: int, noise: Noise
) -> Adapter:
    """The task's adapter after a round of DP-SGD.

    Args:
        base: the frozen model.
        task: what the server asks; its ``privacy.examples`` has C and z.
        samples: of each step, drawn by `poisson`; one may be empty.
        examples: that the client has.
        data: prepared examples.
        seed: of the dropout masks.
        noise: draws.

    Raises:
        TrainingError: if what was trained is not finite.
        InputError: where this cannot protect examples.
    """
    settings = task.privacy.examples
    assert settings is not None
    refuse_unsound(base, task.adapter.dense)
    if task.penalty is not None or task.local.checkpointing:
        raise InputError("privacy.examples: neither a tail penalty nor local.checkpointing goes with it")
    apart = max(map(len, samples), default=0) > 1 and side_by_side(base, data, task.local.dropout) is not None
    trained = _Trained(base, task, seed, 1 if apart else task.local.batch)
    if samples and trained.tensors:
        with hooked(trained.live, base.modules, trained.masks):
            _run(trained, settings, samples, rate(task.local, examples) * examples, data, noise)
    if not all(bool(tensor.isfinite().all()) for tensor in trained.tensors.values()):
        raise TrainingError(f"weights are not finite after DP-SGD; lower local.lr ({task.local.lr:g})")
    return trained.adapter()


def _run(
    trained: _Trained,
    settings: ExamplePrivacy,
    samples: Sequence[Indices],
    expected: float,
    data: Examples,
    noise: Noise,
) -> None:
    inner = optimizer_of(list(trained.tensors.values()), trained.task.local)
    optimizer = private_optimizer(inner, settings, expected, noise)
    most = _most(trained.most, sum(map(torch.numel, trained.tensors.values())))
    for sample in samples:
        parts = [sample[at : at + most] for at in range(0, len(sample), most)] or [sample]
        for part in parts:
            optimizer.zero_grad()
            for tensor, gradients in zip(trained.tensors.values(), trained.gradients(part, data), strict=True):
                tensor.grad_sample = gradients  # type: ignore[attr-defined]
            optimizer.signal_skip_step(part is not parts[-1])  # all but the last are clipped and summed only
            optimizer.step()
        optimizer.zero_grad()


def _whole(gradients: list[Tensor]) -> list[Tensor]:
    """Gradients in which an example counts as none where its own is not finite.

    No noise covers an update that fails: a server could send weights under which one example alone makes it fail.
    """
    finite = torch.stack([gradient.flatten(1).isfinite().all(1) for gradient in gradients]).all(0)
    if bool(finite.all()):
        return gradients
    return [torch.where(finite.view(-1, *[1] * (g.dim() - 1)), g, torch.zeros_like(g)) for g in gradients]


class _Trained:
    """What a client trains, and the model that runs a copy of it for each example."""

    def __init__(self, base: Base, task: Task, seed: int, most: int) -> None:
        self.base, self.task, self.most = base, task, most  # most: examples of a pass
        held: dict[Key, Tensor] = {
            **{("A", name): x.A for name, x in task.adapter.layers.items()},
            **{("B", name): x.B for name, x in task.adapter.layers.items()},
            **{("dense", name): tensor for name, tensor in task.adapter.dense.items()},
        }
        self.all = {key: leaf(tensor, base.device) for key, tensor in held.items()}
        self.tensors = {
            key: tensor.requires_grad_()
            for key, tensor in self.all.items()
            if key[0] == "dense" or key[0] in task.factors
        }
        self.masks = Masks(task.local.dropout, [seed]) if task.local.dropout else None
        self.live = Attachment(
            base.logits,
            scales={name: x.scale for name, x in task.adapter.layers.items()},
            fixed={name: tensor.to(base.device) for name, tensor in task.frozen.dense.items()},
            frozen={name: on_device(x, base.device) for name, x in task.frozen.layers.items()},
            stacked=True,
            layouts=base.layouts,
        )
        self._copies(1)

    def _copies(self, count: int) -> list[Tensor]:
        """Copies of everything for `count` examples, in the model; those of what is trained."""
        tensors: dict[str, dict[str, Tensor]] = {"A": self.live.A, "B": self.live.B, "dense": self.live.dense}
        for (kind, name), tensor in self.all.items():
            copies = tensor.detach().expand(count, *tensor.shape)
            tensors[kind][name] = copies.requires_grad_((kind, name) in self.tensors)
        self.live.settle()
        return [tensors[kind][name] for kind, name in self.tensors]

    def gradients(self, chosen: Indices, data: Examples) -> list[Tensor]:
        """The gradients of each example's loss, n x the shape of each trained tensor, in their order."""
        if not len(chosen):
            return [tensor.new_zeros(0, *tensor.shape) for tensor in self.tensors.values()]
        copies = self._copies(len(chosen))
        batch = data.batch(chosen)
        if self.masks is not None:
            self.masks.meet([len(chosen)])
        with autocast(self.task.local, self.base.device), asked_alone(self.base.output, batch["labels"]):
            scored = [self.live(batch)]
        each = losses(scored.pop(), batch["labels"])
        (each / torch.from_numpy(data.targets[chosen]).to(each).clamp(min=1)).sum().backward()
        return _whole([torch.zeros_like(copy) if copy.grad is None else copy.grad for copy in copies])

    def adapter(self) -> Adapter:
        """As it is now, on the CPU. A factor that was not trained is what was sent."""

        def own(kind: str, name: str, sent: Tensor) -> Tensor:
            tensor = self.tensors.get((kind, name))
            return sent if tensor is None else tensor.detach().to("cpu", copy=True)

        layers = {
            name: LowRank(own("A", name, x.A), own("B", name, x.B), x.scale)
            for name, x in self.task.adapter.layers.items()
        }
        return Adapter(layers, {name: own("dense", name, t) for name, t in self.task.adapter.dense.items()})
