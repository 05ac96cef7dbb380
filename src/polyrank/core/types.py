"""The values that travel: between server and clients, from round to round, and into the records of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from polyrank.core.architecture import ModelSpec as ModelSpec
from polyrank.core.lowrank import Adapter, Factors, nbytes
from polyrank.core.privacy import UNPROTECTED, Privacy

Client = str
"""A client's name. Cohorts, updates and sums are ordered by it."""

Precision = Literal["auto", "fp32", "bf16"]
LRSchedule = Literal["constant", "linear", "cosine", "exponential"]
_MOST_PASSES = 1_000_000  # of a round: its steps are listed before the first
MeasuredOn = Literal["holdout", "clients"]
Labels = Literal["given", "sampled"]
FisherForm = Literal["trace", "squared", "norm"]
Target = Literal["log_likelihood", "logit"]


@dataclass(frozen=True)
class ClientProfile:
    """What a client reports of itself; everything but `examples` may be unknown (None).

    Attributes:
        examples: training examples it holds.
        rank: the LoRA rank per module its operator states, if any.
        memory: bytes of accelerator memory.
        uplink: bits per second towards the server.
        downlink: bits per second from the server.
        flops: floating-point operations per second it sustains.
        group: the name of its device group, for tables and figures.
    """

    examples: int
    rank: int | None = None
    memory: float | None = None
    uplink: float | None = None
    downlink: float | None = None
    flops: float | None = None
    group: str = ""


@dataclass(frozen=True)
class Limit:
    """How far one resource carries a client.

    Attributes:
        name: ``memory``, ``upload``, ``download``, or ``stated`` for a rank that was given.
        rank: the largest rank per module that it allows; 0 where not even rank 1 fits.
        unit: of the figures below: ``B`` or ``bit/s``; nothing for a stated rank.
        have: what the client has.
        need: what `rank` needs of it.
        more: what ``rank + 1`` would need; None where no module has room for it.
        advice: where not even rank 1 fits: changes under which it would, each a phrase.
    """

    name: str
    rank: int
    unit: str = ""
    have: float | None = None
    need: float | None = None
    more: float | None = None
    advice: tuple[str, ...] = ()


@dataclass(frozen=True)
class Budget:
    """What a client can afford, and why.

    Attributes:
        total: the rank budget: the sum of ranks over the adapted modules, so rank r on all of m modules is r * m.
        rank: the rank per module behind it.
        limit: the name of the limit that binds; ``full rank`` where none does.
        limits: all limits that were looked at.
    """

    total: int
    rank: int
    limit: str
    limits: tuple[Limit, ...] = ()


