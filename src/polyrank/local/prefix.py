"""No forward pass twice through what a client does not train: hidden states below its lowest trained block, kept.

Blocks below the lowest trained one need no backward pass; autograd sees to that. Their forward pass gives the same
hidden states in every epoch, and in every round in which nothing below has changed: the frozen base, and the folds
and carried layers that are attached to it. They are computed once, and training goes on from them: the blocks below
hand their input on, and the lowest trained block gets the kept rows in its place. With L blocks of which the top k are
trained, and E epochs, a step costs (L + k) / 2L of a whole one without the cache and ((L - k) / E + 2k) / 2L with it.

A client's rows are computed together, in batches that depend on its examples alone (`by_length`), whenever they are
needed: products of another shape round differently, so rows taken from whatever batch came first would make a resumed
run another run. So the bytes of an update depend on whether a client's rows are kept, by rounding, but not on when they
were computed, nor on what else the cache holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyrank.core.types import Client, LocalTraining, Task
from polyrank.data.padding import RIGHT
from polyrank.local.attach import Attachment, Batch
from polyrank.local.base import Base
from polyrank.local.data import Examples, Indices, by_length
from polyrank.local.optimizer import autocast

POSITIONS = 2048
"""Most input positions of the batches in which rows are computed: as many as evaluation takes at once."""

Extras = tuple[None, ...]


@dataclass(frozen=True, eq=False)
class Prefix:
    """What enters a block, for each of a client's examples.

    Attributes:
        base: the model.
        block: the lowest trained block, at least 1.
        extras: fills the places of what its blocks return beside hidden states; None where they return these alone.
        ids: the examples, ascending (n,).
        starts: where each one's rows begin in `values` (n,).
        lengths: rows of each, T_i (n,).
        values: hidden states, (sum of T_i) x d, on the model's device.
    """

    base: Base
    block: int
    extras: Extras | None
    ids: Indices
    starts: Indices
    lengths: Indices
    values: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the hidden states."""
        return self.values.numel() * self.values.element_size()

    def rows(self, chosen: Indices, positions: int) -> Tensor:
        """The hidden states of these examples, b x T x d, zero at positions that only fill up the batch."""
        at = np.searchsorted(self.ids, chosen)
        steps = np.arange(positions)
        inside = steps < self.lengths[at][:, None]
        where = torch.from_numpy(np.where(inside, self.starts[at][:, None] + steps, 0))
        rows = self.values.index_select(0, where.flatten().to(self.values.device)).unflatten(0, where.shape)
        if not inside.all():
            rows.masked_fill_(torch.from_numpy(~inside).to(rows.device)[..., None], 0.0)
        return rows

    def resumed(self, chosen: Indices) -> AbstractContextManager[None]:
        """The model goes on from these examples' rows, until the context ends."""
        return resumed([(self, chosen)])


@contextmanager
def resumed(parts: Sequence[tuple[Prefix, Indices]]) -> Iterator[None]:
    """The model goes on from the rows of several clients, one after another in the batch, until the context ends.

    Args:
        parts: each client's rows and its examples in the batch; all of one model and block.
    """
    first = parts[0][0]

    def rows(like: Tensor) -> Tensor:
        return torch.cat([prefix.rows(chosen, like.shape[1]) for prefix, chosen in parts])

    with _going_on(first.base, first.block, first.extras, rows):
        yield


class Prefixes:
    """The prefixes of clients, one each, at most `limit` bytes in all; those not used for longest go first.

    Args:
        base: the frozen model.
        data: the examples of all clients; a batch of the same examples is always the same.
        limit: bytes. A client whose rows alone are more trains without.
    """

    def __init__(self, base: Base, data: Examples, limit: float) -> None:
        self.base, self.data, self.limit = base, data, limit
        self._one_stack = len({name.rpartition(".")[0] for name in base.blocks}) == 1
        self._kept: dict[Client, tuple[bytes, Prefix]] = {}  # in order of use
        self._enters: dict[int, bool] = {}  # by block: whether the model goes on from its input alone

    @property
    def nbytes(self) -> int:
        """Bytes that are held now."""
        return sum(prefix.nbytes for _, prefix in self._kept.values())

    def of(self, task: Task, client: Client, indices: Indices) -> Prefix | None:
        """The client's prefix for this task, kept or computed now; not to be called while an adapter is attached.

        None where nothing is to be gained or it would be wrong: the lowest block is trained, the round does not see
        every example, a module may drop units, the rows do not fit, or the model cannot go on from one block's input.
        """
        block = self.block(task, indices)
        if block == 0:
            return None
        key = _fingerprint(self.base, task, block, indices)
        held, prefix = self._kept.pop(client, (b"", None))
        if held != key:
            prefix = self._computed(task, block, indices)
        if prefix is not None:
            self._kept[client] = key, prefix
        return prefix

    def block(self, task: Task, indices: Indices) -> int:
        """The block that this client's training would go on from; 0 where it starts from the input."""
        block = lowest(self.base, task) if self._one_stack else 0
        drops = any(module.training for module in self.base.modules.values())
        # Rows are kept without what fills them up on the right.
        if getattr(self.data, "padding", RIGHT).side != "right":
            return 0
        if drops or not _sees_all(task.local, len(indices)) or not self._enters.get(block, True):
            return 0
        return block

    def _computed(self, task: Task, block: int, indices: Indices) -> Prefix | None:
        data, batches = self.data, list(by_length(indices, self.data.lengths, POSITIONS))
        with (
            self.base.attached(task.adapter, task.frozen, task.factors) as model,
            autocast(task.local, self.base.device),
        ):
            few = data.batch(batches[-1][-2:])  # the shortest
            hidden, extras = _entering(self.base, block, model, few)
            if block not in self._enters:
                self._enters[block] = _in_rows(hidden, few) and _goes_on(self.base, block, model, few)
            # Where a parameter outside all blocks is trained and lies below them, its gradient reaches the rows.
            if not self._enters[block] or hidden.requires_grad:
                return None
            order = np.concatenate(batches)
            # Texts are padded on the right, and what pads them is masked; images have as many positions each.
            lengths = data.lengths[order] if "attention_mask" in few else np.full(len(order), hidden.shape[1])
            values = self._room(int(lengths.sum()), hidden)
            if values is None:
                return None
            done = rows = 0
            for chosen in batches:
                hidden, _ = _entering(self.base, block, model, data.batch(chosen))
                inside = np.arange(hidden.shape[1]) < lengths[done : done + len(chosen), None]
                own = hidden[torch.from_numpy(inside).to(hidden.device)]
                values[rows : rows + len(own)] = own
                done, rows = done + len(chosen), rows + len(own)
        ids, starts = np.argsort(order), np.cumsum(lengths) - lengths
        return Prefix(self.base, block, extras, order[ids], starts[ids], lengths[ids], values)

    def _room(self, rows: int, like: Tensor) -> Tensor | None:
        """Space for so many rows, made by letting go of what was not used for longest; None where there is none."""
        needed = rows * like.shape[-1] * like.element_size()
        if needed > self.limit:
            return None
        while self._kept and self.nbytes + needed > self.limit:
            del self._kept[next(iter(self._kept))]
        return like.new_empty(rows, like.shape[-1])


