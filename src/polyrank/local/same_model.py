"""What several adapters have in common: one base, one task, layers of the same names and shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from polyrank.core.lowrank import Adapter
from polyrank.local import lokr
from polyrank.local.adapters import AdapterInfo, read_adapter
from polyrank.local.fingerprint import fingerprint
from polyrank.local.peft_config import AdapterError, few
from polyrank.local.peft_keys import renamed


@dataclass(frozen=True)
class Adapters:
    """Adapters of one model.

    Attributes:
        folders: where they were read.
        adapters: in the same order, under common names of layers.
        info: what an adapter of all of them says of the model.
        names: by folder, the names of layers that were read as another's: (in the file, as they are read).
    """

    folders: tuple[Path, ...]
    adapters: tuple[Adapter, ...]
    info: AdapterInfo
    names: Mapping[Path, Mapping[str, str]]


def read_adapters(folders: Sequence[Path], base: str | None = None) -> Adapters:
    """LoRA adapters of one model, which may lack layers that others have.

    Args:
        folders: PEFT adapters.
        base: the name of the base of all of them, whatever their configs say.

    Raises:
        AdapterError: if one cannot be read, is a LoKr or has no layer, or they are of different models: other bases,
            other tasks, other shapes, or no layer in common.
    """
    read = [read_adapter(folder) for folder in folders]
    for folder, (adapter, _) in zip(folders, read, strict=True):
        if lokr.grouped(adapter.dense):
            raise AdapterError(f"{folder}: a LoKr adapter; only LoRA adapters can be merged")
        if not adapter.layers:
            raise AdapterError(f"{folder}: holds no LoRA layer")
    infos = [info if base is None else replace(info, base=base, revision=None) for _, info in read]
    _check_bases(folders, infos)
    _check_tasks(folders, infos)
    names = renamed([[*adapter.layers, *adapter.dense] for adapter, _ in read])
    adapters = [_under(adapter, own) for (adapter, _), own in zip(read, names, strict=True)]
    _check_shapes(folders, adapters)
    _check_shared(folders, adapters)
    return Adapters(tuple(folders), tuple(adapters), _together(infos), dict(zip(folders, names, strict=True)))


def under_names(adapter: Adapter, names: Iterable[str]) -> Adapter:
    """The adapter under a model's names, where nothing but their nesting differs."""
    return _under(adapter, renamed([names, [*adapter.layers, *adapter.dense]])[1])


def _under(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    return Adapter(
        {names.get(name, name): x for name, x in adapter.layers.items()},
        {names.get(name, name): tensor for name, tensor in adapter.dense.items()},
    )


def _together(infos: Sequence[AdapterInfo]) -> AdapterInfo:
    """What they say together: a thing that one of them leaves open, another may say."""
    saved = tuple(dict.fromkeys(name for info in infos for name in info.modules_to_save))
    return AdapterInfo(
        next((info.base for info in infos if info.base), None),
        next((info.task for info in infos if info.task), None),
        any(info.fan_in_fan_out for info in infos),
        saved,
        revision=next((info.revision for info in infos if info.base and info.revision), None),
    )


def _check_bases(folders: Sequence[Path], infos: Sequence[AdapterInfo]) -> None:
    """By name; where names differ, by the weights, if both are on this disk."""
    known = {(info.base, info.revision): folder for folder, info in zip(folders, infos, strict=True) if info.base}
    if len({base for base, _ in known}) > 1:
        prints = [fingerprint(*base) for base in known]
        if None not in prints and len(set(prints)) == 1:
            return
        why = "their weights differ" if None not in prints else "not all are on this disk, so that names decide"
    elif len({revision or "main" for _, revision in known}) > 1:
        why = "their revisions differ"
    else:
        return
    named = "; ".join(f"{folder}: {base}{f' at {at}' if at else ''}" for (base, at), folder in known.items())
    raise AdapterError(
        f"adapters of different base models cannot be merged: {why} ({named}); if they are the same, say so with "
        f"--base NAME"
    )


def _check_tasks(folders: Sequence[Path], infos: Sequence[AdapterInfo]) -> None:
    tasks = {info.task: folder for folder, info in zip(folders, infos, strict=True) if info.task}
    if len(tasks) > 1:
        named = "; ".join(f"{folder}: {task}" for task, folder in tasks.items())
        raise AdapterError(f"adapters of different tasks cannot be merged: task_type differs ({named})")


def _check_shapes(folders: Sequence[Path], adapters: Sequence[Adapter]) -> None:
    shapes: dict[str, tuple[tuple[int, ...], Path]] = {}
    for folder, adapter in zip(folders, adapters, strict=True):
        own = {name: x.shape for name, x in adapter.layers.items()}
        own |= {name: tuple(tensor.shape) for name, tensor in adapter.dense.items()}
        for name, shape in own.items():
            first, where = shapes.setdefault(name, (shape, folder))
            if first != shape:
                raise AdapterError(f"{folder}: {name} has shape {shape}, but {where} has {first}: not the same model")


def _check_shared(folders: Sequence[Path], adapters: Sequence[Adapter]) -> None:
    """Every adapter shares a layer with the first, or with one that does."""
    reached, waiting = set(adapters[0].layers), list(range(1, len(adapters)))
    while near := [index for index in waiting if reached & adapters[index].layers.keys()]:
        reached |= {name for index in near for name in adapters[index].layers}
        waiting = [index for index in waiting if index not in near]
    for index in waiting:
        raise AdapterError(
            f"{folders[index]}: shares no layer with {folders[0]}, so they cannot be of one model: it has "
            f"{few(adapters[index].layers)}; the other has {few(adapters[0].layers)}"
        )
