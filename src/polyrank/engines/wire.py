"""Messages between a server and its clients: one frame of bytes each, checked before anything is made of it.

    "PRNK"  version (1 byte)  length of the header (4 bytes)  header: deflated JSON  tensors: safetensors

Every header names the version of polyrank that made it: another version's message is read no further. The header of a
task lists its tensors; the values follow in that order, flat, under one of `CODECS`. An update travels without a list:
what it must hold follows from the task it answers, to the byte, so it is compared with that first.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import save
from torch import Tensor

from polyrank.core.lowrank import Adapter, LowRank, truncate
from polyrank.core.privacy import Privacy
from polyrank.core.types import Client, LocalTraining, TailPenalty, Task, Update
from polyrank.engines.encodings import CODECS, Encoding, relative_error
from polyrank.files import from_json
from polyrank.version import __version__

_FRAME = struct.Struct(">4sBI")
_MAGIC, _VERSION = b"PRNK", 1
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8"}
_PREFIX = 4096
"""Most bytes that safetensors' own header takes here: it names two tensors at most."""

SMALL = 1 << 14
"""Most bytes of a header, unpacked, that lists nothing."""
LISTING = 1 << 24
"""Most bytes of one that lists a model's layers or classes."""
_PER_RANK = 8
"""Most bytes of a rank in a list of them."""
_MOST_EXAMPLES = 2**53
_LARGEST = sys.float_info.max

_METRICS = {"loss": 1e9, "steps": 2.0**53, "seconds": 1e9, "memory": 2.0**53}
"""What a client may say of its training, and the most that it can be: 30 years, for example, and 8 PiB."""
_MOST_ERROR = 1e9
"""The most that an encoding can lose, relative to what it carries."""

