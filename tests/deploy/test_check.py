"""What a site says of itself before it dials, and how its operator decides."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

import talking
from asking import Asker
from polyrank.cli import app
from polyrank.core.privacy import ExamplePrivacy, Privacy
from polyrank.deploy import join, operate
from polyrank.deploy.check import check
from polyrank.deploy.layout import DeployError
from polyrank.deploy.provision import init
from polyrank.deploy.site import Site
from polyrank.errors import InputError
from polyrank.experiment.loading import parse
from polyrank.experiment.shares import export_shares, share_data

NOISY = Privacy(examples=ExamplePrivacy(clip=1.0, noise=2.0))


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


def write(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    np.savez(folder / "own.npz", image=np.zeros((6, 8, 8), np.uint8), label=np.arange(6).astype(str))
    data = {"name": "files", "train": "own.npz", "test": "own.npz", "image": "image"}
    path = folder / "site.yaml"
    path.write_text(yaml.safe_dump({"model": "digits-vit", "data": data, "threads": 1, **config}))
    return path


def test_a_file_that_nobody_has_edited_dials_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dialled(*_: Any) -> bool:
        raise AssertionError("somebody was dialled")

    monkeypatch.setattr(join, "preflight", dialled)
    made = init(tmp_path / "server", ["a"], ["localhost"], port=0, superlink_port=0, listen="127.0.0.1")
    node = made.node("a")
    result = call("deploy", "join", node.folder)
    assert result.exit_code == 2
    assert f"{node.folder / 'site.yaml'}: data.train: {node.folder / 'train.parquet'}: no such file" in result.stderr
    assert operate.processes(node) == {}
    assert call("deploy", "check", node.folder).stderr == result.stderr
    write(node.folder, model="./model")  # the data are there, and the model is not
    with pytest.raises(InputError, match=r"model"):
        join.join(node.folder)
    write(node.folder)
    with pytest.raises(AssertionError, match="somebody was dialled"):
        join.join(node.folder)


def test_a_site_says_what_it_will_answer(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        rank=2,
        privacy={"examples": {"clip": 1.0, "noise": 2.0}},
        budget={"epsilon": 8, "run": 3},
        limits={"steps": 50, "epochs": 5, "seconds": 60, "memory": "2 GiB"},
        approve="ask",
    )
    result = call("deploy", "check", tmp_path)
    assert result.exit_code == 0, result.output
    lines = dict(line.split(": ", 1) for line in result.stdout.replace("answers: ", "answers ").splitlines())
    assert lines["model"].startswith("digits-vit: ViTForImageClassification, ")
    assert lines["data"].startswith("6 examples (image), 6 classes: 0, 1, 2, 3, 4, 5; fingerprint ")
    assert lines["one step"].startswith("rank 2, batch 8: ")
    assert lines["answers profile"] == "6 examples, rank, a fingerprint of the model"
    assert lines["answers fit"] == (
        "only with privacy.examples with noise of 2 or more; at most 50 steps, 5 epochs, 60 s, 2,048 MiB in a task"
    )
    assert lines["answers measure"] == "refused: no noise covers it"
    assert lines["budget"] == "epsilon 8 (examples, delta 1e-05), 3 in a run; 0 spent"
    assert lines["new runs"] == "wait until `polyrank site approve` (approve: ask)"
    assert not (tmp_path / "ledger.json").exists()
    assert not (tmp_path / "history.jsonl").exists()
    write(tmp_path)
    lines = dict(check(path))
    assert "MiB" in lines["one step"]
    assert lines["answers: fit"].startswith("also without any protection")
    assert lines["answers: measure"] == "answered, without protection"
    assert lines["budget"] == "none: what the answers tell together is not bounded (so far: none)"
    assert lines["new runs"] == "take part without being asked for (approve: auto)"
    (tmp_path / "ledger.json").write_text("{")
    with pytest.raises(InputError, match=r"ledger\.json: not as it was written"):
        check(path)


def test_a_site_of_instructions_is_looked_at_within_its_positions(tmp_path: Path) -> None:
    experiment = parse(talking.experiment(tmp_path), "test", Path())
    manifest = export_shares(tmp_path / "shares", experiment, share_data(experiment))
    entry = next(iter(manifest["clients"].values()))
    files = {key: f"shares/{entry['file']}" for key in ("train", "test")}
    site = {"model": experiment.model.name, "data": {**manifest["data"], **files}, "threads": 1}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    lines = dict(check(tmp_path / "site.yaml"))
    assert "(causal)" in lines["data"]
    assert "classes" not in lines["data"]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"budget": {"epsilon": 0}}, "budget.epsilon: 0"),
        ({"budget": {}}, "budget.epsilon: missing"),
        ({"budget": {"epsilon": 8, "run": 9}}, "run: 9 exceeds epsilon, 8"),
        ({"budget": {"epsilon": 8, "delta": 1}}, "budget.delta: 1"),
        ({"budget": {"epsilon": 8, "unit": "people"}}, "budget.unit: 'people'"),
        ({"limits": {"step": 3}}, "Did you mean 'steps'"),
        ({"limits": {"memory": 3}}, "needs a unit, for example '2 GiB'"),
        ({"limits": {"seconds": float("inf")}}, "limits.seconds"),
        ({"approve": "yes"}, "approve: 'yes'"),
        ({"approve": "policy"}, "policy: says which runs are approved"),
        ({"policy": {"rounds": 3}}, "policy: says which runs are approved"),
        (
            {"budget": {"epsilon": 1}, "privacy": {"clients": {"clip": 1.0, "noise": 1.0, "where": "central"}}},
            "budget: where: central leaves what this site sends as it is",
        ),
    ],
)
def test_mistakes_in_what_a_site_allows_are_named(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    write(tmp_path, **config)
    result = call("deploy", "check", tmp_path)
    assert result.exit_code == 2
    assert str(tmp_path / "site.yaml") in result.stderr
    assert reason in result.stderr


def test_an_operator_decides_by_the_command_line(tmp_path: Path) -> None:
    site = Site(write(tmp_path, approve="ask", budget={"epsilon": 8}))
    asker = Asker(privacy=NOISY, rounds=2, name="[red]ward[/red]")
    site.answer("profile", asker.hello())
    listing = call("site", "runs", tmp_path)
    assert listing.exit_code == 0, listing.output
    for word in (
        asker.run.id,
        "waiting",
        "fedit",
        "eve@server",
        "epsilon 3.189",
        "[red]ward[/red]",
        "of which is spent: 0",
    ):
        assert word in " ".join(listing.stdout.split()), word
    assert json.loads(call("site", "runs", tmp_path, "--json").stdout)["runs"][asker.run.id]["state"] == "waiting"
    assert call("site", "approve", tmp_path, asker.run.id[:6]).stdout.startswith(f"{asker.run.id}: approved")
    site.answer("profile", asker.hello())
    assert call("site", "deny", tmp_path / "site.yaml", asker.run.id, "--reason", "no").exit_code == 0
    assert site.consent.known()[asker.run.id].state == "denied"
    assert call("site", "pause", tmp_path, "--reason", "a holiday").stdout == "paused: a holiday\n"
    assert "paused: a holiday" in call("site", "runs", tmp_path).stdout
    site.answer("profile", asker.hello())
    assert call("site", "resume", tmp_path).exit_code == 0
    assert site.consent.paused is None
    asked = json.loads(call("site", "log", tmp_path, "--json").stdout)
    assert {line["run"] for line in asked} == {asker.run.id}
    assert [line["question"] for line in asked] == ["announcement", "profile", "profile", "profile"]
    shown = " ".join(call("site", "log", tmp_path).stdout.split())
    assert "this site is paused: a holiday" in shown
    for arguments in (
        ("approve", tmp_path, "zz"),
        ("approve", tmp_path, ""),
        ("log", tmp_path / "none"),
        ("runs", tmp_path / "none"),
    ):
        result = call("site", *arguments)
        assert result.exit_code == 2, arguments
        assert result.stderr.startswith("error: ")


def test_a_node_s_own_mistakes_come_before_its_site_s(tmp_path: Path) -> None:
    made = init(tmp_path / "server", ["a"], ["localhost"], port=0, superlink_port=0, listen="127.0.0.1")
    made.node("a").key.chmod(0o644)
    with pytest.raises(DeployError, match="chmod 600"):
        join.join(made.node("a").folder)
