"""A folder with a file of examples for each client: what a split becomes on disk, and a data set made of such files.

``manifest.json`` says what is where. Its ``data`` has the options, but for the files, with which `files` or
`instructions` read any of them, so that a site's configuration can take them over.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from polyrank.data.formats import read_table
from polyrank.data.instructions import Fields, of_turns
from polyrank.data.source import DataError, Dataset, Origin, Prompting, Source, Turn
from polyrank.data.tables import Raw, read_raw, to_dataset, wanted_columns
from polyrank.files import from_json, read_text, whole_folder, write_json

MANIFEST = "manifest.json"
_VERSION = 1
_KEPT = "importance"
_SERVER = ("validation", "test", _KEPT)
_TEMPLATE = "template.json"
_LONGEST = 60  # characters of a name
_RESERVED = {"AUX", "CON", "NUL", "PRN", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10))}


def write_per_client(
    folder: Path,
    dataset: Dataset,
    shares: Mapping[str, np.ndarray],
    named: Mapping[str, Any] | None = None,
    **note: Any,
) -> dict[str, Any]:
    """Writes each client's examples to a file of its own, and those of the server; the folder is there whole or not.

    Texts, instructions and encoded images go to parquet, raw images to .npz. Labels are written as class names.

    Args:
        folder: must not exist yet, or be empty.
        dataset: with the split that is shared.
        shares: each client's indices into the training split.
        named: what columns are to be called, by option of `files` or `instructions` (``text``, ``label``, ...).
        note: further facts for the manifest.

    Returns:
        The manifest.

    Raises:
        FileExistsError: if there is something in the folder.
    """
    refuse_used(folder)
    columns = _columns(dataset, named or {})
    suffix = "npz" if isinstance(dataset.train.inputs, np.ndarray) else "parquet"
    taken: set[str] = set()
    files = {client: f"clients/{_safe(client, taken)}.{suffix}" for client in shares}
    held = {split: source for split in _SERVER if (source := getattr(dataset, split)) is not None and len(source)}
    manifest: dict[str, Any] = {
        "version": _VERSION,
        "name": dataset.name,
        "kind": dataset.kind,
        **note,
        "data": _options(dataset, columns),
        "client_column": _free("client", dataset.train.columns),
        "clients": {client: {"file": files[client], "examples": len(own)} for client, own in shares.items()},
        "server": {split: {"file": f"server/{split}.{suffix}", "examples": len(s)} for split, s in held.items()},
    }
    with whole_folder(folder) as made:
        (made / "clients").mkdir()
        (made / "server").mkdir()
        for client, own in shares.items():
            _write(made / files[client], dataset.train.select(own), dataset.classes, columns)
        for split, source in held.items():
            _write(made / manifest["server"][split]["file"], source, dataset.classes, columns)
        if manifest["data"].get("template") == _TEMPLATE:
            shutil.copy(str(dataset.prompting.template), made / _TEMPLATE)  # type: ignore[union-attr]
        write_json(made / MANIFEST, manifest)
    return manifest


def refuse_used(folder: Path) -> None:
    """Refuses a folder in which there is something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists already; choose another --export")