BROKEN = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What reading values that may be anything can raise."""


class WireError(ValueError):
    """A message that is not what it must be; says what is wrong with it."""


class VersionError(WireError):
    """A message of another version of polyrank."""


class Sent(NamedTuple):
    """A task as it travels.

    Attributes:
        blob: the message.
        task: the task.
        read: what the client reads in the message: the task itself, but for the rounding of a lossy encoding.
        reply: the encoding that the answer must have.
    """

    blob: bytes
    task: Task
    read: Task
    reply: Encoding

    @property
    def digest(self) -> str:
        """By which an update names the task it answers."""
        return digest(self.blob)


def digest(blob: bytes) -> str:
    """The SHA-256 of a message."""
    return hashlib.sha256(blob).hexdigest()


def frame(header: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> bytes:
    """One message from a header and flat tensors."""
    signed = {**header, "polyrank": __version__}
    packed = zlib.compress(json.dumps(signed, separators=(",", ":"), allow_nan=False).encode(), 9)
    return _FRAME.pack(_MAGIC, _VERSION, len(packed)) + packed + (save(dict(tensors)) if tensors else b"")


def opened(blob: bytes, kind: str, most: int = SMALL) -> tuple[dict[str, Any], bytes]:
    """A message's header, of at most `most` bytes when unpacked, and the bytes of its tensors.

    Raises:
        VersionError: if another version of polyrank has made it.
        WireError: if it is no such message.
    """
    if len(blob) < _FRAME.size:
        raise WireError(f"a message of {len(blob)} bytes is none")
    magic, version, length = _FRAME.unpack_from(blob)
    if magic != _MAGIC or version != _VERSION:
        raise WireError(f"begins with {magic!r}, version {version}, not with {_MAGIC!r}, version {_VERSION}")
    start = _FRAME.size + length
    if start > len(blob):
        raise WireError(f"its header should have {length} bytes, and the message has {len(blob)}")
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(blob[_FRAME.size : start], most + 1)
        if len(text) > most or not unpacker.eof or unpacker.unused_data:
            raise WireError(f"its header is longer than {most} bytes, or cut short")
        header = from_json(text, finite=True)
    except (zlib.error, ValueError) as error:
        raise WireError(f"its header cannot be read: {error}") from None
    if not isinstance(header, dict):
        raise WireError(f"is no {kind}")
    if (version := header.pop("polyrank", None)) != __version__:
        theirs = "no stated version of polyrank" if version is None else f"polyrank {shown(version, 20)}"
        raise VersionError(f"is of {theirs}, and this side has {__version__!r}: server and sites need the same version")
    if header.get("kind") != kind:
        raise WireError(f"is no {kind}")
    return header, blob[start:]


def encode_task(
    task: Task, client: Client, encoding: Encoding = "float32", reply: Encoding = "float32", **more: Any
) -> Sent:
    """The task of one client as it travels; `more` goes into its header."""
    tensors = [*_values(task.adapter, "AB"), *_values(task.frozen, "AB")]
    header = {
        "kind": "task",
        "round": task.round,
        "client": client,
        "adapter": _listing(task.adapter),
        "frozen": _listing(task.frozen),
        "factors": task.factors,
        "local": asdict(task.local),
        "penalty": None if task.penalty is None else asdict(task.penalty),
        "seed": task.seed,
        "privacy": asdict(task.privacy),
        "encoding": encoding,
        "reply": reply,
        **more,
    }
    blob = frame(header, CODECS[encoding].pack(tensors))
    return Sent(blob, task, task if CODECS[encoding].exact else decode_task(blob)[0], reply)


def decode_task(blob: bytes) -> tuple[Task, dict[str, Any]]:
    """The task that a client was sent, and the header it came with.

    Raises:
        WireError: if the message is not a task.
    """
    header, body = opened(blob, "task", LISTING)
    try:
        parts = [header["adapter"], header["frozen"]]
        sizes = [size for part in parts for size in _sizes(part)]
        found = iter(_read(body, header["encoding"], sizes))
        adapter, frozen = (_filled(part, found) for part in parts)
        penalty = None if header["penalty"] is None else TailPenalty(**header["penalty"])
        local = local_of(header["local"])
        for key, valid in (("factors", ("A", "B", "AB")), ("reply", tuple(CODECS))):
            if header[key] not in valid:
                raise WireError(f"{key}: {shown(header[key])} is none of {', '.join(valid)}")
        if not isinstance(header["client"], str):
            raise WireError(f"client: {shown(header['client'])} is not a name")
        round_, seed = _count(header["round"]), _count(header["seed"])
        privacy = privacy_of(header["privacy"])
        return Task(round_, adapter, frozen, header["factors"], local, penalty, seed, privacy), header
    except BROKEN as error:
        raise WireError(f"not a task: {str(error)[:300]}") from None


def local_of(plain: Mapping[str, Any]) -> LocalTraining:
    """How a client trains, as a message says it.

    Raises:
        WireError: if a count is none; others of `BROKEN` for what is no such mapping.
    """
    for name in ("epochs", "steps", "batch", "accumulate"):
        count = plain[name]
        if (type(count) is not int or not 1 <= count <= _MOST_EXAMPLES) and (name, count) != ("steps", None):
            raise WireError(f"local.{name}: {shown(count)} is not a whole number from 1 to 2^53")
    return LocalTraining(**plain)


def privacy_of(plain: Mapping[str, Any]) -> Privacy:
    """What is protected, as a message says it.

    Raises:
        WireError: if a number is none; others of `BROKEN` for what is no such mapping.
    """
    sections = {kind: plain[kind] and dict(plain[kind]) for kind in ("clients", "examples")}
    for kind, section in sections.items():
        if section is not None:
            numbers = ("clip", "noise", "delta")
            section |= {key: _number(section[key], f"privacy.{kind}.{key}") for key in numbers}
            if section.get("where", "client") not in ("central", "client"):
                raise WireError(f"privacy.{kind}.where: {shown(section['where'])} is none of central, client")
    return Privacy.of(sections)


def encode_update(update: Update, sent: Task, digest_: str, reply: Encoding = "float32") -> bytes:
    """A client's answer to the task it read, whose message has this digest.

    Only factors that were trained travel. A lossy encoding carries how far they moved, which is what its blocks then
    resolve, and the header says what was lost of it.
    """
    codec = CODECS[reply]
    values = _values(update.adapter, sent.factors)
    ranks = [x.rank for x in update.adapter.layers.values()]
    start = _values(_at_ranks(sent.adapter, ranks), sent.factors)
    moved = values if codec.exact else [x - y for x, y in zip(values, start, strict=True)]
    parts = codec.pack(moved)
    header: dict[str, Any] = {
        "kind": "update",
        "round": sent.round,
        "client": update.client,
        "task": digest_,
        "examples": update.examples,
        "metrics": {name: value for name, value in update.metrics.items() if name in _METRICS},
    }
    if not codec.exact:
        header["error"] = relative_error(moved, codec.unpack(parts, [x.numel() for x in moved]))
    if ranks != [x.rank for x in sent.adapter.layers.values()]:
        header["ranks"] = ranks
    return frame(header, parts)


def most_bytes(sent: Sent) -> int:
    """The longest that an answer to a task may be."""
    sizes = [x.numel() for x in _values(sent.task.adapter, sent.task.factors)]
    return _FRAME.size + _most_header(sent) + _PREFIX + CODECS[sent.reply].nbytes(sizes)


def _most_header(sent: Sent) -> int:
    return SMALL + _PER_RANK * len(sent.task.adapter.layers)


def decode_update(blob: bytes, sent: Sent, client: Client) -> tuple[Update, float]:
    """The update in an answer to a task, and what its encoding lost (`encode_update`).

    What the task lost on its way is not taken for training: the client's movement is added to what the server sent.

    Raises:
        WireError: if the message is anything else than an answer to that very task by that client: other layers,
            ranks, shapes, types or sizes, another round's, another client's. What its values are is not looked at.
    """
    if len(blob) > most_bytes(sent):
        raise WireError(f"has {len(blob)} bytes, and an answer to its task has at most {most_bytes(sent)}")
    header, body = opened(blob, "update", _most_header(sent))
    task = sent.task
    for key, due in (("round", task.round), ("client", client), ("task", sent.digest)):
        if header.get(key) != due or type(header[key]) is not type(due):
            raise WireError(f"{key}: {shown(header.get(key))}, not {due!r}")
    known = {"kind", "round", "client", "task", "examples", "metrics", "ranks", "error"}
    if unknown := sorted(header.keys() - known):
        raise WireError(f"has unknown parts: {', '.join(unknown)[:200]}")
    examples, metrics = _number(header.get("examples"), "examples"), header.get("metrics")
    if not 0 < examples <= _MOST_EXAMPLES:
        raise WireError(f"examples: {examples:g} must be more than 0 and at most 2^53")
    if not isinstance(metrics, dict) or not metrics.keys() <= _METRICS.keys():
        names = shown(metrics) if not isinstance(metrics, dict) else ", ".join(sorted(metrics))[:200]
        raise WireError(f"metrics: {names}: not all are among {', '.join(sorted(_METRICS))}")
    metrics = {name: _number(value, f"metrics: {name}", most=_METRICS[name]) for name, value in metrics.items()}
    ranks = _ranks(task, header.get("ranks"))
    start, read = _at_ranks(task.adapter, ranks), _at_ranks(sent.read.adapter, ranks)
    values = _values(start, task.factors)
    found = _read(body, sent.reply, [x.numel() for x in values])
    if CODECS[sent.reply].exact and sent.read is not task:
        found = [x - y.flatten() for x, y in zip(found, _values(read, task.factors), strict=True)]
    if not CODECS[sent.reply].exact or sent.read is not task:
        found = [x + y.flatten() for x, y in zip(found, values, strict=True)]
    adapter = _replaced(start, task.factors, found)
    lost = _number(header.get("error", 0.0), "error", most=_MOST_ERROR)
    return Update(client, adapter, examples, task.factors, metrics), lost


def _ranks(task: Task, stated: Any) -> list[int]:
    """The ranks of an update's layers: those that were sent, unless its client may have pruned itself."""
    layers = task.adapter.layers
    if stated is None:
        return [x.rank for x in layers.values()]
    if task.penalty is None or not task.penalty.prune:
        raise WireError("states ranks of its own, and its task has none pruned")
    if not isinstance(stated, list) or len(stated) != len(layers):
        raise WireError(f"ranks: {shown(stated)} is not a list of one for each of {len(layers)} layers")
    for (name, x), rank in zip(layers.items(), stated, strict=True):
        if type(rank) is not int or not 1 <= rank <= x.rank:
            raise WireError(f"ranks: {shown(rank)} for {name}, which was sent rank {x.rank}")
    return stated


