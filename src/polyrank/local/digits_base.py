"""The embedded default's foundation model: a small ViT, trained in seconds on a public slice of upright digits."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from polyrank.core.rng import stream
from polyrank.data import cache_dir, prepare_images, public_digits
from polyrank.local import hf

_RECIPE = "digits-vit-1"
_EPOCHS, _BATCH, _LR = 30, 64, 2e-3


def digits_config() -> Any:
    """The config of the model."""
    return hf.small_vit_config(image_size=8, patch_size=2, hidden=64, layers=4, heads=4, channels=1, classes=10)


def digits_vit() -> str:
    """The folder of the model, trained on first use and cached; the same weights every time on one machine."""
    cache = cache_dir()
    folder = (cache or Path(tempfile.mkdtemp(prefix="polyrank-"))) / _RECIPE
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{_RECIPE}-", dir=folder.parent))
        hf.save_model(_train(), unfinished)
        try:
            os.rename(unfinished, folder)
        except OSError:  # another process was faster
            shutil.rmtree(unfinished)
    return str(folder)


def _train() -> torch.nn.Module:
    """Trains on one thread, so that the weights do not depend on who happens to need them first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _fit()
    finally:
        torch.set_num_threads(threads)


def _fit() -> torch.nn.Module:
    source = public_digits()
    data = prepare_images(source, 8, 1, (0.5,), (0.5,))
    rng = stream(0, "digits-vit")
    model = hf.random_vit(digits_config(), rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=0.01, fused=True)
    steps = _EPOCHS * int(np.ceil(len(source) / _BATCH))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=_LR, total_steps=steps)
    model.train()
    for _ in range(_EPOCHS):
        order = rng.permutation(len(source))
        for start in range(0, len(order), _BATCH):
            batch = data.batch(order[start : start + _BATCH])
            loss = F.cross_entropy(model(pixel_values=batch["pixel_values"]).logits, batch["labels"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()
