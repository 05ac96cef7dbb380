"""What a client may make Flower keep for the server, and how little of it reaches the server's memory."""

import json
import os
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

flwr = pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict  # noqa: E402
from flwr.app.message import remove_content_from_message  # noqa: E402
from flwr.common.serde import message_to_proto  # noqa: E402
from flwr.proto.message_pb2 import (  # noqa: E402
    ConfirmMessageReceivedResponse,
    ObjectTree,
    PullObjectResponse,
)
from flwr.proto.runtime_pb2 import PullAppMessagesResponse  # noqa: E402
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree  # noqa: E402
from flwr.supercore.run import Run  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402
from flwr.superlink.grid.http_grid import HttpGrid  # noqa: E402

from polyrank.engines.flower import FlowerPost, answer  # noqa: E402
from polyrank.engines.post import Reply  # noqa: E402

MOST = 1_000_000
LITTLE = 12 * MOST


class Link:
    """What a SuperLink says to a server: messages as trees, and pieces one by one."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Any, ObjectTree]] = []
        self.pieces: dict[str, bytes] = {}
        self.missing: set[str] = set()
        self.served, self.confirmed = 0, []  # type: int, list[str]

    def put(self, message: Message, tree: ObjectTree | None = None) -> None:
        message.metadata.__dict__["_message_id"] = message.object_id
        objects = get_all_nested_objects(message)
        self.pieces |= {name: bytes(piece.deflate()) for name, piece in objects.items()}
        self.waiting.append((message_to_proto(remove_content_from_message(message)), tree or get_object_tree(message)))

    def PullMessages(self, request: Any) -> PullAppMessagesResponse:  # noqa: N802 (Flower's)
        found, self.waiting = self.waiting, []
        return PullAppMessagesResponse(
            messages_list=[head for head, _ in found], message_object_trees=[tree for _, tree in found]
        )

    def PullObject(self, request: Any) -> PullObjectResponse:  # noqa: N802
        there = request.object_id not in self.missing
        piece = self.pieces[request.object_id] if there else b""
        self.served += len(piece)
        return PullObjectResponse(object_found=True, object_available=there, object_content=piece)

    def ConfirmMessageReceived(self, request: Any) -> ConfirmMessageReceivedResponse:  # noqa: N802
        self.confirmed.append(request.message_object_id)
        return ConfirmMessageReceivedResponse()


@pytest.fixture
def link() -> Link:
    return Link()


@pytest.fixture
def post(link: Link) -> FlowerPost:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    grid = HttpGrid(token="t")
    grid._run = Run.create_empty(1)
    grid._client = link  # type: ignore[assignment]
    return FlowerPost(grid)


def asked(number: int = 0) -> Message:
    message = Message(RecordDict(), 7, "train", ttl=60)
    message.metadata.__dict__["_message_id"] = f"asked-{number}"
    return message


def carrying(content: RecordDict) -> Message:
    return Message(content, reply_to=asked())


def blob_in(array: Array) -> Message:
    return carrying(RecordDict({"blob": ArrayRecord({"blob": array})}))


def measured(post: FlowerPost, most: int = MOST) -> tuple[list[Reply], int]:
    """What is received, and the most memory that it took."""
    tracemalloc.start()
    try:
        found = list(post.receive({"asked-0": most}))
        return found, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_an_answer_comes_whole(link: Link, post: FlowerPost) -> None:
    blob = os.urandom(MOST)
    link.put(answer(asked(), blob))
    assert list(post.receive({"asked-0": MOST})) == [Reply("asked-0", blob)]
    assert len(link.confirmed) == 1
    assert list(post.receive({"asked-0": MOST})) == []


def test_a_large_message_is_not_fetched(link: Link, post: FlowerPost) -> None:
    """60 MB, in pieces of 5 MB: a piece is there before it is known to be too much."""
    link.put(answer(asked(), os.urandom(60_000_000)))
    (reply,), memory = measured(post)
    assert reply.blob is None
    assert reply.refused
    assert f"has more than the {MOST} bytes that an answer may have" in reply.error
    assert link.served < 6_000_000
    assert memory < LITTLE
    assert len(link.confirmed) == 1  # so that the SuperLink does not keep it


def test_copies_of_one_piece_are_not_joined(link: Link, post: FlowerPost) -> None:
    """600 MB of zeros are one piece, a hundred and twenty times."""
    array = Array(np.zeros(5_000_000, np.uint8))
    message = blob_in(array)
    message.metadata.__dict__["_message_id"] = message.object_id
    link.put(message)
    (name,) = [key for key, piece in link.pieces.items() if piece.startswith(b"Array ")]
    head, body = link.pieces[name].split(b"\x00", 1)
    meta = json.loads(body)
    longer = json.dumps({**meta, "arraychunk_ids": meta["arraychunk_ids"] * 300}).encode()
    parts = head.split(b" ")
    link.pieces[name] = b" ".join([*parts[:-1], str(len(longer)).encode()]) + b"\x00" + longer
    (reply,), memory = measured(post, 6_000_000)
    assert "would be joined to" in reply.error
    assert reply.refused
    assert memory < 6 * LITTLE


def test_a_reply_in_millions_of_pieces_is_not_fetched(link: Link, post: FlowerPost) -> None:
    message = answer(asked(), b"x")
    leaf = ObjectTree(object_id="a" * 64)
    link.put(message, ObjectTree(object_id="b" * 64, children=[leaf] * 100_000))
    (reply,) = post.receive({"asked-0": MOST})
    assert "pieces, too many" in reply.error
    assert link.served == 0


def lies(edit: Callable[[bytes], bytes]) -> Callable[[Link], None]:
    def of(link: Link) -> None:
        link.put(answer(asked(), b"x" * 100))
        link.pieces = {name: edit(piece) for name, piece in link.pieces.items()}

    return of


def deep(link: Link) -> None:
    tree = ObjectTree(object_id="a")
    for _ in range(95):  # protobuf itself takes no more than a hundred
        tree = ObjectTree(object_id="a", children=[tree])
    link.put(answer(asked(), b"x"), tree)
    link.pieces["a"] = b"Message  3\x00abc"


@pytest.mark.parametrize(
    "hostile",
    [
        lies(lambda piece: b""),
        lies(lambda piece: piece[:-1]),
        lies(lambda piece: piece.replace(b"Array", b"Aray")),
        lies(lambda piece: piece.replace(b"ArrayRecord", b"ConfigRecord")),
        lies(lambda piece: piece.replace(b"[0]", b"[9]")),
        lies(lambda piece: piece.replace(b"numpy", b"torch")),
        lies(lambda piece: b"\xff" * len(piece)),
        deep,
        lambda link: link.put(carrying(RecordDict())),
        lambda link: link.put(carrying(RecordDict({"blob": ConfigRecord({"blob": b"x"})}))),
        lambda link: link.put(blob_in(Array(np.zeros((3, 3))))),
        lambda link: link.put(blob_in(Array("uint8", (1 << 40,), "numpy.ndarray", b"\x93NUMPY\x01\x00"))),
    ],
)
def test_no_message_that_cannot_be_read_ends_the_run(
    link: Link, post: FlowerPost, hostile: Callable[[Link], None]
) -> None:
    hostile(link)
    (reply,) = post.receive({"asked-0": MOST})
    assert reply.message == "asked-0"
    assert reply.blob is None
    assert reply.refused
    assert 0 < len(reply.error) < 500


def test_the_server_does_not_wait_for_pieces_that_do_not_come(link: Link, post: FlowerPost) -> None:
    blob = os.urandom(MOST)
    link.put(answer(asked(), blob))
    (last, *_) = [name for name, piece in link.pieces.items() if piece.startswith(b"ArrayChunk")]
    link.missing = {last}
    assert list(post.receive({"asked-0": MOST})) == []
    before = link.served
    assert list(post.receive({"asked-0": MOST})) == []
    assert link.served == before  # what is there already is not fetched again
    link.missing = set()
    assert list(post.receive({"asked-0": MOST})) == [Reply("asked-0", blob)]


def test_what_nobody_waits_for_any_more_is_forgotten(link: Link, post: FlowerPost) -> None:
    link.put(answer(asked(), os.urandom(100)))
    link.missing = set(link.pieces)
    assert list(post.receive({"asked-0": MOST})) == []
    link.missing = set()
    assert list(post.receive({"asked-1": MOST})) == []
    assert not post.parcels.coming  # type: ignore[union-attr]
