"""The cost model against real training of a tiny BERT: what a client of rank r holds, receives, sends, to the byte."""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from polyrank.core.costs import download_bytes, memory, task_memory, upload_bytes
from polyrank.core.federate import plan
from polyrank.core.lowrank import Adapter, Factors, nbytes
from polyrank.core.types import ClientProfile, LocalTraining, ModelSpec, ServerState, Task
from polyrank.data import TextSplit
from polyrank.local import trainer
from polyrank.local.base import Base
from polyrank.local.measure import Meter
from polyrank.methods import DISPATCHERS
from polyrank.methods.estimate import fixed
from polyrank.methods.named import fedit

SHARE = np.arange(20)
OPTIMIZERS = {
    "adamw": LocalTraining(batch=8, optimizer="adamw"),
    "sgd": LocalTraining(batch=8, optimizer="sgd", lr=0.01),
    "sgd with momentum": LocalTraining(batch=8, optimizer="sgd", lr=0.01, momentum=0.9),
}

factors_ = pytest.mark.parametrize("factors", ["A", "B", "AB"])
heads = pytest.mark.parametrize("head", [True, False], ids=["head trained", "head frozen"])


@dataclass(frozen=True)
class Held:
    """Bytes of live tensors at the end of a client's last step; `new` are all that were not there before it began."""

    adapter: int
    gradients: int
    optimizer: int
    counters: int
    new: int


Watch = Callable[[Task], tuple[Any, Held]]


@pytest.fixture(scope="module")
def base(tiny_model: Callable[[str], nn.Module]) -> Base:
    """All linear layers of the backbone: wide, narrow and square ones."""
    return Base(tiny_model("bert"), "all-linear", name="tiny", tokens=8)


@pytest.fixture
def train(base: Base, toy_texts: TextSplit, monkeypatch: pytest.MonkeyPatch) -> Watch:
    """The product's own training, its tensors counted while they live."""
    found: list[Held] = []
    before: set[int] = set()

    class Watched(Meter):
        def __init__(self, model: nn.Module, device: torch.device, tensors: Any, parameters: Any, *more: bool) -> None:
            super().__init__(model, device, tensors, parameters, *more)
            self.tensors, self.parameters = tensors, parameters

        def peak(self, optimizer: torch.optim.Optimizer) -> float:
            states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            live = storages() | storages_of(gradients)
            found.append(
                Held(
                    adapter=size(self.tensors),
                    gradients=size(gradients),
                    optimizer=size(t for t in states if t.ndim),
                    counters=size(t for t in states if not t.ndim),
                    new=sum(live[pointer] for pointer in live.keys() - before),
                )
            )
            return super().peak(optimizer)

    monkeypatch.setattr(trainer, "Meter", Watched)

    def run(task: Task) -> tuple[Any, Held]:
        gc.collect()
        before.update(storages())
        update = trainer.train(base, task, "c", toy_texts, SHARE)
        return update, found[-1]

    return run


def size(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def storages_of(tensors: Any) -> dict[int, int]:
    """Bytes of the storages behind tensors, by address."""
    kept = (t.untyped_storage() for t in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in kept}


def storages() -> dict[int, int]:
    return storages_of([x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)])


def task_of(base: Base, adapter: Adapter, head: bool, **changes: Any) -> Task:
    dense = base.initial_head()
    trained, frozen = (dense, {}) if head else ({}, dense)
    plain = Task(0, Adapter(adapter.layers, trained), Adapter({}, frozen), "AB", OPTIMIZERS["adamw"], None, 0)
    return replace(plain, **changes)


def planned_with(base: Base, head: bool) -> ModelSpec:
    return replace(base.spec, head_trained=head)


def ranks_of(adapter: Adapter) -> dict[str, int]:
    return {name: x.rank for name, x in adapter.layers.items()}


RANKS = (3, 1, 0, 5)  # one layer in four is not held at all


