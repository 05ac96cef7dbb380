"""Who trains together: the groups of a round's clients that cost least, by a model of what a training pass costs.

A pass costs its input positions, weighted by how deep its backward pass goes and how wide its adapters are, and a fixed
overhead. Together, clients share the overhead; but texts are padded to the longest of all, the backward pass goes down
to the lowest layer of all, and ranks are padded to the highest. Where the overhead is small beside a client's own
batch, clients train one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from polyrank.local.base import Base
from polyrank.local.cohort import Job
from polyrank.local.data import Indices
from polyrank.local.heads import stackable
from polyrank.local.lokr import is_part
from polyrank.local.packing import rows_of

OVERHEAD = {"cpu": 2.4e8, "cuda": 5e10}
"""Floating-point operations that a pass's fixed cost is worth, per transformer block and CPU thread.

Estimates: on a CPU from how much slower a model of MiniLM's size runs with 32 positions than with 512, on a GPU from
some 60 kernel launches of 5 us per block. They decide who shares a pass, not what comes out of it.
"""

TOGETHER = {"cpu": 1024, "cuda": 16384}
"""Most input positions of a pass that clients share, where nothing else is said: beyond, nothing is left to gain."""


@dataclass(frozen=True)
class Load:
    """What a client's round asks of a forward and backward pass.

    Attributes:
        passes: how many.
        rows, positions: examples of a batch, and positions of an example (the mean of its batches' longest).
        depth: the part of a full forward and backward pass that it takes, 1/2 to 1.
        width: operations on its adapter over those on the base.
    """

    passes: int
    rows: int
    positions: float
    depth: float
    width: float


def key(job: Job, base: Base, block: int = 0) -> Hashable:
    """What clients must have in common to train together; a client that cannot has a key of its own.

    Args:
        job: the client's.
        base: the frozen model.
        block: that the client's training goes on from, where what is below is kept.
    """
    task, local = job.task, job.task.local
    own = [name for name in task.adapter.dense if not is_part(name)]
    if not job.steps or not stackable(base.modules, own):
        return job.client
    return (
        (block, local.batch, local.accumulate, local.pack, local.optimizer, local.momentum),
        (local.dropout, local.precision, local.checkpointing),
        tuple((name, tensor.shape) for name, tensor in task.adapter.dense.items()),
        tuple((name, id(tensor)) for name, tensor in task.frozen.dense.items()),
    )


def load(job: Job, base: Base, lengths: Indices) -> Load:
    """What a client's round asks of a forward and backward pass."""
    total = len(base.blocks) or 1
    batches = [batch for step in job.steps for batch in step]
    elements = sum(x.A.numel() + x.B.numel() for x in job.task.adapter.layers.values())
    return Load(
        passes=len(batches),
        rows=max(len(rows_of(batch, lengths, job.task.local.pack)) for batch in batches),
        positions=float(np.mean([lengths[batch].max() for batch in batches])),
        depth=(2 * total - base.lowest(job.task.adapter)) / (2 * total),
        width=1.5 * elements / base.weights,
    )


def overhead(base: Base, threads: int) -> float:
    """The fixed cost of a forward and backward pass with its part of a step, in input positions."""
    fixed = OVERHEAD["cpu"] * threads if base.device.type == "cpu" else OVERHEAD["cuda"]
    return fixed * len(base.blocks) / (4 * base.weights)


def cost(loads: Sequence[Load], fixed: float) -> float:
    """What training these together costs, in input positions: padded to the longest, deepest and widest of them."""
    per_position = max(x.depth for x in loads) + max(x.width for x in loads)
    passes = [x.passes for x in loads]
    return sum(passes) * _longest(loads) * per_position + max(passes) * fixed


def _longest(loads: Sequence[Load]) -> float:
    """Input positions of each client's part of a pass."""
    return max(x.rows for x in loads) * max(x.positions for x in loads)


def cheapest(loads: Sequence[Load], fixed: float, positions: float) -> list[tuple[int, int]]:
    """The cuts of a sequence of clients into neighbours who train together that cost least: from, to.

        best[j] = min over i of best[i] + cost(loads[i:j])

    Args:
        loads: of the clients, sorted so that neighbours are alike.
        fixed: a pass's fixed cost.
        positions: most input positions of a pass of several clients.
    """
    best, cut = [0.0], [0]
    for stop in range(1, len(loads) + 1):
        options = []
        for start in range(stop - 1, -1, -1):
            together = loads[start:stop]
            if len(together) > 1 and len(together) * _longest(together) > positions:
                break
            options.append((best[start] + cost(together, fixed), start))
        found = min(options)
        best.append(found[0])
        cut.append(found[1])
    parts: list[tuple[int, int]] = []
    stop = len(loads)
    while stop:
        parts.append((cut[stop], stop))
        stop = cut[stop]
    return parts[::-1]


def grouped(
    jobs: Sequence[Job],
    base: Base,
    lengths: Indices,
    positions: int,
    threads: int,
    block: Callable[[Job], int] = lambda job: 0,
) -> list[list[Job]]:
    """The jobs in the groups that train together; in each, those with the most steps first.

    Args:
        jobs: of a round.
        base: the frozen model.
        lengths: input positions of every example.
        positions: most input positions of a pass of several clients; 0: everybody trains alone.
        threads: of the CPU.
        block: that a client's training goes on from, where what is below is kept; 0: from the input.
    """
    alike: dict[Hashable, list[tuple[Load, Job]]] = {}
    for job in jobs:
        if not positions or not job.steps or job.task.privacy.examples is not None:
            alike[job.client] = [(Load(0, 0, 0.0, 1.0, 0.0), job)]
        else:
            alike.setdefault(key(job, base, block(job)), []).append((load(job, base, lengths), job))
    fixed, groups = overhead(base, threads), []
    for members in alike.values():
        members.sort(key=lambda pair: (pair[0].depth, pair[0].rows, pair[0].positions, pair[0].width, pair[1].client))
        for start, stop in cheapest([x for x, _ in members], fixed, positions):
            together = [job for _, job in members[start:stop]]
            groups.append(sorted(together, key=lambda job: (-len(job.steps), job.client)))
    return groups
