"""What the files of a run and of a study hold, as types that are checked when a file is read.

Files come from disks that were full, from other versions, and from people. What is checked here nobody checks again.
Keys that are not named may be there, and older runs lack some: only what is required must be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Required

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from polyrank.errors import InputError, shortened
from polyrank.files import from_json, from_yaml

_LOOSE = ConfigDict(strict=True, extra="allow")

Count = Annotated[int, Field(ge=0, le=2**53)]
Rank = Annotated[int, Field(ge=0, le=2**31 - 1)]
Number = float | None
Numbers = dict[str, Number]
Pair = Annotated[list[Count], Field(min_length=2, max_length=2)]


@with_config(_LOOSE)
class Named(TypedDict):
    """A component, by its name."""

    name: str


@with_config(_LOOSE)
class Source(TypedDict, total=False):
    """Where data is from."""

    name: str
    clients: Count | None


@with_config(_LOOSE)
class Plan(TypedDict, total=False):
    """experiment.yaml, as far as reports and those who watch read it."""

    seed: Count
    rounds: Count
    regime: str
    method: Named | str
    data: Source | str


@with_config(_LOOSE)
class Round(TypedDict, total=False):
    """A line of rounds.jsonl."""

    round: Required[Count]
    factors: Literal["A", "B", "AB"]
    ranks: dict[str, dict[str, Rank]]
    losses: Numbers
    bytes_up: dict[str, float]
    bytes_down: dict[str, float]
    lr: Number
    seconds: Number
    metrics: Numbers | None
    dropped: list[str] | None
    refused: dict[str, str] | None
    bounded: dict[str, str] | None
    examples: dict[str, float] | None
    predicted_memory: dict[str, float] | None
    aggregation_error: Number
    scores: dict[str, float] | None
    client_metrics: dict[str, Numbers] | None


ROUND_KEYS = ("factors", "ranks", "losses", "bytes_up", "bytes_down")
"""What the record of a round always has."""


@with_config(_LOOSE)
class Timing(TypedDict, total=False):
    """A line of timings.jsonl."""

    round: Required[Count]
    wall_seconds: Required[float]
    measured_memory: dict[str, float] | None


@with_config(_LOOSE)
class Choices(TypedDict, total=False):
    """What a language model made of questions with choices."""

    questions: Count
    accuracy: Number
    accuracy_norm: Number
    accuracy_token: Number
    chance: Number
    error: Number
    subjects: dict[str, Numbers]


@with_config(_LOOSE)
class Part(TypedDict, total=False):
    """What a model is worth, in summary.json."""

    round: Annotated[int, Field(ge=-1)] | None
    test: Required[Numbers]
    choices: Choices
    generate: Numbers
    alone: dict[str, Numbers]
    clients: dict[str, Numbers]


@with_config(_LOOSE)
class Selected(TypedDict, total=False):
    """The same of the round that was best on validation."""

    round: Required[Count]
    test: Required[Numbers]
    choices: Choices
    generate: Numbers


@with_config(_LOOSE)
class Local(TypedDict, total=False):
    """Clients that trained alone."""

    best: str
    test: Numbers
    mean: Numbers
    mean_accuracy: Number


@with_config(_LOOSE)
class Single(TypedDict):
    """Training on the pooled data."""

    test: Numbers


@with_config(_LOOSE)
class Baselines(TypedDict, total=False):
    """What was trained beside the method."""

    local: Local
    single: Single


@with_config(_LOOSE)
class Promise(TypedDict, total=False):
    """Differential privacy of a run."""

    epsilon: Required[Number]
    delta: Required[float]


@with_config(_LOOSE)
class Summary(TypedDict, total=False):
    """summary.json."""

    method: str
    seed: Count
    rounds: Count
    before: Part | None
    final: Part
    selected: Selected | None
    baselines: Baselines
    privacy: dict[str, Promise]
    bytes_up: float
    bytes_down: float
    wall_seconds: float
    environment: dict[str, str | float | None]


SUMMARY_KEYS = ("method", "seed", "rounds", "before", "final", "selected", "bytes_up", "bytes_down", "wall_seconds")
"""What a summary has that this version wrote."""


@with_config(_LOOSE)
class Group(TypedDict, total=False):
    """A device group, in setting.json."""

    name: Required[str]
    clients: Count | None
    memory: Number
    uplink: Number
    downlink: Number
    flops: Number
    budget: Count | None
    rank: Rank | None
    limit: str | None


@with_config(_LOOSE)
class Member(TypedDict, total=False):
    """A client, in setting.json."""

    group: str | None
    examples: Count


@with_config(_LOOSE)
class Module(TypedDict, total=False):
    """An adapted module, in setting.json."""

    shape: Required[Pair]
    block: Count | None


@with_config(_LOOSE)
class Setting(TypedDict, total=False):
    """setting.json."""

    data: str
    classes: list[str]
    clients: Count | None
    groups: list[Group]
    members: dict[str, Member] | None
    modules: dict[str, Module]
    dense: float


SETTING_KEYS = ("data", "classes", "clients", "groups", "members", "modules")
"""What a setting has that this version wrote."""


@with_config(_LOOSE)
class Confusion(TypedDict):
    """confusion.json."""

    classes: list[str]
    counts: list[list[Count]]


@with_config(_LOOSE)
class Sample(TypedDict):
    """What a language model was asked, and answered."""

    prompt: str
    reference: str
    before: str
    final: str


@with_config(_LOOSE)
class Samples(TypedDict):
    """samples.json."""

    samples: list[Sample]


@with_config(_LOOSE)
class Cell(TypedDict, total=False):
    """A run of a study."""

    run: Required[str]
    method: str
    setting: dict[str, Any]
    seed: Count


@with_config(_LOOSE)
class Study(TypedDict, total=False):
    """study.json."""

    name: str
    cells: Required[list[Cell]]


def check(shape: Any, value: Any, where: str, needs: Sequence[str] = ()) -> None:
    """Refuses a value that is not of a shape.

    Args:
        shape: one of the types above.
        value: as it was read.
        where: what the message begins with: the file, or its line, and what it should be.
        needs: keys that must be there, too.

    Raises:
        InputError: naming the key, the value and what would be valid.
    """
    try:
        _adapter(shape).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"][:12])
        if first["type"] == "missing":
            raise InputError(f"{where}: {key}: missing") from None
        shown = shortened(first["input"])
        raise InputError(f"{where}: {key + ': ' if key else ''}{shown}: {first['msg']}") from None
    for key in needs:
        if key not in value:
            raise InputError(f"{where}: {key}: missing")


def read(path: Path, shape: Any, needs: Sequence[str] = (), **options: Any) -> Any:
    """The value of a JSON file, of a shape; None where there is no file.

    Raises:
        InputError: naming the file.
    """
    if not path.is_file():
        return None
    try:
        value = from_json(path.read_text(encoding="utf-8"), **options)
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    check(shape, value, str(path), needs)
    return value


def read_plan(path: Path, loader: Any = None) -> dict[str, Any]:
    """The resolved experiment of a run, as plain values.

    Raises:
        InputError: naming the file.
    """
    try:
        value = from_yaml(path.read_text(encoding="utf-8"), **({} if loader is None else {"loader": loader}))
    except ValueError as error:
        raise InputError(f"{path}: not a resolved experiment: {error}") from None
    check(Plan, value, f"{path}: not a resolved experiment", ("method",))
    return dict(value)


def read_lines(path: Path, shape: Any, what: str, needs: Sequence[str] = (), **options: Any) -> Iterator[Any]:
    """The values of a file's lines, one at a time; a last one that a crash has cut short is left out.

    Raises:
        InputError: naming the file and the line.
    """
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                value = from_json(line, **options)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    return
                raise InputError(f"{path}: line {number} is not JSON: {error}") from None
            check(shape, value, f"{path}: line {number} is not {what}", needs)
            yield value


@lru_cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)
