"""Who holds what: the data set, its split among the clients, and their profiles. No model is needed for it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from polyrank.core.rng import stream
from polyrank.core.roster import Fleet, Named, Names, Numbered, PerClient
from polyrank.core.types import Client
from polyrank.data import DataError, Dataset, Partition, hold_out, limit, set_apart, write_per_client
from polyrank.data.source import Turn
from polyrank.experiment.components import describe, parameters
from polyrank.experiment.config import ConfigError, Experiment, Group
from polyrank.experiment.planning import profile_of
from polyrank.experiment.tables import DATASETS, PARTITIONERS, SCORERS

Indices = npt.NDArray[np.int64]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shares:
    """The data set and who holds what of its training split.

    Attributes:
        dataset: its splits.
        partition: of the training split.
        clients: their names.
        kept: what part of its own examples each client keeps to evaluate on, and never trains on.
        seed: of the streams that draw them.
    """

    dataset: Dataset
    partition: Partition
    clients: Names
    kept: float = 0.0
    seed: int = 0

    def indices(self) -> Mapping[Client, Indices]:
        """Each client's indices into the training split, those it trains on; made as they are asked for."""
        if not self.kept:
            return PerClient(self.clients, self.partition.__getitem__)
        return PerClient(self.clients, lambda number: self._divided(number)[1])

    def held_out(self) -> Mapping[Client, Indices]:
        """Each client's indices into the training split, those it is evaluated on; made as they are asked for."""
        return PerClient(self.clients, lambda number: self._divided(number)[0])

    @property
    def sizes(self) -> Indices:
        """Examples that each client trains on, (clients,)."""
        sizes = self.partition.sizes
        return sizes - self._kept_of(sizes)

    def _divided(self, number: int) -> tuple[Indices, Indices]:
        own = self.partition[number]
        order = stream(self.seed, "client-hold-out", self.clients[number]).permutation(len(own))
        count = int(self._kept_of(np.asarray(len(own))))
        return own[np.sort(order[:count])], own[np.sort(order[count:])]

    def _kept_of(self, sizes: Indices) -> Indices:
        """At least one example of two; of a single one, none."""
        return np.minimum(np.maximum(np.round(self.kept * sizes), 1 if self.kept else 0), sizes - 1).clip(0).astype(int)


def share_data(experiment: Experiment, *, remote: bool = False) -> Shares:
    """Loads the data set, holds out validation, and splits the training data among the clients.

    What the server keeps to measure importance on is set apart first.

    Every step draws from its own stream of the seed alone, so every method of a comparison sees the same split.

    Args:
        experiment: with the data.
        remote: whether clients are on other machines; then there need not be training data here.

    Raises:
        ConfigError: if there is no training data, and clients are here.
    """
    config, seed = experiment.data, experiment.seed
    options = {key: getattr(config, key) for key in parameters(DATASETS[config.name])}
    dataset = DATASETS[config.name](**options)
    if not len(dataset.train):
        if not remote:
            raise ConfigError("data.train: missing: clients of a simulation train on it; a deployment's have their own")
        return _of_server(dataset, experiment)
    _check_classes(dataset, listed=options.get("classes", True) is not None)
    dataset = hold_out(dataset, config.hold_out, stream(seed, "hold-out"))
    dataset = limit(dataset, config.limit, stream(seed, "limit"))
    if dataset.importance is None and (kept := kept_for_importance(experiment)):
        dataset = set_apart(dataset, kept, stream(seed, "importance"))
    chosen = config.partition
    keywords = {key: getattr(chosen, key) for key in parameters(PARTITIONERS[chosen.name])}
    try:
        partition = PARTITIONERS[chosen.name](dataset.train, config.clients, stream(seed, "partition"), **keywords)
    except DataError as error:
        raise DataError(f"data.clients, data.partition: {error}") from None
    names = Numbered(len(partition)) if partition.names is None else Named(partition.names)
    evaluated = experiment.evaluate
    return Shares(dataset, partition, names, evaluated.client_hold_out if evaluated.clients else 0.0, seed)


def _of_server(dataset: Dataset, experiment: Experiment) -> Shares:
    """What a server holds whose clients are elsewhere, and have all of the training data."""
    if kept_for_importance(experiment):
        raise ConfigError("data.importance: examples to measure it on are taken from data.train, which is missing")
    dataset = limit(dataset, experiment.data.limit, stream(experiment.seed, "limit"))
    nobody = Partition(np.empty(0, np.int64), np.zeros(1, np.int64))
    return Shares(dataset, nobody, Named(()), 0.0, experiment.seed)


def _check_classes(dataset: Dataset, listed: bool) -> None:
    """Refuses a training split of one class, unless a list of classes says that there are more.

    A site may well hold examples of one class only; a whole experiment hardly does on purpose.
    """
    present = np.unique(dataset.train.labels)
    if dataset.kind == "causal" or len(present) != 1:
        return
    name = dataset.classes[present[0]]
    if len(dataset.classes) == 1 or not listed:
        raise DataError(
            f"{dataset.name}: every training example is of class {name!r}; a classifier learns two classes or more."
            " Look at data.label and at the file, or list all classes in data.classes"
        )
    _log.warning("%s: every training example is of class %r, of %d", dataset.name, name, len(dataset.classes))


def export_shares(folder: Path, experiment: Experiment, shares: Shares) -> dict[str, Any]:
    """Writes every client's share to a file of its own (`polyrank.data.write_per_client`); returns the manifest."""
    held = PerClient(shares.clients, shares.partition.__getitem__)
    partition = experiment.data.partition.model_dump(mode="json")
    named = {part: getattr(experiment.data, part, None) for part in (*Turn._fields, "text", "image", "label")}
    return write_per_client(folder, shares.dataset, held, named, seed=experiment.seed, partition=partition)


def kept_for_importance(experiment: Experiment) -> int:
    """How many training examples the server keeps: those that the file names, or that the method's scorer needs.

    Raises:
        ConfigError: if the scorer takes all there are and the file does not say how many.
    """
    if experiment.data.importance is not None:
        return int(experiment.data.importance)
    scorer = describe(SCORERS, experiment.build_method().score)
    if scorer.get("on") != "holdout":
        return 0
    if scorer.get("samples") is None:
        raise ConfigError(
            f"data.importance: missing; method.score, {scorer['name']}, measures on all that the server keeps"
        )
    return int(scorer["samples"])


def group_sizes(fleet: list[Group], clients: int) -> list[int]:
    """Clients of each device group; the last group takes what rounding leaves."""
    sizes = [int(clients * group.share + 1e-9) for group in fleet[:-1]]
    return [*sizes, clients - sum(sizes)]


def fleet_profiles(fleet: list[Group], shares: Shares) -> Fleet:
    """Everybody's profile; clients are numbered group by group."""
    groups = np.repeat(np.arange(len(fleet)), group_sizes(fleet, len(shares.clients)))
    reports = [replace(profile_of(g), group=g.name or f"group {index}") for index, g in enumerate(fleet)]
    return Fleet(shares.clients, groups, reports, shares.sizes)
