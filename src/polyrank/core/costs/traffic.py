"""Bytes on the wire and the seconds they take, and what a client computes in a round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from polyrank.core.architecture import ModelSpec
from polyrank.core.costs.memory import NoFormulaError, adapter_elements, record
from polyrank.core.costs.tape import FLOAT32
from polyrank.core.lowrank import Factors
from polyrank.core.types import ClientProfile, LocalTraining


def upload_bytes(spec: ModelSpec, ranks: Mapping[str, int], factors: Factors = "AB") -> int:
    """Bytes of tensors a client sends: the factors it trained, and the head if it trained it."""
    head = sum(spec.head.values()) if spec.head_trained else 0
    return FLOAT32 * (adapter_elements(spec, ranks, factors) + head)


def download_bytes(spec: ModelSpec, ranks: Mapping[str, int]) -> int:
    """Bytes of tensors a client receives: both factors of what it trains, and the head.

    What a method has a client carry beside them (folds, the rows beyond its rank) comes on top.
    """
    return FLOAT32 * (adapter_elements(spec, ranks, "AB") + sum(spec.head.values()))


def transfer_seconds(nbytes: float, speed: float) -> float:
    """Seconds for bytes on a link of so many bits per second."""
    return 8 * nbytes / speed


def examples_trained(local: LocalTraining, examples: int) -> int:
    """Examples that pass through the model in a round, counted once per pass."""
    if local.steps is None:
        return local.epochs * examples
    per_step = min(local.batch * local.accumulate, examples)
    per_epoch = math.ceil(examples / per_step) if examples else 1
    whole, rest = divmod(local.steps, per_epoch)
    return whole * examples + min(rest * per_step, examples)


def training_flops(
    spec: ModelSpec, local: LocalTraining, ranks: Mapping[str, int], factors: Factors, examples: int
) -> float:
    """Floating-point operations of a round: matrix products of the forward and backward pass.

    Layers below the lowest trained one have no backward pass; checkpointed blocks run forward twice.

    Raises:
        NoFormulaError: if the model's family has no formula.
    """
    tape = record(spec, local, ranks, factors)
    return examples_trained(local, examples) * (tape.flops + tape.backward_flops) / local.batch


@dataclass(frozen=True)
class RoundSeconds:
    """A client's round on the simulated clock; None where its profile does not say enough.

    Attributes:
        download: receiving the task.
        compute: training.
        upload: sending the update.
    """

    download: float | None
    compute: float | None
    upload: float | None

    @property
    def total(self) -> float | None:
        """The known parts together; None if none is known."""
        known = [part for part in (self.download, self.compute, self.upload) if part is not None]
        return sum(known) if known else None


def round_seconds(
    profile: ClientProfile,
    spec: ModelSpec,
    local: LocalTraining,
    ranks: Mapping[str, int],
    factors: Factors,
    bytes_down: int,
    bytes_up: int,
) -> RoundSeconds:
    """Seconds of one client's round from the bytes of its actual messages and the operations of its training."""
    compute = None
    if profile.flops is not None:
        try:
            compute = training_flops(spec, local, ranks, factors, profile.examples) / profile.flops
        except NoFormulaError:
            compute = None
    return RoundSeconds(
        None if profile.downlink is None else transfer_seconds(bytes_down, profile.downlink),
        compute,
        None if profile.uplink is None else transfer_seconds(bytes_up, profile.uplink),
    )
