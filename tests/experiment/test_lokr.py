"""LoKr as a federated method: rounds on a real (tiny) model, the frozen head, budgets, plans, exports and commands."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from polyrank.cli import app
from polyrank.core.fake import FakeClients
from polyrank.core.federate import absorb, federate, plan
from polyrank.core.lokr import lokr_parameters
from polyrank.core.lowrank import Adapter, LowRank
from polyrank.core.rng import stream
from polyrank.core.types import ClientProfile, LocalTraining, ModelSpec, ServerState
from polyrank.engines.simulator import Simulator
from polyrank.experiment.build import World, build
from polyrank.experiment.config import Experiment
from polyrank.experiment.forecast import forecast
from polyrank.experiment.loading import parse
from polyrank.experiment.merging import merge
from polyrank.experiment.session import Session
from polyrank.experiment.store import Run, pack, unpack
from polyrank.local import lokr
from polyrank.local.adapters import AdapterError, AdapterInfo, read_adapter, write_adapter
from polyrank.local.base import Base
from polyrank.methods import METHODS
from polyrank.methods.named import fedit

Config = dict[str, Any]
FACTORS = 8 * (8 * 8 + 8 * 8)  # of 8 modules of 64 x 64: w1 and w2 of 8 x 8
HEAD = 10 * 64 + 10
SHAPES = {"l0": (12, 10), "l1": (8, 10)}
SPEC = ModelSpec(SHAPES, head={"head": 6})
runner = CliRunner()


@pytest.fixture
def config(digits_config: Config) -> Config:
    config = copy.deepcopy(digits_config)
    config["method"] = {"name": "lokr"}
    return config


def experiment_of(config: Config) -> Experiment:
    return parse(config, "test", Path())


def finished(folder: Path, config: Config) -> tuple[Session, dict[str, Any]]:
    session = Session(Run.create(folder, experiment_of(config)))
    for _ in session.rounds():
        pass
    return session, session.finish()


def call(*arguments: object) -> Any:
    return runner.invoke(app, [str(argument) for argument in arguments])


def state_of(rank: int = 2) -> ServerState:
    generator = torch.Generator().manual_seed(0)
    shapes = lokr_parameters(SHAPES, rank)
    dense = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return ServerState(0, Adapter({}, {"head": torch.zeros(2, 3, dtype=torch.float64), **dense}))


# --- rounds


def test_all_clients_that_can_afford_anything_train_all_of_it() -> None:
    method, state = METHODS["lokr"](), state_of()
    profiles = {"a": ClientProfile(1, rank=1), "b": ClientProfile(3, rank=0), "c": ClientProfile(3, rank=6)}
    budgets = method.estimate(profiles, SPEC, LocalTraining())
    tasks = plan(method, state, budgets, list(profiles), SPEC, LocalTraining(), 0)
    assert list(tasks) == ["a", "c"]
    for task in tasks.values():
        assert not task.adapter.layers
        assert task.adapter.dense == state.adapter.dense
        assert task.nbytes == sum(8 * tensor.numel() for tensor in state.adapter.dense.values())
    updates = list(FakeClients(profiles).fit(tasks))
    after = absorb(method, state, updates, 0)
    for name, tensor in after.adapter.dense.items():
        sent = [update.adapter.dense[name] for update in updates]
        torch.testing.assert_close(tensor, (sent[0] + 3 * sent[1]) / 4)
    assert updates[0].nbytes == tasks["a"].nbytes


def test_a_frozen_head_leaves_the_factors_to_be_trained() -> None:
    method, state = replace(METHODS["lokr"](), dense="freeze"), state_of()
    profiles = {"a": ClientProfile(1, rank=1)}
    budgets = method.estimate(profiles, SPEC, LocalTraining())
    (task,) = plan(method, state, budgets, ["a"], SPEC, LocalTraining(), 0).values()
    assert set(task.frozen.dense) == {"head"}
    assert set(task.adapter.dense) == set(state.adapter.dense) - {"head"}
    clients = FakeClients(profiles)
    ((after, _),) = federate(method, state, clients, SPEC, LocalTraining(), rounds=1)
    assert after.adapter.dense.keys() == state.adapter.dense.keys()
    for name, tensor in after.adapter.dense.items():
        assert torch.equal(tensor, state.adapter.dense[name]) == (name == "head")


def test_it_learns_without_a_head_and_keeps_the_frozen_one(tmp_path: Path, config: Config) -> None:
    config["model"] |= {"head": "freeze", "alpha": 48}
    config["rounds"] = 4
    session, summary = finished(tmp_path / "run", config)
    head = session.world.base.initial_head()
    assert summary["final"]["test"]["loss"] < summary["before"]["test"]["loss"]
    final, info = read_adapter(tmp_path / "run" / "adapter")
    assert info.rank == 24
    assert all(torch.equal(final.dense[name], tensor) for name, tensor in head.items())
    assert {x.scale for x in lokr.grouped(final.dense).values()} == {2.0}
    assert all(x.w1.any() for x in lokr.grouped(final.dense).values())
    for record in session.records:
        assert set(record["bytes_up"].values()) == {4 * FACTORS}
        assert set(record["bytes_down"].values()) == {4 * (FACTORS + HEAD) + 8 * 8}  # a scale of 8 bytes a module
    loaded = unpack(tmp_path / "run" / "state" / "checkpoint.safetensors")
    assert pack(loaded) == pack(session.state)


def test_simulated_clients_learn_on_a_text_model(tiny_model: Callable[[str], torch.nn.Module], toy_texts: Any) -> None:
    base = Base(tiny_model("bert"), "attention", name="tiny")
    dense = {**base.initial_head(), **lokr.fresh(base.spec.modules, 24, stream(0, "adapter"))}
    state = ServerState(0, Adapter({}, dense))
    indices = torch.arange(48).numpy()
    profiles = {"a": ClientProfile(24, rank=1), "b": ClientProfile(24, rank=1)}
    clients = Simulator(base, toy_texts, {"a": indices[:24], "b": indices[24:]}, profiles)
    local = LocalTraining(epochs=2, batch=8, lr=1e-2)
    losses = []
    for after, record in federate(METHODS["lokr"](), state, clients, base.spec, local, rounds=4):
        losses.append(sum(record.losses.values()))
        assert all(not torch.equal(tensor, dense[name]) for name, tensor in after.adapter.dense.items())
    assert losses[-1] < losses[0]


# --- what is planned is what runs


@pytest.mark.parametrize("head", ["train", "freeze"])
@pytest.mark.parametrize("alpha", [None, 12])
def test_the_plan_s_bytes_and_memory_are_the_run_s(
    head: str, alpha: float | None, tmp_path: Path, config: Config
) -> None:
    config["model"] |= {"head": head, **({"alpha": alpha} if alpha else {})}
    config["method"]["rank"] = 2
    config["simulation"] = {"together": "off"}  # alone, each has a measured memory
    found = forecast(experiment_of(config))
    session, _ = finished(tmp_path / "run", config)
    trained = 4 * (8 * (64 + 2 * 16) + HEAD * (head == "train"))
    for index, client in enumerate(sorted(session.records[0]["bytes_up"])):
        group = found["groups"][index // 2]
        record = session.records[0]
        assert record["bytes_up"][client] == group["traffic"][0]["bytes_up"] == trained
        assert record["bytes_down"][client] == group["traffic"][0]["bytes_down"]
        assert record["predicted_memory"][client] == group["peak_memory"]
        assert (group["peak"]["gradients"], group["peak"]["optimizer"]) == (trained, 2 * trained)
        parts = {**group["peak"], "working": 0, "overhead": 0}
        assert record["measured_memory"][client] == pytest.approx(sum(parts.values()), rel=0.02)
        assert group["ranks"] == {}
    assert record["seconds"] == pytest.approx(
        max(sum(filter(None, g["traffic"][0]["seconds"].values())) for g in found["groups"]), rel=1e-6
    )


def test_a_budget_is_all_or_nothing(config: Config) -> None:
    """What an estimator finds is whether LoKr fits: its cost is the same at every rank."""
    config["method"]["estimate"] = "least"
    config["fleet"] = [
        {"name": "no", "share": 0.5, "uplink": f"{8 * 4 * (FACTORS + HEAD) - 1} bit/s"},
        {"name": "yes", "share": 0.5, "uplink": f"{8 * 4 * (FACTORS + HEAD)} bit/s"},
    ]
    no, yes = forecast(experiment_of(config))["groups"]
    assert (no["budget"], no["limit"]) == (0, "upload")
    assert yes["limit"] == "full rank"
    assert yes["traffic"][0]["bytes_up"] == 4 * (FACTORS + HEAD)


def test_a_profile_measures_low_rank_steps(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "lokr.json"
    path.write_text(json.dumps(config))
    found = json.loads(call("profile", path, "--ranks", "2,4", "--json").stdout)
    for step in found["measured"]["steps"]:
        assert step["measured"]["adapter"] == step["predicted"]["adapter"]


# --- adapters, in and out


def test_evaluate_and_restart(tmp_path: Path, config: Config) -> None:
    _, summary = finished(tmp_path / "first", config)
    for option in ([], ["--best"]):
        result = call("evaluate", tmp_path / "first", "--json", *option)
        assert result.exit_code == 0, result.output
    found = json.loads(call("evaluate", tmp_path / "first", "--json").stdout)
    assert found["accuracy"] == summary["final"]["test"]["accuracy"]
    assert found["loss"] == pytest.approx(summary["final"]["test"]["loss"], rel=1e-5)
    adapter_config = json.loads((tmp_path / "first" / "adapter" / "adapter_config.json").read_text())
    assert [adapter_config[key] for key in ("peft_type", "r", "alpha")] == ["LOKR", 24, 24]
    config["rounds"] = 1
    config["model"] |= {"adapter": str(tmp_path / "first" / "adapter"), "alpha": 6}
    _, second = finished(tmp_path / "second", config)
    assert second["before"]["test"]["loss"] == pytest.approx(summary["final"]["test"]["loss"], rel=1e-5)


def world_of(config: Config, **model: Any) -> World:
    return build(experiment_of({**config, "model": {**config["model"], **model}}))


def test_a_start_may_nest_its_layers_otherwise(tmp_path: Path, config: Config) -> None:
    name = next(iter(world_of(config).base.spec.modules))
    given = lokr.fresh({name: (64, 64)}, 24, stream(1, "x"))
    nested = {f"language_model.{part}": tensor for part, tensor in given.items()}
    write_adapter(tmp_path / "kron", Adapter({}, nested), AdapterInfo(rank=24))
    start = world_of(config, adapter=str(tmp_path / "kron")).start.adapter.dense
    assert torch.equal(start[f"{name}.lokr_w2"], given[f"{name}.lokr_w2"])


def test_adapters_of_the_other_form_or_size_are_refused(tmp_path: Path, config: Config) -> None:
    name, info = next(iter(world_of(config).base.spec.modules)), AdapterInfo("x", rank=24)
    write_adapter(tmp_path / "lora", Adapter({name: LowRank(torch.ones(1, 64), torch.ones(64, 1))}), AdapterInfo("x"))
    write_adapter(tmp_path / "kron", Adapter({}, lokr.fresh({name: (64, 64)}, 24, stream(0, "x"))), info)
    write_adapter(tmp_path / "small", Adapter({}, lokr.fresh({name: (64, 16)}, 24, stream(0, "x"))), info)
    with pytest.raises(AdapterError, match="is a LoRA; the method lokr starts from a LoKr"):
        world_of(config, adapter=str(tmp_path / "lora"))
    with pytest.raises(AdapterError, match="does not fit the model's LoKr factors or head"):
        world_of(config, adapter=str(tmp_path / "small"))
    with pytest.raises(AdapterError, match="is a LoKr, which only the method lokr can start from"):
        world_of({**config, "method": {"name": "fedit"}}, adapter=str(tmp_path / "kron"))
    result = call("merge", tmp_path / "kron", tmp_path / "lora", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert f"{tmp_path / 'kron'}: a LoKr adapter; only LoRA adapters can be merged" in result.output.replace("\n", "")
    assert not (tmp_path / "out").exists()
    with pytest.raises(AdapterError, match="a LoKr adapter"):
        merge([tmp_path / "kron"], fedit())
