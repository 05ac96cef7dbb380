"""The clients of a simulation, and somebody who looks on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from polyrank.core.types import Client, ClientProfile, Query, ServerState, Task, Update
from polyrank.engines.events import Answered, Asked, Phase, Tell
from polyrank.engines.simulator import Simulator
from polyrank.engines.workers import Workers
from polyrank.local.data import Indices


class Watched:
    """The `Clients` that are given; what they do is told while it passes, and no different for that.

    Updates come in order of client, so of one that is done is told once all before it are.

    Args:
        clients: who trains.
        tell: is told, in the thread that runs the round.
    """

    def __init__(self, clients: Simulator | Workers, tell: Tell) -> None:
        self.clients, self.tell = clients, tell

    @property
    def shares(self) -> Mapping[Client, Indices]:
        """Each client's indices into the training data."""
        return self.clients.shares

    def profiles(self) -> Mapping[Client, ClientProfile]:
        """Those of the clients."""
        return self.clients.profiles()

    def only(self, clients: Sequence[Client]) -> Simulator:
        """These clients alone, on whom nobody looks."""
        return self.clients.only(clients)

    def measure(self, query: Query, state: ServerState) -> Mapping[str, float]:
        """The importance that `query` asks for."""
        self.tell(Phase("importance"))
        return self.clients.measure(query, state)

    def fit(self, tasks: Mapping[Client, Task]) -> Iterator[Update]:
        """Trains the clients; their updates, in order. After the last one it is the server's turn."""
        profiles = self.clients.profiles()
        groups = {client: profiles[client].group for client in tasks}
        round_ = next((task.round for task in tasks.values()), 0)
        self.tell(Asked(round_, groups, {client: task.nbytes for client, task in tasks.items()}))
        for update in self.clients.fit(tasks):
            said = update.metrics
            self.tell(Answered(update.client, said.get("loss"), update.nbytes, said.get("seconds")))
            yield update
        self.tell(Phase("server"))