def _at_ranks(adapter: Adapter, ranks: Sequence[int]) -> Adapter:
    layers = {name: truncate(x, rank) for (name, x), rank in zip(adapter.layers.items(), ranks, strict=True)}
    return Adapter(layers, adapter.dense)


def _values(adapter: Adapter, factors: str) -> list[Tensor]:
    """The tensors that travel, in order: of every layer the factors named, then the dense parameters."""
    layers = [getattr(x, factor) for x in adapter.layers.values() for factor in factors]
    return [tensor.detach().to("cpu", torch.float32).contiguous() for tensor in (*layers, *adapter.dense.values())]


def _replaced(adapter: Adapter, factors: str, flat: Sequence[Tensor]) -> Adapter:
    """An adapter with the tensors that `_values` lists taken from flat ones."""
    rest = iter(flat)
    layers = {}
    for name, x in adapter.layers.items():
        own = {factor: next(rest).view(getattr(x, factor).shape) for factor in factors}
        layers[name] = LowRank(own.get("A", x.A), own.get("B", x.B), x.scale)
    return Adapter(layers, {name: next(rest).view(tensor.shape) for name, tensor in adapter.dense.items()})


def _listing(adapter: Adapter) -> dict[str, Any]:
    layers = [[name, *x.shape, x.rank, x.scale] for name, x in adapter.layers.items()]
    return {"layers": layers, "dense": [[name, list(tensor.shape)] for name, tensor in adapter.dense.items()]}


