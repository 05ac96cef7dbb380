"""Flower as a carrier of bytes: one blob a message, each way."""

from __future__ import annotations

from collections.abc import Collection, Mapping
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
        self.grid = grid

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

    def receive(self, messages: Collection[str]) -> list[Reply]:
        """What has come. An error's sender may be the SuperLink, so replies are told apart by what they answer."""
        return [_reply(message) for message in self.grid.pull_messages(set(messages))] if messages else []


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


def _reply(message: Message) -> Reply:
    asked = message.metadata.reply_to_message_id
    if message.has_error():
        return Reply(asked, None, f"error {message.error.code}: {message.error.reason}")
    try:
        return Reply(asked, blob_of(message))
    except Exception as error:  # whatever a hostile payload provokes in the decoder of arrays
        return Reply(asked, None, f"cannot be read: {error}")
