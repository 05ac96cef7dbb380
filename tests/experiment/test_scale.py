"""100,000 registered clients, 100 a round: nobody who is not asked is a Python object, and nothing else changes."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyrank.core.fake import FakeClients
from polyrank.core.federate import federate, sample
from polyrank.core.lowrank import Adapter, fresh
from polyrank.core.rng import stream
from polyrank.core.roster import Fleet, Named, Numbered, PerClient, ascending, kinds
from polyrank.core.types import Client, ClientProfile, LocalTraining, ServerState
from polyrank.experiment.forecast import forecast
from polyrank.experiment.loading import parse
from polyrank.experiment.session import Session
from polyrank.experiment.shares import fleet_profiles, share_data
from polyrank.experiment.store import Run, pack, unpack
from polyrank.local.hf import base_from_config, small_vit_config
from polyrank.methods import ESTIMATORS, METHODS

CLIENTS, COHORT = 100_000, 100
GIB, MBIT = 2.0**30, 1e6
SPEC = base_from_config(
    small_vit_config(image_size=8, patch_size=4, hidden=16, layers=2, heads=2, channels=1, classes=3),
    ["query", "value"],
    kind="image",
    classes=3,
    tokens=4,
    device="meta",
).spec
LOCAL = LocalTraining(batch=4)
REPORTS = [
    ClientProfile(1, rank=3, memory=1 * GIB, uplink=0.01 * MBIT, downlink=1 * MBIT, group="weak"),
    ClientProfile(1, rank=9, memory=1 * GIB, uplink=9 * MBIT, downlink=9 * MBIT, group="nobody's"),
    ClientProfile(1, rank=6, memory=2 * GIB, uplink=0.03 * MBIT, downlink=2 * MBIT, group="strong"),
]
FLEET = Fleet(Numbered(12), np.array([2, 0, 0] * 4), REPORTS, np.arange(12))


@pytest.fixture(scope="module")
def experiment_at(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """clients -> an experiment in which so many clients share 100,000 images of the digits' size."""
    folder, rng = tmp_path_factory.mktemp("scale"), np.random.default_rng(0)
    for name, count in (("train", CLIENTS), ("test", 50)):
        np.savez(folder / name, image=rng.integers(0, 256, (count, 8, 8), np.uint8), label=np.arange(count) % 10)

    def build(clients: int, **options: Any) -> Any:
        data = {split: str(folder / f"{name}.npz") for split, name in SPLITS.items()}
        raw = {
            "rounds": 1,
            "cohort": COHORT,
            "model": {"name": "digits-vit", "targets": ["query", "value"], "rank": 4},
            "data": {"name": "files", "image": "image", **data, "clients": clients},
            "fleet": [{"share": 0.5, "rank": 2}, {"share": 0.5, "rank": 4}],
            "local": {"steps": 1, "batch": 1},
            "evaluate": {"aggregation": False},
            **options,
        }
        return parse(raw, "scale", folder)

    return build


SPLITS = {"train": "train", "validation": "test", "test": "test"}


def as_dict(values: Mapping[Client, Any]) -> dict[Client, Any]:
    return {client: values[client] for client in values}


# --- names and profiles


@pytest.mark.parametrize("names", [Numbered(1), Numbered(10), Numbered(101), Named(["b", "client_1", "a"])])
def test_names_and_numbers_are_each_others_inverse(names: Numbered | Named) -> None:
    assert [names.number(name) for name in names] == list(range(len(names)))
    assert [names[number] for number in range(len(names))] == list(names)


@pytest.mark.parametrize("name", ["client_100", "client_7", "client_007", "client_-1", "07", "client_\u0661\u0661", ""])
def test_a_name_that_nobody_has(name: str) -> None:
    names = Numbered(100)
    with pytest.raises(KeyError):
        names.number(name)
    assert name not in PerClient(names, lambda number: number)


def test_numbered_names_are_in_ascending_order_and_named_ones_are_sorted() -> None:
    numbered = PerClient(Numbered(1001), lambda number: number)
    assert list(ascending(numbered)) == sorted(numbered)
    assert ascending(PerClient(Named(["b", "a"]), lambda number: number)) == ["a", "b"]
    names = [f"client_{i:04d}" for i in range(1001)]
    assert sample(ascending(numbered), 50, 3, 0) == sample(names, 50, 3, 0)


def test_a_fleet_is_the_profiles_it_stands_for() -> None:
    plain = {f"client_{i:02d}": replace(REPORTS[[2, 0, 0][i % 3]], examples=i) for i in range(12)}
    assert as_dict(FLEET) == plain
    of_fleet, of_plain = kinds(FLEET), kinds(plain)
    assert list(of_fleet.each) == list(of_plain.each) == [replace(REPORTS[i], examples=0) for i in (2, 0)]
    assert of_fleet.kind.tolist() == of_plain.kind.tolist()
    assert [of_fleet.first(kind) for kind in (0, 1)] == ["client_00", "client_01"]


