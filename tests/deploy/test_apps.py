"""Both Flower apps over a grid in one process: real messages, real sites, and the simulator's bytes."""

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import talking
from asking import Asker

flwr = pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from flwr.app import Context, Error, Message, RecordDict  # noqa: E402
from flwr.proto.node_pb2 import NodeInfo  # noqa: E402
from flwr.serverapp import Grid  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

from polyrank.data.source import Prompting  # noqa: E402
from polyrank.deploy import client, server  # noqa: E402
from polyrank.deploy.site import Site  # noqa: E402
from polyrank.engines.audit import Audit  # noqa: E402
from polyrank.engines.letters import ask_profile  # noqa: E402
from polyrank.engines.wire import VersionError, opened  # noqa: E402
from polyrank.errors import InputError  # noqa: E402
from polyrank.experiment.config import ConfigError  # noqa: E402
from polyrank.experiment.loading import parse  # noqa: E402
from polyrank.experiment.machine import on_this_machine  # noqa: E402
from polyrank.experiment.models import prompting_of  # noqa: E402
from polyrank.experiment.session import Session  # noqa: E402
from polyrank.experiment.shares import export_shares, share_data  # noqa: E402
from polyrank.experiment.store import Run  # noqa: E402
from polyrank.experiment.trust import CLIP, SIZE_CAP  # noqa: E402
from polyrank.methods import METHODS  # noqa: E402

Config = dict[str, Any]


class InProcessGrid(Grid):
    """A grid whose nodes answer, in this process and through the client app, when their replies are pulled."""

    def __init__(self, sites: dict[str, Path]) -> None:
        self.nodes = {number: (name, site) for number, (name, site) in enumerate(sites.items(), 10)}
        self.posted: dict[str, Message] = {}
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any: ...

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def get_nodes(self) -> list[NodeInfo]:
        return [NodeInfo(node_id=number, name=name) for number, (name, _) in self.nodes.items()]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = name = f"message-{len(self.posted)}"
            self.posted[name] = message
            ids.append(name)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self.reply(self.posted.pop(name)) for name in sorted(message_ids) if name in self.posted]

    def reply(self, message: Message) -> Message:
        number = message.metadata.dst_node_id
        context = Context(1, number, {"site": str(self.nodes[number][1])}, RecordDict(), {})
        try:
            return client.app(message, context)
        except Exception as error:
            return Message(Error(2, repr(error)), reply_to=message)


@pytest.fixture(scope="module")
def config(digits_config: Config) -> Config:
    """Three clients of unequal ranks, one thread, each training alone: what a deployment does."""
    config = copy.deepcopy(digits_config)
    config["data"] |= {"clients": 3, "importance": 12}
    config["fleet"] = [{"share": 1 / 3, "rank": rank} for rank in (1, 2, 4)]
    alone = {"simulation": {"together": "off", "cache": "off"}, "deployment": {"clients": 3, "poll": 0}}
    return {**config, "device": "cpu", "threads": 1, "rounds": 2, **alone}


def sites_of(folder: Path, config: Config, names: Iterable[str]) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "experiment.yaml").write_text(yaml.safe_dump(config))
    found = {}
    for name in names:
        found[name] = folder / name / "site.yaml"
        found[name].parent.mkdir()
        site = {"model": "digits-vit", "rehearse": {"experiment": "../experiment.yaml", "client": name}, "threads": 1}
        found[name].write_text(yaml.safe_dump(site))
    return found


def simulated(folder: Path, config: Config) -> Run:
    session = Session(Run.create(folder, on_this_machine(parse(config, "test", Path()))))
    for _ in session.rounds():
        pass
    session.finish()
    return session.run


def deployed(folder: Path, config: Config, grid: Grid) -> Run:
    run = Run.create(folder, on_this_machine(parse(config, "test", Path())))
    server.app(grid, Context(1, 1, {}, RecordDict(), {"folder": str(folder)}))
    return run


