"""LoKr's Kronecker factors: fresh ones, and what they add to a module's output. Shapes are in `polyrank.core.lokr`.

They are dense parameters of an adapter, under PEFT's names. A module whose scale is not 1 has it beside them, as
``MODULE.lokr_scale``, among what is not trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from polyrank.core.lokr import Shape, lokr_parameters
from polyrank.core.lowrank import precision
from polyrank.core.rng import torch_generator
from polyrank.local.layout import BATCH_FIRST, Layout

_SCALE = "lokr_scale"
_FACTORS = ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", _SCALE)


@dataclass(frozen=True)
class LoKr:
    """A module's update, ``scale * kron(w1, w2)`` with w1 (l x m) and w2 (k x n), or w2_a (k x r) @ w2_b (r x n).

    Factors of one dimension more are stacks, one for each of as many equal parts of a batch.
    """

    w1: Tensor
    w2: Tensor | tuple[Tensor, Tensor]
    scale: float = 1.0

    @property
    def rank(self) -> int | None:
        """r, where w2 is factored."""
        return None if isinstance(self.w2, Tensor) else self.w2[0].shape[1]

    @property
    def least_rank(self) -> int:
        """The smallest r at which w2 is not factored: half its larger side."""
        k, n = self.w2.shape if isinstance(self.w2, Tensor) else (self.w2[0].shape[0], self.w2[1].shape[1])
        return (max(k, n) + 1) // 2

    def delta(self) -> Tensor:
        """The d_out x d_in matrix itself, in at least float32. For tests and export only."""
        w2 = self.w2 if isinstance(self.w2, Tensor) else _float(self.w2[0]) @ _float(self.w2[1])
        return self.scale * torch.kron(_float(self.w1), _float(w2))

    def __call__(self, x: Tensor, layout: Layout = BATCH_FIRST, examples: int = 0) -> Tensor:
        """``x @ (scale * kron(w1, w2)).T``, without the d_out x d_in matrix.

        With x as an m x n matrix it is ``scale * w1 X w2^T``, l x k: m n k + l m k products per position, not d_out
        d_in.

        Args:
            x: inputs, any shape that ends in d_in = m n.
            layout: where x has the examples of a batch; of stacks alone.
            examples: of the batch; of stacks alone.
        """
        w1 = self.w1 if self.scale == 1.0 else self.w1 * self.scale
        w2 = self.w2 if isinstance(self.w2, Tensor) else self.w2[0] @ self.w2[1]
        if w1.ndim == 3:
            parts = layout.parts(x, len(w1), examples)
            return layout.whole(_of_parts(parts, w1, w2), x.shape[:-1], examples)
        inner = F.linear(x.unflatten(-1, (w1.shape[1], -1)), w2)  # ... m k
        return F.linear(inner.transpose(-1, -2), w1).transpose(-1, -2).flatten(-2)


def _of_parts(parts: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """`LoKr` with w1 (c x l x m) and w2 (c x k x n), for c parts of as many rows p: c x p x m n to c x p x l k."""
    count, m = len(w1), w1.shape[2]
    inner = parts.reshape(count, -1, w2.shape[2]) @ w2.mT  # c (p m) k
    turned = inner.unflatten(1, (-1, m)).mT.flatten(1, 2)  # c (p k) m
    outer = (turned @ w1.mT).unflatten(1, (-1, w2.shape[1])).mT  # c p l k
    return outer.flatten(2)


def fresh(modules: Mapping[str, Shape], rank: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """The factors as PEFT starts them: w1 = 0, so delta = 0; those of w2 ~ U(-1/sqrt(d), 1/sqrt(d)), d their columns.

    Args:
        modules: (d_out, d_in) by module name.
        rank: r, as for `lokr_shapes`.
        rng: draws them.
    """
    generator = torch_generator(rng)
    factors = {name: torch.zeros(shape) for name, shape in lokr_parameters(modules, rank).items()}
    for name, tensor in factors.items():
        if not name.endswith("lokr_w1"):
            bound = tensor.shape[1] ** -0.5
            tensor.uniform_(-bound, bound, generator=generator)
    return factors


def scales(modules: Iterable[str], scale: float) -> dict[str, Tensor]:
    """What says that these modules' updates are scaled; nothing where the scale is 1."""
    value = torch.tensor(scale, dtype=torch.float64)
    return {} if scale == 1.0 else {f"{name}.{_SCALE}": value.clone() for name in modules}


def is_part(name: str) -> bool:
    """Whether a dense parameter belongs to a LoKr layer, and not to the model."""
    return name.rpartition(".")[2] in _FACTORS


def is_scale(name: str) -> bool:
    """Whether a dense parameter is a LoKr layer's scale."""
    return name.endswith(f".{_SCALE}")


def grouped(dense: Mapping[str, Tensor], stacks: bool = False) -> dict[str, LoKr]:
    """The LoKr layers among dense parameters, by module name.

    Args:
        dense: the parameters.
        stacks: whether a layer's factors may be stacks.

    Raises:
        ValueError: if a module lacks a factor, or its factors do not fit.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in dense.items():
        module, _, factor = name.rpartition(".")
        if factor in _FACTORS:
            parts.setdefault(module, {})[factor] = tensor
    return {module: _layer(module, own, (2, 3) if stacks else (2,)) for module, own in parts.items()}


def _float(tensor: Tensor) -> Tensor:
    return tensor.to(precision(tensor))


def _layer(module: str, parts: Mapping[str, Tensor], dimensions: tuple[int, ...]) -> LoKr:
    factors = {name: tensor for name, tensor in parts.items() if name != _SCALE}
    scale = float(parts[_SCALE].detach()) if _SCALE in parts else 1.0
    if set(factors) not in ({"lokr_w1", "lokr_w2"}, {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}):
        raise ValueError(f"layer {module} has {', '.join(sorted(factors)) or 'a scale'} only")
    if any(tensor.ndim not in dimensions for tensor in factors.values()):
        raise ValueError(f"layer {module}: the factors of a linear layer are matrices")
    if "lokr_w2" in factors:
        return LoKr(factors["lokr_w1"], factors["lokr_w2"], scale)
    a, b = factors["lokr_w2_a"], factors["lokr_w2_b"]
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(f"layer {module}: lokr_w2_a {tuple(a.shape)} and lokr_w2_b {tuple(b.shape)} do not fit")
    return LoKr(factors["lokr_w1"], (a, b), scale)
