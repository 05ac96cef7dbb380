"""The optimizer and the precision of a client's round."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from polyrank.core.types import LocalTraining, Precision


def optimizer_of(parameters: Iterable[Tensor] | list[dict[str, Any]], local: LocalTraining) -> torch.optim.Optimizer:
    """The optimizer of a client's round.

    Args:
        parameters: what it updates, or groups of them with learning rate and weight decay of their own.
        local: how the client trains.
    """
    if local.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=local.lr, weight_decay=local.weight_decay, fused=True)
    return torch.optim.SGD(parameters, lr=local.lr, momentum=local.momentum, weight_decay=local.weight_decay)


def precision_on(device: torch.device, wanted: Precision) -> Precision:
    """What ``auto`` means on a device: bf16 where its accelerator has it."""
    if wanted != "auto":
        return wanted
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def autocast(local: LocalTraining, device: torch.device) -> AbstractContextManager[object]:
    """The precision of a client's forward pass."""
    wanted = precision_on(device, local.precision) == "bf16"
    return torch.autocast(device.type, torch.bfloat16) if wanted else nullcontext()
