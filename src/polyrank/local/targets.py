"""Which modules carry an adapter: resolved from the model's structure, once.

A target is a module name (``q_proj``, ``attention.output.dense``, or a full name), matched against the end of a
module's dotted name as PEFT does, or a group:

    attention       every linear layer inside the attention of a transformer block
    attention+mlp   every linear layer of a transformer block
    all-linear      every linear layer of the backbone

A module that a group targets takes the rank that it has room for: min(r, d_in, d_out). One that is named by itself is
refused where it has no room for r.

Names of the same projection in other model families or library versions work too (``query`` is ``q_proj``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches

from polyrank.errors import InputError
from polyrank.local.structure import Structure

GROUPS = ("attention", "attention+mlp", "all-linear")
_SYNONYMS = (
    ("query", "q_proj", "q_lin", "q"),
    ("key", "k_proj", "k_lin", "k"),
    ("value", "v_proj", "v_lin", "v"),
    ("attention.output.dense", "o_proj", "out_proj", "out_lin"),
    ("intermediate.dense", "fc1", "lin1", "up_proj"),
    ("output.dense", "fc2", "lin2", "down_proj"),
)
_LISTED = 12  # kinds of layers that a message names


class TargetError(InputError):
    """Targets that match no module of the model."""


def resolve_targets(
    targets: str | Sequence[str], model: Structure, shown: str = "the model"
) -> tuple[list[str], frozenset[str]]:
    """The full names of the targeted modules, in the order of the model, and those that were not targeted as a group.

    Args:
        targets: a group, a module name, or a list of module names.
        model: what it is built of.
        shown: its name, for messages.

    Raises:
        TargetError: if a target matches nothing; the message lists what would match.
    """
    wanted = [targets] if isinstance(targets, str) else list(targets)
    if not model.linears:
        raise TargetError(_no_linear(model, shown))
    chosen: set[str] = set()
    named: set[str] = set()
    for target in wanted:
        matching = _match(target, model)
        if not matching:
            raise TargetError(_nothing(target, model))
        chosen.update(matching)
        named.update(matching if target not in GROUPS else ())
    return [name for name in model.linears if name in chosen], frozenset(named)


def _match(target: str, model: Structure) -> list[str]:
    linear = list(model.linears)
    if target in GROUPS:
        return [name for name in linear if _IN_GROUP[target](name, model)]
    alike = next((names for names in _SYNONYMS if target in names), ())
    for name in (target, *alike):
        found = [full for full in linear if full == name or full.endswith(f".{name}")]
        if name != target:  # as the name of an MLP's second layer, output.dense is not the attention's
            found = [full for full in found if name != "output.dense" or not full.endswith("attention.output.dense")]
        if found:
            return found
    return []


_IN_GROUP: Mapping[str, Callable[[str, Structure], bool]] = {
    "attention": lambda name, model: name in model.attention,
    "attention+mlp": lambda name, model: any(name.startswith(f"{block}.") for block in model.blocks),
    "all-linear": lambda name, model: True,
}


def _nothing(target: str, model: Structure) -> str:
    leaves = Counter(name.rsplit(".", 1)[-1] for name in model.linears)
    listed = ", ".join(f"{leaf} ({count})" for leaf, count in list(leaves.items())[:_LISTED])
    more = f" and {len(leaves) - _LISTED} more" if len(leaves) > _LISTED else ""
    groups = ", ".join(group for group in GROUPS if _match(group, model))
    if target in GROUPS:
        what = "no linear layer in its attention" if target == "attention" else "no transformer block"
        why = f" The model has {what}; all-linear targets the {len(model.linears)} linear layers that it has."
    elif passed := next((n for n in model.passed if n == target or n.endswith(f".{target}")), None):
        why = (
            f" The model reads the weights of {passed} past that layer, so that an adapter there would change nothing."
        )
    else:
        close = [word for word in get_close_matches(target, [*leaves, *GROUPS], n=1) if word != target]
        why = f" Did you mean {close[0]!r}?" if close else ""
    return f"model.targets: {target!r} matches no linear layer.{why} Would match: {listed}{more}; or {groups}."


def _no_linear(model: Structure, shown: str) -> str:
    kinds = ", ".join(list(model.others)[:3])
    made = f": its weights are {kinds}" if kinds else ""
    return (
        f"model.name: {shown} has no linear layer outside its classifier{made}. Adapters update linear layers, and "
        "neither convolutions nor other kinds; take a model with linear layers, such as a vision transformer"
    )
