"""Autograd without tensors: which values a training step keeps, for how long, and what it computes.

A family's forward pass (`polyrank.core.costs.families`) runs on `Value`s, which have a size and no content. Every
operation notes what autograd would save of it for the backward pass: a frozen linear layer keeps nothing, its LoRA
keeps the input of A and the input of B, a normalisation its input, attention its operands. A value that does not
depend on anything trained needs no backward, so layers below the lowest trained one keep nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from polyrank.core.architecture import Architecture
from polyrank.core.lokr import Shape
from polyrank.core.lowrank import Factors

FLOAT32 = 4
"""Bytes of an element that is trained, of its gradient and of each of its states."""

# What a nonlinearity of n elements saves, and what its backward needs beside: both in copies of n.
ACTIVATIONS = {
    "bloom_gelu": (1, 4),
    "gelu": (1, 0),
    "gelu_new": (4, 1),
    "gelu_pytorch_tanh": (1, 0),
    "relu": (1, 0),
    "silu": (1, 0),
}


@dataclass(eq=False)
class Value:
    """A tensor's size. Views of a whole storage are the same value.

    Attributes:
        numel: its elements.
        itemsize: bytes per element.
        grad: whether the backward pass reaches it.
        part_of: the larger value whose storage it is a part of: keeping the part keeps the whole.
    """

    numel: int
    itemsize: int = 4
    grad: bool = False
    part_of: Value | None = None

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.numel * self.itemsize


@dataclass(eq=False)
class Op:
    """One recorded operation.

    Attributes:
        inputs, output: its operands and its result.
        saved: what it keeps for the backward pass, beside parameters.
        inside: the operations that a checkpoint runs again in the backward pass.
        scratch: bytes that its backward needs on top of the gradients of its inputs.
        grows: bytes of parameters' gradients that its backward makes.
    """

    inputs: tuple[Value, ...]
    output: Value
    saved: tuple[Value, ...]
    inside: list[Op] = field(default_factory=list)
    scratch: int = 0
    grows: int = 0

    @property
    def grown(self) -> int:
        """Those bytes, with those of what runs again inside."""
        return self.grows + sum(op.grown for op in self.inside)


@dataclass(frozen=True)
class Step:
    """What a training step does besides its result.

    Attributes:
        batch: examples per forward pass.
        ranks: rank of each trained module; modules that are left out are frozen.
        factors: the factors that are trained.
        dropout: whether LoRA's input is dropped out.
        autocast: whether the arithmetic runs in bfloat16 on float32 inputs.
        checkpointing: whether blocks keep their inputs only and are run again in the backward pass.
        padded: whether texts are padded, so that attention carries a mask.
        head: parameters of the head, if it is trained.
        lokr: the shapes of the Kronecker factors of each module that trains LoKr instead; see `lokr_shapes`.
    """

    batch: int
    ranks: Mapping[str, int]
    factors: Factors = "AB"
    dropout: bool = False
    autocast: bool = False
    checkpointing: bool = False
    padded: bool = False
    head: int = 0
    lokr: Mapping[str, Mapping[str, Shape]] = field(default_factory=dict)


class Tape:
    """Records a forward pass. Its methods are the operations; each returns the result's `Value`."""

    def __init__(self, model: Architecture, step: Step) -> None:
        self.model, self.step = model, step
        self.ops: list[Op] = []
        self.flops = 0.0  # of the forward pass
        self.backward_flops = 0.0
        self.work = 2 if step.autocast else model.weights  # bytes of what a matrix product returns
        self._shared: dict[str, Value] = {}

    @property
    def rows(self) -> int:
        """Positions in the batch."""
        return self.step.batch * self.model.tokens

    def embedded(self) -> Value:
        """The residual stream before the first block; nothing below it is trained."""
        return Value(self.rows * self.model.hidden, self.model.weights)

    def op(
        self,
        inputs: Sequence[Value],
        numel: int,
        saved: Sequence[Value] = (),
        *,
        itemsize: int = 0,
        scratch: int = 0,
        trained: int = 0,
        keeps_result: bool = False,
        part_of: Value | None = None,
    ) -> Value:
        """Any operation: it has a backward pass where an input needs a gradient, or parameters of it are `trained`."""
        grad = trained > 0 or any(x.grad for x in inputs)
        output = Value(numel, itemsize or max(x.itemsize for x in inputs), grad, part_of)
        if grad:
            kept = tuple(value.part_of or value for value in (*saved, *[output] * keeps_result))
            self.ops.append(Op(tuple(inputs), output, kept, scratch=scratch, grows=FLOAT32 * trained))
        return output

    def linear(self, name: str, x: Value) -> Value:
        """A frozen linear layer, with its LoRA where the module has a rank, or its LoKr."""
        d_out, d_in = self.model.linears[name]
        rows, rank = x.numel // d_in, self.step.ranks.get(name, 0)
        self._count(2.0 * rows * d_in * d_out, 1.0 if x.grad else 0.0)
        weight = self.cast(d_in * d_out) if self.model.weights == 4 and not self.model.quantization else []
        whole = d_in * d_out * self.work if self.model.quantization else 0  # the weight, dequantised for a moment
        y = self.op([x], rows * d_out, weight, itemsize=self.work, scratch=whole)
        if name in self.step.lokr:
            return self.lokr(x, y, rows, d_in, d_out, self.step.lokr[name])
        return self.lora(x, y, rows, d_in, d_out, rank) if rank else y

    def cast(self, weight: int) -> list[Value]:
        """The bfloat16 copy of a float32 weight of so many elements that autocast keeps for the backward pass."""
        return [Value(weight, 2)] if self.step.autocast else []

    def lora(self, x: Value, y: Value, rows: int, d_in: int, d_out: int, rank: int) -> Value:
        """``y + scale * B (A x)``: keeps A's input if A is trained and B's input if B is trained."""
        step, trains_a, trains_b = self.step, "A" in self.step.factors, "B" in self.step.factors
        size = 2 if step.autocast else 4
        kept = x
        if step.dropout:
            kept = self.op([x], x.numel, [Value(x.numel, 1)], itemsize=4)
        if kept.itemsize != size or (step.autocast and not step.dropout):
            kept = self.op([kept], kept.numel, itemsize=size)
        A, B = (self.cast(rank * wide) for wide in (d_in, d_out))
        u = self.op([kept], rows * rank, [*[kept] * trains_a, *A * kept.grad], trained=rank * d_in * trains_a)
        update = self.op(
            [u],
            rows * d_out,
            [*[u] * trains_b, *B * u.grad],
            trained=rank * d_out * trains_b,
            scratch=rows * d_out * size,
        )
        into, out = 2.0 * rows * rank * d_in, 2.0 * rows * rank * d_out
        self._count(into, float(trains_a) + float(kept.grad))
        self._count(out, float(trains_b) + float(u.grad))
        return self.op([y, update], y.numel, itemsize=y.itemsize)

    def lokr(self, x: Value, y: Value, rows: int, d_in: int, d_out: int, shapes: Mapping[str, Shape]) -> Value:
        """``y + scale * w1 X w2^T``: keeps X, which is x, and what lies between the two products."""
        _, m = shapes["lokr_w1"]
        of_w1, *of_w2 = map(prod, shapes.values())
        size, k, n = 2 if self.step.autocast else 4, d_out // shapes["lokr_w1"][0], d_in // m
        kept = x
        if kept.itemsize != size or self.step.autocast:
            kept = self.op([kept], kept.numel, itemsize=size)
        made = self.cast(k * n) or [Value(k * n)] * ("lokr_w2" not in shapes)  # of w2; a parameter is there already
        inner = self.op([kept], rows * m * k, [kept, *made * kept.grad], trained=sum(of_w2))
        turned = self.op([inner], inner.numel)
        update = self.op(
            [turned],
            rows * d_out,
            [turned, *self.cast(d_out // k * m)],
            trained=of_w1,
            scratch=rows * d_out * size,
        )
        self._count(2.0 * rows * d_in * k, 1.0 + kept.grad)
        self._count(2.0 * rows * d_out * m, 2.0)
        return self.op([y, update], y.numel, itemsize=y.itemsize)

    def norm(self, x: Value) -> Value:
        """LayerNorm with frozen weights: keeps its input, mean and reciprocal deviation."""
        return self._normalised(x, statistics=2)

    def rms_norm(self, x: Value) -> Value:
        """RMSNorm with frozen weights: keeps its input, in float32, and the reciprocal root."""
        return self._normalised(x, statistics=1)

    def _normalised(self, x: Value, statistics: int) -> Value:
        wide = self.step.autocast or statistics == 1  # computed in float32
        source = x if x.itemsize == 4 or not wide else self.op([x], x.numel, itemsize=4)
        rows = x.numel // self.model.hidden
        small = [Value(rows, 4) for _ in range(statistics)]
        return self.op([source], x.numel, [source, *small], itemsize=4 if self.step.autocast else x.itemsize)

    def activation(self, x: Value) -> Value:
        """The MLP's nonlinearity."""
        copies, scratch = ACTIVATIONS[self.model.activation]
        if self.model.activation == "relu":
            return self.op([x], x.numel, keeps_result=True)
        kept = [x, *(Value(x.numel, x.itemsize) for _ in range(copies - 1))]
        return self.op([x], x.numel, kept, scratch=scratch * x.nbytes)

    def add(self, x: Value, y: Value) -> Value:
        """A sum; keeps nothing."""
        return self.op([x, y], max(x.numel, y.numel))

    def multiply(self, x: Value, y: Value) -> Value:
        """An elementwise product: each factor is kept for the other's gradient."""
        return self.op([x, y], x.numel, [v for v, other in ((x, y), (y, x)) if other.grad])

    def shared(self, name: str, numel: int, itemsize: int = 4) -> Value:
        """A value that all layers share, such as rotary tables or a mask."""
        return self._shared.setdefault(name, Value(numel, itemsize))

    def mask(self, always: bool = False) -> list[Value]:
        """The mask that all blocks are given: additive for eager attention, else boolean and only of padded texts."""
        eager = self.model.attention == "eager"
        pairs = self.step.batch * self.model.tokens**2
        return [self.shared("mask", pairs, 4 if eager else 1)] if self.step.padded or (always and eager) else []

    def attention(self, q: Value, k: Value, v: Value, *, masked: bool = False, eager: bool = False) -> Value:
        """Softmax attention over the tokens of each example.

        Args:
            q, k, v: queries, keys and values; where one layer computes all three, the same value three times.
            masked: whether padding is masked out.
            eager: whether the family knows no other attention.
        """
        model, step = self.model, self.step
        scores = step.batch * model.heads * model.tokens**2
        wide = q.numel if q is not k else q.numel // 3  # of the result: q, k and v may be one fused value
        self._count(4.0 * step.batch * model.tokens**2 * (wide // self.rows), 2.0 * (q.grad or k.grad or v.grad))
        repeated = 1 < model.kv_heads < model.heads and q is not k  # a single head is broadcast, not copied
        if eager or model.attention == "eager":
            # Batched products take copies in their own layout, and so does what comes after them.
            q, k, v = (self.op([x], wide) for x in (q, k, v))
            return self.op([self._eager(q, k, v, scores)], wide)
        mask: tuple[Value, ...] = ()
        if masked:  # PyTorch turns a boolean mask into an additive one, in every layer anew
            mask = (Value(step.batch * model.tokens**2, self.work),)
            if repeated:
                k, v = (self.op([x], wide) for x in (k, v))
        operands = tuple(dict.fromkeys((q, k, v)))
        lse = Value(step.batch * model.heads * model.tokens)
        return self.op(operands, wide, (*operands, *mask, lse), itemsize=q.itemsize, keeps_result=True)

    def _eager(self, q: Value, k: Value, v: Value, scores: int) -> Value:
        raw = self.op([q, k], scores, [x for x, other in ((q, k), (k, q)) if other.grad])
        scaled = self.op([raw], scores)
        wide = 4 if self.step.autocast else scaled.itemsize
        probabilities = self.op([scaled], scores, itemsize=wide, keeps_result=True)
        if self.step.autocast:
            probabilities = self.op([probabilities], scores, itemsize=2)
        return self.op([probabilities, v], v.numel, [x for x, y in ((probabilities, v), (v, probabilities)) if y.grad])

    def first_token(self, x: Value) -> Value:
        """A view of each example's first position."""
        return self.op([x], x.numel // self.model.tokens, part_of=x)

    def blocks(self, block: Callable[..., Value], x: Value, *beside: Value) -> Value:
        """All transformer blocks, each checkpointed where the step asks for it and the block has a backward pass.

        Args:
            block: runs one block, given its input and the names of its linear layers.
            x: the first block's input.
            beside: what a checkpoint keeps beside a block's input.
        """
        for names in self.model.blocks:
            if not self.step.checkpointing:
                x = block(x, *names)
                continue
            outer, self.ops, before = self.ops, [], self.flops
            y = block(x, *names)
            inside, self.ops = self.ops, outer
            if inside:
                self.backward_flops += self.flops - before
                self.ops.append(Op((x,), y, (x, *beside), inside))
            x = y
        return x

    def _count(self, flops: float, backward: float) -> None:
        self.flops += flops
        self.backward_flops += flops * backward