NAMES = [f"client_{number}" for number in range(3)]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_deployment_ends_with_the_simulator_s_bytes(tmp_path: Path, config: Config, name: str) -> None:
    chosen = {**config, "method": {"name": name}}
    one = simulated(tmp_path / "simulated", chosen)
    other = deployed(tmp_path / "deployed", chosen, InProcessGrid(sites_of(tmp_path / "sites", chosen, NAMES)))
    for part in ("state/checkpoint.safetensors", "adapter/adapter_model.safetensors"):
        assert (one.folder / part).read_bytes() == (other.folder / part).read_bytes(), part
    for mine, theirs in zip(one.records(), other.records(), strict=True):
        assert mine["losses"] == theirs["losses"]
        assert mine["metrics"] == theirs["metrics"]
    events = [line["event"] for line in Audit(other.folder / "audit.jsonl").lines()]
    assert events.count("joined") == 3
    assert events.count("accepted") == sum(len(record["bytes_up"]) for record in other.records())


def test_importance_is_measured_by_the_clients(tmp_path: Path, config: Config) -> None:
    score = {"name": "fisher", "on": "clients", "samples": 8}
    chosen = {**config, "method": {"name": "fim_hla", "score": score}}
    one = simulated(tmp_path / "simulated", chosen)
    other = deployed(tmp_path / "deployed", chosen, InProcessGrid(sites_of(tmp_path / "sites", chosen, NAMES)))
    assert one.scores() == other.scores()
    assert len(set(one.scores().values())) > 2


def test_a_client_protects_what_it_sends(tmp_path: Path, config: Config) -> None:
    protected = {**config, "privacy": {"clients": {"clip": 1.0, "noise": 0.01, "where": "client"}}}
    one = simulated(tmp_path / "simulated", protected)
    other = deployed(tmp_path / "deployed", protected, InProcessGrid(sites_of(tmp_path / "sites", protected, NAMES)))
    part = "state/checkpoint.safetensors"
    assert (one.folder / part).read_bytes() == (other.folder / part).read_bytes()
    for mine, theirs in zip(one.records(), other.records(), strict=True):
        assert mine["metrics"]["privacy/clients"] == theirs["metrics"]["privacy/clients"] > 0
        assert not theirs["losses"]
        assert not theirs["refused"]


def test_a_run_goes_on_without_a_site_that_does_not_agree(tmp_path: Path, config: Config) -> None:
    fewer = {**config, "deployment": {"clients": 2, "poll": 0}, "method": {"name": "fedit"}}
    sites = sites_of(tmp_path / "sites", fewer, NAMES)
    sites["client_1"].write_text(sites["client_1"].read_text() + "approve: ask\n")
    run = deployed(tmp_path / "deployed", fewer, InProcessGrid(sites))
    for record in run.records():
        assert sorted(record["bytes_up"]) == ["client_0", "client_2"]
    declined = [line for line in Audit(run.folder / "audit.jsonl").lines() if line["event"] == "declined"]
    assert [line["client"] for line in declined] == ["client_1"]
    assert declined[0]["reason"] == "this site's operator has not approved the run yet: approve: ask"
    (known,) = Site(sites["client_1"]).consent.known().values()
    assert (known.run.name, known.run.rounds, known.run.method) == ("deployed", 2, "fedit")
    assert "@" in known.run.by


