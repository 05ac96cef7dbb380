"""What a run is doing just now, as values: whoever shows it is one function, and is told of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial


@dataclass(frozen=True)
class Asked:
    """A round's clients have been asked.

    Attributes:
        round: the round, from 0.
        groups: the device group of each.
        bytes_down: of tensors sent to each.
    """

    round: int
    groups: Mapping[str, str]
    bytes_down: Mapping[str, int]


@dataclass(frozen=True)
class Answered:
    """A client is done.

    Attributes:
        client: who.
        loss: mean over its round, if it says.
        bytes_up: of the tensors that come back.
        seconds: simulated, where its links are known.
    """

    client: str
    loss: float | None
    bytes_up: int
    seconds: float | None


@dataclass(frozen=True)
class Phase:
    """What happens beside the clients' training.

    Attributes:
        name: ``importance``, ``server``, ``evaluation``, ``test``, or words.
        done, of: how far it is, where that is known; `of` is 0 otherwise.
    """

    name: str
    done: int = 0
    of: int = 0


Event = Asked | Answered | Phase
Tell = Callable[[Event], None]


def tell_all(listeners: Iterable[Tell], event: Event) -> None:
    """Tells each of them."""
    for listener in listeners:
        listener(event)


ignore: Tell = partial(tell_all, ())
"""Who does not look."""
