"""A component's keyword-only parameters are its options: the signature is the schema.

Every entry of a table becomes a strict pydantic model with the entry's name and its options; a table becomes the
union of its entries, told apart by ``name``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import cache, partial, reduce
from operator import or_
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model, model_validator
from pydantic_core import PydanticCustomError

LARGEST = 2**31 - 1
"""Of whole numbers, but for seeds."""

Count = Annotated[int, Field(ge=1, le=LARGEST, strict=True)]
Processes = Annotated[int, Field(ge=1, le=1024, strict=True)]
Seed = Annotated[int, Field(ge=0, le=2**53)]
"""As large as every reader of JSON keeps it."""


def did_you_mean(value: object, valid: Iterable[str]) -> str:
    """`` Did you mean 'x'? Valid: a, b, x.`` for an error message."""
    names = sorted(valid)
    close = get_close_matches(str(value)[:100], names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Valid: {', '.join(names)}."


class Strict(BaseModel):
    """A section of the configuration: unknown keys are errors, values are not coerced across types."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            for key in value:
                if key not in cls.model_fields:
                    hint, shown = did_you_mean(key, cls.model_fields), str(key)[:100].encode(errors="backslashreplace")
                    context = {"key": shown.decode(), "hint": hint}
                    raise PydanticCustomError("unknown_key", "unknown key '{key}'.{hint}", context)
        return value


def parameters(function: Callable[..., Any], *, keyword_only: bool = True) -> dict[str, Any]:
    """Field definitions, name -> (type, default), of a function's options; whole numbers in them have bounds."""
    hints = get_type_hints(function, include_extras=True)
    return {
        name: (
            Annotated[hints[name], BeforeValidator(_bounded)],
            ... if p.default is inspect.Parameter.empty else p.default,
        )
        for name, p in inspect.signature(function).parameters.items()
        if p.kind is inspect.Parameter.KEYWORD_ONLY or not keyword_only
    }


def _bounded(value: Any) -> Any:
    """Refuses whole numbers that no option needs, and that something would loop or grow with."""
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int) and not -LARGEST <= number <= LARGEST:
            raise ValueError(f"must be between {-LARGEST} and {LARGEST}")
    return value


def entry_model(
    name: str, function: Callable[..., Any], *, base: type[Strict] = Strict, named: bool = True, **more: Any
) -> type[Strict]:
    """The schema of one entry: its name, its options, and `more` fields."""
    title = "".join(part.capitalize() for part in name.split("_"))
    doc = inspect.cleandoc(function.__doc__ or "")
    fields: dict[str, Any] = {"name": (Literal[name], ... if named else name), **parameters(function), **more}
    return create_model(f"{title}{base.__name__}", __base__=base, __doc__=doc, **fields)


def union_of(models: Iterable[type[Strict]], unnamed: type[Strict] | None = None) -> Any:
    """Any of the entries, by ``name``; a bare name is an entry without options.

    The JSON schema takes an entry without a name to be `unnamed`, if there is one.
    """
    members = list(models)
    names = reduce(or_, (member.model_fields["name"].annotation for member in members))
    union = members[0] if len(members) == 1 else Annotated[reduce(or_, members), Field(discriminator="name")]
    written = union | names if unnamed is None else union | names | unnamed
    bare = BeforeValidator(lambda x: {"name": x} if isinstance(x, str) else x, json_schema_input_type=written)
    return Annotated[union, bare]


def table_type(table: Mapping[str, Callable[..., Any]], own: str | None = None) -> Any:
    """Any entry of a table, with its options; to the JSON schema, one without a name is `own`."""
    entries = [_entry(name, function) for name, function in table.items()]
    return union_of(entries, None if own is None else _entry(own, table[own], named=False))


@cache
def _entry(name: str, function: Callable[..., Any], named: bool = True) -> type[Strict]:
    """One schema of an entry, however many tables it is in: making it takes milliseconds."""
    return entry_model(name, function, named=named)


def bind(table: Mapping[str, Callable[..., Any]], chosen: BaseModel) -> Callable[..., Any]:
    """The chosen entry with its options filled in."""
    options = {key: getattr(chosen, key) for key in type(chosen).model_fields if key != "name"}
    return partial(table[chosen.name], **options)  # type: ignore[attr-defined]


def describe(table: Mapping[str, Callable[..., Any]], bound: Callable[..., Any]) -> dict[str, Any]:
    """A table's entry back from a function, bound or not: its name and all its options."""
    function = bound.func if isinstance(bound, partial) else bound
    given = bound.keywords if isinstance(bound, partial) else {}
    names = [name for name, candidate in table.items() if candidate is function]
    name = function.__name__ if function.__name__ in names else names[0]
    defaults = {key: default for key, (_, default) in parameters(function).items()}
    return {"name": name, **defaults, **given}
