"""What the server believes of its clients: the section ``trust`` of an experiment."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import create_model

from polyrank.core.gate import Gate
from polyrank.core.privacy import Privacy
from polyrank.experiment.components import Strict, parameters
from polyrank.experiment.units import Multiple

SIZE_CAP, CLIP = 3.0, 3.0
"""What ``auto`` is where clients are on other machines. docs/threats.md says why."""

_FIELDS = parameters(Gate, keyword_only=False) | {
    "reach": (bool, True),
    "size_cap": (Multiple, "auto"),
    "clip": (Multiple, "auto"),
}
TrustConfig: Any = create_model("TrustConfig", __base__=Strict, __doc__=Gate.__doc__, **_FIELDS)


def check_trust(trust: Any, protection: Privacy) -> None:
    """Refuses checks by what other clients sent, where the server adds noise for each client.

    Raises:
        ValueError: naming the key.
    """
    for key in ("norm", "clip"):
        if protection.on_server is not None and isinstance(getattr(trust, key), float):
            raise ValueError(
                f"trust.{key}: not with privacy.clients: what one client sends would decide who else counts"
            )


def written_out(trust: Any, protection: Privacy, *, remote: bool) -> Any:
    """The section with a word or a number for ``auto``: bounds where clients are `remote`, none in a simulation."""
    usual = {"size_cap": SIZE_CAP, "clip": "off" if protection.on_server is not None else CLIP}
    auto = [key for key in usual if getattr(trust, key) == "auto"]
    return trust.model_copy(update={key: usual[key] if remote else "off" for key in auto})


def gate_of(trust: Any, protection: Privacy, *, remote: bool) -> Gate:
    """What an update must satisfy; where anything is protected, noise reaches where no optimizer does."""
    stated = written_out(trust, protection, remote=remote).model_dump()
    gate = Gate(**{key: None if value == "off" else value for key, value in stated.items()})
    return replace(gate, reach=False) if protection else gate