def test_what_travels_is_what_the_cost_model_says(tmp_path: Path, config: Config) -> None:
    bigger = {**config, "model": {**config["model"], "targets": "attention+mlp", "rank": 16}}
    bigger["fleet"] = [{"share": 1 / 3, "rank": rank} for rank in (4, 8, 16)]
    for method in ("fedit", "ffa_lora"):
        chosen = {**bigger, "method": {"name": method}}
        one = simulated(tmp_path / f"{method}-simulated", chosen)
        grid = InProcessGrid(sites_of(tmp_path / f"{method}-sites", chosen, NAMES))
        other = deployed(tmp_path / f"{method}-deployed", chosen, grid)
        for mine, theirs in zip(one.records(), other.records(), strict=True):
            for way in ("bytes_up", "bytes_down"):
                for client_, predicted in mine[way].items():
                    assert predicted < theirs[way][client_] < 1.02 * predicted
    history = (tmp_path / "ffa_lora-sites" / "client_0" / "history.jsonl").read_text().splitlines()
    questions = [(line["question"], line.get("round")) for line in map(json.loads, history)]
    assert questions == [("announcement", None), ("profile", None), ("fit", 0), ("fit", 1)]


def talking_sites(folder: Path, config: Config, **data: Any) -> dict[str, Path]:
    """Sites with the files that `polyrank data --export` writes of the experiment; `data` differs from its manifest."""
    experiment = parse(config, "test", Path())
    manifest = export_shares(folder, experiment, share_data(experiment))
    found = {}
    for rank, (name, entry) in zip((1, 2, 4), manifest["clients"].items(), strict=True):
        own = {**manifest["data"], "train": f"../{entry['file']}", "test": f"../{entry['file']}", **data}
        found[name] = folder / name / "site.yaml"
        found[name].parent.mkdir()
        site = {"model": config["model"]["name"], "data": own, "rank": rank, "threads": 1}
        found[name].write_text(yaml.safe_dump(site))
    return found


@pytest.mark.parametrize("rehearsed", [True, False])
def test_a_language_model_is_deployed_to_the_simulator_s_bytes(tmp_path: Path, rehearsed: bool) -> None:
    chosen = talking.experiment(tmp_path) | {"method": {"name": "rb_lora"}}
    one = simulated(tmp_path / "simulated", chosen)
    if rehearsed:
        sites = sites_of(tmp_path / "sites", chosen, NAMES)
        for path in sites.values():
            path.write_text(path.read_text().replace("digits-vit", chosen["model"]["name"]))
    else:
        sites = talking_sites(tmp_path / "sites", chosen)
    other = deployed(tmp_path / "deployed", chosen, InProcessGrid(sites))
    for part in ("state/checkpoint.safetensors", "adapter/adapter_model.safetensors"):
        assert (one.folder / part).read_bytes() == (other.folder / part).read_bytes(), part
    for mine, theirs in zip(one.records(), other.records(), strict=True):
        assert mine["losses"] == theirs["losses"]
        assert mine["metrics"] == theirs["metrics"]


@pytest.mark.parametrize("own", [{"template": "alpaca"}, {"train_on_inputs": True}])
def test_a_site_that_words_prompts_in_another_way_is_refused(tmp_path: Path, own: dict[str, Any]) -> None:
    chosen = talking.experiment(tmp_path)
    name, path = next(iter(talking_sites(tmp_path / "sites", chosen, **own).items()))
    prompting = prompting_of(Prompting("alpaca_short"))
    asked = {"kind": "causal", "classes": [], "targets": "attention", "max_length": 32, "prompting": prompting}
    said = rf"{name}/site\.yaml: data: prompts are made by .*, and the server's by .*alpaca_short"
    with pytest.raises(InputError, match=said):
        Site(path).answer("profile", Asker(asked).hello())


def test_a_site_that_states_nothing_to_plan_with_is_left_out_and_named(tmp_path: Path) -> None:
    """As the site.yaml that `polyrank deploy request` writes, in which resources are left to the operator."""
    chosen = talking.experiment(tmp_path) | {"method": {"name": "fedit"}}
    sites = talking_sites(tmp_path / "sites", chosen)
    silent = yaml.safe_load(sites["client_1"].read_text())
    del silent["rank"]
    sites["client_1"].write_text(yaml.safe_dump(silent))
    run = deployed(tmp_path / "deployed", chosen, InProcessGrid(sites))
    records = list(run.records())
    assert run.summary() is not None
    for record in records:
        assert sorted(record["bytes_up"]) == ["client_0", "client_2"]
        assert list(record["refused"]) == ["client_1"]
        assert "left out until its profile changes: states no rank; give" in record["refused"]["client_1"]
        assert record["refused"]["client_1"].endswith("site.yaml")
    events = [(line["event"], line["client"]) for line in Audit(run.folder / "audit.jsonl").lines()]
    assert events.count(("left out", "client_1")) == 1


