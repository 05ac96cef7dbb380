"""What a client that cannot hold rank 1 could change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from polyrank.core.architecture import MiB, ModelSpec, Quantization
from polyrank.core.costs.memory import architecture_of, memory
from polyrank.core.lowrank import Factors
from polyrank.core.types import LocalTraining

_SHORTEST = 16  # tokens


def remedies(spec: ModelSpec, local: LocalTraining, factors: Factors, room: float) -> tuple[str, ...]:
    """Changes under which rank 1 on every module would fit into `room` bytes, each enough by itself.

    Where no single change is enough, the two strongest together; where they are not either, what is missing.
    """
    ranks = spec.at(1)

    def fits(spec: ModelSpec, local: LocalTraining) -> bool:
        return memory(spec, local, ranks, factors).total <= room

    single = tuple(text for text, s, t in _changes(spec, local) if fits(s, t))
    if single:
        return tuple(_first_of_each_kind(single))
    smallest = replace(local, batch=1, checkpointing=True)
    for text, s in _lighter_bases(spec):
        if fits(s, smallest):
            return (f"batch 1, checkpointing{text}",)
    _, lightest = list(_lighter_bases(spec))[-1]
    missing = memory(lightest, smallest, ranks, factors).total - room
    return (f"{missing / MiB:,.0f} MiB more, even with batch 1, checkpointing and the lightest base",)


def _changes(spec: ModelSpec, local: LocalTraining) -> Iterator[tuple[str, ModelSpec, LocalTraining]]:
    batch = local.batch // 2
    while batch:
        yield f"batch {batch}", spec, replace(local, batch=batch)
        batch //= 2
    if not local.checkpointing:
        yield "checkpointing (local.checkpointing)", spec, replace(local, checkpointing=True)
    model = architecture_of(spec)
    tokens = model.tokens // 2
    while model.family != "vit" and tokens >= _SHORTEST:
        yield f"length {tokens} (model.max_length)", replace(spec, architecture=replace(model, tokens=tokens)), local
        tokens //= 2
    for text, lighter in list(_lighter_bases(spec))[1:]:
        yield text.removeprefix(", "), lighter, local


def _lighter_bases(spec: ModelSpec) -> Iterator[tuple[str, ModelSpec]]:
    """The base as it is, and quantised."""
    yield "", spec
    model = architecture_of(spec)
    options: tuple[Quantization, ...] = ("8bit", "4bit")
    for quantization in options if model.quantization is None else ():
        lighter = replace(model, quantization=quantization)
        yield f", a {quantization[0]}-bit base", replace(spec, architecture=lighter)


def _first_of_each_kind(changes: tuple[str, ...]) -> Iterator[str]:
    """The mildest change of each kind; they come mildest first."""
    seen = set()
    for change in changes:
        kind = change.split()[-1] if change.startswith("a ") else change.split()[0]
        if kind not in seen:
            seen.add(kind)
            yield change
