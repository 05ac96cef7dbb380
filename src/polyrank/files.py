"""Files that are either there whole or not at all, and what they hold as plain values."""

from __future__ import annotations

import codecs
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

_DEEPEST, _MOST = 100, 10_000_000  # of plain values: levels, and values in all
_LONGEST = 300  # digits of a whole number, which is then a float, too
_LARGEST = 10**_LONGEST

TEMPORARY = ".*.tmp"
"""Names of files that are being written, or were when their process died."""


def write_bytes(path: Path, data: bytes) -> None:
    """Writes under a temporary name, flushes to disk, and renames: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with named(path), open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def append_line(path: Path, text: str) -> None:
    """Adds a line to a file, and flushes it to disk."""
    with named(path), open(path, "a", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors of the system inside name the file: those of writing, as to a full disk, name none by themselves."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None or isinstance(error, BrokenPipeError):
            raise
        raise OSError(error.errno, error.strerror or os.strerror(error.errno), str(path)) from error


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `path` once the context ends well, and is removed otherwise.

    Args:
        path: must not exist, or be an empty folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        with named(path):
            yield temporary
            os.replace(temporary, path)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if error.filename is not None and Path(os.fsdecode(error.filename)).is_relative_to(temporary):
            error.filename = str(path / Path(os.fsdecode(error.filename)).relative_to(temporary))
        raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sweep(folder: Path) -> None:
    """Removes what writes left in a folder when the process died in the middle of them."""
    for temporary in folder.rglob(TEMPORARY):
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_bytes`, in UTF-8; what that cannot hold, bytes of a path for example, stands as its escape."""
    write_bytes(path, encoded(text))


def encoded(text: str) -> bytes:
    """Text as UTF-8, with escapes for what it cannot hold."""
    return text.encode(errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """`write_bytes`, as indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte-order mark.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is in another encoding, saying what to do.
    """
    return decoded(path.read_bytes())


def decoded(data: bytes) -> str:
    """Text from UTF-8, with or without a byte-order mark.

    Raises:
        ValueError: if it is in another encoding, saying what to do.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:2]:
        raise ValueError("its bytes look like UTF-16; save the file as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        raise ValueError(
            f"line {line} is not UTF-8 (byte 0x{byte:02x}, as of Latin-1 or Windows-1252); save the file as UTF-8"
        ) from None


def from_json(
    text: str | bytes, *, finite: bool = False, unique: bool = False, characters: bool = False, **options: Any
) -> Any:
    r"""The value of a JSON text.

    Args:
        text: in JSON.
        finite: refuses NaN and infinite numbers, which Python reads and JSON does not have.
        unique: refuses an object that has a key twice.
        characters: refuses halves of characters, such as ``\ud800``. Our own files have them, for bytes of a path that
            are no UTF-8.
        options: of `json.loads`.

    Raises:
        ValueError: if it is not JSON, nested too deeply, has a whole number that is too long, or what is refused.
    """
    if finite:
        options["parse_constant"] = _no_number
    if unique:
        options["object_pairs_hook"] = _object
    try:
        value = json.loads(text, **options)
        if characters and ("\\u" if isinstance(text, str) else b"\\u") in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("holds half of a character, which no text has") from None
    _check_size(value, math.inf)
    return value


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number, and is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r:.80} is given twice")
    return value


def from_yaml(text: str, loader: Any = yaml.SafeLoader) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: if it is not YAML, nested too deeply, or unfolds, by its anchors, to more than anybody writes.
    """
    try:
        value = yaml.load(text, loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:  # of a tag that does not fit its value
        raise ValueError(f"a value does not fit its tag: {error}") from None
    _check_size(value, _MOST)
    return value


def _check_size(value: Any, most: float) -> None:
    """Refuses what is nested too deeply, contains itself, or is written with few signs and endless all the same."""
    level, depth, count = [value], 0, 0
    while level:
        depth, count = depth + 1, count + len(level)
        if depth > _DEEPEST or count > most:
            raise ValueError("nested too deeply" if depth > _DEEPEST else "holds too many values")
        if any(type(node) is int and abs(node) >= _LARGEST for node in level):
            raise ValueError(f"a whole number has more than {_LONGEST} digits")
        level = [
            inner
            for node in level
            if isinstance(node, dict | list)
            for inner in (node.values() if isinstance(node, dict) else node)
        ]
