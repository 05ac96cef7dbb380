"""How training examples are spread over clients: equally, by class, by quantity, or as the data says.

Every partitioner is a function ``(source, clients, rng, *, options) -> Partition``; parts are disjoint, and cover
the data unless the docstring says otherwise.
"""

from __future__ import annotations

import numpy as np

from polyrank.data.partition import Partition, from_owners, members, top_up
from polyrank.data.pathological import pathological
from polyrank.data.source import DataError, Source, unknown

# Whole draws that miss the minimum are thrown away this often before examples are moved instead.
_REDRAWS = 10


def _need_clients(source: Source, clients: int | None, partitioner: str, each: int = 1) -> int:
    if clients is None:
        raise DataError(f"partition {partitioner!r} needs the number of clients")
    if clients < 1:
        raise DataError(f"partition {partitioner!r}: {clients} clients; there must be at least 1")
    if each < 0:
        raise DataError(f"partition {partitioner!r}: minimum is {each}; it must be at least 0")
    need = clients * max(each, 1)
    if need > len(source):
        raise DataError(
            f"partition {partitioner!r}: {clients} clients of at least {max(each, 1)} example(s) need {need},"
            f" but the training split has only {len(source)} examples"
        )
    return clients


def _positive(partitioner: str, name: str, value: float) -> float:
    if not 0 < value < float("inf"):
        raise DataError(f"partition {partitioner!r}: {name} is {value}; it must be positive and finite")
    return value


def _cuts(shares: np.ndarray, count: int) -> np.ndarray:
    """Whole numbers near ``shares * count`` that sum to `count` (differences of the rounded running sum)."""
    ends = np.rint(np.cumsum(shares) / shares.sum() * count).astype(np.int64)
    return np.diff(ends, prepend=0)


def iid(source: Source, clients: int | None, rng: np.random.Generator) -> Partition:
    """Shuffled examples in parts whose sizes differ by at most one."""
    clients = _need_clients(source, clients, "iid")
    owners = np.empty(len(source), np.int64)
    owners[rng.permutation(len(source))] = np.arange(len(source)) % clients
    return from_owners(owners, clients)


def dirichlet(
    source: Source, clients: int | None, rng: np.random.Generator, *, alpha: float = 0.5, minimum: int = 1
) -> Partition:
    """Each class spread over the clients in Dirichlet(alpha) proportions.

    For every class k: p_k ~ Dir(alpha, ..., alpha) over clients, and client i gets p_ki of the class's examples.
    A large alpha tends to uniform, a small one to one client per class.

    Args:
        source: the training split.
        clients: how many clients.
        rng: the randomness.
        alpha: concentration, above 0.
        minimum: examples that every client must have. A draw that leaves a client below it is redrawn as a whole,
            up to ten times; after that the missing examples are moved from the clients that are then largest.

    References:
        Hsu, Qi, Brown: Measuring the effects of non-identical data distribution, arXiv:1909.06335.
    """
    clients = _need_clients(source, clients, "dirichlet", minimum)
    _positive("dirichlet", "alpha", alpha)
    classes = members(source.labels).values()
    owners = np.empty(len(source), np.int64)
    for _ in range(_REDRAWS):
        for own in classes:
            shares = rng.dirichlet(np.full(clients, alpha))
            owners[rng.permutation(own)] = np.repeat(np.arange(clients), _cuts(shares, len(own)))
        if np.bincount(owners, minlength=clients).min() >= minimum:
            break
    return from_owners(top_up(owners, clients, minimum, rng), clients)


def shards(source: Source, clients: int | None, rng: np.random.Generator, *, per_client: int = 2) -> Partition:
    """Examples sorted by class, cut into equal shards, `per_client` random shards for each client.

    References:
        McMahan et al.: Communication-efficient learning of deep networks, arXiv:1602.05629.
    """
    if per_client < 1:
        raise DataError(f"partition 'shards': per_client is {per_client}; it must be at least 1")
    clients = _need_clients(source, clients, "shards", per_client)
    total = clients * per_client
    shuffled = rng.permutation(len(source))
    by_class = shuffled[np.argsort(source.labels[shuffled], kind="stable")]
    shard = np.arange(len(source)) * total // len(source)
    owner_of_shard = rng.permutation(np.repeat(np.arange(clients), per_client))
    owners = np.empty(len(source), np.int64)
    owners[by_class] = owner_of_shard[shard]
    return from_owners(owners, clients)


def by_quantity(
    source: Source,
    clients: int | None,
    rng: np.random.Generator,
    *,
    sizes: list[int] | None = None,
    alpha: float | None = None,
) -> Partition:
    """Random examples in unequal amounts: the given sizes, or Dirichlet(alpha) over the clients.

    Args:
        source: the training split.
        clients: how many clients; with `sizes` it may be None.
        rng: the randomness.
        sizes: examples for each client; what is beyond their sum is left unused.
        alpha: concentration of the clients' shares of all examples; everyone gets at least one.
    """
    if (sizes is None) == (alpha is None):
        raise DataError(f"partition 'by_quantity' needs one of sizes and alpha; got sizes={sizes}, alpha={alpha}")
    if sizes is not None:
        amounts = _given_sizes(source, clients, sizes)
        clients = len(amounts)
    else:
        clients = _need_clients(source, clients, "by_quantity")
        shares = rng.dirichlet(np.full(clients, _positive("by_quantity", "alpha", alpha)))
        amounts = _cuts(shares, len(source))
    owners = np.full(len(source), -1, np.int64)
    owners[rng.permutation(len(source))[: amounts.sum()]] = np.repeat(np.arange(clients), amounts)
    return from_owners(owners if sizes else top_up(owners, clients, 1, rng), clients)


def _given_sizes(source: Source, clients: int | None, sizes: list[int]) -> np.ndarray:
    if clients is not None and clients != len(sizes):
        raise DataError(f"partition 'by_quantity': {clients} clients, but {len(sizes)} sizes")
    if not sizes or min(sizes) < 1:
        raise DataError(f"partition 'by_quantity': sizes are {sizes}; there must be some, each at least 1")
    if sum(sizes) > len(source):
        raise DataError(
            f"partition 'by_quantity': sizes sum to {sum(sizes)}, but the training split has only"
            f" {len(source)} examples"
        )
    return np.asarray(sizes, np.int64)


def by_column(source: Source, clients: int | None, rng: np.random.Generator, *, column: str) -> Partition:
    """Natural clients: one for each value of a column, such as the writer or the speaker.

    Args:
        source: the training split.
        clients: None for all of them; a number keeps that many, the largest (the first in order of value where
            sizes tie), and leaves the others' examples unused.
        rng: not used; nature has drawn already.
        column: a column that was loaded with the data.
    """
    if column not in source.columns:
        raise unknown("column", column, source.columns, "partition 'by_column'")
    values, owners, sizes = np.unique(source.columns[column], return_inverse=True, return_counts=True)
    kept = np.arange(len(values))
    if clients is not None:
        if not 1 <= clients <= len(values):
            raise DataError(f"partition 'by_column': {clients} clients, but column {column!r} has {len(values)} values")
        kept = np.sort(np.argsort(-sizes, kind="stable")[:clients])
    renumbered = np.full(len(values), -1, np.int64)
    renumbered[kept] = np.arange(len(kept))
    names = tuple(str(value) for value in values[kept].tolist())
    return from_owners(renumbered[owners], len(kept), names)


PARTITIONERS = {
    "by_column": by_column,
    "by_quantity": by_quantity,
    "dirichlet": dirichlet,
    "iid": iid,
    "pathological": pathological,
    "shards": shards,
}
