"""Flower as a carrier of bytes: one blob a message, each way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from polyrank.engines.post import Kind, Reply

if TYPE_CHECKING:
    from polyrank.core.types import Client

TYPES: Mapping[Kind, str] = {"profile": "query.profile", "measure": "query.measure", "fit": "train"}
"""Flower's types of message."""

_NAME = "blob"


class FlowerPost:
    """A transport over a Flower grid.

    A client's name is the one that its node was registered under at the SuperLink, where its key was: nobody can claim
    another's. Nodes without a name go by their number.
    """

    def __init__(self, grid: Grid) -> None:
        from flwr.superlink.grid.http_grid import HttpGrid  # heavy, and clients import this module as well

        from polyrank.engines.pieces import Parcels

        self.grid = grid
        self.parcels = Parcels(grid) if isinstance(grid, HttpGrid) else None

    def sites(self) -> dict[Client, int]:
        """The nodes that are online. Of two with one name, which registration should not allow, the older one."""
        nodes = sorted(self.grid.get_nodes(), key=lambda node: node.registered_at, reverse=True)
        return {node.name or f"node_{node.node_id}": node.node_id for node in nodes}

    def send(self, kind: Kind, letters: Mapping[Client, bytes], seconds: float) -> dict[str, Client]:
        """Sends one message to each client that is online; message -> client."""
        there = self.sites()
        clients = [client for client in sorted(letters) if client in there]
        if not clients:
            return {}
        messages = [Message(_content(letters[c]), there[c], TYPES[kind], ttl=seconds) for c in clients]
        ids = self.grid.push_messages(messages)
        return {message: client for message, client in zip(ids, clients, strict=True) if message}

    def receive(self, messages: Mapping[str, int]) -> Iterator[Reply]:
        """What has come. An error's sender may be the SuperLink, so replies are told apart by what they answer.

        From a SuperLink no more is fetched than may answer. A grid of another kind, within a process, hands out whole
        messages, which are measured then.
        """
        if not messages:
            return
        found: Iterable[tuple[str, Message | Exception]]
        if self.parcels is not None:
            found = self.parcels.fetched(messages)
        else:
            pulled = self.grid.pull_messages(set(messages))
            found = ((message.metadata.reply_to_message_id, message) for message in pulled)
        for asked, message in found:
            if isinstance(message, Exception):
                yield Reply(asked, None, str(message), refused=True)
            else:
                yield _reply(asked, message, messages.get(asked, 0))


def answer(message: Message, blob: bytes) -> Message:
    """A client's reply to a message."""
    return Message(_content(blob), reply_to=message)


def blob_of(message: Message) -> bytes:
    """The bytes of a message.

    Raises:
        ValueError: if it has none, or other content.
    """
    records = message.content.array_records
    if list(message.content) != [_NAME] or list(records.get(_NAME, {})) != [_NAME]:
        raise ValueError("its content is not one blob")
    values = records[_NAME][_NAME].numpy()
    if values.dtype != np.uint8 or values.ndim != 1:
        raise ValueError(f"its blob is {values.dtype}, of shape {values.shape}, and not bytes")
    return values.tobytes()


def _content(blob: bytes) -> RecordDict:
    return RecordDict({_NAME: ArrayRecord({_NAME: Array(np.frombuffer(blob, np.uint8))})})


def _reply(asked: str, message: Message, most: int) -> Reply:
    if message.has_error():
        return Reply(asked, None, f"error {message.error.code}: {message.error.reason}")
    try:
        blob = blob_of(message)
    except Exception as error:  # whatever a hostile payload provokes in the decoder of arrays
        return Reply(asked, None, f"cannot be read: {error}", refused=True)
    if len(blob) > most:
        return Reply(asked, None, f"has {len(blob)} bytes, and an answer may have {most}", refused=True)
    return Reply(asked, blob)
