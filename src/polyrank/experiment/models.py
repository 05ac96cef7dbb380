"""The base model that a configuration names, and data prepared for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from polyrank.core.rng import stream
from polyrank.data import CausalSplit, ImageSplit, Source, TextSplit, prepare_causal, prepare_images, prepare_text
from polyrank.data.prompts import form_of
from polyrank.data.source import Kind, Prompting
from polyrank.experiment.config import Experiment, ModelConfig
from polyrank.experiment.planning import BUILT_IN_MODELS, from_config, kind_of
from polyrank.local import hf, processors
from polyrank.local.base import Base
from polyrank.local.lengths import check_length
from polyrank.local.quantized import check_quantization

Split = TextSplit | ImageSplit | CausalSplit


def load_base(config: ModelConfig, kind: Kind, classes: Sequence[str], device: str, rng: np.random.Generator) -> Base:
    """The frozen model with a head for these classes; one that its checkpoint lacks is drawn from `rng`.

    Raises:
        InputError: if it cannot be loaded, is not whole, or has fewer positions than texts may have tokens.
    """
    base = hf.load_base(
        located(config),
        config.targets,
        kind=kind,
        classes=classes,
        rng=rng,
        device=device,
        dtype=config.dtype,
        image_size=config.image_size,
        attention=config.attention,
        tokens=config.max_length,
        quantize=config.quantize,
    )
    if kind != "image":
        check_length(base.model, config.max_length, config.name)
    return base


def load_random(experiment: Experiment, device: str) -> Base:
    """The experiment's model with random weights: its costs are those of the real one.

    Raises:
        InputError: if it is to be quantised, and cannot be on this device.
    """
    if experiment.model.quantize is None:
        return from_config(experiment, device)
    check_quantization(experiment.model.quantize, device)
    whole = from_config(experiment, "cpu")
    kind: Kind = kind_of(experiment)
    with TemporaryDirectory() as folder:  # a model is quantised as it is read
        hf.save_model(whole.model, Path(folder))
        config = experiment.model.model_copy(update={"name": folder})
        return load_base(config, kind, list(whole.model.config.id2label.values()), device, stream(0, "random"))


def prompting_of(prompting: Prompting) -> dict[str, Any]:
    """What a server and its clients must agree on of prompts: their form, by a fingerprint; its name is to be read."""
    name, learnt = Path(prompting.template).stem, prompting.train_on_inputs
    return {"template": name, "train_on_inputs": learnt, "form": form_of(prompting)}


def preparer(config: ModelConfig, kind: Kind, prompting: Prompting | None = None) -> Callable[[Source], Split]:
    """What makes of a split the tensors that the model takes; `prompting` makes texts of instructions."""
    if kind == "causal":
        causal = processors.causal_processor(located(config), config.max_length, prompting or Prompting())
        return lambda source: prepare_causal(source, causal.encode, causal.pad_id, causal.fingerprint)
    if kind == "text":
        text = processors.text_processor(located(config), config.max_length)
        return lambda source: prepare_text(source, text.encode, text.pad_id, text.fingerprint)
    image = processors.image_processor(located(config), config.image_size)
    return lambda source: prepare_images(source, image.size, image.channels, image.mean, image.std)


def located(config: ModelConfig) -> str:
    """The model's name as Transformers takes it: a hub name, or a folder of this machine."""
    _, folder = BUILT_IN_MODELS.get(config.name, (None, None))
    return folder() if folder else hf.locate(config.name)
