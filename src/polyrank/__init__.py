"""polyrank: one Hugging Face model, fine-tuned by many clients that cannot afford the same LoRA."""

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

__version__ = "0.1.0"

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
    "mean",
    "nbytes",
    "norm",
    "overlay",
    "pad",
    "plan",
    "rescale",
    "sample",
    "scored",
    "stack",
    "stream",
    "truncate",
]
