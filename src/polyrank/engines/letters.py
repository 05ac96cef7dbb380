"""The short messages beside tasks and updates: what a client is, and which layers matter on its data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, get_args

from polyrank.core.lowrank import Adapter
from polyrank.core.types import (
    Client,
    ClientProfile,
    FisherForm,
    Labels,
    LocalTraining,
    Query,
    ServerState,
    Target,
    Task,
)
from polyrank.engines.wire import WireError, decode_task, digest, encode_task, frame, opened

_KNOWN = {"examples": int, "rank": int, "memory": float, "uplink": float, "downlink": float, "flops": float}


def ask_profile(model: Mapping[str, Any]) -> bytes:
    """Asks a client what it is, and whether it has the model."""
    return frame({"kind": "hello", "model": model})


def encode_profile(profile: ClientProfile, base: str, asked: bytes) -> bytes:
    """A client's answer: its profile, and the fingerprint of its base model."""
    known = {name: value for name in _KNOWN if (value := getattr(profile, name)) is not None}
    return frame({"kind": "profile", "asked": digest(asked), "base": base, "profile": known})


def decode_profile(blob: bytes, asked: bytes, base: str) -> ClientProfile:
    """A client's profile.

    Raises:
        WireError: if it is none, answers something else, or is of a client with another base model.
    """
    header, _ = opened(blob, "profile")
    if header.get("asked") != digest(asked):
        raise WireError("answers another question")
    if header.get("base") != base:
        raise WireError(f"its base model is {str(header.get('base'))[:16]!r}, the server's is {base[:16]!r}")
    values = header.get("profile")
    if not isinstance(values, dict) or "examples" not in values or not values.keys() <= _KNOWN.keys():
        raise WireError(f"profile: {str(values)[:100]} must have examples, and no other keys than {', '.join(_KNOWN)}")
    for name, value in values.items():
        numeric = type(value) is int or (_KNOWN[name] is float and type(value) is float and math.isfinite(value))
        if not numeric or value < 0:
            raise WireError(f"profile: {name}: {str(value)[:40]!r} is not a number that it can be")
    return ClientProfile(**values)


def ask_scores(query: Query, state: ServerState, client: Client, model: Mapping[str, Any]) -> bytes:
    """Asks a client to measure importance of the server's model on its own examples."""
    task = Task(state.round, state.adapter, state.folded, "AB", LocalTraining(), None, query.seed)
    asked = {key: value for key, value in asdict(query).items() if key != "cohort"}
    return encode_task(task, client, query=asked, model=model).blob


def decode_query(blob: bytes) -> tuple[Query, ServerState]:
    """What a client is asked to measure, and of which model.

    Raises:
        WireError: if it is no such question.
    """
    task, header = decode_task(blob)
    try:
        query = Query(**header["query"])
    except (KeyError, TypeError) as error:
        raise WireError(f"not a query: {error}") from None
    words = ((query.kind, ("fisher", "gradient")), (query.labels, get_args(Labels)))
    for word, valid in (*words, (query.form, get_args(FisherForm)), (query.target, get_args(Target))):
        if word not in valid:
            raise WireError(f"query: {str(word)[:40]!r} is none of {', '.join(valid)}")
    return query, ServerState(task.round, task.adapter, task.frozen)


def encode_scores(scores: Mapping[str, float], examples: int, asked: bytes) -> bytes:
    """A client's answer: a score per layer, and how many examples it holds."""
    return frame({"kind": "scores", "asked": digest(asked), "examples": examples, "scores": dict(scores)})


def decode_scores(blob: bytes, asked: bytes, layers: Adapter, client: Client) -> tuple[dict[str, float], int]:
    """The scores of a client and its number of examples.

    Raises:
        WireError: if they are not of the question, one for each layer, finite and not negative.
    """
    header, _ = opened(blob, "scores", 1 << 24)
    scores, examples = header.get("scores"), header.get("examples")
    if header.get("asked") != digest(asked):
        raise WireError("answers another question")
    if type(examples) is not int or examples < 0:
        raise WireError(f"examples: {str(examples)[:40]!r} of {client!r}")
    if not isinstance(scores, dict) or scores.keys() != layers.layers.keys():
        raise WireError("scores are not those of the model's layers")
    for name, value in scores.items():
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise WireError(f"score of {name}: {str(value)[:40]!r}")
    return scores, examples
