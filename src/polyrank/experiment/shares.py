"""Who holds what: the data set, its split among the clients, and their profiles. No model is needed for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from polyrank.core.rng import stream
from polyrank.core.types import Client, ClientProfile
from polyrank.data import DataError, Dataset, Partition, hold_out, limit, set_apart
from polyrank.experiment.components import describe, parameters
from polyrank.experiment.config import ConfigError, Experiment, Group
from polyrank.experiment.planning import profile_of
from polyrank.experiment.tables import DATASETS, PARTITIONERS, SCORERS


@dataclass(frozen=True)
class Shares:
    """The data set and who holds what of its training split."""

    dataset: Dataset
    partition: Partition
    clients: tuple[Client, ...]

    def indices(self) -> dict[Client, npt.NDArray[np.int64]]:
        """Each client's indices into the training split."""
        return {client: self.partition[index] for index, client in enumerate(self.clients)}


def share_data(experiment: Experiment) -> Shares:
    """Loads the data set, holds out validation, and splits the training data among the clients.

    What the server keeps to measure importance on is set apart first.

    Every step draws from its own stream of the seed alone, so every method of a comparison sees the same split.
    """
    config, seed = experiment.data, experiment.seed
    options = {key: getattr(config, key) for key in parameters(DATASETS[config.name])}
    dataset = DATASETS[config.name](**options)
    dataset = hold_out(dataset, config.hold_out, stream(seed, "hold-out"))
    dataset = limit(dataset, config.limit, stream(seed, "limit"))
    if kept := kept_for_importance(experiment):
        dataset = set_apart(dataset, kept, stream(seed, "importance"))
    chosen = config.partition
    keywords = {key: getattr(chosen, key) for key in parameters(PARTITIONERS[chosen.name])}
    try:
        partition = PARTITIONERS[chosen.name](dataset.train, config.clients, stream(seed, "partition"), **keywords)
    except DataError as error:
        raise DataError(f"data.clients, data.partition: {error}") from None
    names = partition.names or client_names(len(partition))
    return Shares(dataset, partition, tuple(names))


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


def client_names(count: int) -> tuple[Client, ...]:
    """Names of clients that have none of their own, in the order of their numbers."""
    width = len(str(count - 1))
    return tuple(f"client_{i:0{width}d}" for i in range(count))


def group_sizes(fleet: list[Group], clients: int) -> list[int]:
    """Clients of each device group; the last group takes what rounding leaves."""
    sizes = [int(clients * group.share + 1e-9) for group in fleet[:-1]]
    return [*sizes, clients - sum(sizes)]


def fleet_profiles(fleet: list[Group], shares: Shares) -> dict[Client, ClientProfile]:
    """A profile per client; clients are numbered group by group."""
    groups = np.repeat(np.arange(len(fleet)), group_sizes(fleet, len(shares.clients)))
    examples = shares.partition.sizes
    reports = [profile_of(group) for group in fleet]
    return {
        client: replace(reports[g], examples=int(examples[index]), group=fleet[g].name or f"group {g}")
        for index, (client, g) in enumerate(zip(shares.clients, groups.tolist(), strict=True))
    }
