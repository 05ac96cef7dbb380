"""The short messages beside tasks and updates: what a client is, which layers matter on its data, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, get_args

import torch

from polyrank.core.lowrank import Adapter
from polyrank.core.types import (
    Client,
    ClientProfile,
    FisherForm,
    Labels,
    LocalTraining,
    MeasuredOn,
    Query,
    ServerState,
    Target,
    Task,
)
from polyrank.engines.announcement import Announcement
from polyrank.engines.wire import BROKEN, SMALL, WireError, decode_task, digest, encode_task, frame, opened, shown
from polyrank.text import REASON, one_line

_KNOWN = {"examples": int, "rank": int, "memory": float, "uplink": float, "downlink": float, "flops": float}
_MOST = 2**53
"""Examples, and bytes and operations per second, beyond which nothing is a figure of a client."""
_MOST_SCORE = torch.finfo(torch.float32).max
_PER_SCORE = 32
"""Most bytes of a score in a message, beside its layer's name."""
MOST_PROFILE = 2 * SMALL
"""Most bytes of a profile, as it travels."""


def ask_profile(model: Mapping[str, Any], run: Announcement | None = None) -> bytes:
    """Tells a client of a run, and asks what it is, and whether it has the model."""
    return frame({"kind": "hello", "model": model, **({"run": run.plain()} if run else {})})


def encode_profile(profile: ClientProfile, base: str, asked: bytes) -> bytes:
    """A client's answer: its profile, and the fingerprint of its base model."""
    known = {name: value for name in _KNOWN if (value := getattr(profile, name)) is not None}
    return frame({"kind": "profile", "asked": digest(asked), "base": base, "profile": known})


def decode_profile(blob: bytes, asked: bytes, base: str) -> ClientProfile:
    """A client's profile.

    Raises:
        WireError: if it is none, answers something else, or is of a client with another base model.
    """
    header = _bare(blob, "profile", SMALL)
    if header.get("asked") != digest(asked):
        raise WireError("answers another question")
    if header.get("base") != base:
        raise WireError(f"its base model is {shown(header.get('base'), 18)}, the server's is {base[:16]!r}")
    values = header.get("profile")
    if not isinstance(values, dict) or "examples" not in values or not values.keys() <= _KNOWN.keys():
        held = ", ".join(sorted(values))[:200] if isinstance(values, dict) else shown(values)
        raise WireError(f"profile: {held}: must have examples, and no other keys than {', '.join(_KNOWN)}")
    for name, value in values.items():
        if type(value) not in (int, _KNOWN[name]) or not 0 <= value <= _MOST:
            raise WireError(f"profile: {name}: {shown(value)} is not a number that it can be")
    return ClientProfile(**values)


def answer_to_another_version() -> bytes:
    """A site's answer to a message of another version, from which the server learns the site's."""
    return frame({"kind": "another version"})


def ask_scores(query: Query, state: ServerState, client: Client, model: Mapping[str, Any], **more: Any) -> bytes:
    """Asks a client to measure importance of the server's model on its own examples; `more` goes into the header."""
    task = Task(state.round, state.adapter, state.folded, "AB", LocalTraining(), None, query.seed)
    asked = {key: value for key, value in asdict(query).items() if key not in ("cohort", "most")}
    return encode_task(task, client, query=asked, model=model, **more).blob


def decode_query(blob: bytes) -> tuple[Query, ServerState, dict[str, Any]]:
    """What a client is asked to measure, of which model, and the header it came with.

    Raises:
        WireError: if it is no such question.
    """
    task, header = decode_task(blob)
    try:
        query = Query(**header["query"])
    except BROKEN as error:
        raise WireError(f"not a query: {str(error)[:300]}") from None
    words = ((query.kind, ("fisher", "gradient")), (query.on, get_args(MeasuredOn)), (query.labels, get_args(Labels)))
    for word, valid in (*words, (query.form, get_args(FisherForm)), (query.target, get_args(Target))):
        if word not in valid:
            raise WireError(f"query: {shown(word)} is none of {', '.join(valid)}")
    for name in ("samples", "round", "seed"):
        number = getattr(query, name)
        if (type(number) is not int or number < 0) and (name, number) != ("samples", None):
            raise WireError(f"query: {name}: {shown(number)} is not a whole number from 0")
    return query, ServerState(task.round, task.adapter, task.frozen), header


def encode_scores(scores: Mapping[str, float], examples: int, asked: bytes) -> bytes:
    """A client's answer: a score per layer, and how many examples it holds."""
    return frame({"kind": "scores", "asked": digest(asked), "examples": examples, "scores": dict(scores)})


def decode_scores(blob: bytes, asked: bytes, layers: Adapter, client: Client) -> tuple[dict[str, float], int]:
    """The scores of a client and its number of examples.

    Raises:
        WireError: if they are not of the question, one for each layer, finite and not negative.
    """
    header = _bare(blob, "scores", _most_listed(layers))
    scores, examples = header.get("scores"), header.get("examples")
    if header.get("asked") != digest(asked):
        raise WireError("answers another question")
    if type(examples) is not int or not 0 <= examples <= _MOST:
        raise WireError(f"examples: {shown(examples)} of {client!r} is not a number that it can be")
    if not isinstance(scores, dict) or scores.keys() != layers.layers.keys():
        raise WireError("scores are not those of the model's layers")
    for name, value in scores.items():
        if type(value) not in (int, float) or not 0 <= value <= _MOST_SCORE:
            raise WireError(f"score of {name}: {shown(value)} is not a number from 0 to {_MOST_SCORE:.3g}")
    return scores, examples


def encode_refusal(reason: str, asked: bytes) -> bytes:
    """A client's answer to a question that it does not answer: why."""
    return frame({"kind": "refusal", "asked": digest(asked), "reason": reason[:REASON]})


def refusal_of(blob: bytes, asked: str) -> str | None:
    """Why a client does not answer, fit to be shown; None where what it sends is something else.

    Args:
        blob: what it sends.
        asked: digest of the question.
    """
    try:
        header = _bare(blob, "refusal", SMALL)
    except WireError:
        return None
    reason = header.get("reason")
    return one_line(reason, REASON) if header.get("asked") == asked and isinstance(reason, str) else None


def most_scores(layers: Adapter) -> int:
    """The longest that an answer with a score for each layer may be, as it travels."""
    return SMALL + _most_listed(layers)


def _most_listed(layers: Adapter) -> int:
    return SMALL + sum(len(json.dumps(name)) + _PER_SCORE for name in layers.layers)


def _bare(blob: bytes, kind: str, most: int) -> dict[str, Any]:
    """The header of a message that has nothing else."""
    header, body = opened(blob, kind, most)
    if body:
        raise WireError(f"has {len(body)} bytes after its header, where none are due")
    return header
