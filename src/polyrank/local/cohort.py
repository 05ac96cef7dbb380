"""Clients that train together: one pass of the frozen base for all of them, adapters of each client's own.

Tensors of the same layer are stacked, zero where a client's rank is lower or it lacks the layer: with rows of A and
columns of B both zero, so are their gradients and the optimizer's states, and they stay zero. Gradients of the summed
losses, norms, learning rates and steps are each client's own, so that training together is training alone. A cohort of
one is a client alone, without stacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from polyrank.core.lowrank import Adapter, LowRank
from polyrank.core.noise import Noise
from polyrank.core.types import Client, Task
from polyrank.local.attach import Attachment, Layer, Masks, Scale, hooked, leaf, on_device
from polyrank.local.base import Base
from polyrank.local.data import Indices
from polyrank.local.optimizer import optimizer_of


@dataclass(frozen=True, eq=False)
class Job:
    """A client's round, with everything random drawn.

    Attributes:
        client: who.
        task: what the server asks.
        steps: its optimizer steps, each a list of batches of example indices.
        seed: of its dropout masks.
        examples: that it holds.
        noise: draws what protects it; None where nothing does.
    """

    client: Client
    task: Task
    steps: list[list[Indices]]
    seed: int
    examples: int
    noise: Noise | None = None


Key = tuple[str, str]
"""``A``, ``B`` or ``dense``, and the name of the layer or the parameter."""


class Cohort:
    """The tensors of the clients that train together.

    Args:
        base: the frozen model.
        jobs: of at least one client, those of most steps first; of one `polyrank.local.grouping.key`.

    Attributes:
        live: what is attached to the model: of all clients, or of those that `keep` has kept.
    """

    def __init__(self, base: Base, jobs: Sequence[Job]) -> None:
        self.base, self.jobs, self.active = base, jobs, len(jobs)
        tasks = [job.task for job in jobs]
        layers = list(dict.fromkeys(name for task in tasks for name in task.adapter.layers))
        held = {name: [task.adapter.layers.get(name) for task in tasks] for name in layers}
        self.stacked = len(jobs) > 1
        # With rank in front, a client's own part is contiguous: its optimizer states need no padding.
        self.full: dict[Key, Tensor] = {
            **{("A", name): self._stack([x and x.A for x in xs]) for name, xs in held.items()},
            **{("B", name): self._stack([x and self._turned(x.B) for x in xs]) for name, xs in held.items()},
            **{("dense", n): self._stack([task.adapter.dense[n] for task in tasks]) for n in tasks[0].adapter.dense},
        }
        self.scales = {name: self._scale([x.scale if x else None for x in xs]) for name, xs in held.items()}
        self.frozen = self._frozen(tasks)
        fixed = {name: tensor.to(base.device) for name, tensor in tasks[0].frozen.dense.items()}
        self.masks: Masks | None = None
        self.live = Attachment(base.logits, fixed=fixed, stacked=self.stacked, layouts=base.layouts)
        self.leaves: dict[Key, Tensor] = {}
        self.keep(len(jobs))

    def keep(self, active: int) -> None:
        """From now on only the first `active` clients run: the others have done their steps."""
        self.active = active
        tensors: dict[str, dict[str, Tensor]] = {"A": self.live.A, "B": self.live.B, "dense": self.live.dense}
        for (kind, name), full in self.full.items():
            own = full[:active] if self.stacked else full[0]
            trained = any(_trains(job.task, kind) for job in self.jobs)
            self.leaves[kind, name] = own.detach().requires_grad_(trained)
            tensors[kind][name] = self._turned(self.leaves[kind, name]) if kind == "B" else self.leaves[kind, name]
        self.live.scales |= {name: _first(scale, active) for name, scale in self.scales.items()}
        self.live.frozen |= {
            name: Layer(_first(x.A, active), _first(x.B, active), _first(x.scale, active)) if x.A.ndim == 3 else x
            for name, x in self.frozen.items()
        }
        self.live.settle()

    @contextmanager
    def attached(self) -> Iterator[Attachment]:
        """The model with the adapters of the cohort in it, until the context ends."""
        local = self.jobs[0].task.local
        self.masks = Masks(local.dropout, [job.seed for job in self.jobs]) if local.dropout else None
        again = self.base.run_again([job.task.adapter for job in self.jobs]) if local.checkpointing else []
        with hooked(self.live, self.base.modules, self.masks, again) as live:
            yield live

    # --- one step

    def meet(self, rows: Sequence[int], positions: Sequence[int], width: int) -> None:
        """Begins a pass with dropout, in which clients have so many rows, and texts so many positions, of their own."""
        assert self.masks is not None
        self.masks.meet(rows, positions, width)

    def optimizer(self) -> torch.optim.Optimizer:
        """One optimizer of every client's own parts, with learning rates and weight decay of their own."""
        self.views: list[tuple[Key, int, Tensor]] = []
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for client, job in enumerate(self.jobs):
            own = {key: self._part(key, client) for key in self.full if _trains(job.task, key[0])}
            views = [(key, client, part) for key, part in own.items() if part.numel()]
            groups.setdefault((job.task.local.lr, job.task.local.weight_decay), []).extend(part for *_, part in views)
            self.views += views
        chosen = [{"params": own, "lr": lr, "weight_decay": decay} for (lr, decay), own in groups.items()]
        return optimizer_of(chosen, self.jobs[0].task.local)

    def gradients(self) -> dict[Key, Tensor]:
        """The gradients of what is trained, with the client in front."""
        found = {key: tensor.grad for key, tensor in self.leaves.items()}
        return {key: g if self.stacked else g[None] for key, g in found.items() if g is not None}

    def gradients_of(self, client: int) -> dict[Key, Tensor]:
        """The gradients of one client's own parts, in the shapes of its tensors."""
        parts = {key: g[client][: len(self._part(key, client))] for key, g in self.gradients().items()}
        return {key: self._turned(part) if key[0] == "B" else part for key, part in parts.items()}

    def clip(self) -> None:
        """Scales each client's gradients to its largest norm, as `torch.nn.utils.clip_grad_norm_` does."""
        limits = [job.task.local.clip for job in self.jobs[: self.active]]
        if all(limit is None for limit in limits):
            return
        found = self.gradients()
        tasks = [job.task for job in self.jobs[: self.active]]
        trains = {kind: [float(_trains(task, kind)) for task in tasks] for kind in ("A", "B", "dense")}
        mask = {kind: torch.tensor(own, device=self.base.device) for kind, own in trains.items()}
        norms = [torch.linalg.vector_norm(g.flatten(1), dim=1) * mask[key[0]] for key, g in found.items()]
        norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        limit = torch.tensor([float("inf") if limit is None else limit for limit in limits], device=self.base.device)
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        for g in found.values():
            g.mul_(factor.view(-1, *[1] * (g.ndim - 1)))

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """One step of the clients that still train."""
        found = self.gradients()
        for key, client, view in self.views:
            runs = client < self.active and key in found
            view.grad = found[key][client][: len(view)] if runs else None
        optimizer.step()

    def forget(self) -> None:
        """Lets go of all gradients: nothing but parameters and states is held while a forward pass runs."""
        for *_, view in self.views:
            view.grad = None
        for tensor in self.leaves.values():
            tensor.grad = None

    # --- the result

    @cached_property
    def finite(self) -> list[bool]:
        """Whether each client's tensors are, after the last step."""
        sums = [full.flatten(1).abs().sum(1) for full in self.full.values()]
        return torch.stack(sums).isfinite().all(0).tolist() if sums else [True] * len(self.jobs)

    def adapter(self, client: int) -> Adapter:
        """A client's adapter as it is now, at its own ranks, on the CPU. A factor it did not train is what was sent."""
        task = self.jobs[client].task

        def own(kind: str, name: str, sent: Tensor) -> Tensor:
            if not _trains(task, kind):
                return sent
            part = self._part((kind, name), client)
            return (self._turned(part) if kind == "B" else part).to("cpu", copy=True).contiguous()

        layers = {n: LowRank(own("A", n, x.A), own("B", n, x.B), x.scale) for n, x in task.adapter.layers.items()}
        return Adapter(layers, {name: own("dense", name, tensor) for name, tensor in task.adapter.dense.items()})

    # --- building

    def _stack(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """n x the largest shape, zero where a tensor is smaller or missing."""
        given = [tensor for tensor in tensors if tensor is not None]
        if len(tensors) == 1:
            return leaf(given[0], self.base.device)[None]
        largest = [max(sizes) for sizes in zip(*(tensor.shape for tensor in given), strict=True)]
        stacked = torch.zeros(len(tensors), *largest, device=self.base.device)
        for own, tensor in zip(stacked, tensors, strict=True):
            if tensor is not None:
                own[tuple(slice(size) for size in tensor.shape)] = tensor.detach()
        return stacked

    def _scale(self, scales: Sequence[float | None]) -> Scale:
        """The clients' common scale, or a column of theirs."""
        given = {scale for scale in scales if scale is not None}
        if len(given) == 1:
            return given.pop()
        return torch.tensor([scale or 0.0 for scale in scales], device=self.base.device).view(-1, 1, 1)

    def _frozen(self, tasks: Sequence[Task]) -> dict[str, Layer]:
        """What only runs: once for all clients where they have the very same."""
        layers = {}
        for name in dict.fromkeys(name for task in tasks for name in task.frozen.layers):
            xs = [task.frozen.layers.get(name) for task in tasks]
            if all(x is xs[0] for x in xs):
                assert xs[0] is not None
                layers[name] = on_device(xs[0], self.base.device)
            else:
                A, B = self._stack([x and x.A for x in xs]), self._stack([x and x.B for x in xs])
                layers[name] = Layer(A, B, self._scale([x.scale if x else None for x in xs]))
        return layers

    def _part(self, key: Key, client: int) -> Tensor:
        """A client's own part of a stack, without what only fills it up; empty where it lacks the layer."""
        kind, name = key
        own = self.full[key][client]
        if kind == "dense" or not self.stacked:
            return own
        layer = self.jobs[client].task.adapter.layers.get(name)
        return own[: layer.rank if layer else 0]

    def _turned(self, B: Tensor) -> Tensor:
        """B with rank in front, or back: only where it is stacked."""
        return B.mT if self.stacked else B


def _trains(task: Task, kind: str) -> bool:
    return kind == "dense" or kind in task.factors


def _first(value: Scale, count: int) -> Scale:
    return value[:count] if isinstance(value, Tensor) else value
