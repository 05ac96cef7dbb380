"""Replies that lie at Flower's SuperLink, fetched only as far as they can be answers.

Flower keeps a message as a tree of pieces, says of none how large it is, and hands out a message before its pieces have
come. Its own `pull_messages` waits for them for two hours, fetches whatever is there, joins an array from as many
copies of a piece as its sender names (600 MB of zeros are one piece of 5 MB), and raises where one is not as it should.
Here a reply whose pieces are still to come waits, and the server does not. Pieces are counted as they come. What they
would be joined to is added up before it is. What is wrong with a reply is said of that reply alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from flwr.app import Message
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_children_ids_from_object_content,
    get_object_head_values_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectUnavailableError,
    inflatable_class_registry,
    inflate_object_from_contents,
)
from flwr.superlink.grid.http_grid import HttpGrid

from polyrank.files import from_json

OVERHEAD = 1 << 16
"""Most bytes of what Flower puts around a blob: heads of pieces, names, the header of an array."""
_LEAST_PIECE = 1 << 16  # bytes of a blob for each of its pieces, so that nobody sends millions of empty ones
_FEW = 16  # pieces of a message around its blob's
_ARRAY = "Array"


class ExcessError(ValueError):
    """A reply that is larger than what may answer its message, or no message at all."""


class Parcels:
    """The replies to a server's messages, from the SuperLink into memory.

    Args:
        grid: Flower's connection.
    """

    def __init__(self, grid: HttpGrid) -> None:
        self.grid = grid
        self.coming: dict[str, _Parcel] = {}

    def fetched(self, most: Mapping[str, int]) -> Iterator[tuple[str, Message | ExcessError]]:
        """What is there for messages: the message that is answered, and the answer, or why it was not read.

        Args:
            most: message -> most bytes of a blob that may answer it. A reply to another one is forgotten.
        """
        run = self.grid._run
        assert run is not None
        link, node = self.grid._runtime_client, self.grid.node
        pull = make_pull_object_fn_protobuf(pull_object_protobuf=link.PullObject, node=node, run_id=run.run_id)
        answers = link.PullMessages(PullAppMessagesRequest(message_ids=list(most)))
        for head, tree in zip(answers.messages_list, answers.message_object_trees, strict=True):
            asked = head.metadata.reply_to_message_id
            self.coming[asked] = _Parcel(head.metadata.message_id, tree, most.get(asked, 0))
        self.coming = {asked: parcel for asked, parcel in self.coming.items() if asked in most}
        for asked in list(self.coming):
            parcel = self.coming[asked]
            try:
                found: Message | ExcessError = parcel.message(pull)
            except ObjectUnavailableError:
                continue
            except ExcessError as error:
                found = error
            except Exception as error:  # whatever a hostile message provokes in Flower's reading of it
                found = ExcessError(f"cannot be read: {type(error).__name__}: {str(error)[:300]}")
            del self.coming[asked]
            link.ConfirmMessageReceived(  # so that the SuperLink throws the pieces away
                ConfirmMessageReceivedRequest(node=node, run_id=run.run_id, message_object_id=parcel.name)
            )
            yield asked, found


class _Parcel:
    """One reply, whose pieces come one by one.

    Args:
        name: Flower's id of it.
        tree: the ids of its pieces.
        most: bytes of a blob that may be in it.
    """

    def __init__(self, name: str, tree: ObjectTree, most: int) -> None:
        self.name, self.tree, self.most = name, tree, most
        self.pieces: dict[str, bytes] = {}
        self.left = most + OVERHEAD

    def message(self, pull: Callable[[str], bytes]) -> Message:
        """The message, once all of its pieces are there.

        Raises:
            ExcessError: if it has more, or would have more when joined, than may answer.
            ObjectUnavailableError: while a piece is still to come.
        """
        for name in self._names():
            if name not in self.pieces:
                piece = pull(name)
                self.left -= len(piece)
                if self.left < 0:
                    raise ExcessError(f"has more than the {self.most} bytes that an answer may have; not fetched")
                self.pieces[name] = piece
        self._check_joined()
        found = inflate_object_from_contents(self.name, self.pieces)
        if not isinstance(found, Message):
            raise ExcessError(f"is a {type(found).__name__} and no message")
        return found

    def _names(self) -> list[str]:
        names: list[str] = []
        for node in iterate_object_tree(self.tree):
            names.append(node.object_id)
            if len(names) > _FEW + self.most // _LEAST_PIECE:
                raise ExcessError(f"is in more than {len(names) - 1} pieces, too many for {self.most} bytes")
        return names

    def _check_joined(self) -> None:
        total = 0
        for piece in self.pieces.values():
            kind, *_ = get_object_head_values_from_object_content(piece)
            if kind == _ARRAY:
                names = get_object_children_ids_from_object_content(piece)
                parts = from_json(get_object_body(piece, inflatable_class_registry[_ARRAY]))["arraychunk_ids"]
                total += sum(len(self.pieces[names[part]]) for part in parts)
        if total > self.most + OVERHEAD:
            raise ExcessError(f"would be joined to {total} bytes, and an answer may have {self.most}")
