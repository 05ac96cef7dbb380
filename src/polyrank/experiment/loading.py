"""From a YAML file and overrides to a validated experiment, with errors that name the key, the value and the remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import ValidationError

from polyrank.core.method import Method
from polyrank.errors import shortened
from polyrank.experiment.components import Strict, did_you_mean
from polyrank.experiment.config import ConfigError, Experiment
from polyrank.files import from_yaml, read_text

_MOST_LINES = 12  # of a message
Section = TypeVar("Section", bound=Strict)


class _Loader(yaml.SafeLoader):
    """YAML as its current version has it: ``1e-3`` is a number, and ``on`` a word, which PyYAML takes for True."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str) -> Any:
    """The value that a YAML text holds.

    Raises:
        ValueError: if it is not YAML.
    """
    return from_yaml(text, _Loader)


def load(path: Path, overrides: list[str] | None = None) -> Experiment:
    """Reads and validates a file. ``--set`` overrides are ``key.sub=value`` with YAML values.

    Raises:
        ConfigError: naming the file, the key, the value and what would be valid.
    """
    return parse(read(path, overrides), str(path), path.parent)


def read(path: Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """The mapping that a file holds, with overrides; not validated.

    Raises:
        ConfigError: naming the file, or the override.
    """
    raw = _read(path)
    for override in overrides or []:
        key, value = assignment(override)
        put(raw, key, value, f"--set {override}")
    return raw


def yaml_of(path: Path) -> Any:
    """The value of a YAML file.

    Raises:
        ConfigError: if it cannot be read, or is not YAML.
    """
    try:
        return read_yaml(read_text(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None


def _read(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file's mapping, laid over that of the file it ``extends``."""
    raw = yaml_of(path)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must be a mapping with keys {', '.join(Experiment.model_fields)}")
    if "extends" not in raw:
        return raw
    first = raw.pop("extends")
    if not isinstance(first, str) or Path(first).name != first:
        raise ConfigError(f"{path}: extends: {shortened(first)} must be the name of a file beside this one")
    if path.with_name(first) in (path, *below):
        raise ConfigError(f"{path}: extends: {first!r} extends this file in turn")
    return _laid_over(_read(path.with_name(first), (path, *below)), raw)


def _laid_over(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key, unless `second` names another component; anything else is replaced.

    The name of a model is a value like others: its targets and ranks stay.
    """
    merged = dict(first)
    for key, value in second.items():
        old = first.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        same = key == "model" or (both and value.get("name") in (None, old.get("name")))
        merged[key] = _laid_over(old, value) if both and same else value
    return merged


def parse(raw: dict[str, Any], where: str, folder: Path) -> Experiment:
    """Validates a mapping; relative paths in it are seen from `folder`."""
    return _absolute(validated(Experiment, raw, where), folder)


def validated(section: type[Section], raw: Any, where: str) -> Section:
    """A section of this kind from plain values.

    Raises:
        ConfigError: naming where it is from, the key, the value and what would be valid.
    """
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        lines = [f"{where}: {_explain(raw, dict(item))}" for item in error.errors(include_url=False)]
        lines = list(dict.fromkeys(lines))
        more = [f"{where}: {len(lines) - _MOST_LINES} more mistakes"] if len(lines) > _MOST_LINES else []
        raise ConfigError("\n".join([*lines[:_MOST_LINES], *more])) from None


def anchored(section: Section, folder: Path) -> Section:
    """The section with its paths as seen from `folder`."""
    paths = {
        key: Path(folder / value.expanduser()).resolve()
        for key in type(section).model_fields
        if isinstance(value := getattr(section, key), Path)
    }
    return section.model_copy(update=paths)


def located(name: str, folder: Path) -> str:
    """A model's name; if it is that of a folder as seen from `folder`, the folder."""
    path = folder / Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() or name.startswith((".", "~")) else name


def method_with(name: str, overrides: list[str]) -> Method:
    """A named method with options of its aggregation rule overridden, given as ``option=value``."""
    section: dict[str, Any] = {"name": name, "aggregate": {}}
    for override in overrides:
        key, value = assignment(override)
        put(section["aggregate"], key, value, f"--set {override}")
    raw = {"rounds": 1, "model": {"name": ""}, "data": "digits", "fleet": [{"rank": 1}], "method": section}
    return parse(raw, "merge", Path()).build_method()


def assignment(override: str, option: str = "--set") -> tuple[str, Any]:
    """The key and the value, as YAML, of ``key=value``."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{option} {override}: must be key=value, for example {option} rounds=5")
    try:
        return key, read_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{option} {override}: the value is not YAML: {error}") from None


def put(raw: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Sets a dotted key of a file's mapping; `where` opens the message if there is no such place."""
    *path, last = key.split(".")
    node: Any = raw
    for part in path:
        place = _place(node, part, where)
        inner = node.get(place) if isinstance(node, dict) else node[place]
        inner = {"name": inner} if isinstance(inner, str) else {} if inner is None else inner
        if not isinstance(inner, dict | list):
            raise ConfigError(f"{where}: {part} is {shortened(inner)}, not a section")
        node[place] = inner
        node = inner
    node[_place(node, last, where)] = value


def _place(node: Any, part: str, where: str) -> str | int:
    """A key of a section, or a position in a list."""
    if isinstance(node, dict):
        return part
    if not re.fullmatch("[0-9]{1,9}", part) or int(part) >= len(node):
        raise ConfigError(f"{where}: {part!r} is not a position in a list of {len(node)} (from 0)")
    return int(part)


def _explain(raw: dict[str, Any], error: dict[str, Any]) -> str:
    """One line for one validation error: the key as the file has it, the value, and what would be valid."""
    key, node = [], raw
    for part in error["loc"]:
        if (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int)):
            node = node[part]
            key.append(str(part))
        elif not (isinstance(node, dict) and part == node.get("name")) and not str(part).startswith("function-"):
            key += [str(part)] if error["type"] == "missing" else []
    name = ".".join(key)
    if error["type"] == "union_tag_invalid":
        tags = [tag.strip(" '") for tag in error["ctx"]["expected_tags"].split(",")]
        return f"{name}.name: {shortened(error['ctx']['tag'])} is unknown.{did_you_mean(error['ctx']['tag'], tags)}"
    if error["type"] == "union_tag_not_found":
        return f"{name}.name: missing"
    if error["type"] == "missing":
        return f"{name}: missing"
    if error["type"] == "unknown_key":
        return f"{name + ': ' if name else ''}{error['msg']}"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{name}: {shortened(error['input'])} {message}" if name else message


def _absolute(experiment: Experiment, folder: Path) -> Experiment:
    """Paths as seen from the file's folder, so that the resolved experiment runs from anywhere."""
    model = anchored(experiment.model, folder).model_copy(update={"name": located(experiment.model.name, folder)})
    choices = experiment.evaluate.choices and anchored(experiment.evaluate.choices, folder)
    evaluate = experiment.evaluate.model_copy(update={"choices": choices})
    update = {
        "model": model,
        "data": anchored(experiment.data, folder),
        "costs": anchored(experiment.costs, folder),
        "evaluate": evaluate,
    }
    return experiment.model_copy(update=update)
