"""A partition: which training examples each client holds, as two flat arrays however many clients there are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Partition:
    """Client i holds the examples ``order[offsets[i]:offsets[i + 1]]``.

    Attributes:
        order: example indices, grouped by client, int64.
        offsets: int64 (clients + 1,), from 0 to len(order).
        names: the natural clients' names, or None for clients that are only numbers.
    """

    order: np.ndarray
    offsets: np.ndarray
    names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, client: int) -> np.ndarray:
        if not 0 <= client < len(self):
            raise IndexError(f"client {client} of {len(self)}")
        return self.order[self.offsets[client] : self.offsets[client + 1]]

    @property
    def sizes(self) -> np.ndarray:
        """Examples per client, int64 (clients,)."""
        return np.diff(self.offsets)

    def counts(self, labels: np.ndarray, classes: int) -> np.ndarray:
        """Examples per client and class, int64 (clients, classes)."""
        client = np.repeat(np.arange(len(self)), self.sizes)
        cells = np.bincount(client * classes + labels[self.order], minlength=len(self) * classes)
        return cells.reshape(len(self), classes)


def from_owners(owners: np.ndarray, clients: int, names: tuple[str, ...] | None = None) -> Partition:
    """The partition in which client ``owners[i]`` holds example i, and nobody holds it where that is -1.

    A client's examples keep their order in the data.
    """
    order = np.argsort(owners, kind="stable")
    held = np.bincount(owners + 1, minlength=clients + 1)
    offsets = np.concatenate([[0], np.cumsum(held[1:])])
    return Partition(order[held[0] :], offsets, names)


def members(labels: np.ndarray) -> dict[int, np.ndarray]:
    """The indices of each class, ascending, in one pass however many classes there are; `labels` are 0 or above."""
    # numpy sorts whole numbers of at most 16 bits by radix, ten times as fast.
    order = np.argsort(labels.astype(np.min_scalar_type(labels.max())), kind="stable")
    present, starts = np.unique(labels[order], return_index=True)
    return dict(zip(present.tolist(), np.split(order, starts[1:]), strict=True))


def top_up(owners: np.ndarray, clients: int, minimum: int, rng: np.random.Generator) -> np.ndarray:
    """Owners in which everyone has `minimum` examples, the missing ones moved over from the largest clients.

    Moving one example at a time from whoever is then largest cuts all donors to one common level; that level is
    found directly. Which examples a donor gives is random.

    Args:
        owners: the client of each example, int64 (N,), all assigned.
        clients: how many clients there are; clients * minimum must not exceed N.
        minimum: examples that everyone must end up with.
        rng: chooses the examples that move.
    """
    sizes = np.bincount(owners, minlength=clients)
    short = np.maximum(minimum - sizes, 0)
    need = int(short.sum())
    if need == 0:
        return owners
    low, high = minimum, int(sizes.max())
    while high - low > 1:
        level = (low + high) // 2
        low, high = (level, high) if np.maximum(sizes - level, 0).sum() >= need else (low, level)
    gives = np.maximum(sizes - low, 0)
    spared = np.flatnonzero(gives)[: gives.sum() - need]
    gives[spared] -= 1
    shuffled = rng.permutation(len(owners))
    ordered = shuffled[np.argsort(owners[shuffled], kind="stable")]
    rank = np.arange(len(owners)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    moved = ordered[rank < np.repeat(gives, sizes)]
    topped = owners.copy()
    topped[moved] = np.repeat(np.arange(clients), short)
    return topped