@heads
@factors_
def test_a_client_of_rank_r_holds_and_sends_r_rows(
    base: Base, random_adapter: Callable[..., Adapter], train: Watch, factors: Factors, head: bool
) -> None:
    given = random_adapter(base.spec, RANKS)
    assert len(given.layers) < len(base.spec.modules)
    task = task_of(base, given, head, factors=factors)
    update, _ = train(task)
    assert ranks_of(update.adapter) == ranks_of(given)
    elements = 0
    for name, x in update.adapter.layers.items():
        sent, (d_out, d_in), r = given.layers[name], base.spec.modules[name], given.layers[name].rank
        assert (tuple(x.A.shape), tuple(x.B.shape)) == ((r, d_in), (d_out, r))
        assert torch.equal(x.A, sent.A) == ("A" not in factors)
        assert torch.equal(x.B, sent.B) == ("B" not in factors)
        elements += r * (d_in * ("A" in factors) + d_out * ("B" in factors))
    assert update.adapter.dense.keys() == (set(base.head) if head else set())
    in_head = sum(t.numel() for t in base.initial_head().values())
    assert update.nbytes == 4 * (elements + in_head * head)


@heads
@factors_
def test_messages_are_as_long_as_planned(
    base: Base, random_adapter: Callable[..., Adapter], train: Watch, factors: Factors, head: bool
) -> None:
    given = random_adapter(base.spec, RANKS)
    task, spec = task_of(base, given, head, factors=factors), planned_with(base, head)
    update, _ = train(task)
    assert task.nbytes == download_bytes(spec, ranks_of(given))
    assert update.nbytes == upload_bytes(spec, ranks_of(given), factors)


@heads
@factors_
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_client_holds_the_bytes_that_were_planned(
    base: Base, random_adapter: Callable[..., Adapter], train: Watch, factors: Factors, head: bool, optimizer: str
) -> None:
    given, local = random_adapter(base.spec, RANKS), OPTIMIZERS[optimizer]
    _, held = train(task_of(base, given, head, factors=factors, local=local))
    planned = memory(planned_with(base, head), local, ranks_of(given), factors)
    assert held.adapter == planned.adapter
    assert held.gradients == planned.gradients
    assert held.optimizer == planned.optimizer
    tensors = len(given.layers) * len(factors) + head * len(base.head)
    assert held.counters == (4 * tensors if local.optimizer == "adamw" else 0)  # AdamW counts its steps per tensor
    shared = 0 if head else own_head(base)  # on a CPU, a frozen head is the task's own
    assert held.new + shared == held.adapter + held.gradients + held.optimizer + held.counters, "something else lives"


@factors_
@pytest.mark.parametrize("dispatch", DISPATCHERS)
def test_planned_tasks_cost_their_ranks_and_what_they_carry(
    base: Base, random_adapter: Callable[..., Adapter], train: Watch, factors: Factors, dispatch: str
) -> None:
    """Rows that a client only runs take memory and download; gradients, optimizer and upload are of its own rank."""
    state = ServerState(0, random_adapter(base.spec, (6,), head=base.initial_head()))
    method = replace(fedit(), factors=lambda _: factors, dispatch=DISPATCHERS[dispatch])
    profiles = {"c": ClientProfile(len(SHARE), rank=2)}
    local = OPTIMIZERS["adamw"]
    task = plan(method, state, fixed(profiles, base.spec, local), ["c"], base.spec, local, 0)["c"]
    ranks: Mapping[str, int] = dict.fromkeys(base.spec.modules, 2)
    update, held = train(task)
    own, planned = memory(base.spec, local, ranks, factors), task_memory(base.spec, task)
    carried = sum(nbytes(x) for x in task.frozen.layers.values())
    assert carried == (download_bytes(base.spec, dict.fromkeys(ranks, 4)) - own_head(base)) * (dispatch == "whole")
    assert held.adapter == planned.adapter == own.adapter + carried
    assert (held.gradients, held.optimizer) == (own.gradients, own.optimizer)
    assert held.new == held.adapter + held.gradients + held.optimizer + held.counters
    assert task.nbytes == download_bytes(base.spec, ranks) + carried
    assert update.nbytes == upload_bytes(base.spec, ranks, factors)


def own_head(base: Base) -> int:
    return 4 * sum(t.numel() for t in base.initial_head().values())