@dataclass(frozen=True)
class TailPenalty:
    """HetLoRA's local terms (EMNLP 2024, arXiv 2401.06432).

    A client of rank r adds ``weight * ||B[:, k:]||_F ||A[k:, :]||_F`` with ``k = floor(decay * r)`` to its loss,
    for every module; where that product has become smaller during the round, it drops those rows (self-pruning).
    """

    weight: float = 1e-3
    decay: float = 0.99
    prune: bool = True


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains in one round.

    Attributes:
        epochs: passes over the client's data, unless `steps` is given.
        steps: optimizer steps per round (None: as many as `epochs` takes).
        batch: examples per forward pass.
        accumulate: forward passes per optimizer step.
        optimizer: ``adamw`` or ``sgd``; its state lives for one round.
        lr: learning rate in round 0.
        schedule: how the rate changes over rounds: ``constant``, ``linear`` or ``cosine`` towards `lr_min`, or
            ``exponential`` by `lr_decay` a round.
        lr_min: the rate that ``linear`` and ``cosine`` would reach one round after the last.
        lr_decay: the factor per round, for ``exponential``.
        weight_decay: decoupled for AdamW; acts on trained tensors only.
        momentum: for SGD.
        clip: largest gradient norm (None: no clipping).
        dropout: LoRA dropout, on the input of A. The frozen base always runs without dropout.
        precision: ``auto`` is bf16 where the accelerator has it and fp32 on CPU; ``bf16`` autocasts activations.
            Adapters and optimizer states stay in float32.
        checkpointing: transformer blocks keep their inputs only and are computed again in the backward pass.
        group_by_length: batches hold examples of similar length, which costs less padding and makes their order a
            little less random (`polyrank.local.data.shuffled`).
        pack: the texts of a batch share rows, end to end (`polyrank.local.packing`): what is learnt is the same.
    """

    epochs: int = 1
    steps: int | None = None
    batch: int = 32
    accumulate: int = 1
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    schedule: LRSchedule = "constant"
    lr_min: float = 0.0
    lr_decay: float = 0.99
    weight_decay: float = 0.0
    momentum: float = 0.0
    clip: float | None = 1.0
    dropout: float = 0.0
    precision: Precision = "auto"
    checkpointing: bool = False
    group_by_length: bool = False
    pack: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"local.{name}: {getattr(self, name)} must be at least 1")
        for name in ("epochs", "steps"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= _MOST_PASSES:
                raise ValueError(f"local.{name}: {value} must be between 1 and {_MOST_PASSES:,}")
        for name, low, high in (("lr", 0.0, math.inf), ("clip", 0.0, math.inf), ("lr_decay", 0.0, 1.0)):
            value = getattr(self, name)
            if value is not None and not (low < value <= high and math.isfinite(value)):
                raise ValueError(f"local.{name}: {value} must be more than {low:g} and at most {high:g}")
        highest = {"lr_min": self.lr, "weight_decay": math.inf, "momentum": 1.0, "dropout": 1.0}
        for name, high in highest.items():
            value = getattr(self, name)
            if not (0 <= value <= high and math.isfinite(value)) or (name in ("momentum", "dropout") and value == 1):
                raise ValueError(f"local.{name}: {value} must be between 0 and {high:g}")

    def at(self, round_: int, rounds: int) -> LocalTraining:
        """The same settings with the learning rate of one round of `rounds`, counted from 0."""
        done = round_ / rounds
        span = self.lr - self.lr_min
        lr = {
            "constant": self.lr,
            "linear": self.lr_min + span * (1 - done),
            "cosine": self.lr_min + span * (1 + math.cos(math.pi * done)) / 2,
            "exponential": self.lr * self.lr_decay**round_,
        }[self.schedule]
        return replace(self, lr=lr, lr_min=min(lr, self.lr_min), schedule="constant")


@dataclass(frozen=True)
class Task:
    """Server to one client: all it must know for a round.

    Attributes:
        round: the round, from 0.
        adapter: the low-rank layers it trains, at its own ranks, and the dense parameters it trains.
        frozen: what it only runs: folds, the rows beyond its rank if the method carries them, a frozen head.
        factors: which factors it trains: ``A``, ``B`` or ``AB``.
        local: how it trains.
        penalty: terms added to its loss, if any.
        seed: the run's seed; the client's streams are named by round and client.
        privacy: what the client must protect, and how.
    """

    round: int
    adapter: Adapter
    frozen: Adapter
    factors: Factors
    local: LocalTraining
    penalty: TailPenalty | None
    seed: int
    privacy: Privacy = UNPROTECTED

    @property
    def nbytes(self) -> int:
        """Bytes of tensors sent down."""
        return nbytes(self.adapter) + nbytes(self.frozen)


@dataclass(frozen=True)
class Update:
    """Client to server: factors, not differences.

    Attributes:
        client: who sends it.
        adapter: the trained adapter. A factor that the task froze is the one that was sent; it does not travel.
        examples: training examples behind the update; 0 gives it no weight among clients that have some. Where
            clients are protected (`Privacy.clients`) it is 1 for everybody.
        factors: the factors that were trained, and so travel.
        metrics: figures of the local training: ``loss`` (mean over the round), ``steps``, ``seconds`` (simulated),
            ``memory`` (measured peak, bytes), and the ``bytes_down`` and ``bytes_up`` of real messages. Where anything
            is protected, none that tells of the data.
    """

    client: Client
    adapter: Adapter
    examples: float
    factors: Factors = "AB"
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of tensors sent up."""
        return nbytes(self.adapter, self.factors)


