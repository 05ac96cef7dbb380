"""Files as users have them: what was right, with something changed, by a generator: the same every time."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml

NUMBERS = (0, -1, 1, 2, 7, 10**9, 2**31, 2**63, 10**30, -(10**30), 0.5, 1e-300, 1e30, 1e308, -0.0, math.nan, math.inf)
WORDS = (
    "",
    " ",
    "a",
    "fedit",
    "digits",
    "auto",
    "off",
    "detect",
    "null",
    "1e3",
    "12 GiB",
    "-1 B",
    "1/3",
    "1/0",
    "\x1b[31m",
    "a\nb",
    "[/b]",
    "[red]",
    "{x}",
    "%s",
    "$a$",
    "\u202e",
    "\x00",
    "é😀",
    "../..",
    "/",
    ".",
    "~",
    "~nobody/x",
    "x" * 5000,
    "\udcff",
)
VALUES: tuple[Any, ...] = (*NUMBERS, *WORDS, None, True, False, [], {}, [[]], [None], {"name": "a"}, {"": 1}, [1, "a"])


def changed(value: Any, rng: Random) -> Any:
    """A copy of plain values with one to three of them replaced, removed, renamed, repeated or set into another."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _changed_once(value, rng)
    return value


def _changed_once(value: Any, rng: Random) -> Any:
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            places.append((node, key))
            walk(node[key])

    walk(value)
    if not places or rng.random() < 0.02:
        return rng.choice(VALUES)
    node, key = rng.choice(places)
    how = rng.choice(("replace", "replace", "replace", "remove", "rename", "more", "nest", "move", "type"))
    if how == "replace":
        node[key] = rng.choice(VALUES)
    elif how == "remove":
        del node[key]
    elif how == "rename" and isinstance(node, dict):
        node[rng.choice((*(str(w) for w in WORDS), str(key) + "s", str(key).upper()))] = node.pop(key)
    elif how == "more":
        where = node[key] if isinstance(node[key], dict | list) else node
        if isinstance(where, dict):
            where[rng.choice(("name", "x", "rank", "", "rounds", "0"))] = rng.choice(VALUES)
        else:
            where.append(rng.choice([*VALUES, *where]))
    elif how == "nest":
        for _ in range(rng.choice((1, 1, 2, 50))):
            node[key] = rng.choice(([node[key]], {"name": node[key]}))
    elif how == "move":
        other, place = rng.choice(places)
        if other is not node and place in (other if isinstance(other, dict) else range(len(other))):
            node[key] = json.loads(json.dumps(other[place]))
    elif isinstance(node[key], str):
        node[key] = rng.choice(([node[key]], len(node[key]), {node[key]: node[key]}))
    else:
        node[key] = rng.choice((str(node[key]), repr(node[key]), [node[key]], [node[key]] * 2))
    return value


def damaged(data: bytes, rng: Random) -> bytes:
    """Bytes cut off, turned, taken out or put in; or other ones altogether."""
    how = rng.choice(("cut", "cut", "flip", "flip", "flip", "out", "in", "other", "end"))
    if how == "cut":
        return data[: rng.randrange(len(data) + 1)]
    if how == "flip":
        found = bytearray(data)
        for _ in range(rng.choice((1, 1, 3, 20))):
            if found:
                place = rng.randrange(min(len(found), rng.choice((16, 200, len(found)))))
                found[place] = rng.randrange(256)
        return bytes(found)
    place = rng.randrange(len(data) + 1)
    if how == "out":
        return data[:place] + data[place + rng.choice((1, 5, 100)) :]
    if how == "in":
        return (
            data[:place] + rng.choice((b"\x00", b"\xff\xfe", b"\n\n", b'"', b"[" * 50_000, b"{", b",,,")) + data[place:]
        )
    if how == "end":
        return data + rng.choice((b"\x00", b"\n", b"}", b"x", b"\n{", b"\nnull\n", b"\n[]\n"))
    return rng.choice(
        (b"", b"\x00" * 64, b"null", b"[]", b"{}", b'""', b"1", b"[" * 100_000, b"version https://git-lfs")
    )


def broken(path: Path, rng: Random) -> str:
    """Changes a file in its place; returns how."""
    data = path.read_bytes()
    form = {".json": _json, ".jsonl": _lines, ".yaml": _yaml, ".csv": _text}.get(path.suffix)
    if form is not None and rng.random() < 0.7:
        path.write_bytes(form(data, rng))
        return f"{path.name}: values"
    if rng.random() < 0.03:
        path.unlink()
        return f"{path.name}: gone"
    if rng.random() < 0.02:
        path.unlink()
        path.mkdir()
        return f"{path.name}: a folder"
    path.write_bytes(_header(data, rng) if path.suffix == ".safetensors" and rng.random() < 0.5 else damaged(data, rng))
    return f"{path.name}: bytes"


def _json(data: bytes, rng: Random) -> bytes:
    return json.dumps(changed(json.loads(data), rng)).encode()


def _lines(data: bytes, rng: Random) -> bytes:
    lines = data.splitlines()
    place = rng.randrange(len(lines))
    lines[place : place + 1] = rng.choice(
        ([_json(lines[place], rng)], [_json(lines[place], rng)], [], [lines[place]] * 2)
    )
    return b"\n".join(lines) + b"\n"


def _yaml(data: bytes, rng: Random) -> bytes:
    return yaml.safe_dump(changed(yaml.safe_load(data), rng), allow_unicode=True).encode(errors="surrogatepass")


def _text(data: bytes, rng: Random) -> bytes:
    lines = data.decode().splitlines()
    for _ in range(rng.choice((1, 2, 9))):
        place = rng.choice((0, rng.randrange(len(lines))))
        cells = lines[place].split(",")
        cells[rng.randrange(len(cells))] = str(rng.choice((*NUMBERS, *WORDS, '"', '"a""b', "a" * 300_000)))
        lines[place] = ",".join(rng.choice((cells, cells[:-1], [*cells, "x"])))
    return "\n".join(lines).encode(errors="surrogatepass")


def _header(data: bytes, rng: Random) -> bytes:
    """A safetensors file whose header says something else."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(changed(json.loads(data[8 : 8 + length]), rng)).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


Change = Callable[[Path, Random], str]
