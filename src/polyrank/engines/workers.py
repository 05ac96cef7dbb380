"""Clients in several processes of one machine, each with a frozen base and a device of its own.

A round's clients are dealt out in shares of about equal work. Who is in which share follows from the tasks alone, and
updates come in order of client, so what comes out does not depend on which process is faster.
"""

from __future__ import annotations

import io
import os
import signal
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyrank.core.types import Client, ClientProfile, Query, ServerState, Task, Update
from polyrank.engines.simulator import Simulator
from polyrank.local.data import Indices

Factory = Callable[[int], Simulator]

PATIENCE = 5.0
"""Seconds that a process gets to end after it was told to."""


class Workers:
    """The `Clients` of a simulation, trained by several processes, which start with the first round.

    Args:
        here: the same clients in this process: it knows them, and measures importance.
        factory: number of a worker -> the clients as that worker has them. It is called there, so it must be
            importable: a module's function, or a `functools.partial` of one.
        count: how many processes.
        threads: of each, for libraries that read OMP_NUM_THREADS when they are imported.
    """

    def __init__(self, here: Simulator, factory: Factory, count: int, threads: int = 1) -> None:
        self.here, self.factory, self.count, self.threads = here, factory, count, threads
        self._crew: list[_Worker] = []
        weakref.finalize(self, _stop, self._crew)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes; the next round starts new ones."""
        _stop(self._crew)

    @property
    def shares(self) -> Mapping[Client, Indices]:
        """Each client's indices into the training data."""
        return self.here.shares

    def profiles(self) -> Mapping[Client, ClientProfile]:
        """Those of the clients in this process."""
        return self.here.profiles()

    def only(self, clients: Sequence[Client]) -> Simulator:
        """These clients alone, who always answer, in this process."""
        return self.here.only(clients)

    def measure(self, query: Query, state: ServerState) -> dict[str, float]:
        """The importance that `query` asks for, measured in this process (`Simulator.measure`)."""
        return self.here.measure(query, state)

    def fit(self, tasks: Mapping[Client, Task]) -> Iterator[Update]:
        """Trains the clients; their updates, in order. Absent clients are skipped.

        Raises:
            ChildProcessError: if a worker ends before it has answered.
            Exception: what a worker raised, with its traceback there as a note. Either way all workers are ended.
        """
        profiles = self.profiles()
        parts = balanced({client: work(task, profiles[client].examples) for client, task in tasks.items()}, self.count)
        try:
            crew = self._started()
            for worker, part in zip(crew, parts, strict=True):
                worker.send({client: tasks[client] for client in part})
            yield from _merged(crew)
        except BaseException:  # also where the caller stops in the middle: nobody would read the rest of the answers
            self.close()
            raise

    def _started(self) -> list[_Worker]:
        if not self._crew:
            with variable("OMP_NUM_THREADS", str(self.threads)):
                for number in range(self.count):
                    self._crew.append(_start(self.factory, number))
            for worker in self._crew:
                worker.receive()  # it is ready, or could not be
        return self._crew


def work(task: Task, examples: int) -> int:
    """Examples that a client trains on in a round, each as often as it is seen."""
    local = task.local
    if local.steps is None or not examples:
        return local.epochs * examples
    return local.steps * local.batch * local.accumulate


def balanced(works: Mapping[Client, int], count: int) -> list[list[Client]]:
    """Clients in `count` shares of about equal work: the largest first, each to whoever has least.

    >>> balanced({"a": 1, "b": 6, "c": 3, "d": 2}, 2)
    [['b'], ['a', 'c', 'd']]

    References:
        Graham 1969, Bounds on multiprocessing timing anomalies: the longest share is at most 4/3 of the best one's.
    """
    parts: list[list[Client]] = [[] for _ in range(count)]
    totals = [0] * count
    for client in sorted(works, key=lambda client: (-works[client], client)):
        least = totals.index(min(totals))
        parts[least].append(client)
        totals[least] += works[client]
    return [sorted(part) for part in parts]


