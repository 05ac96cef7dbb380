"""Several processes train a round's clients as one does, and none of them outlives its use."""

import copy
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyrank.core.federate import plan
from polyrank.core.types import Client, Task, Update
from polyrank.engines.simulator import Simulator
from polyrank.engines.workers import Workers, balanced, work
from polyrank.errors import TrainingError
from polyrank.experiment.build import World, build, clients_of_worker
from polyrank.experiment.config import ConfigError, Experiment
from polyrank.experiment.loading import parse
from polyrank.experiment.machine import on_this_machine
from polyrank.experiment.session import Session
from polyrank.experiment.store import Run

Config = dict[str, Any]
Tasks = dict[Client, Task]


@pytest.fixture(scope="module")
def config(digits_config: Config) -> Config:
    """Six clients, of whom some do not answer; two workers."""
    config = copy.deepcopy(digits_config)
    config["data"]["clients"] = 6
    return {**config, "device": "cpu", "absent": 0.5, "rounds": 2, "simulation": {"workers": 2}}


@pytest.fixture(scope="module")
def experiment(config: Config) -> Experiment:
    """With a frozen head: one tensor in all tasks of a round."""
    return on_this_machine(parse({**config, "model": {**config["model"], "head": "freeze"}}, "test", Path()))


@pytest.fixture(scope="module")
def world(experiment: Experiment) -> Iterator[World]:
    world = build(experiment)
    assert isinstance(world.clients, Workers)
    with world.clients:
        yield world
    assert active_children() == []


@pytest.fixture
def workers(world: World) -> Workers:
    assert isinstance(world.clients, Workers)
    return world.clients


@pytest.fixture(scope="module")
def tasks(experiment: Experiment, world: World) -> Tasks:
    method, local = world.method, experiment.local_training()
    budgets = method.estimate(world.clients.profiles(), world.spec, local)
    return plan(method, world.start, budgets, list(budgets), world.spec, local, experiment.seed)


def tensors(update: Update) -> list[torch.Tensor]:
    factors = [tensor for _, x in sorted(update.adapter.layers.items()) for tensor in (x.A, x.B)]
    return factors + [tensor for _, tensor in sorted(update.adapter.dense.items())]


def by_share(here: Simulator, tasks: Mapping[Client, Task], count: int) -> list[Update]:
    """What workers should answer, trained in this process."""
    works = {client: work(task, here.profiles()[client].examples) for client, task in tasks.items()}
    parts = balanced(works, count)
    updates = [update for part in parts for update in here.fit({client: tasks[client] for client in part})]
    return sorted(updates, key=lambda update: update.client)


def test_workers_train_their_shares_as_this_process_would(workers: Workers, tasks: Tasks) -> None:
    for round_ in range(2):  # the processes stay
        asked = {client: replace(task, round=round_) for client, task in reversed(tasks.items())}
        expected, found = by_share(workers.here, asked, 2), list(workers.fit(asked))
        assert 0 < len(found) < len(tasks)  # some are absent
        assert [update.client for update in found] == [update.client for update in expected]
        for one, other in zip(found, expected, strict=True):
            assert all(map(torch.equal, tensors(one), tensors(other)))
            assert (one.examples, one.factors, one.metrics) == (other.examples, other.factors, other.metrics)
        assert any(
            "memory" not in update.metrics for update in found
        )  # trained together, which needs the head to be one
    assert len(active_children()) == 2


def test_a_worker_that_is_killed_is_an_error(workers: Workers, tasks: Tasks) -> None:
    list(workers.fit(tasks))
    pid = active_children()[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match=r"worker \d of the simulation ended with exit code -9"):
        list(workers.fit(tasks))
    assert active_children() == []


def test_what_a_worker_raises_is_raised_here(workers: Workers, tasks: Tasks) -> None:
    wild = {client: replace(task, local=replace(task.local, lr=1e30)) for client, task in tasks.items()}
    with pytest.raises(TrainingError, match=r"round 0, client 'client_\d': .* lower local\.lr") as caught:
        list(workers.fit(wild))
    assert "in train_together" in caught.value.__notes__[0]
    assert active_children() == []


def test_a_round_that_is_left_in_the_middle_leaves_no_process(workers: Workers, tasks: Tasks) -> None:
    answers = workers.fit(tasks)
    first = next(answers)
    assert len(active_children()) == 2
    answers.close()
    assert active_children() == []
    assert next(iter(by_share(workers.here, tasks, 2))).client == first.client


def test_an_interrupt_leaves_no_process(workers: Workers, tasks: Tasks) -> None:
    workers.close()
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.5, signal.pthread_kill, (main, signal.SIGINT))  # before a worker has imported torch
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        list(workers.fit(tasks))
    timer.join()
    assert active_children() == []


def test_a_worker_that_cannot_start_says_why(workers: Workers, experiment: Experiment, tasks: Tasks) -> None:
    elsewhere = {**experiment.resolved(), "device": "cuda:99"}
    broken = Workers(workers.here, partial(clients_of_worker, elsewhere, 1, 1), 1)
    with pytest.raises(ConfigError, match="device: 'cuda:99' is not available"):
        list(broken.fit(tasks))
    assert active_children() == []


def test_a_run_on_two_workers_is_the_run_in_one_process(tmp_path: Path, config: Config) -> None:
    runs = []
    for count in (1, 2):
        simulation = {"together": "off", "workers": count}
        session = Session(
            Run.create(tmp_path / str(count), parse({**config, "simulation": simulation}, "test", Path()))
        )
        for _ in session.rounds():
            pass
        assert len(active_children()) == (0 if count == 1 else 2)
        session.finish()
        names = ("rounds.jsonl", "state/checkpoint.safetensors", "adapter/adapter_model.safetensors")
        runs.append([(session.run.folder / name).read_bytes() for name in names])
    assert runs[0] == runs[1]
    del session  # the last that knew the workers
    assert active_children() == []


def test_workers_are_decided_before_a_run(config: Config) -> None:
    decided = on_this_machine(parse({**config, "simulation": {"workers": "auto"}}, "test", Path()))
    assert decided.simulation.workers == 1  # on a CPU
    with pytest.raises(ConfigError, match=r"simulation\.workers: 0 "):
        parse({**config, "simulation": {"workers": 0}}, "test", Path())


@given(st.dictionaries(st.text("abcdef", min_size=1), st.integers(0, 1000)), st.integers(1, 5))
def test_shares_are_balanced_and_hold_everybody_once(works: dict[str, int], count: int) -> None:
    parts = balanced(works, count)
    assert sorted(client for part in parts for client in part) == sorted(works)
    assert parts == balanced(dict(reversed(works.items())), count)
    totals = [sum(works[client] for client in part) for part in parts]
    assert max(totals) - min(totals) <= max(works.values(), default=0)
