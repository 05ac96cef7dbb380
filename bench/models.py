"""Takes a tiny model of every family of `tests/families.py` through all that polyrank does with it; stores what held.

    python bench/models.py               # those that the record lacks, or has of other libraries
    python bench/models.py --again       # all of them
    python bench/models.py --only bert   # one (again: several)

Each is planned, run for a round of two clients and one of three, alone and together, exported, and loaded by PEFT.
Differences are relative to the largest of what is compared. What is refused is stored with its message.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.append(str(Path(__file__).parents[1] / "tests"))  # for the table of families

import numpy as np
import peft
import torch
import transformers
import yaml
from torch import Tensor

from families import AUTO, CONVOLUTIONS, FAMILIES, RATE, Family
from machine import LIBRARIES, machine
from polyrank.core.costs import FAMILIES as FORMULAS
from polyrank.core.lowrank import Adapter, LowRank
from polyrank.core.types import Update
from polyrank.engines import simulator
from polyrank.errors import InputError
from polyrank.experiment.build import World, build
from polyrank.experiment.forecast import forecast
from polyrank.experiment.loading import load
from polyrank.experiment.models import Split
from polyrank.experiment.planning import from_config
from polyrank.experiment.publishing import chosen, write
from polyrank.experiment.session import Session
from polyrank.experiment.store import Run
from polyrank.local import grouping
from polyrank.local.adapters import read_adapter
from polyrank.local.base import Base
from polyrank.local.cohort import Job
from polyrank.local.dpsgd import refuse_unsound
from polyrank.local.losses import losses
from polyrank.local.probe import side_by_side
from polyrank.local.trainer import train_together
from records import RESULTS, store
from tiny import WORDS, tokenizer

RECORD = RESULTS / "models.json"
TARGETS = ("attention", "all-linear")
RANKS = (4, 2, 1)
GOALS = {"together": 1e-4, "examples": 1e-5, "peft": 1e-3}
TEXTS, WIDTH, CLASSES = 24, 16, 3
WORDLESS = ("qwen2", "qwen2-classifier")
"""Transformers cuts their texts by a tokenizer of its own, which has none of the words; tests have them by tokens."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="also those that are stored")
    parser.add_argument("--only", action="append", choices=[*FAMILIES, *CONVOLUTIONS])
    parser.add_argument("--out", type=Path, default=RECORD)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    grouping.OVERHEAD["cpu"] = 1e15  # clients share passes wherever they can, not only where that is faster
    on = machine(threads=1)
    table = {name: family for name, family in {**FAMILIES, **CONVOLUTIONS}.items() if name not in WORDLESS}
    held = stored_of(options.out, on)
    due = options.only or [name for name in table if options.again or name not in held]
    for name in due:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            held[name] = record_of(name, table[name], Path(folder))
        rows = [held[known] for known in table if known in held]
        store(options.out, {"machine": on, "goals": GOALS, "families": rows})
        print(f"{name}: {time.perf_counter() - started:.1f} s {held[name]}", flush=True)
    return 0