@dataclass(frozen=True)
class _Worker:
    """A process and this end of the line to it."""

    number: int
    process: SpawnProcess
    connection: Connection

    def send(self, message: object) -> None:
        try:
            _send(self.connection, message)
        except OSError:
            raise self._death() from None

    def receive(self) -> Update | None:
        """An update, or None at the end of an answer."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if isinstance(message, BaseException):
            raise message
        found: Update | None = message
        return found

    def _death(self) -> ChildProcessError:
        self.process.join(PATIENCE)
        code = self.process.exitcode
        cause = ": killed, perhaps for want of memory; fewer simulation.workers need less" if code == -9 else ""
        return ChildProcessError(f"worker {self.number} of the simulation ended with exit code {code}{cause}")


def _merged(crew: Sequence[_Worker]) -> Iterator[Update]:
    """Answers in order of client. All workers are listened to, so that none waits until another one's are taken."""
    found: dict[int, deque[Update]] = {worker.number: deque() for worker in crew}
    working = {worker.connection: worker for worker in crew}
    while working or any(found.values()):
        if all(found[worker.number] for worker in working.values()):
            first = min((answers for answers in found.values() if answers), key=lambda answers: answers[0].client)
            yield first.popleft()
            continue
        for connection in wait(list(working)):
            worker = working[connection]  # type: ignore[index]
            update = worker.receive()
            if update is None:
                del working[worker.connection]
            else:
                found[worker.number].append(update)


def _start(factory: Factory, number: int) -> _Worker:
    # Spawned: a fork of a process with threads or a CUDA context does not work.
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_serve, args=(theirs, factory, number), name=f"polyrank-worker-{number}", daemon=True
    )
    try:
        process.start()
    finally:
        theirs.close()  # so that the line breaks when the process ends
    return _Worker(number, process, ours)


def _stop(crew: list[_Worker]) -> None:
    """Ends processes, in the middle of what they do."""
    for worker in crew:
        worker.connection.close()
        worker.process.terminate()
    for worker in crew:
        worker.process.join(PATIENCE)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.process.close()
    crew.clear()


def _serve(connection: Connection, factory: Factory, number: int) -> None:
    """A worker's life: None when it is ready; then for every round's tasks their updates, and None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts all processes; the parent ends its workers
    try:
        clients = factory(number)
        _send(connection, None)
        while True:
            for update in clients.fit(connection.recv()):
                _send(connection, update)
            _send(connection, None)
    except Exception as error:
        with suppress(OSError):  # the parent is gone
            _send(connection, _portable(error))


def _portable(error: Exception) -> Exception:
    """The error as it can be sent, or else a RuntimeError with its message; the traceback is a note of it."""
    note = "in a worker of the simulation:\n" + "".join(traceback.format_exception(error))
    try:
        sent = ForkingPickler.loads(ForkingPickler.dumps(error))
    except Exception:  # whatever the class's constructor makes of arguments that are not its own
        sent = RuntimeError(f"{type(error).__name__}: {error}")
    assert isinstance(sent, Exception)
    sent.add_note(note)
    return sent


class _Pickler(ForkingPickler):
    """Messages with tensors as bytes. Torch would move them to shared memory, a file descriptor for each."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        flat = value.detach().cpu().contiguous().reshape(-1)
        return _tensor, (flat.view(torch.uint8).numpy(), value.dtype, tuple(value.shape))


def _tensor(data: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    # In torch's own memory: products may round differently where operands are not aligned as it aligns them.
    return torch.from_numpy(data).view(dtype).reshape(shape).clone()


def _send(connection: Connection, message: object) -> None:
    # One message for all tasks: tensors that clients have in common stay one, by which `grouping.key` knows them.
    buffer = io.BytesIO()
    _Pickler(buffer).dump(message)
    connection.send_bytes(buffer.getbuffer())


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """A variable of the environment, for processes that start meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
