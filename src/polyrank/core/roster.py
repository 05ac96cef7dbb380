"""Everybody who is registered, in columns: a client that nobody asks for is no Python object.

A round asks 100 clients of 100,000. So names, profiles, budgets and shares are mappings that make a value when it is
asked for, from arrays that hold a few bytes a client; and what is the same for all clients of a kind is held once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from polyrank.core.types import Client, ClientProfile

Numbers = npt.NDArray[np.int64]
V = TypeVar("V")
W = TypeVar("W")

_PREFIX = "client_"


class Listed(Protocol):
    """Clients' names, by number: a list, or what makes them when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Client: ...

    def __iter__(self) -> Iterator[Client]: ...


class Names(Listed, Protocol):
    """Clients' names, and their numbers."""

    def number(self, name: Client) -> int:
        """The client of this name; a KeyError where there is none."""
        ...


class Numbered:
    """Names of clients that have none of their own: ``client_00`` to ``client_99``, in ascending order.

    >>> names = Numbered(100)
    >>> names[7], names.number("client_07")
    ('client_07', 7)
    """

    def __init__(self, count: int) -> None:
        self.count, self.width = count, len(str(count - 1))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Client:
        if not 0 <= number < self.count:
            raise IndexError(f"client {number} of {self.count}")
        return f"{_PREFIX}{number:0{self.width}d}"

    def __iter__(self) -> Iterator[Client]:
        return map(self.__getitem__, range(self.count))

    def number(self, name: Client) -> int:
        """The client of this name."""
        digits = name.removeprefix(_PREFIX)
        found = int(digits) if digits.isdecimal() else -1
        if not 0 <= found < self.count or self[found] != name:
            raise KeyError(name)
        return found


class Named:
    """Names that clients have of their own, each once."""

    def __init__(self, names: Sequence[Client]) -> None:
        self.names = tuple(names)
        self.numbers = {name: number for number, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> Client:
        return self.names[number]

    def __iter__(self) -> Iterator[Client]:
        return iter(self.names)

    def number(self, name: Client) -> int:
        """The client of this name."""
        return self.numbers[name]


class PerClient(Mapping[Client, V]):
    """A value per client, made from its number whenever it is asked for.

    Args:
        names: the clients.
        at: the value of the client of a number.
    """

    def __init__(self, names: Names, at: Callable[[int], V]) -> None:
        self.names, self.at = names, at

    def __getitem__(self, client: Client) -> V:
        return self.at(self.names.number(client))

    def __iter__(self) -> Iterator[Client]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class PerKind(PerClient[V]):
    """One value for all clients of a kind.

    Args:
        names: the clients.
        kind: each client's kind, (clients,); kinds are numbered from 0 in the order of their first clients.
        each: the value of each kind.
    """

    def __init__(self, names: Names, kind: Numbers, each: Sequence[V]) -> None:
        super().__init__(names, lambda number: each[kind[number]])
        self.kind, self.each = kind, each

    def map(self, value: Callable[[V], W]) -> PerKind[W]:
        """A value of each kind's value."""
        return PerKind(self.names, self.kind, [value(held) for held in self.each])

    def first(self, kind: int) -> Client:
        """The first client of a kind."""
        return self.names[int(np.argmax(self.kind == kind))]


class Fleet(PerClient[ClientProfile]):
    """The profiles of a fleet in which clients of a kind report the same, but for their examples.

    Args:
        names: the clients.
        kind: which of `reports` is each client's, (clients,).
        reports: a profile of each kind, whatever its examples; some may be nobody's.
        examples: training examples of each client, (clients,).
    """

    def __init__(self, names: Names, kind: Numbers, reports: Sequence[ClientProfile], examples: Numbers) -> None:
        super().__init__(names, lambda number: replace(reports[kind[number]], examples=int(examples[number])))
        self.examples = examples
        present, first, inverse = np.unique(kind, return_index=True, return_inverse=True)
        order = np.argsort(first)
        alike = [replace(reports[found], examples=0) for found in present[order].tolist()]
        self.kinds = PerKind(names, np.argsort(order)[inverse], alike)


def kinds(profiles: Mapping[Client, ClientProfile]) -> PerKind[ClientProfile]:
    """What each kind of client reports, with no examples: clients that differ in nothing else are of a kind."""
    if isinstance(profiles, Fleet):
        return profiles.kinds
    seen: dict[ClientProfile, int] = {}
    kind = [seen.setdefault(replace(profile, examples=0), len(seen)) for profile in profiles.values()]
    return PerKind(Named(list(profiles)), np.asarray(kind, np.int64), list(seen))


def sizes(profiles: Mapping[Client, ClientProfile]) -> Numbers:
    """How many examples each client states, (clients,)."""
    if isinstance(profiles, Fleet):
        return profiles.examples
    return np.asarray([profile.examples for profile in profiles.values()], np.int64)


def ascending(clients: Mapping[Client, V]) -> Listed:
    """The names of all clients in ascending order, which numbered ones are in already."""
    if isinstance(clients, PerClient) and isinstance(clients.names, Numbered):
        return clients.names
    return sorted(clients)