def stored_of(path: Path, on: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What is stored of the same libraries, by family."""
    record = json.loads(path.read_text()) if path.exists() else {"machine": {}, "families": []}
    same = all(record["machine"].get(library) == on[library] for library in LIBRARIES)
    return {row["family"]: row for row in record["families"]} if same else {}


def record_of(name: str, family: Family, folder: Path) -> dict[str, Any]:
    """One family: what is known of it, what worked, to how much, and the messages of what was refused."""
    model = folder / "model"
    config = family.make()
    made = family.model("cpu")
    made.save_pretrained(model)
    if family.kind != "image":
        tokenizer(model, ends=True)
    data = data_of(family.kind, folder)

    def file(targets: str, clients: int) -> Path:
        return experiment(folder, model, family.kind, data, targets, clients)

    row: dict[str, Any] = {"family": name, "type": config.model_type, "task": family.kind, "refused": {}}
    row["targets"] = [
        targets for targets in TARGETS if attempted(row, f"plan {targets}", lambda t=targets: plan(file(t, 2)))
    ]
    if not row["targets"]:
        return row
    most = row["targets"][-1]
    row |= described(file(most, 2))
    runs = attempted(row, "run", lambda: [pair(file(most, clients), folder) for clients in (2, 3)])
    if runs is None:
        return row
    row["together"] = None if None in (gaps := [gap for *_, gap in runs]) else max(gaps)
    world, run, _ = runs[0]
    row |= answers(world)
    row["examples"] = attempted(row, "examples", lambda: examples(world))
    row["export"] = attempted(row, "export", lambda: exported(run, folder / "export"))
    row["peft"] = attempted(row, "peft", lambda: loaded(world, run, model, folder / "export", family.kind))
    return row


def attempted(row: dict[str, Any], step: str, act: Callable[[], Any]) -> Any:
    """What a step gives; None where it is refused, with the message in the row."""
    try:
        return act()
    except (InputError, ValueError) as error:
        message = " ".join(str(error).split())
    except Exception as error:  # what no message explains is a fault, and is stored as one
        message = f"FAULT: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    row["refused"].setdefault(step, hidden(message))
    return None


def hidden(message: str) -> str:
    """A message without folders of this machine."""
    return " ".join("MODEL" if tempfile.gettempdir() in word else word for word in message.split())


# --- inputs


def data_of(kind: str, folder: Path) -> Path:
    """A table of texts of unequal lengths, or of images."""
    rng = np.random.default_rng(0)
    labels = np.arange(TEXTS) % CLASSES
    if kind == "image":
        path = folder / "data.npz"
        np.savez(path, image=rng.integers(0, 256, (TEXTS, 32, 32, 3), dtype=np.uint8), label=labels)
        return path
    path = folder / "data.jsonl"
    texts = [" ".join(rng.choice(WORDS, int(rng.integers(2, 10)))) for _ in labels]
    rows = [{"text": x, "instruction": x, "output": x, "label": f"c{y}"} for x, y in zip(texts, labels, strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def experiment(folder: Path, model: Path, kind: str, data: Path, targets: str, clients: int) -> Path:
    """The file of a round; its clients have unequal ranks, and train two steps."""
    files = {"name": "files", "train": str(data), "test": str(data)}
    source = {
        "text": {**files, "text": "text"},
        "image": {**files, "image": "image"},
        "causal": {"name": "instructions", "train": str(data), "test": str(data), "template": "plain"},
    }[kind]
    size = {"image_size": 32} if kind == "image" else {"max_length": WIDTH * 2 if kind == "causal" else WIDTH}
    path = folder / f"{targets}-{clients}.yaml"
    written = {
        **{"rounds": 1, "threads": 1, "device": "cpu", "log": [], "method": "flexlora"},
        "model": {"name": str(model), "targets": targets, "rank": RANKS[0], **size},
        "data": {**source, "clients": clients},
        "fleet": [{"rank": rank, "share": 1 / clients} for rank in RANKS[:clients]],
        "local": {"steps": 2, "batch": 4, "lr": RATE, "optimizer": "sgd"},
    }
    path.write_text(yaml.safe_dump(written))
    return path


# --- steps


def plan(file: Path) -> bool:
    return bool(forecast(load(file)))


def described(file: Path) -> dict[str, Any]:
    """What the config alone tells."""
    base = from_config(load(file), "meta")
    model = base.spec.architecture
    return {
        "layers": len(base.spec.modules),
        "blocks": len(base.blocks),
        "covered": base.spec.covered,
        "memory": model is not None and model.family in FORMULAS,
    }


def answers(world: World) -> dict[str, Any]:
    """What the model itself says: of padding, and of adapters side by side."""
    data = world.splits["train"]
    padding = getattr(data, "padding", None)
    reasons = {
        key: side_by_side(world.base, data, dropout) for key, dropout in (("apart", 0.0), ("apart_dropout", 0.1))
    }
    kind = None if padding is None else "one width" if padding.width is not None else padding.side
    return {"padding": kind, "layouts": len(world.base.layouts), **reasons, "unused": len(world.base.unused())}


def pair(file: Path, folder: Path) -> tuple[World, Run, float | None]:
    """A round of clients that share passes where they can, and of each alone: the first, and by how much they differ.

    None: nobody has shared one.
    """
    asked = load(file)
    world = build(asked)
    alone = copy(world.clients)
    alone.together = 0
    sizes: list[int] = []
    both = ran(world, Run.create(folder / f"{file.stem}-both", asked), sizes)
    if max(sizes) == 1:
        return world, both, None
    single = ran(replace(world, clients=alone), Run.create(folder / f"{file.stem}-single", asked))
    found, expected = (read_adapter(run.adapter)[0] for run in (both, single))
    gaps = [gap(products(found), products(expected)), gap(found.dense, expected.dense)]
    return world, both, max(gaps)


def ran(world: World, run: Run, sizes: list[int] | None = None) -> Run:
    """A run to its end; `sizes` learns how many clients were in each pass."""

    def counted(base: Base, jobs: list[Job], *others: Any) -> list[Update]:
        if sizes is not None:
            sizes.append(len(jobs))
        return train_together(base, jobs, *others)

    simulator.train_together = counted
    session = Session(run, world)
    with session.logs:
        for _ in session.rounds():
            pass
        session.finish()
    return run


def products(adapter: Adapter) -> dict[str, Tensor]:
    return {name: x.scale * x.B @ x.A for name, x in adapter.layers.items()}


def gap(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest relative difference; a tensor that hardly counts is held against a tenth of the largest."""
    least = 0.1 * max(float(t.norm()) for t in expected.values()) if expected else 1.0
    return max((float((found[n] - t).norm()) / max(float(t.norm()), least) for n, t in expected.items()), default=0.0)


def examples(world: World) -> float | None:
    """Gradients of four examples in one pass against one by one; None where they are taken one by one anyway.

    What is above the goal is taken again in float64, which tells rounding from a wrong gradient.
    """
    base, data = world.base, world.splits["train"]
    refuse_unsound(base, base.head)
    if side_by_side(base, data) is not None:
        return None
    rounded = example_gap(base, data, torch.float32)
    if rounded <= GOALS["examples"]:
        return rounded
    base.model.double()
    try:
        return example_gap(base, data, torch.float64)
    finally:
        base.model.float()


def example_gap(base: Base, data: Split, dtype: torch.dtype) -> float:
    """By how much the gradients of four examples differ, in one pass and one by one."""
    draws, layers = torch.Generator().manual_seed(0), {}
    for name, (d_out, d_in) in base.spec.modules.items():
        A, B = torch.randn(2, d_in, generator=draws), torch.randn(d_out, 2, generator=draws)
        layers[name] = LowRank((A / d_in**0.5).to(dtype), (0.2 * B).to(dtype))
    adapter = Adapter(layers)

    def gradients(chosen: np.ndarray, copies: int | None) -> dict[str, Tensor]:
        batch = {name: x.to(dtype) if x.is_floating_point() else x for name, x in data.batch(chosen).items()}
        with base.attached(adapter, None, "AB", copies=copies) as model:
            losses(model(batch), batch["labels"]).sum().backward()
            named = {f"{n}.{f}": getattr(model, f)[n] for n in layers for f in "AB"}
            return {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in named.items()}

    at_once = gradients(np.arange(4), 4)
    alone = [gradients(np.array([i]), None) for i in range(4)]
    return max(gap({n: g[i] for n, g in at_once.items()}, own) for i, own in enumerate(alone))


def exported(run: Run, folder: Path) -> str:
    """What the export's own check says."""
    folder.mkdir()
    return write(chosen(run), folder).verified


def loaded(world: World, run: Run, model: Path, folder: Path, kind: str) -> float:
    """The logits of PEFT's own load of the export against polyrank's, relative to the largest; a text at a time."""
    adapter, _ = read_adapter(run.adapter)
    classes = {} if kind == "causal" else {"num_labels": CLASSES}
    plain = AUTO[kind].from_pretrained(model, **classes)
    other = peft.PeftModel.from_pretrained(plain, folder).eval()
    worst = 0.0
    for example in range(4):
        batch = world.splits["test"].batch(np.array([example]))
        with torch.no_grad(), world.base.attached(adapter) as live:
            ours = live(batch)
        with torch.no_grad():
            theirs = other(**world.base.inputs(batch)).logits
        worst = max(worst, float((theirs - ours).abs().max() / ours.abs().max()))
    return worst


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