# --- what everybody can afford


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_fleet_has_the_budgets_of_its_profiles_one_by_one(name: str) -> None:
    budgets = ESTIMATORS[name](FLEET, SPEC, LOCAL)
    assert as_dict(budgets) == as_dict(ESTIMATORS[name](as_dict(FLEET), SPEC, LOCAL))
    totals = [budget.total for budget in as_dict(budgets).values()]
    alone = [ESTIMATORS[name]({c: profile}, SPEC, LOCAL)[c].total for c, profile in FLEET.items()]
    relative = {"straggler": [min(alone)] * 12, "exclusive": [max(alone) if own == max(alone) else 0 for own in alone]}
    assert totals == relative.get(name, alone)


def test_the_first_client_that_states_too_little_is_named() -> None:
    silent = Fleet(Numbered(30), np.repeat([0, 1], 15), [REPORTS[0], ClientProfile(1)], np.ones(30, np.int64))
    for name in ("fixed", "by_memory", "by_network", "least"):
        with pytest.raises(ValueError, match="'client_15' states no"):
            ESTIMATORS[name](silent, SPEC, LOCAL)


@pytest.mark.parametrize("name", METHODS)
def test_rounds_of_a_fleet_are_those_of_its_profiles(name: str) -> None:
    layers = {layer: fresh(shape, 4, 1.0, stream(0, "adapter")) for layer, shape in SPEC.modules.items()}

    def run(profiles: Mapping[Client, ClientProfile]) -> list[Any]:
        state = ServerState(0, Adapter(layers))
        options = {"rounds": 2, "cohort": 4, "measure": lambda query, state: dict.fromkeys(SPEC.modules, 1.0)}
        found = federate(METHODS[name](), state, FakeClients(profiles), SPEC, LOCAL, **options)
        return [(record, pack(state)) for state, record in found]

    backwards = {
        client: FLEET[client] for client in reversed(list(FLEET))
    }  # the order in which clients are registered is nothing to a round
    assert run(FLEET) == run(as_dict(FLEET)) == run(backwards)


# --- 100,000


def test_start_up_makes_no_object_per_client(experiment_at: Any) -> None:
    experiment, estimate = experiment_at(CLIENTS), ESTIMATORS["fixed"]
    shares = share_data(experiment)  # the data is read outside of what is counted
    before = sys.getallocatedblocks()
    profiles, indices = fleet_profiles(experiment.fleet, shares), shares.indices()
    budgets, names = estimate(profiles, SPEC, LOCAL), ascending(profiles)
    assert sys.getallocatedblocks() - before < 1000
    assert len(profiles) == len(indices) == len(budgets) == len(names) == CLIENTS
    last = names[CLIENTS - 1]
    assert (last, budgets[last].rank) == ("client_99999", 4)
    assert profiles[last].examples == len(indices[last]) == 1
    assert np.shares_memory(indices[last], shares.partition.order)  # a view


def test_a_round_of_100_among_100_000(experiment_at: Any, tmp_path: Path) -> None:
    sizes = {}
    for clients in (COHORT, CLIENTS):
        experiment = experiment_at(clients, threads=1, device="cpu")
        session = Session(Run.create(tmp_path / str(clients), experiment))
        [(record, _)] = session.rounds()
        assert len(record.bytes_up) == len(record.losses) == COHORT
        sizes[clients] = session.run.checkpoint.stat().st_size
        names = ascending(session.world.clients.profiles())
        assert list(record.ranks) == sample(names, COHORT, 0, experiment.seed)
    assert sizes[CLIENTS] == sizes[COHORT]


def test_planning_looks_at_groups_alone(experiment_at: Any) -> None:
    planned = forecast(experiment_at(CLIENTS))
    assert [group["clients"] for group in planned["groups"]] == [CLIENTS // 2, CLIENTS // 2]
    assert len(planned["clients"]) == 2


def test_ranks_that_everybody_has_pruned_to_fit_a_checkpoint(tmp_path: Path) -> None:
    layers = [f"vit.layers.{i}.attention.{part}" for i in range(12) for part in ("q_proj", "v_proj")]
    ranks = {client: dict.fromkeys(layers, number % 9) for number, client in enumerate(Numbered(20_000))}
    ranks["client_00007"] = {layers[3]: 2}
    state = ServerState(1, Adapter(), memory={"scored": 0, "ranks": ranks})
    (tmp_path / "state").write_bytes(packed := pack(state))
    assert len(packed) < 20_000 * (4 * len(layers) + 40)  # a whole number a rank, and the client's name
    found = unpack(tmp_path / "state")
    assert found.memory == state.memory
    assert pack(found) == packed
