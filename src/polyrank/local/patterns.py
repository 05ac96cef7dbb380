"""PEFT's patterns for the names of modules: regular expressions, matched in a time that no pattern can make long.

PEFT takes the first key of ``rank_pattern`` or ``alpha_pattern`` that matches the end of a module's name, from its
start or after a dot. An adapter comes from somebody else, and the matcher of `re` can need exponential time for
``(a+)+b``. Here a pattern maps the set of positions that it may start at to the set that it may end at.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

MOST_CHARACTERS, MOST_EXPRESSIONS, MOST_NAMES = 200, 32, 10_000
"""Of a pattern that is not a plain name, how many of them there may be, and how many plain names."""

Positions = frozenset[int]
Step = Callable[[str, Positions], Positions]

_TOKEN = re.compile(r"\\[dDsSwW]|\\[^0-9A-Za-z]|\[\^?(?:[^\[\]\\]|\\[dDsSwW.\-])+\]|\(\?:|\{\d+(?:,\d*)?\}|[^\\{}\[\]]")
_COUNT = re.compile(r"\{(\d+)(,?)(\d*)\}")
_MOST_REPEATS = 100
_NESTED = 8


def value_of(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, or the default.

    >>> value_of({"layers.1.q": 2, r".*\\.[kv]": 3}, "model.layers.1.q", 8)
    2
    """
    for key, value in (patterns or {}).items():
        if _is_plain(key):
            if name == key or name.endswith(f".{key}") or ("." in key and _alike(key, name)):
                return value
        elif matches(key, name):
            return value
    return default


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches the end of a name, from the name's start or after a dot.

    Raises:
        ValueError: for a pattern that `check_patterns` refuses.
    """
    starts = frozenset({0} | {index + 1 for index, character in enumerate(name) if character == "."})
    return len(name) in _compiled(pattern)(name, starts)


def check_patterns(patterns: Iterable[str]) -> None:
    """Refuses what is no regular expression, and what goes beyond characters, classes, groups, choices and repeats.

    Raises:
        ValueError: names the pattern and says what is wrong.
    """
    patterns = list(patterns)
    expressions = [pattern for pattern in patterns if not _is_plain(pattern)]
    if len(patterns) - len(expressions) > MOST_NAMES:
        raise ValueError(f"has {len(patterns) - len(expressions)} names, more than {MOST_NAMES}")
    if len(expressions) > MOST_EXPRESSIONS:
        raise ValueError(f"has {len(expressions)} regular expressions, more than {MOST_EXPRESSIONS}")
    for pattern in expressions:
        if len(pattern) > MOST_CHARACTERS:
            raise ValueError(f"{pattern[:40]!r}... has {len(pattern)} characters, more than {MOST_CHARACTERS}")
        try:
            _compiled(pattern)
        except ValueError as error:
            raise ValueError(f"{pattern!r} {error}") from None


def as_pattern(name: str) -> str:
    """The pattern of a name: itself, where it has nothing but letters, digits, underscores, hyphens and dots."""
    return name if _is_plain(name) else re.escape(name)


def is_literal(pattern: str) -> bool:
    """Whether a pattern is a name, as `as_pattern` writes it: characters that stand for themselves, or for any one."""
    return re.fullmatch(r"([\w.\-]|\\[^0-9A-Za-z])+", pattern) is not None


def _is_plain(pattern: str) -> bool:
    return re.fullmatch(r"[\w.\-]+", pattern) is not None


def _alike(key: str, name: str) -> bool:
    """Whether a plain key matches the end of a name: its dots stand for any character."""
    start = len(name) - len(key)
    if start < 0 or (start and name[start - 1] != "."):
        return False
    return all(k in (c, ".") for k, c in zip(key, name[start:], strict=True))


@lru_cache(maxsize=512)
def _compiled(pattern: str) -> Step:
    tokens = list(_tokens(pattern))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes whose meaning may change in a later Python
        try:
            re.compile(pattern)
        except (re.error, OverflowError) as error:
            raise ValueError(f"is no regular expression: {error}") from None
        step, rest = _choice(tokens, 0)
    assert rest == len(tokens)  # parentheses balance: `re` has compiled it
    return step


def _tokens(pattern: str) -> Iterator[str]:
    at = depth = 0
    while at < len(pattern):
        token = _TOKEN.match(pattern, at)
        if token is None or pattern.startswith("(?", at) != (token.group() == "(?:"):
            raise ValueError(f"has {pattern[at : at + 3]!r}, which is not supported")
        depth += {"(": 1, "(?:": 1, ")": -1}.get(token.group(), 0)
        if depth > _NESTED:
            raise ValueError(f"has groups nested more than {_NESTED} deep")
        at = token.end()
        yield token.group()


def _choice(tokens: list[str], at: int) -> tuple[Step, int]:
    """Alternatives up to a closing parenthesis or the end."""
    steps: list[Step] = []
    while True:
        step, at = _sequence(tokens, at)
        steps.append(step)
        if at == len(tokens) or tokens[at] == ")":
            return (lambda text, starts: frozenset().union(*(each(text, starts) for each in steps))), at
        at += 1


def _sequence(tokens: list[str], at: int) -> tuple[Step, int]:
    steps: list[Step] = []
    while at < len(tokens) and tokens[at] not in ("|", ")"):
        step, at = _atom(tokens, at)
        while at < len(tokens) and (tokens[at] in ("*", "+", "?") or tokens[at].startswith("{")):
            step, at = _repeated(step, tokens[at]), at + 1
            if tokens[at : at + 1] == ["+"]:  # possessive
                raise ValueError("has a repeat followed by '+', which is not supported")
            at += tokens[at : at + 1] == ["?"]  # lazy: which ends are possible does not depend on it
        steps.append(step)

    def run(text: str, starts: Positions) -> Positions:
        for step in steps:
            starts = step(text, starts)
        return starts

    return run, at


def _atom(tokens: list[str], at: int) -> tuple[Step, int]:
    token = tokens[at]
    if token in ("(", "(?:"):
        step, end = _choice(tokens, at + 1)
        return step, end + 1
    if token == "^":
        return (lambda text, starts: starts & {0}), at + 1
    if token == "$":
        return (lambda text, starts: starts & {len(text)}), at + 1
    one = re.compile(token).fullmatch
    return (lambda text, starts: frozenset(i + 1 for i in starts if i < len(text) and one(text[i]))), at + 1


def _repeated(step: Step, token: str) -> Step:
    least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(token) or _bounds(token)

    def run(text: str, starts: Positions) -> Positions:
        for _ in range(least):
            before, starts = starts, step(text, starts)
            if starts == before:
                break
        ends = reached = starts
        for _ in range(len(text) + 1 if most is None else most - least):
            reached = step(text, reached) - ends
            if not reached:
                break
            ends |= reached
        return ends

    return run


def _bounds(token: str) -> tuple[int, int | None]:
    count = _COUNT.fullmatch(token)
    assert count is not None
    least, most = int(count[1]), int(count[3]) if count[3] else None if count[2] else int(count[1])
    if max(least, most or 0) > _MOST_REPEATS:
        raise ValueError(f"has {token}, more than {_MOST_REPEATS} repeats")
    return least, most
