"""What a model is made of, as far as its costs depend on it: read from a config, without a weight in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

MiB = 2**20

Quantization = Literal["8bit", "4bit"]
Attention = Literal["eager", "sdpa"]


@dataclass(frozen=True)
class Architecture:
    """A Transformers model as the cost model sees it.

    Attributes:
        family: whose forward pass it has, a key of `polyrank.core.costs.FAMILIES`; "" where there is no formula.
        linears: every linear layer of the backbone by name, as (d_out, d_in).
        blocks: the names of the linear layers of each transformer block, in the order of the forward pass.
        after: those after the last block (BERT's pooler).
        hidden: width of the residual stream; 0 where there is no formula that needs it, and so is `heads`.
        heads, kv_heads: attention heads, and key-value heads where several query heads share one.
        activation: the nonlinearity of the MLP, by Transformers' name.
        attention: ``eager`` keeps heads x tokens^2 probabilities, ``sdpa`` (memory-efficient) does not.
        tokens: positions per example, as the data is prepared; 0 where they are not known, or in no row.
        classes: outputs of the head: classes, or the vocabulary.
        causal: whether the head predicts the next token at every position.
        weights: bytes per base parameter: 4, or 2 for a bfloat16 base.
        parameters: base parameters, all of them.
        quantization: of the linear layers of the backbone.
        rotated: the part of each head whose positions are rotated, where the family rotates them.
        kind: the model's type, as its config has it.
        backbone: parameters of the backbone, as far as it runs.
        others: parameters of its matrices that belong to no linear layer and no embedding, by name with ``*`` for
            numbers, the largest first: no adapter reaches them.
    """

    family: str
    linears: Mapping[str, tuple[int, int]]
    blocks: tuple[tuple[str, ...], ...]
    after: tuple[str, ...]
    hidden: int
    heads: int
    kv_heads: int
    activation: str
    attention: Attention
    tokens: int
    classes: int
    weights: int
    parameters: int
    quantization: Quantization | None = None
    causal: bool = False
    rotated: float = 1.0
    kind: str = ""
    backbone: int = 0
    others: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Calibration:
    """What was measured where formulas end (``polyrank profile``).

    Attributes:
        overhead: bytes beyond tensors: the allocator's rounding and fragments, library workspaces.
        scale: measured over predicted activations.
        constant, per_rank: for models without a formula: activations are ``constant + per_rank * sum of ranks``
            bytes per example.
    """

    overhead: float = 64.0 * MiB
    scale: float = 1.0
    constant: float | None = None
    per_rank: float | None = None


NO_CALIBRATION = Calibration()


@dataclass(frozen=True)
class ModelSpec:
    """What planning knows of a model.

    Attributes:
        modules: the adapted modules by name, each with its (d_out, d_in) shape, in the order of the forward pass.
        blocks: the transformer block of each module, from 0; modules outside all blocks are left out.
        head: elements of each dense parameter of the head.
        head_trained: whether clients train and send the head, or only receive it.
        architecture: what costs are computed from; None where they are not asked for.
        calibration: what was measured on a client's kind of device.
        lokr: LoKr's r where the modules train its Kronecker factors, which cost the same at every rank budget; None
            where they train low-rank layers.
        exact: modules that were named one by one, so that a rank which they have no room for is a mistake. Others take
            the rank that they have room for.
    """

    modules: Mapping[str, tuple[int, int]]
    blocks: Mapping[str, int] = field(default_factory=dict)
    head: Mapping[str, int] = field(default_factory=dict)
    head_trained: bool = True
    architecture: Architecture | None = None
    calibration: Calibration = NO_CALIBRATION
    lokr: int | None = None
    exact: frozenset[str] = frozenset()

    @property
    def full_rank(self) -> int:
        """The largest rank of any use: that of the narrowest module named by itself, or else what the widest takes."""
        rooms = {name: min(shape) for name, shape in self.modules.items()}
        return min((rooms[name] for name in self.exact), default=max(rooms.values(), default=0))

    def at(self, rank: int) -> dict[str, int]:
        """This rank on every module, or what one has room for.

        >>> ModelSpec({"q_proj": (32, 32), "router": (2, 32)}).at(4)
        {'q_proj': 4, 'router': 2}
        """
        return {name: min(rank, *shape) for name, shape in self.modules.items()}

    @property
    def covered(self) -> float | None:
        """The share of the backbone's parameters that an adapter updates; None where it is not known."""
        if self.architecture is None or not self.architecture.backbone:
            return None
        return sum(d_out * d_in for d_out, d_in in self.modules.values()) / self.architecture.backbone
