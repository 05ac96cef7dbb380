"""polyrank: one Hugging Face model, fine-tuned by many clients that cannot afford the same LoRA."""

import importlib
import os
import typing

from polyrank.version import __version__ as __version__

# A thread that has done its part of a product spins until the others have. Where another process has their cores, that
# is until they get one back, hundreds of times a step; spinning for a shorter while costs nothing and leaves them room.
# OpenMP reads this when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

if typing.TYPE_CHECKING:
    from polyrank.core.compress import compress
    from polyrank.core.fake import FakeClients
    from polyrank.core.federate import absorb, federate, plan, sample, scored
    from polyrank.core.lowrank import (
        Adapter,
        LowRank,
        delta,
        fresh,
        mean,
        nbytes,
        norm,
        overlay,
        pad,
        rescale,
        stack,
        truncate,
    )
    from polyrank.core.method import Boost, Method
    from polyrank.core.privacy import ClientPrivacy, ExamplePrivacy, Privacy
    from polyrank.core.rng import stream
    from polyrank.core.types import (
        ClientProfile,
        Clients,
        LocalTraining,
        ModelSpec,
        Query,
        RoundRecord,
        ServerState,
        TailPenalty,
        Task,
        Update,
    )
    from polyrank.methods import AGGREGATORS, ALLOCATORS, DISPATCHERS, ESTIMATORS, METHODS, SCHEDULES, SCORERS

__all__ = [
    "AGGREGATORS",
    "ALLOCATORS",
    "DISPATCHERS",
    "ESTIMATORS",
    "METHODS",
    "SCHEDULES",
    "SCORERS",
    "Adapter",
    "Boost",
    "ClientPrivacy",
    "ClientProfile",
    "Clients",
    "ExamplePrivacy",
    "FakeClients",
    "LocalTraining",
    "LowRank",
    "Method",
    "ModelSpec",
    "Privacy",
    "Query",
    "Results",
    "RoundRecord",
    "ServerState",
    "TailPenalty",
    "Task",
    "Update",
    "absorb",
    "compress",
    "delta",
    "federate",
    "fresh",
    "load",
    "mean",
    "nbytes",
    "norm",
    "overlay",
    "pad",
    "plan",
    "rescale",
    "run",
    "sample",
    "scored",
    "stack",
    "stream",
    "truncate",
]

_HOMES = {
    "polyrank.core.compress": ("compress",),
    "polyrank.core.fake": ("FakeClients",),
    "polyrank.core.federate": (
        "absorb",
        "federate",
        "plan",
        "sample",
        "scored",
    ),
    "polyrank.core.lowrank": (
        "Adapter",
        "LowRank",
        "delta",
        "fresh",
        "mean",
        "nbytes",
        "norm",
        "overlay",
        "pad",
        "rescale",
        "stack",
        "truncate",
    ),
    "polyrank.core.method": (
        "Boost",
        "Method",
    ),
    "polyrank.core.privacy": (
        "ClientPrivacy",
        "ExamplePrivacy",
        "Privacy",
    ),
    "polyrank.core.rng": ("stream",),
    "polyrank.core.types": (
        "ClientProfile",
        "Clients",
        "LocalTraining",
        "ModelSpec",
        "Query",
        "RoundRecord",
        "ServerState",
        "TailPenalty",
        "Task",
        "Update",
    ),
    "polyrank.experiment.results": (  # not among the imports for type checkers: it imports this module itself
        "Results",
        "load",
        "run",
    ),
    "polyrank.methods": (
        "AGGREGATORS",
        "ALLOCATORS",
        "DISPATCHERS",
        "ESTIMATORS",
        "METHODS",
        "SCHEDULES",
        "SCORERS",
    ),
}


def __getattr__(name: str) -> typing.Any:
    """A public name, imported when it is first asked for: a client's process that only carries bytes needs no torch."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