def test_what_a_deployment_believes_is_written_down_and_the_simulator_believes_no_more(
    tmp_path: Path, config: Config
) -> None:
    """One of three holds many times as much as the others: both engines count it as the file says."""
    uneven = {**config, "data": {**config["data"], "partition": {"name": "by_quantity", "sizes": [6, 8, 60]}}}
    trusting = on_this_machine(parse(uneven, "test", Path()), remote=True)
    assert (trusting.trust.size_cap, trusting.trust.clip) == (SIZE_CAP, CLIP)
    resolved = trusting.resolved()
    assert resolved["trust"] | {"size_cap": 3.0, "clip": 3.0} == resolved["trust"]
    one = simulated(tmp_path / "simulated", resolved)
    other = deployed(tmp_path / "deployed", uneven, InProcessGrid(sites_of(tmp_path / "sites", uneven, NAMES)))
    part = "state/checkpoint.safetensors"
    assert (one.folder / part).read_bytes() == (other.folder / part).read_bytes()
    for mine, theirs in zip(one.records(), other.records(), strict=True):
        assert mine["bounded"] == theirs["bounded"]
        assert mine["examples"] == theirs["examples"]


def test_a_site_says_that_the_server_has_another_version(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (path,) = sites_of(tmp_path, config, NAMES[:1]).values()
    with monkeypatch.context() as patch:
        patch.setattr("polyrank.engines.wire.__version__", "9.9")
        asked = ask_profile({"kind": "image", "classes": []})
    reply = Site(path).answer("profile", asked)
    (record,) = caplog.records
    assert "site.yaml: the server's message is of polyrank '9.9', and this side has" in record.getMessage()
    with monkeypatch.context() as patch:
        patch.setattr("polyrank.engines.wire.__version__", "9.9")
        with pytest.raises(VersionError, match=r"and this side has '9\.9'"):
            opened(reply, "profile")


def test_a_server_needs_no_training_data(tmp_path: Path, config: Config) -> None:
    """It has files to validate and to test on; with the sites' data it ends with the simulator's bytes."""
    draw, files = np.random.default_rng(0), {}
    for name, count in (("train", 60), ("validation", 20), ("test", 20)):
        files[name] = str(tmp_path / f"{name}.npz")
        images = draw.integers(0, 255, (count, 16, 16), dtype=np.uint8)
        np.savez(files[name], image=images, label=np.arange(count) % 4)
    data = {"name": "files", "image": "image", "classes": ["a", "b", "c", "d"], **files}
    whole = {**config, "data": {**data, "clients": 3}}
    server_data = {key: value for key, value in data.items() if key != "train"}
    alone = {**config, "data": server_data}
    one = simulated(tmp_path / "simulated", whole)
    other = deployed(tmp_path / "deployed", alone, InProcessGrid(sites_of(tmp_path / "sites", whole, NAMES)))
    part = "state/checkpoint.safetensors"
    assert (one.folder / part).read_bytes() == (other.folder / part).read_bytes()
    assert one.summary()["final"]["test"] == other.summary()["final"]["test"]  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"data\.train: missing: clients of a simulation train on it"):
        simulated(tmp_path / "here", alone)
    del server_data["validation"]
    with pytest.raises(InputError, match=r"data\.validation: missing"):
        deployed(tmp_path / "nothing", alone, InProcessGrid({}))