def _sizes(listing: Mapping[str, Any]) -> list[int]:
    sizes = []
    for _, out, into, rank, _ in listing["layers"]:
        sizes += [_count(rank) * _count(into), _count(out) * _count(rank)]
    return sizes + [math.prod(map(_count, shape)) for _, shape in listing["dense"]]


def _filled(listing: Mapping[str, Any], flat: Any) -> Adapter:
    layers = {}
    for name, out, into, rank, scale in listing["layers"]:
        layers[str(name)] = LowRank(
            next(flat).view(rank, into), next(flat).view(out, rank), _number(scale, "scale", -_LARGEST)
        )
    return Adapter(layers, {str(name): next(flat).view(shape) for name, shape in listing["dense"]})


def _read(body: bytes, encoding: str, sizes: Sequence[int]) -> list[Tensor]:
    """Flat tensors of these sizes from the bytes of a message; nothing is made before all of them are as they must be.

    Raises:
        WireError: if the bytes hold anything else.
    """
    if encoding not in CODECS:
        raise WireError(f"encoding: {shown(encoding)} is none of {', '.join(CODECS)}")
    codec = CODECS[encoding]
    if len(body) > _PREFIX + codec.nbytes(sizes):
        raise WireError(f"has {len(body)} bytes of tensors, where {codec.nbytes(sizes)} are due")
    if int.from_bytes(body[:8], "little") > _PREFIX:
        raise WireError(f"its tensors are listed in more than {_PREFIX} bytes")
    try:
        found = dict(deserialize(body))
    except (SafetensorError, ValueError) as error:
        raise WireError(f"its tensors cannot be read: {error}") from None
    layout = codec.layout(sizes)
    held = {name: (part["dtype"], list(part["shape"])) for name, part in found.items()}
    due = {name: (_DTYPES[dtype], [length]) for name, (dtype, length) in layout.items()}
    if held != due:
        raise WireError(f"holds {str(held)[:200]}, where {due} is due")
    flat = {
        name: torch.frombuffer(found[name]["data"], dtype=dtype) if length else torch.zeros(0, dtype=dtype)
        for name, (dtype, length) in layout.items()
    }
    return codec.unpack(flat, sizes)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise WireError(f"{shown(value)} is not a whole number from 0")
    return value


def _number(value: Any, what: str, least: float = 0.0, most: float = _LARGEST) -> float:
    # Comparing, unlike converting, takes integers of any length.
    if type(value) not in (int, float) or not least <= value <= most:
        highest = f" to {most:g}" if most < _LARGEST else ""
        raise WireError(f"{what}: {shown(value)} is not a finite number from {least:g}{highest}")
    return float(value)


def shown(value: Any, most: int = 80) -> str:
    """What a message holds where something else is due, in few characters; lists and objects by their type alone."""
    plain = value is None or isinstance(value, str | int | float)
    return repr(value)[:most] if plain else f"a {type(value).__name__}"
