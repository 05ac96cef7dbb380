"""Nothing is computed for blocks below the lowest trained one that need not be: no backward pass, no second forward."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from polyrank.core.lowrank import Adapter, LowRank
from polyrank.core.types import ClientProfile, LocalTraining, Task
from polyrank.data import ImageSplit, TextSplit
from polyrank.engines.simulator import Simulator
from polyrank.local.base import Base
from polyrank.local.prefix import Prefixes, lowest, resumed
from polyrank.local.trainer import train

Adapters = Callable[..., Adapter]
Models = Callable[[str], nn.Module]
Data = TextSplit | ImageSplit
ALL, FAMILIES, GIB = np.arange(48), ["bert", "bloom", "gpt2", "llama", "vit"], 2.0**30
LOCAL = LocalTraining(epochs=3, batch=8, optimizer="sgd", lr=0.1)


@pytest.fixture(scope="module")
def images() -> ImageSplit:
    rng = np.random.default_rng(0)
    return ImageSplit(rng.integers(0, 256, (48, 1, 8, 8), np.uint8), np.arange(48) % 3, (0.5,), (0.5,))


@pytest.fixture(scope="module")
def base(tiny_model: Models) -> Base:
    return Base(tiny_model("bert"), "attention", name="tiny")


def top(base: Base, adapter: Adapter) -> Adapter:
    """The adapter without its layers in block 0."""
    return Adapter({n: x for n, x in adapter.layers.items() if base.spec.blocks[n]}, adapter.dense)


@pytest.fixture
def task(base: Base, random_adapter: Adapters) -> Task:
    return task_of(base, random_adapter)


def task_of(base: Base, random_adapter: Adapters, **changes: Any) -> Task:
    """Trains block 1, with layers carried in block 0 and block 1."""
    adapter = top(base, random_adapter(base.spec, head=base.initial_head()))
    plain = Task(0, adapter, random_adapter(base.spec, (2,), seed=1), "AB", LOCAL, None, 0)
    return replace(plain, **changes)


def trained(
    prefixes: Prefixes | None, base: Base, task: Task, data: Data, client: str = "c", own: Any = ALL
) -> Adapter:
    return train(base, task, client, data, own, prefixes and prefixes.of(task, client, own)).adapter


def tensors(adapter: Adapter) -> dict[str, Tensor]:
    factors = {f"{name}.{f}": getattr(x, f) for name, x in adapter.layers.items() for f in ("A", "B")}
    return {**factors, **adapter.dense}


def same(one: Adapter, other: Adapter) -> bool:
    return all(torch.equal(tensor, tensors(other)[name]) for name, tensor in tensors(one).items())


def assert_close(one: Adapter, other: Adapter) -> None:
    for name, tensor in tensors(one).items():
        torch.testing.assert_close(tensor, tensors(other)[name], rtol=1e-4, atol=1e-5)


@contextmanager
def examples_through(base: Base, block: int) -> Iterator[list[int]]:
    """The batch sizes that come through the attention of a block."""
    sizes: list[int] = []
    name = next(n for n in base.spec.modules if base.spec.blocks[n] == block)
    handle = base.modules[name].register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    try:
        yield sizes
    finally:
        handle.remove()


# --- the backward pass ends at the lowest trained block


@pytest.mark.parametrize("family", FAMILIES)
def test_autograd_saves_nothing_below(
    family: str, tiny_model: Models, tiny_batch: Any, random_adapter: Adapters
) -> None:
    base = Base(tiny_model(family), "attention", name="tiny")
    saved: dict[int, int] = {0: 0, 1: 0}
    now = [0]
    for index, name in enumerate(base.blocks):
        base.modules[name].register_forward_pre_hook(lambda *_, index=index: now.__setitem__(0, index))

    def pack(tensor: Tensor) -> Tensor:
        saved[now[0]] += 1
        return tensor

    attached = base.attached(top(base, random_adapter(base.spec)), factors="AB")
    with attached as model, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(tiny_batch(family)).sum()
    assert saved[0] == 0
    assert saved[1] > 0


def test_a_step_computes_no_more_than_the_model_of_its_cost_says(
    base: Base, random_adapter: Adapters, tiny_batch: Any
) -> None:
    def operations(adapter: Adapter) -> int:
        with base.attached(adapter, factors="AB") as model, FlopCounterMode(display=False) as counter:
            model(tiny_batch("bert")).sum().backward()
        return counter.get_total_flops()

    whole = random_adapter(base.spec, (1,))
    # Forward passes of both blocks and one backward pass of two: (L + k) / 2L = 3/4, and the head.
    assert operations(top(base, whole)) < 0.8 * operations(whole)


# --- the same training, with less of it


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_changes_no_more_than_rounding(
    family: str,
    checkpointing: bool,
    tiny_model: Models,
    random_adapter: Adapters,
    toy_texts: TextSplit,
    images: ImageSplit,
) -> None:
    base, data = Base(tiny_model(family), "attention", name="tiny"), images if family == "vit" else toy_texts
    task = task_of(base, random_adapter, local=replace(LOCAL, checkpointing=checkpointing, dropout=0.2))
    plain = trained(None, base, task, data)
    prefixes = Prefixes(base, data, GIB)
    with examples_through(base, 0) as sizes:
        assert_close(trained(prefixes, base, task, data), plain)
        assert sum(sizes) <= 48 + 8  # every example once in three epochs, and a few to find out how
    assert prefixes.nbytes > 0
    assert not same(plain, task.adapter)
    assert same(trained(None, base, task, data), plain)  # no trace is left in the model


def test_bytes_depend_on_nothing_else_that_the_cache_holds(
    base: Base, task: Task, toy_texts: TextSplit, random_adapter: Adapters
) -> None:
    fresh = Prefixes(base, toy_texts, GIB)
    once = trained(fresh, base, task, toy_texts)
    later = replace(task, round=1, adapter=once)
    warm = trained(fresh, base, later, toy_texts)
    assert same(trained(Prefixes(base, toy_texts, GIB), base, later, toy_texts), warm)
    small = Prefixes(base, toy_texts, fresh.nbytes)
    for client in ("d", "c", "d", "c"):
        update = trained(small, base, later, toy_texts, client)
    assert same(update, warm)


def test_rows_are_kept_until_something_below_changes(
    base: Base, task: Task, toy_texts: TextSplit, random_adapter: Adapters
) -> None:
    prefixes = Prefixes(base, toy_texts, GIB)

    def computed(task: Task, own: Any = ALL) -> bool:
        with examples_through(base, 0) as sizes:
            assert prefixes.of(task, "c", own) is not None
        return bool(sizes)

    def carrying(block: int, seed: int) -> Task:
        changed = random_adapter(base.spec, (2,), seed=seed).layers
        layers = {n: changed[n] if base.spec.blocks[n] == block else x for n, x in task.frozen.layers.items()}
        return replace(task, frozen=Adapter(layers))

    assert computed(task)
    assert not computed(
        replace(task, round=1, adapter=top(base, random_adapter(base.spec, seed=5, head=base.initial_head())))
    )
    assert not computed(carrying(1, seed=7))
    assert computed(carrying(0, seed=7))
    assert not computed(carrying(0, seed=7))
    assert computed(carrying(0, seed=8))
    scaled = {n: LowRank(x.A, x.B, 2 * x.scale) for n, x in task.frozen.layers.items()}
    assert computed(replace(task, frozen=Adapter(scaled)))
    assert computed(replace(task, frozen=Adapter()))
    assert computed(replace(task, frozen=Adapter()), ALL[:40])


def test_memory_is_bounded_and_those_not_used_for_longest_go(base: Base, task: Task, toy_texts: TextSplit) -> None:
    half = Prefixes(base, toy_texts, GIB)
    prefix = half.of(task, "a", ALL[:24])
    assert prefix is not None
    assert prefix.nbytes == int(toy_texts.lengths[:24].sum()) * 16 * 4 == half.nbytes
    prefixes = Prefixes(base, toy_texts, 2 * half.nbytes)
    for client in ("a", "b", "a", "c"):
        assert prefixes.of(task, client, ALL[:24]) is not None
        assert prefixes.nbytes <= prefixes.limit
    with examples_through(base, 0) as sizes:
        prefixes.of(task, "a", ALL[:24])
        assert not sizes
        prefixes.of(task, "b", ALL[:24])
        assert sizes
    assert Prefixes(base, toy_texts, half.nbytes - 1).of(task, "a", ALL[:24]) is None


# --- where it would be wrong, or would not pay


def test_the_lowest_block_is_that_of_anything_trained(base: Base, random_adapter: Adapters, task: Task) -> None:
    names, head = list(base.spec.modules), base.initial_head()
    whole = random_adapter(base.spec)
    assert lowest(base, replace(task, adapter=whole)) == 0
    assert lowest(base, task) == 1
    empty = LowRank(torch.zeros(0, 16), torch.zeros(16, 0), 1.0)
    assert lowest(base, replace(task, adapter=Adapter({**task.adapter.layers, names[0]: empty}))) == 1
    assert lowest(base, replace(task, adapter=Adapter({}, head))) == 1
    for name in (f"{names[0]}.lokr_w1", f"{names[0]}.bias"):
        assert lowest(base, replace(task, adapter=Adapter({}, {**head, name: torch.zeros(1)}))) == 0


def test_clients_for_whom_it_would_be_wrong_or_lost_work_do_without(
    base: Base, task: Task, toy_texts: TextSplit, random_adapter: Adapters
) -> None:
    prefixes = Prefixes(base, toy_texts, GIB)
    assert prefixes.of(replace(task, adapter=random_adapter(base.spec)), "c", ALL) is None
    assert prefixes.of(task, "c", ALL[:0]) is None
    assert prefixes.of(replace(task, local=replace(LOCAL, steps=5)), "c", ALL) is None
    assert prefixes.of(replace(task, local=replace(LOCAL, steps=6)), "c", ALL) is not None
    base.model.train()
    try:
        assert prefixes.of(task, "c", ALL) is None  # dropout in the base
    finally:
        base.model.eval()


def test_a_trained_parameter_below_all_blocks_is_seen(
    tiny_model: Models, random_adapter: Adapters, toy_texts: Any
) -> None:
    new = "bert.embeddings.LayerNorm.weight"
    base = Base(tiny_model("bert"), "attention", name="tiny", new=[new])
    task = task_of(base, random_adapter)
    assert new in task.adapter.dense
    assert Prefixes(base, toy_texts, GIB).of(task, "c", ALL) is None


def test_a_model_that_takes_more_from_below_is_not_entered(
    tiny_model: Models, random_adapter: Adapters, toy_texts: TextSplit
) -> None:
    base = Base(tiny_model("bert"), "attention", name="tiny")
    low, high = (base.modules[name] for name in base.blocks)
    from_below: list[Tensor] = []
    low.register_forward_hook(lambda module, args, output: from_below.append(output))
    high.register_forward_hook(lambda module, args, output: output + from_below[-1])
    assert Prefixes(base, toy_texts, GIB).of(task_of(base, random_adapter), "c", ALL) is None


# --- several clients at once


def test_clients_share_a_forward_pass(base: Base, task: Task, toy_texts: TextSplit) -> None:
    prefixes = Prefixes(base, toy_texts, GIB)
    one, two = prefixes.of(task, "a", ALL[:24]), prefixes.of(task, "b", ALL[24:])
    assert one is not None
    assert two is not None
    chosen = np.array([3, 17, 40, 25])
    with base.attached(task.adapter, task.frozen) as model:
        plain = model(toy_texts.batch(chosen))
        with resumed([(one, chosen[:2]), (two, chosen[2:])]), examples_through(base, 0) as sizes:
            torch.testing.assert_close(model(toy_texts.batch(chosen)), plain, rtol=1e-4, atol=1e-5)
        assert not sizes


def test_a_simulation_keeps_them_from_round_to_round(base: Base, task: Task, toy_texts: TextSplit) -> None:
    shares = {"a": ALL[:24], "b": ALL[24:]}
    profiles = {client: ClientProfile(24, rank=4) for client in shares}
    world = Simulator(base, toy_texts, shares, profiles, prefixes=Prefixes(base, toy_texts, GIB))
    first = list(world.fit({"a": task, "b": task}))
    with examples_through(base, 0) as sizes:
        again = list(world.fit({"a": task, "b": task}))
        alone = list(world.only(["a"]).fit({"a": task}))
    assert not sizes
    assert all(same(x.adapter, y.adapter) for x, y in zip(first, again, strict=True))
    assert same(alone[0].adapter, first[0].adapter)
