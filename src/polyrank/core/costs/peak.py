"""How much of what a tape recorded is alive at once: at the end of the forward pass, and moment by moment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from polyrank.core.costs.tape import Op, Value


@dataclass(frozen=True)
class Moment:
    """Bytes that a training step holds at one moment, beside parameters and the optimizer's states.

    Attributes:
        kept: activations that the backward pass has still to see.
        passing: activations and gradients that come and go.
        gradients: of parameters, as many as there are by then.
    """

    kept: int
    passing: int
    gradients: int

    @property
    def activations(self) -> int:
        """All but the gradients of parameters that stay."""
        return self.kept + self.passing


def saved_bytes(ops: Sequence[Op]) -> int:
    """Bytes kept for the backward pass at the end of the forward pass; a value that several keep counts once."""
    return sum(value.nbytes for value in dict.fromkeys(value for op in ops for value in op.saved))


def moments(ops: Sequence[Op], resident: int = 0) -> list[Moment]:
    """The forward and backward pass, operation by operation.

    Gradients of parameters come up one by one as the backward pass reaches them: where the model's last layers need
    most, such as a large vocabulary's logits, there are none yet.

    Args:
        ops: of a forward pass.
        resident: bytes of gradients that are there from the start, of batches before this one.
    """
    return [*_forward(ops, resident), *_backward(ops, resident)]


def _forward(ops: Sequence[Op], resident: int) -> Iterator[Moment]:
    kept: dict[Value, None] = {}
    total = 0
    for op in ops:
        inner = _unkept_peak(op.inside) if op.inside else 0
        loose = sum(v.nbytes for v in {*op.inputs, op.output} if v not in kept)
        yield Moment(total, loose + inner, resident)
        for value in op.saved:
            if value not in kept:
                kept[value] = None
                total += value.nbytes


def _unkept_peak(ops: Sequence[Op]) -> int:
    """Bytes of the largest operation of a block that keeps nothing."""
    return max((sum(v.nbytes for v in {*op.inputs, op.output}) for op in ops), default=0)


def _backward(ops: Sequence[Op], resident: int) -> Iterator[Moment]:
    """Gradients and saved values, from the last operation to the first."""
    users: dict[Value, int] = {}
    for op in ops:
        for value in dict.fromkeys(op.saved):
            users[value] = users.get(value, 0) + 1
    kept = sum(value.nbytes for value in users)
    gradients: dict[Value, int] = {ops[-1].output: ops[-1].output.nbytes} if ops else {}
    live, grown = sum(gradients.values()), 0
    yield Moment(kept, live, resident)
    for op in reversed(ops):
        for inner in _backward(op.inside, resident):
            yield Moment(kept + inner.kept, live + inner.passing, grown + inner.gradients)
        wanted = [x for x in dict.fromkeys(op.inputs) if x.grad]
        new = sum(x.nbytes for x in wanted)
        # A gradient that is there already grows in place, by another that comes and goes.
        again, first = (op.grows, 0) if resident else (0, op.grows)
        yield Moment(kept, live + new + op.scratch + again, resident + grown + first)
        grown += 0 if resident else op.grown
        live -= gradients.pop(op.output, 0)
        for value in dict.fromkeys(op.saved):
            users[value] -= 1
            if not users[value]:
                kept -= value.nbytes
        for x in wanted:
            if x in gradients:  # the sum of two gradients is a third tensor
                yield Moment(kept, live + 2 * x.nbytes, resident + grown)
            else:
                gradients[x] = x.nbytes
                live += x.nbytes
    yield Moment(kept, live, resident + grown)
