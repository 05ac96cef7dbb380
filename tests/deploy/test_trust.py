"""What a site agrees to, attacked as its security office would: a server that asks whatever it likes."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from polyrank.core.lowrank import Adapter
from polyrank.core.privacy import ExamplePrivacy, Privacy
from polyrank.core.types import LocalTraining, Query, ServerState, Task
from polyrank.deploy.site import Site
from polyrank.engines.letters import ask_scores, decode_scores
from polyrank.engines.wire import encode_task

MODEL = {"targets": "attention", "dtype": "float32", "attention": "auto", "max_length": 128, "image_size": None}
DIGITS = {**MODEL, "kind": "image", "classes": [str(digit) for digit in range(10)]}


def write(folder: Path, **config: Any) -> Path:
    path = folder / "site.yaml"
    rng = np.random.default_rng(0)
    np.savez(folder / "own.npz", image=rng.integers(0, 256, (6, 8, 8), np.uint8), label=np.arange(6).astype(str))
    data = {"name": "files", "train": "own.npz", "test": "own.npz", "image": "image"}
    path.write_text(yaml.safe_dump({"model": "digits-vit", "data": data, "threads": 1, **config}))
    return path


def test_labels_are_not_read_off_gradients(tmp_path: Path, random_adapter: Any) -> None:
    site = Site(write(tmp_path, privacy={"examples": {"clip": 1.0, "noise": 2.0}}))
    base, data = site._model(DIGITS)
    adapter = random_adapter(base.spec, (2,), head=base.initial_head())
    bias = next(name for name in adapter.dense if name.endswith("bias"))
    guesses = []
    for seed in range(6):
        scores = []
        for digit in range(10):
            head = {**adapter.dense, bias: 1e3 * torch.nn.functional.one_hot(torch.tensor(digit), 10).float()}
            state = ServerState(0, Adapter(adapter.layers, head))
            asked = ask_scores(Query("gradient", "clients", 1, seed=seed), state, "a", DIGITS)
            try:
                scores.append(sum(decode_scores(site.answer("measure", asked), asked, adapter, "a")[0].values()))
            except Exception:
                scores.append(math.nan)
        guesses.append(int(np.argmin(scores)) if np.isfinite(scores).all() else None)
    print(guesses)
    assert guesses == [None] * 6


def test_steps_are_no_way_around_epsilon(tmp_path: Path, random_adapter: Any) -> None:
    site = Site(write(tmp_path, privacy={"examples": {"clip": 1.0, "noise": 2.0}}, budget={"epsilon": 8}))
