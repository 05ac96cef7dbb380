"""What training really takes: bytes kept for the backward pass, the peak of a step, the memory of this device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class DeviceMemory:
    """A device's memory, in bytes; ``name`` says which device."""

    name: str
    total: int
    free: int


def device_memory(device: torch.device | None = None) -> DeviceMemory:
    """Memory of the GPU if there is one, or of `device`; main memory otherwise."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory(torch.cuda.get_device_name(device), total, free)
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    return DeviceMemory("main memory", total, _available() or free)


def _available() -> int | None:
    """What Linux says can be had without swapping: caches count as free."""
    try:
        with open("/proc/meminfo") as file:
            line = next(line for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return 1024 * int(line.split()[1])


@dataclass
class Kept:
    """Bytes kept for the backward pass: filled while `saved_tensors` is on."""

    nbytes: int = 0


@contextmanager
def saved_tensors(parameters: list[Tensor]) -> Iterator[Kept]:
    """Counts the storages that autograd saves, once each, without those of parameters."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    alive: list[Tensor] = []  # a storage that were freed could be handed out again under the same address
    kept = Kept()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            alive.append(tensor.detach())
            kept.nbytes += storage.nbytes()
        return tensor.detach()  # itself, a result that its own operation saves would never be let go

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
    alive.clear()


class Meter:
    """The memory of a client's round: the GPU's peak, or on a CPU the tensors that its steps hold together.

    On a CPU, that is at the end of a forward pass, or where gradients take more than activations, of a backward pass.

    Args:
        model: the frozen base.
        device: where it is.
        tensors: all that is held beside it.
        parameters: those of them that are trained.
        accumulates: whether gradients of batches before are there when a forward pass begins.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        tensors: list[Tensor],
        parameters: list[Tensor],
        accumulates: bool = False,
    ) -> None:
        self.device, self.kept, self.accumulates = device, 0, accumulates
        self.held, self.gradients = model_bytes(model) + _bytes(tensors), _bytes(parameters)
        self.known = [*model.parameters(), *tensors]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward pass; the first one is measured."""
        if self.device.type == "cuda" or self.kept:
            yield
            return
        with saved_tensors(self.known) as kept:
            yield
        self.kept = kept.nbytes

    def peak(self, optimizer: torch.optim.Optimizer) -> float:
        """Bytes, after the last step."""
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device))
        states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        step = self.kept + self.gradients if self.accumulates else max(self.kept, self.gradients)
        return float(self.held + step + _bytes(states))


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters."""
    return _bytes(list(model.parameters()))


def peak_of(step: Callable[[], None], device: torch.device) -> int:
    """The most bytes that a step allocates at any moment, beyond what is allocated when it starts.

    On a GPU the allocator's own count; on a CPU the sum of torch's allocations, which is what a GPU's allocator would
    count but for rounding.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr otherwise
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
