"""Which modules carry an adapter: resolved from the model's structure, once.

A target is a module name (``q_proj``, ``attention.output.dense``, or a full name), matched against the end of a
module's dotted name as PEFT does, or a group:

    attention       every linear layer inside the attention of a transformer block
    attention+mlp   every linear layer of a transformer block
    all-linear      every linear layer of the backbone

Names of the same projection in other model families or library versions work too (``query`` is ``q_proj``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches

from polyrank.errors import InputError

GROUPS = ("attention", "attention+mlp", "all-linear")
_SYNONYMS = (
    ("query", "q_proj", "q_lin", "q"),
    ("key", "k_proj", "k_lin", "k"),
    ("value", "v_proj", "v_lin", "v"),
    ("attention.output.dense", "o_proj", "out_proj", "out_lin"),
    ("intermediate.dense", "fc1", "lin1", "up_proj"),
    ("output.dense", "fc2", "lin2", "down_proj"),
)
_ATTENTION = ("attention", "attn")


class TargetError(InputError):
    """Targets that match no module of the model."""


def resolve_targets(targets: str | Sequence[str], linear: Sequence[str], blocks: Sequence[str]) -> list[str]:
    """The full names of the targeted modules, in the order of the model.

    Args:
        targets: a group, a module name, or a list of module names.
        linear: full names of the backbone's linear layers, in order.
        blocks: full names of the transformer blocks.

    Raises:
        TargetError: if a target matches nothing; the message lists what would match.
    """
    wanted = [targets] if isinstance(targets, str) else list(targets)
    chosen: set[str] = set()
    for target in wanted:
        found = _match(target, linear, blocks)
        if not found:
            raise TargetError(_nothing(target, linear))
        chosen.update(found)
    return [name for name in linear if name in chosen]


def _match(target: str, linear: Sequence[str], blocks: Sequence[str]) -> list[str]:
    if target in GROUPS:
        return [name for name in linear if _IN_GROUP[target](name, blocks)]
    alike = next((names for names in _SYNONYMS if target in names), ())
    for name in (target, *alike):
        found = [full for full in linear if full == name or full.endswith(f".{name}")]
        if name != target:  # as the name of an MLP's second layer, output.dense is not the attention's
            found = [full for full in found if name != "output.dense" or not full.endswith("attention.output.dense")]
        if found:
            return found
    return []


def _inside(name: str, blocks: Sequence[str]) -> str | None:
    """The name within its transformer block, or None outside all blocks."""
    for block in blocks:
        if name.startswith(f"{block}."):
            return name[len(block) + 1 :]
    return None


def _in_attention(name: str, blocks: Sequence[str]) -> bool:
    inner = _inside(name, blocks)
    return inner is not None and any(word in inner.lower() for word in _ATTENTION)


_IN_GROUP: Mapping[str, Callable[[str, Sequence[str]], bool]] = {
    "attention": _in_attention,
    "attention+mlp": lambda name, blocks: _inside(name, blocks) is not None,
    "all-linear": lambda name, blocks: True,
}


def _nothing(target: str, linear: Sequence[str]) -> str:
    leaves = Counter(name.rsplit(".", 1)[-1] for name in linear)
    listed = ", ".join(f"{leaf} ({count})" for leaf, count in leaves.items())
    close = get_close_matches(target, [*leaves, *GROUPS], n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"model.targets: {target!r} matches no linear layer.{hint} Would match: {listed}; or {', '.join(GROUPS)}."