def lowest(base: Base, task: Task) -> int:
    """The lowest transformer block with a trained tensor; the last one where the head alone is trained."""
    return min(base.lowest(task.adapter), len(base.blocks) - 1)


def _sees_all(local: LocalTraining, examples: int) -> bool:
    """Whether a round takes as many examples as the client has: computing the rows of all then costs no more."""
    seen = None if local.steps is None else local.steps * local.batch * local.accumulate
    return examples > 0 and (seen is None or seen >= examples)


def _fingerprint(base: Base, task: Task, block: int, indices: Indices) -> bytes:
    """Of all that the rows depend on beside the base: whose they are, and what is attached below `block`, by content.

    What is in no block may lie below.
    """

    def below(name: str) -> bool:
        inside = base.block_of(name)
        return inside is None or inside < block

    digest = hashlib.blake2b(indices.tobytes())
    scales = sorted((name, x.scale) for name, x in task.frozen.layers.items() if below(name))
    digest.update(repr((block, task.local.precision, sorted(task.adapter.dense), scales)).encode())
    tensors = {name: tensor for name, tensor in task.frozen.dense.items() if below(name)}
    for name, x in task.frozen.layers.items():
        if below(name):
            tensors |= {f"{name}.A": x.A, f"{name}.B": x.B}
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, tensor.shape, tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.digest()


class _Reached(Exception):  # noqa: N818 -- nothing went wrong
    """The forward pass has come to the block whose input is wanted."""


def _entering(base: Base, block: int, model: Attachment, batch: Batch) -> tuple[Tensor, Extras | None]:
    """What enters a block, b x T x d, and places for what the block below returns beside it. Nothing above runs."""
    found: list[Any] = []

    def below(module: object, args: tuple[Any, ...], output: Any) -> None:
        found.append((None,) * (len(output) - 1) if isinstance(output, tuple) else None)

    def stop(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs.get("hidden_states"))
        raise _Reached

    under, at = (base.modules[base.blocks[index]] for index in (block - 1, block))
    handles = under.register_forward_hook(below), at.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(batch)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    extras, hidden = found
    return hidden, extras


@contextmanager
def _going_on(base: Base, block: int, extras: Extras | None, rows: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Blocks below `block` hand their input on, and it gets `rows` of that input in its place.

    Embeddings run as ever, and so does what makes masks and positions of them: that is cheap, and differs by family.
    """

    def hand_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states if extras is None else (hidden_states, *extras)

    def replaced(
        module: object, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (rows(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": rows(kwargs["hidden_states"])}

    below = [base.modules[name] for name in base.blocks[:block]]
    handle = base.modules[base.blocks[block]].register_forward_pre_hook(replaced, with_kwargs=True)
    for module in below:
        module.forward = hand_on
    try:
        yield
    finally:
        handle.remove()
        for module in below:
            del module.forward


def _in_rows(hidden: object, batch: Batch) -> bool:
    """Whether it is b x T x d, for the examples of the batch and, of texts, their positions."""
    shape = tuple(next(iter(batch.values())).shape)
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        return False
    return hidden.shape[:2] == shape if "input_ids" in batch else hidden.shape[0] == shape[0]


def _goes_on(base: Base, block: int, model: Attachment, batch: Batch) -> bool:
    """Whether the model's logits follow from what enters `block`: not where blocks above take more from those below."""
    wanted, (hidden, extras) = model(batch).detach(), _entering(base, block, model, batch)
    with _going_on(base, block, extras, lambda like: hidden):
        return torch.allclose(model(batch), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
