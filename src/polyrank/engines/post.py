"""What carries messages: bytes to clients, and bytes back. Imports nothing heavy, for processes that only carry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from polyrank.core.types import Client

Kind = Literal["profile", "fit", "measure"]


class Reply(NamedTuple):
    """What came for a message: bytes, or why there are none.

    Attributes:
        message: that is answered.
        blob: the answer.
        error: why there is none.
        refused: whether what came cannot be an answer, so that its sender need not be asked again.
    """

    message: str
    blob: bytes | None
    error: str = ""
    refused: bool = False


class Post(Protocol):
    """A transport."""

    def sites(self) -> Mapping[Client, int]:
        """Who is connected now: client -> address. A client that comes back may have another address."""
        ...

    def send(self, kind: Kind, letters: Mapping[Client, bytes], seconds: float) -> dict[str, Client]:
        """Sends to clients that are connected; message -> client. It and its answer expire after `seconds`."""
        ...

    def receive(self, messages: Mapping[str, int]) -> Iterable[Reply]:
        """What has come for these messages since the last time, one after another; does not wait.

        Args:
            messages: message -> most bytes that an answer may have. What has more is not read into memory.
        """
        ...
