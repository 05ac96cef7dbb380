"""What a site has: its data, as its own file names it, and the model and the data as a server wants them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polyrank.core.rng import stream
from polyrank.core.types import ClientProfile
from polyrank.data import CausalSplit, Source, warn_of_silent
from polyrank.data.source import Kind, Prompting
from polyrank.deploy.site_file import Rehearsal, SiteConfig
from polyrank.engines.wire import WireError
from polyrank.errors import InputError
from polyrank.experiment.components import parameters
from polyrank.experiment.config import ConfigError, ModelConfig
from polyrank.experiment.loading import load
from polyrank.experiment.models import Split, load_base, preparer, prompting_of
from polyrank.experiment.planning import profile_of
from polyrank.experiment.shares import fleet_profiles, share_data
from polyrank.experiment.tables import DATASETS
from polyrank.local.base import Base
from polyrank.local.data import Indices
from polyrank.local.padding import filled_up
from polyrank.local.vocabulary import check_splits

MODEL_KEYS = {"targets", "dtype", "attention", "quantize", "image_size", "max_length"}
"""What a server says of the model; which one it is, the site's own file says."""


class Holdings(NamedTuple):
    """What a site trains on: a split of which it owns some examples, by whom it is described."""

    source: Source
    classes: tuple[str, ...]
    kind: Kind
    own: Indices
    profile: ClientProfile
    prompting: Prompting | None

    def fingerprint(self) -> str:
        """A digest of the examples and their labels, whatever their order."""
        digests = sorted(_digest(self, index) for index in self.own.tolist())
        return hashlib.sha256(b"".join(digests)).hexdigest()[:32]


def holdings_of(config: SiteConfig) -> Holdings:
    """What a site's file names, read.

    Raises:
        InputError: naming what is not as it must be.
    """
    if config.rehearse is not None:
        return _rehearsed(config.rehearse)
    chosen: Any = config.data
    function = DATASETS[chosen.name]
    dataset = function(**{key: getattr(chosen, key) for key in parameters(function)})
    everything = np.arange(len(dataset.train.labels))
    profile = profile_of(config, len(everything))
    return Holdings(dataset.train, dataset.classes, dataset.kind, everything, profile, dataset.prompting)


def loaded(path: Path, config: SiteConfig, holdings: Holdings, device: str, asked: Any) -> tuple[Base, Split]:
    """The base model, and the site's data prepared for it, as a server wants them.

    Args:
        path: of the site's file.
        config: what it says.
        holdings: what it holds.
        device: where the model goes.
        asked: the server's description of the model.

    Raises:
        InputError: if what is asked does not go with what the site has.
        WireError: if the description is none.
    """
    try:
        kind, classes = asked["kind"], [str(name) for name in asked["classes"]]
        options = {key: value for key, value in asked.items() if key not in ("kind", "classes", "prompting")}
        if strange := options.keys() - MODEL_KEYS:
            raise ValueError(f"{', '.join(sorted(strange))[:200]}: not for a server to say")
        model = ModelConfig(name=config.model, **options)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WireError(f"the server's description of the model: {error}") from None
    if kind != holdings.kind:
        raise InputError(f"{path}: holds {holdings.kind} data, and the server trains on {kind}")
    source = holdings.source
    if holdings.prompting is None:
        source = replace(source, labels=renumbered(source.labels, holdings.classes, classes, path))
    else:  # categories are the site's own affair: no model learns them
        agree(holdings.prompting, asked.get("prompting"), path)
    base = load_base(model, kind, classes, device, stream(0, "head"))  # the server sends the head
    split = preparer(model, kind, holdings.prompting)(source)
    check_splits({"data": split}, base.model, str(base.info.base), str(path))
    split = filled_up(base, {"data": split}, model.max_length)["data"]
    if isinstance(split, CausalSplit):
        warn_of_silent(split, f"{path}: data", model.max_length)
    return base, split


def agree(own: Prompting, server: Any, where: Path) -> None:
    """Refuses to train on other prompts than the server's clients do.

    Raises:
        InputError: naming both.
    """
    form = prompting_of(own)
    if form != server:
        raise InputError(f"{where}: data: prompts are made by {form}, and the server's by {server}")


def renumbered(labels: np.ndarray, own: tuple[str, ...], server: list[str], where: Path) -> np.ndarray:
    """A site's labels as the server numbers its classes.

    Raises:
        InputError: if the site has a class that the server does not know.
    """
    present = np.unique(labels)
    number = {name: index for index, name in enumerate(server)}
    strange = [own[index] for index in present.tolist() if own[index] not in number]
    if strange:
        raise InputError(f"{where}: data: classes {', '.join(strange)} are none of the server's: {', '.join(server)}")
    table = np.array([number.get(name, -1) for name in own], dtype=np.int64)
    return table[labels]


def _rehearsed(asked: Rehearsal) -> Holdings:
    experiment = load(asked.experiment, list(asked.overrides))
    shares = share_data(experiment)
    indices = shares.indices()
    if asked.client not in indices:
        raise ConfigError(f"rehearse.client: {asked.client!r} is none of {', '.join(list(indices)[:20])}")
    profile = fleet_profiles(experiment.fleet, shares)[asked.client]
    dataset = shares.dataset
    return Holdings(dataset.train, dataset.classes, dataset.kind, indices[asked.client], profile, dataset.prompting)


def _digest(holdings: Holdings, index: int) -> bytes:
    example, label = holdings.source.inputs[index], holdings.source.labels[index]
    content = example.tobytes() if isinstance(example, np.ndarray) else example
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    name = holdings.classes[label] if holdings.classes and holdings.prompting is None else str(label)
    return hashlib.sha256(content + b"\0" + name.encode()).digest()
