"""A client's side: its own data, its own copy of the base model, and answers to what a server asks.

What a site is made of is in a file that stays with it. A server learns the number of examples, the resources that the
file states, a fingerprint of the base model, and what it asks to be trained; it names no path and no model.
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import model_validator

from polyrank.core.privacy import Privacy
from polyrank.core.rng import stream
from polyrank.core.types import Client, ClientProfile
from polyrank.data import CausalSplit, Source, warn_of_silent
from polyrank.data.source import Prompting
from polyrank.engines.letters import answer_to_another_version, decode_query, encode_profile, encode_scores
from polyrank.engines.post import Kind
from polyrank.engines.wire import LISTING, VersionError, WireError, decode_task, digest, encode_update, opened
from polyrank.errors import InputError
from polyrank.experiment.components import Strict, entry_model, parameters, union_of
from polyrank.experiment.config import ConfigError, Count, ModelConfig, PrivacyConfig, Resources
from polyrank.experiment.loading import anchored, load, located, read_yaml, validated
from polyrank.experiment.machine import default_threads, pick_device
from polyrank.experiment.models import Kind as DataKind
from polyrank.experiment.models import Split, load_base, preparer, prompting_of
from polyrank.experiment.planning import profile_of
from polyrank.experiment.shares import fleet_profiles, share_data
from polyrank.experiment.tables import DATASETS
from polyrank.files import write_bytes
from polyrank.local.base import Base
from polyrank.local.data import Indices
from polyrank.local.importance import measured
from polyrank.local.padding import filled_up
from polyrank.local.trainer import train
from polyrank.local.vocabulary import check_splits

_log = logging.getLogger(__name__)

DataConfig = union_of(entry_model(name, function) for name, function in DATASETS.items())


class Rehearsal(Strict):
    """The data and the resources that a simulated client has, to try a deployment with.

    Attributes:
        experiment: a file that divides its data among clients.
        client: the one to be.
        overrides: ``key.sub=value``, as after ``--set``.
    """

    experiment: Path
    client: str
    overrides: tuple[str, ...] = ()


class SiteConfig(Resources):
    """What a client is made of, and what it can afford.

    Attributes:
        model: its copy of the base model: a folder, a hub name, or a built-in one.
        data: its own data; all training examples are used, and nothing else. Of instructions it names the columns and
            the template itself; a template that says something else than the server's is refused.
        rehearse: the data and the resources of a simulated client, in place of `data` and of what this file states.
        privacy: the least protection that it agrees to: a task without it, or with less noise, is refused.
        device: ``auto`` is a GPU if there is one.
        threads: CPU threads; None: all cores the process may use.
    """

    model: str
    data: DataConfig | None = None  # type: ignore[valid-type]
    rehearse: Rehearsal | None = None
    privacy: PrivacyConfig = PrivacyConfig()
    device: str = "auto"
    threads: Count | None = None

    @model_validator(mode="after")
    def _one_source(self) -> SiteConfig:
        if (self.data is None) == (self.rehearse is None):
            raise ValueError("exactly one of data and rehearse says what it trains on")
        return self


class _Holdings(NamedTuple):
    """What a site trains on: a split of which it owns some examples, by whom it is described."""

    source: Source
    classes: tuple[str, ...]
    kind: DataKind
    own: Indices
    profile: ClientProfile
    prompting: Prompting | None


class Site:
    """Answers what a server asks.

    Args:
        path: its configuration. Beside it, ``history.jsonl`` says what has left this machine; ``last-update`` is the
            answer to the last task, given again to who asks again: nothing is trained or released twice.
        data: its training data, where that is not as the file says.
    """

    def __init__(self, path: Path, data: Path | None = None) -> None:
        self.path, self.config = path, read_site(path, data)
        torch.set_num_threads(self.config.threads or default_threads())
        self.device = pick_device(self.config.device)
        self.holdings = _holdings(self.config)
        self._ready: dict[str, tuple[Base, Split]] = {}

    def answer(self, kind: Kind, blob: bytes) -> bytes:
        """The answer to a message.

        Raises:
            InputError: if what is asked does not go with what the site has.
            WireError: if the message is not what it should be.
        """
        try:
            return {"profile": self._profile, "fit": self._fit, "measure": self._measure}[kind](blob)
        except VersionError as error:
            _log.error("%s: the server's message %s", self.path, error)
            return answer_to_another_version()

    def _profile(self, blob: bytes) -> bytes:
        header, _ = opened(blob, "hello", LISTING)
        base, _ = self._model(header.get("model"))
        return encode_profile(self.holdings.profile, base.fingerprint(), blob)

    def _fit(self, blob: bytes) -> bytes:
        started, asked = time.monotonic(), digest(blob)
        if (given := self._given(asked)) is not None:
            return given
        task, header = decode_task(blob)
        require(Privacy.of(self.config.privacy.model_dump()), task.privacy, self.path)
        base, data = self._model(header.get("model"))
        # What protects real data is drawn from entropy; a rehearsal repeats what is simulated.
        secret = bool(task.privacy) and self.config.rehearse is None
        update = train(base, task, str(header["client"]), data, self.holdings.own, secret=secret)
        reply = encode_update(update, task, asked, header["reply"])
        write_bytes(self._last, asked.encode() + reply)
        self._remember(
            round=task.round,
            sent=digest(reply),
            bytes=len(reply),
            examples=update.examples,
            loss=update.metrics.get("loss"),
            seconds=round(time.monotonic() - started, 2),
        )
        return reply

    @property
    def _last(self) -> Path:
        return self.path.with_name("last-update")

    def _given(self, asked: str) -> bytes | None:
        """The answer to the last task, if it was this one."""
        held = self._last.read_bytes() if self._last.is_file() else b""
        return held[len(asked) :] if held.startswith(asked.encode()) else None

    def _measure(self, blob: bytes) -> bytes:
        query, state, header = decode_query(blob)
        base, data = self._model(header.get("model"))
        own: Indices = self.holdings.own
        who: Client = str(header["client"])
        scores = measured(base, query, state, data, own, who) if len(own) else dict.fromkeys(state.adapter.layers, 0.0)
        reply = encode_scores(scores, len(own), blob)
        self._remember(round=state.round, sent=digest(reply), bytes=len(reply), scores=len(scores))
        return reply

    def _model(self, asked: Any) -> tuple[Base, Split]:
        """The base model and the data as a server wants them; loaded once."""
        key = json.dumps(asked, sort_keys=True)
        if key not in self._ready:
            self._ready = {key: self._loaded(asked)}
        return self._ready[key]

    def _loaded(self, asked: Any) -> tuple[Base, Split]:
        held = self.holdings
        try:
            kind, classes = asked["kind"], [str(name) for name in asked["classes"]]
            options = {key: value for key, value in asked.items() if key not in ("kind", "classes", "prompting")}
            config = ModelConfig(name=self.config.model, **options)
        except (KeyError, TypeError, ValueError) as error:
            raise WireError(f"the server's description of the model: {error}") from None
        if kind != held.kind:
            raise InputError(f"{self.path}: holds {held.kind} data, and the server trains on {kind}")
        source = held.source
        if held.prompting is None:
            source = replace(source, labels=renumbered(source.labels, held.classes, classes, self.path))
        else:  # categories are the site's own affair: no model learns them
            agree(held.prompting, asked.get("prompting"), self.path)
        base = load_base(config, kind, classes, self.device, stream(0, "head"))  # the server sends the head
        split = preparer(config, kind, held.prompting)(source)
        check_splits({"data": split}, base.model, str(base.info.base), str(self.path))
        split = filled_up(base, {"data": split}, config.max_length)["data"]
        if isinstance(split, CausalSplit):
            warn_of_silent(split, f"{self.path}: data", config.max_length)
        return base, split

    def _remember(self, **what: Any) -> None:
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **what}
        with open(self.path.with_name("history.jsonl"), "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_site(path: Path, data: Path | None = None) -> SiteConfig:
    """A site's file; paths in it are seen from it. `data` is its training data, where that is not as the file says.

    Raises:
        ConfigError: naming the file, the key, the value and what would be valid.
    """
    try:
        raw = read_yaml(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    if data is not None:
        if not isinstance(raw, dict) or not isinstance(raw.get("data"), dict) or "train" not in raw["data"]:
            raise ConfigError(f"{path}: data.train: missing, which --data {data} would replace")
        raw["data"]["train"] = data.resolve()
    config, folder = validated(SiteConfig, raw, str(path)), path.resolve().parent
    parts = {key: anchored(part, folder) for key in ("data", "rehearse") if (part := getattr(config, key)) is not None}
    for section, part in parts.items():
        for key, value in part:
            if isinstance(value, Path) and not value.exists():
                raise ConfigError(f"{path}: {section}.{key}: {value}: no such file")
    return config.model_copy(update={"model": located(config.model, folder), **parts})


def require(least: Privacy, asked: Privacy, where: Path) -> None:
    """Refuses a task that protects less than a site agrees to.

    Raises:
        InputError: saying what it lacks.
    """
    for kind in ("clients", "examples"):
        own, found = getattr(least, kind), getattr(asked, kind)
        if own is None:
            continue
        place = getattr(own, "where", None)
        if found is None or found.noise < own.noise or getattr(found, "where", None) != place:
            had = "none" if found is None else f"noise {found.noise:g}" + (f", {found.where}" if place else "")
            due = f"noise {own.noise:g}" + (f", {place}" if place else "")
            raise InputError(f"{where}: privacy.{kind}: this site agrees to {due} or more; the task has {had}")


def agree(own: Prompting, wanted: Any, where: Path) -> None:
    """Refuses to train on other prompts than the server's clients do.

    Raises:
        InputError: naming both.
    """
    said = prompting_of(own)
    if said != wanted:
        raise InputError(f"{where}: data: prompts are made by {said}, and the server's by {wanted}")


def renumbered(labels: np.ndarray, own: tuple[str, ...], wanted: list[str], where: Path) -> np.ndarray:
    """A site's labels as the server numbers its classes.

    Raises:
        InputError: if the site has a class that the server does not know.
    """
    present = np.unique(labels)
    number = {name: index for index, name in enumerate(wanted)}
    strange = [own[index] for index in present.tolist() if own[index] not in number]
    if strange:
        raise InputError(f"{where}: data: classes {', '.join(strange)} are none of the server's: {', '.join(wanted)}")
    table = np.array([number.get(name, -1) for name in own], dtype=np.int64)
    return table[labels]


def _holdings(config: SiteConfig) -> _Holdings:
    if config.rehearse is not None:
        return _rehearsed(config.rehearse)
    chosen: Any = config.data
    function = DATASETS[chosen.name]
    dataset = function(**{key: getattr(chosen, key) for key in parameters(function)})
    everything = np.arange(len(dataset.train.labels))
    profile = profile_of(config, len(everything))
    return _Holdings(dataset.train, dataset.classes, dataset.kind, everything, profile, dataset.prompting)


def _rehearsed(asked: Rehearsal) -> _Holdings:
    experiment = load(asked.experiment, list(asked.overrides))
    shares = share_data(experiment)
    indices = shares.indices()
    if asked.client not in indices:
        raise ConfigError(f"rehearse.client: {asked.client!r} is none of {', '.join(list(indices)[:20])}")
    profile = fleet_profiles(experiment.fleet, shares)[asked.client]
    dataset = shares.dataset
    return _Holdings(dataset.train, dataset.classes, dataset.kind, indices[asked.client], profile, dataset.prompting)
