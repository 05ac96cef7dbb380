"""How much of what a tape recorded is alive at once: at the end of the forward pass, and at the worst moment."""

from __future__ import annotations

from collections.abc import Sequence

from polyrank.core.costs.tape import Op, Value


def saved_bytes(ops: Sequence[Op]) -> int:
    """Bytes kept for the backward pass at the end of the forward pass; a value that several keep counts once."""
    return sum(value.nbytes for value in dict.fromkeys(value for op in ops for value in op.saved))


def peak_bytes(ops: Sequence[Op]) -> int:
    """The most bytes of activations and their gradients alive at any moment of the forward and backward pass."""
    return max(_forward_peak(ops), _backward_peak(ops))


def _forward_peak(ops: Sequence[Op]) -> int:
    kept: dict[Value, None] = {}
    total = peak = 0
    for op in ops:
        inner = _unkept_peak(op.inside) if op.inside else 0
        loose = sum(v.nbytes for v in {*op.inputs, op.output} if v not in kept)
        peak = max(peak, total + loose + inner)
        for value in op.saved:
            if value not in kept:
                kept[value] = None
                total += value.nbytes
    return peak


def _unkept_peak(ops: Sequence[Op]) -> int:
    """Bytes of the largest operation of a block that keeps nothing."""
    return max((sum(v.nbytes for v in {*op.inputs, op.output}) for op in ops), default=0)


def _backward_peak(ops: Sequence[Op]) -> int:
    """Gradients and saved values, from the last operation to the first."""
    users: dict[Value, int] = {}
    for op in ops:
        for value in dict.fromkeys(op.saved):
            users[value] = users.get(value, 0) + 1
    kept = sum(value.nbytes for value in users)
    gradients: dict[Value, int] = {ops[-1].output: ops[-1].output.nbytes} if ops else {}
    live = sum(gradients.values())
    peak = kept + live
    for op in reversed(ops):
        inner = _backward_peak(op.inside) if op.inside else 0
        wanted = [x for x in dict.fromkeys(op.inputs) if x.grad]
        new = sum(x.nbytes for x in wanted)
        peak = max(peak, kept + live + new + op.scratch, kept + live + inner)
        live -= gradients.pop(op.output, 0)
        for x in wanted:
            if x not in gradients:
                gradients[x] = x.nbytes
                live += x.nbytes
        for value in dict.fromkeys(op.saved):
            users[value] -= 1
            if not users[value]:
                kept -= value.nbytes
    return peak
