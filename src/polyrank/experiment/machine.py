"""What an experiment leaves to the machine it runs on: device, threads, precision, and how much it does at once."""

from __future__ import annotations

import getpass
import math
import os
import socket
from dataclasses import replace
from typing import Literal

import torch

from polyrank.core.architecture import ModelSpec
from polyrank.core.costs import NoFormulaError, memory
from polyrank.experiment.components import describe
from polyrank.experiment.config import ConfigError, Experiment
from polyrank.experiment.logs import openers
from polyrank.experiment.tables import SLOTS
from polyrank.local.grouping import TOGETHER
from polyrank.local.measure import device_memory
from polyrank.local.optimizer import precision_on


def on_this_machine(experiment: Experiment, *, remote: bool = False) -> Experiment:
    """The experiment with all decided that its file leaves to the machine: a resumed run computes as it began.

    Where clients are `remote`, so is what their server believes of them: the same file then simulates the same run.

    The cost model then knows whether activations are bfloat16, which ``auto`` leaves to the device. Loggers that the
    file names are found to be installed; ``log: auto`` stays, as what is installed may differ where the run goes on.

    Raises:
        ConfigError: for a device that is not there.
        ImportError: for a logger whose package is not.
    """
    openers(experiment)
    threads, device = experiment.threads or default_threads(), pick_device(experiment.device)
    precision = precision_on(torch.device(device), experiment.local.precision)
    local = experiment.local.model_copy(update={"precision": precision})
    chosen = {"cache": cache_memory(experiment), "workers": workers(experiment)}
    simulation = experiment.simulation.model_copy(update=chosen)
    decided = {"device": device, "threads": threads, "local": local, "simulation": simulation}
    decided_here = experiment.model_copy(update=decided)
    return decided_here.trusting() if remote else decided_here


def operator() -> str:
    """Who runs this process, and where: ``user@host``."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a user without a name, as in some containers
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def cache_memory(experiment: Experiment) -> float | Literal["off"]:
    """Bytes for hidden states that are computed once, or ``off``.

    It is off where single examples are protected: every one of a random sample runs whole; and where texts share rows.

    ``auto`` is off where no example comes again with the same model below: in one epoch of one round, or where each
    round sends the layers that a client does not train as well. Otherwise it is an eighth of all memory, rounded down
    to a power of two, at most 4 GiB: of all, and not of what is free, so that it is the same next time.
    """
    if experiment.privacy.examples is not None or experiment.local.pack:
        return "off"
    if experiment.simulation.cache != "auto":
        return experiment.simulation.cache
    local, dispatch = experiment.local, experiment.build_method().dispatch
    again_now = local.epochs > 1 or local.steps is not None
    again_later = experiment.rounds > 1 and describe(SLOTS["dispatch"], dispatch)["name"] != "whole"
    total = device_memory(torch.device(pick_device(experiment.device))).total
    return float(2 ** min(int(math.log2(total / 8)), 32)) if again_now or again_later else "off"


def together(experiment: Experiment) -> int | Literal["off"]:
    """Most input positions of a step that clients share."""
    wanted = experiment.simulation.together
    return TOGETHER[torch.device(pick_device(experiment.device)).type] if wanted == "auto" else wanted


def workers(experiment: Experiment) -> int:
    """Processes that train clients; 1: this one. ``auto`` is one per GPU that can be seen."""
    if experiment.simulation.workers != "auto":
        return experiment.simulation.workers
    return torch.cuda.device_count() if pick_device(experiment.device) == "cuda" else 1


def positions_for(spec: ModelSpec, experiment: Experiment, rank: int, device: torch.device, sharing: int = 1) -> int:
    """Most input positions of a shared step on this machine: their activations take at most half of its memory.

    Of all its memory, and not of what is free: the same machine must make the same run. Processes `sharing` the memory
    have their part of the half.
    """
    most = together(experiment)
    if most == "off":
        return 0
    one = replace(experiment.local_training(), batch=1)
    try:
        example = memory(spec, one, spec.at(rank)).activations
    except NoFormulaError:
        return most
    assert spec.architecture is not None
    return min(most, int(device_memory(device).total / 2 / sharing / example * max(spec.architecture.tokens, 1)))


def pick_device(device: str) -> str:
    """``auto`` is the GPU if there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: {device!r} is not available: {error}") from None
    return device


def default_threads() -> int:
    """Cores this process may use: its affinity and its container's quota, or OMP_NUM_THREADS where that is set."""
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return max(int(os.environ["OMP_NUM_THREADS"]), 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        cores = min(cores, max(int(quota) // int(period), 1)) if quota != "max" else cores
    except (OSError, ValueError):
        pass
    return cores