@dataclass(frozen=True)
class ServerState:
    """All that is carried from round to round; a checkpoint is this, saved.

    Attributes:
        round: the next round to run, from 0.
        adapter: the adapter in training, at the server's rank per layer, and the trained head.
        folded: frozen parts that belong to the model by now (FLoRA, FedEx-LoRA) and a frozen head. The base
            model itself is never written to.
        scores: importance per layer, as the last round was planned by.
        memory: what a method remembers, as JSON values: ``scored``, the round in which `scores` were made, and for
            example ``ranks`` that clients have pruned to.
    """

    round: int
    adapter: Adapter
    folded: Adapter = field(default_factory=Adapter)
    scores: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Query:
    """What a scorer asks to have measured on real data: an importance per adapted module of the server's model.

    Attributes:
        kind: ``fisher``: of per-example gradients, squared; ``gradient``: the norm of the mean gradient.
        on: the server's labelled ``holdout``, or the ``clients`` of the round, each on examples of its own.
        samples: examples to measure on, of the hold-out or of each client; None: all there are.
        labels: those ``given``, or ``sampled`` from the model's own prediction (the true Fisher information).
        form: what a module's score is of its Fisher diagonal (see `polyrank.methods.importance.fisher`).
        target: what is differentiated: ``log_likelihood`` of the label, or its raw ``logit``.
        round, seed: name the streams that draw examples and labels; filled in by `federate`.
        cohort: the clients of the round, likewise.
        most: examples that a client of the cohort weighs as at most, likewise.
    """

    kind: Literal["fisher", "gradient"]
    on: MeasuredOn = "holdout"
    samples: int | None = None
    labels: Labels = "given"
    form: FisherForm = "trace"
    target: Target = "log_likelihood"
    round: int = 0
    seed: int = 0
    cohort: tuple[Client, ...] = ()
    most: float = math.inf


@dataclass(frozen=True)
class RoundRecord:
    """What happened in a round; one line of ``rounds.jsonl``.

    Attributes:
        round: the round, from 0.
        factors: which factors were trained.
        lr: the learning rate of the round.
        ranks: client -> layer -> rank, for the cohort.
        bytes_down: bytes sent to each client: of tensors, or of the message where there is a wire.
        bytes_up: bytes each client sent back, likewise.
        losses: mean local training loss by client.
        examples: examples that each update counts as.
        dropped: clients that were asked and did not answer.
        refused: clients that were left out, or whose update was not used, and why (`polyrank.core.gate`).
        bounded: clients that count as less than they state or sent, and why.
        seconds: simulated seconds of the round, where the fleet states its links (the slowest client's).
        metrics: evaluation of the aggregated model, for example ``validation/accuracy``, if it was evaluated; under
            differential privacy, ``privacy/clients`` and ``privacy/examples``: epsilon of all rounds so far.
        predicted_memory: bytes that each client should need at its peak, where the cost model knows the model.
        measured_memory: bytes that each client did need, where it was measured.
        aggregation_error: the relative distance of the new model from the mean of the clients' models, where it was
            asked for (`polyrank.core.exactness.aggregation_error`).
        scores: importance per layer, in rounds for which a method measured or drew it anew and it is not all alike.
        client_metrics: ``accuracy`` and ``loss`` of the aggregated model on examples of each client's own that nobody
            trains on, where it was asked for.
    """

    round: int
    factors: Factors
    lr: float
    ranks: Mapping[Client, Mapping[str, int]]
    bytes_down: Mapping[Client, int]
    bytes_up: Mapping[Client, int]
    losses: Mapping[Client, float]
    examples: Mapping[Client, float]
    dropped: tuple[Client, ...] = ()
    refused: Mapping[Client, str] = field(default_factory=dict)
    bounded: Mapping[Client, str] = field(default_factory=dict)
    seconds: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    predicted_memory: Mapping[Client, float] = field(default_factory=dict)
    measured_memory: Mapping[Client, float] = field(default_factory=dict)
    aggregation_error: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    client_metrics: Mapping[Client, Mapping[str, float]] = field(default_factory=dict)


class Clients(Protocol):
    """Anything that can train a cohort: the simulator, a deployment, or a fake in tests."""

    def profiles(self) -> Mapping[Client, ClientProfile]:
        """What every client reports of itself; the same object for as long as nothing has changed."""
        ...

    def fit(self, tasks: Mapping[Client, Task]) -> Iterable[Update]:
        """Updates in ascending order of client; there may be fewer than tasks."""
        ...