def per_client(*, folder: Path) -> Dataset:
    """A folder that `polyrank data --export` wrote: a file for each client, and what the server holds.

    Names of clients are in a column, `client`, for the partitioner `by_column`.

    Args:
        folder: with `manifest.json`.

    Raises:
        DataError: for a manifest, a file or a column that cannot be used.
    """
    manifest = read_manifest(folder)
    try:
        clients, server = manifest["clients"], manifest["server"]
        options, column = options_of(folder, manifest), str(manifest["client_column"])
        parts = [folder / entry["file"] for entry in [*clients.values(), *[server[s] for s in server if s == _KEPT]]]
        others = [folder / server[split]["file"] for split in ("validation", "test") if split in server]
        causal = manifest["kind"] == "causal"
        if not clients or "test" not in server:
            raise DataError(f"{folder / MANIFEST}: names no client, or no test file")
        read = _instructions if causal else _classified
        dataset, counts = read(str(manifest["name"]), options, parts, others)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / MANIFEST}: not a manifest of polyrank data --export: {error!r}") from None
    held = sum(counts[: len(clients)])
    train = dataset.train.select(np.arange(held))
    owners = _as_numbers(np.repeat(np.array(list(clients)), counts[: len(clients)]))
    train = replace(train, columns={**train.columns, column: owners})
    kept = dataset.train.select(np.arange(held, len(dataset.train))) if _KEPT in server else None
    return replace(dataset, train=train, importance=kept)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a folder says of itself.

    Raises:
        DataError: if it is no folder that ``polyrank data --export`` wrote.
    """
    path = folder / MANIFEST
    try:
        manifest = from_json(read_text(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read, and polyrank data --export would have written it: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("version") != _VERSION:
        raise DataError(f"{path}: not a manifest of polyrank data --export, version {_VERSION}")
    return manifest


def options_of(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """With which options its files are read, but for the files: those of `files` or `instructions`."""
    options = dict(manifest["data"])
    return options | ({"template": str(folder / _TEMPLATE)} if options.get("template") == _TEMPLATE else {})


def _classified(
    name: str, options: Mapping[str, Any], parts: Sequence[Path], others: Sequence[Path]
) -> tuple[Dataset, list[int]]:
    """A data set whose train is all `parts`, in order, and how many examples each has."""
    image_range = None if options.get("image_range") is None else tuple(options["image_range"])
    wanted = wanted_columns(
        options.get("text"), options.get("image"), options["label"], options["columns"], image_range
    )
    raws = [read_raw(path, wanted) for path in parts]
    inputs: Any = [raw.inputs for raw in raws]
    joined = np.concatenate(inputs) if isinstance(inputs[0], np.ndarray) else [item for part in inputs for item in part]
    columns = {other: np.concatenate([raw.columns[other] for raw in raws]) for other in wanted.others}
    labels = np.concatenate([raw.labels for raw in raws])
    origin = Origin.whole(*((raw.where, len(raw.labels)) for raw in raws))
    train = Raw(str(parts[0].parent), joined, labels, columns, origin=origin, image_range=wanted.image_range)
    splits = [train, *(read_raw(path, wanted._replace(others=[])) for path in others)]
    return to_dataset(name, wanted.kind, splits, options["classes"]), [len(raw.labels) for raw in raws]


def _instructions(
    name: str, options: Mapping[str, Any], parts: Sequence[Path], others: Sequence[Path]
) -> tuple[Dataset, list[int]]:
    """A data set whose train is all `parts`, in order, and how many examples each has."""
    fields = Fields(*(options[key] for key in ("response", "instruction", "input", "label", "columns")))
    prompting = Prompting(options["template"], options["train_on_inputs"])
    read = [read_table(path, fields.all, fields.texts) for path in parts]
    held = [(str(path), read_table(path, fields.needed, fields.texts)) for path in others]
    tables = [(str(parts[0].parent), pa.concat_tables(read)), *held]
    return of_turns(name, tables, fields, prompting, validated=len(held) == 2), [len(table) for table in read]


def _columns(dataset: Dataset, named: Mapping[str, Any]) -> dict[str, str]:
    """What each part of an example is called in files: as it was where that is known, and no two alike."""
    if dataset.kind != "causal":
        parts = [dataset.kind, "label"]
    else:
        turns: Any = [turn for split in ("train", *_SERVER) for turn in getattr(getattr(dataset, split), "inputs", [])]
        parts = [part for part in Turn._fields if part == "response" or any(getattr(turn, part) for turn in turns)]
        parts += ["label"] * (len(dataset.classes) > 1)
    given = {part: name for part, name in named.items() if isinstance(name, str)}
    taken = [*dataset.train.columns, *given.values()]
    return {part: given.get(part) or _free("output" if part == "response" else part, taken) for part in parts}


def _options(dataset: Dataset, columns: Mapping[str, str]) -> dict[str, Any]:
    """What reads the files: the options of `files` or `instructions`, but for the files."""
    others = list(dataset.train.columns)
    if dataset.kind != "causal":
        span = dataset.train.image_range
        more = {} if span is None else {"image_range": list(span)}
        return {"name": "files", **columns, "columns": others, "classes": list(dataset.classes), **more}
    asked = dataset.prompting or Prompting()
    template = _TEMPLATE if Path(asked.template).is_file() else asked.template
    parts = {part: columns.get(part) for part in (*Turn._fields, "label")}
    said = {"template": template, "train_on_inputs": asked.train_on_inputs}
    return {"name": "instructions", **parts, "columns": others, **said}


def _write(path: Path, source: Source, classes: Sequence[str], columns: Mapping[str, str]) -> None:
    others = {name: values for name, values in source.columns.items() if name not in columns.values()}
    names = np.array(classes)[source.labels]
    if isinstance(source.inputs, np.ndarray):
        plain: dict[str, Any] = {
            name: values.astype(str) if values.dtype == object else values for name, values in others.items()
        }
        np.savez(path, **{columns["image"]: source.inputs, columns["label"]: names}, **plain)
        return
    written: dict[str, Any] = {}
    for part, name in columns.items():
        if part == "label":
            written[name] = pa.array(names.tolist(), pa.string())
        elif part == "image":
            written[name] = pa.array(source.inputs, pa.binary())
        else:
            texts = [item if isinstance(item, str) else getattr(item, part) for item in source.inputs]
            written[name] = pa.array(texts, pa.string())
    for name, values in others.items():
        numbers = pa.uint64() if values.dtype == np.uint64 else pa.int64()
        written[name] = pa.array(values.tolist(), numbers if values.dtype.kind in "iu" else pa.string())
    pa.parquet.write_table(pa.table(written), path)


def _safe(client: str, taken: set[str]) -> str:
    """A file's name for a client that every file system takes; one that had to be changed ends with a hash."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", client)[:_LONGEST].strip("_-")
    usable = name and name == client and name.upper() not in _RESERVED
    digest, length = hashlib.sha256(client.encode()).hexdigest(), 8
    found = name if usable else f"{name or 'client'}-{digest[:length]}"
    while found.casefold() in taken:
        found, length = f"{name or 'client'}-{digest[:length]}", length + 4
    taken.add(found.casefold())
    return found


def _free(name: str, taken: Iterable[str]) -> str:
    used = set(taken)
    while name in used:
        name += "_"
    return name


def _as_numbers(names: np.ndarray) -> np.ndarray:
    """Names as whole numbers where all are, so that they sort as the column did that they came from."""
    try:
        numbers = names.astype(np.int64)
    except (ValueError, OverflowError):
        return names
    return numbers if (numbers.astype(str) == names).all() else names
