"""The command line as a user meets it: what it prints, what it writes, and what it says of mistakes."""

import copy
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml
from click.testing import Result
from PIL import Image
from torch import Tensor
from transformers import BertConfig
from typer.testing import CliRunner

from polyrank import __version__
from polyrank.cli import app
from polyrank.core.lowrank import Adapter, LowRank, delta
from polyrank.experiment.catalogue import TABLES
from polyrank.experiment.loading import method_with
from polyrank.experiment.merging import merge
from polyrank.local.adapters import AdapterInfo, read_adapter, write_adapter
from polyrank.methods import METHODS

Config = dict[str, Any]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def done(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: object) -> str:
    """The message of a mistake: one screen of text on stderr, nothing on stdout, exit code 2."""
    result = call(*arguments)
    assert result.exit_code == 2, (result.exit_code, result.output)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= 24
    assert len(result.stderr) < 24 * 80
    return result.stderr


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, digits_file: Path) -> tuple[Path, Config]:
    """A finished run, and what the command printed of it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, json.loads(done("run", digits_file, "--out", folder, "--set", "method=flora", "--json"))


# --- run and resume


def test_version_and_help() -> None:
    assert done("--version").strip() == __version__
    for command in ("run", "resume", "evaluate", "export", "merge", "data", "list", "schema"):
        assert command in done("--help")
        assert "Usage" in done(command, "--help")


def test_run_json_is_the_summary_and_nothing_else(run_folder: tuple[Path, Config]) -> None:
    folder, printed = run_folder
    assert printed == {"run": str(folder), **json.loads((folder / "summary.json").read_text())}
    assert printed["method"] == "flora"
    assert printed["rounds"] == 3
    assert {"torch", "polyrank", "threads"} <= set(printed["environment"])


def test_quiet_prints_nothing(digits_file: Path, here: Path) -> None:
    result = call("run", digits_file, "--quiet", "--set", "rounds=1")
    assert (result.exit_code, result.output) == (0, "")
    assert (here / "runs" / "tiny" / "summary.json").is_file()


def test_plain_lines_where_there_is_no_terminal(digits_file: Path, here: Path) -> None:
    first = done("run", digits_file, "--set", "rounds=2", "--set", "baselines=[local, single]")
    lines = first.splitlines()
    assert lines[0].startswith("fedit on digits: 4 clients, 8 adapted modules, rounds 1-2; run in runs/tiny")
    assert [line.split("  ")[0] for line in lines[1:3]] == ["round 1/2", "round 2/2"]
    for part in ("before", "fedit, final round", "best single client", "centralised", "kB up", "runs/tiny/adapter"):
        assert part in first
    assert "run in runs/tiny-2" in done("run", digits_file, "--set", "rounds=1")
    assert "\x1b" not in first


def test_resume_finishes_a_run(digits_file: Path, here: Path) -> None:
    done("run", digits_file, "--out", "one", "--quiet")
    weights = here / "one" / "adapter" / "adapter_model.safetensors"
    before = weights.read_bytes()
    weights.unlink()
    (here / "one" / "summary.json").unlink()
    printed = json.loads(done("resume", "one", "--json"))
    assert printed["rounds"] == 3
    assert weights.read_bytes() == before


def test_resuming_a_finished_run_shows_what_it_reached(digits_file: Path, here: Path) -> None:
    first = json.loads(done("run", digits_file, "--out", "one", "--json"))
    (here / "one" / "state" / "checkpoint.safetensors").unlink()  # nothing is computed again
    assert json.loads(done("resume", "one", "--json")) == first


def test_a_damaged_checkpoint_is_said_to_be_damaged(digits_file: Path, here: Path) -> None:
    done("run", digits_file, "--out", "one", "--quiet")
    (here / "one" / "summary.json").unlink()
    (here / "one" / "state" / "checkpoint.safetensors").write_bytes(b"not a checkpoint")
    result = call("resume", "one")
    assert result.exit_code == 2
    assert "damaged" in result.output


# --- evaluate


def test_evaluate_gives_the_summary_s_figures(run_folder: tuple[Path, Config]) -> None:
    folder, summary = run_folder
    found = json.loads(done("evaluate", folder, "--json"))
    assert found["accuracy"] == summary["final"]["test"]["accuracy"]
    assert found["loss"] == pytest.approx(summary["final"]["test"]["loss"], rel=1e-5)
    best = json.loads(done("evaluate", folder, "--best", "--json"))
    assert best["accuracy"] == summary["selected"]["test"]["accuracy"]
    validation = json.loads(done("evaluate", folder, "--best", "--split", "validation", "--json"))
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert validation["accuracy"] == max(record["metrics"]["validation/accuracy"] for record in rounds)
    assert f"test accuracy {found['accuracy']:.2%}" in done("evaluate", folder)


def test_evaluate_refuses(run_folder: tuple[Path, Config], here: Path, digits_file: Path) -> None:
    folder, _ = run_folder
    assert "--split: 'tset' is unknown. Did you mean 'test'?" in refused("evaluate", folder, "--split", "tset")
    assert "no run here" in refused("evaluate", here)
    assert "no run here" in refused("resume", here)
    (here / "begun").mkdir()
    (here / "begun" / "experiment.yaml").write_text((folder / "experiment.yaml").read_text())
    assert "has no adapter/ yet; `polyrank resume begun`" in refused("evaluate", "begun")


def test_evaluate_refuses_an_adapter_that_is_broken_or_another_model_s(
    run_folder: tuple[Path, Config], here: Path, adapters: list[Path]
) -> None:
    (here / "run").mkdir()
    (here / "run" / "experiment.yaml").write_text((run_folder[0] / "experiment.yaml").read_text())
    shutil.copytree(adapters[0], here / "run" / "adapter")
    assert "run/adapter: layer m.a is none of the model's modules: another model?" in refused("evaluate", "run")
    (here / "run" / "adapter" / "adapter_model.safetensors").write_bytes(b"broken" * 9)
    assert "not a safetensors file" in refused("evaluate", "run")


# --- list, data, schema


@pytest.mark.parametrize("table", TABLES)
def test_list(table: str) -> None:
    found = json.loads(done("list", table, "--json"))
    assert [entry["name"] for entry in found] == list(TABLES[table])
    assert all(entry["description"].endswith(".") for entry in found)
    shown = done("list", table)
    assert all(name in shown for name in TABLES[table])


def test_list_without_a_table_lists_the_methods_with_references() -> None:
    found = json.loads(done("list", "--json"))
    assert [entry["name"] for entry in found] == list(METHODS)
    assert all(entry["reference"] for entry in found)
    assert "Did you mean 'methods'?" in refused("list", "method")


def test_data_shows_the_split(digits_file: Path, here: Path) -> None:
    found = json.loads(done("data", digits_file, "--json"))
    assert found["sizes"] == {"train": 96, "validation": 40, "test": 60}
    assert found["classes"] == list("0123456789")
    assert [row["client"] for row in found["clients"]] == [f"client_{i}" for i in range(4)]
    assert [row["group"] for row in found["clients"]] == ["small", "small", "large", "large"]
    assert sum(row["examples"] for row in found["clients"]) == 96
    assert all(sum(row["classes"]) == row["examples"] for row in found["clients"])
    shown = done("data", digits_file)
    for part in ("client_0", "small", "96 of 96 training examples held by 4 clients, 40 validation, 60 test"):
        assert part in shown
    assert list(here.iterdir()) == []


def test_data_draws_a_picture(digits_file: Path, here: Path) -> None:
    assert "picture: deep/split.png" in done("data", digits_file, "--png", "deep/split.png")
    with Image.open(here / "deep" / "split.png") as image:
        image.verify()
    with Image.open(here / "deep" / "split.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 100
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10


def test_data_of_the_embedded_experiment() -> None:
    assert len(json.loads(done("data", "--json"))["clients"]) == 12


def test_schema_is_one_and_takes_the_experiment(digits_config: Config) -> None:
    schema = json.loads(done("schema"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(digits_config, schema)


# --- mistakes in an experiment


@pytest.fixture
def texts(tmp_path: Path) -> Config:
    """An experiment on a CSV file of eight texts, with a model that has a config and no weights."""
    BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24).save_pretrained(
        tmp_path / "no_weights"
    )
    for split in ("train", "test"):
        rows = "\n".join(f"text {i},{i % 2}" for i in range(8))
        (tmp_path / f"{split}.csv").write_text(f"text,label\n{rows}\n")
    return {
        "rounds": 1,
        "model": {"name": "./no_weights", "rank": 2},
        "data": {"name": "files", "train": "train.csv", "test": "test.csv", "text": "text", "clients": 2},
        "fleet": [{"rank": 2}],
    }


def at(config: Config, key: str, value: Any) -> Config:
    config = copy.deepcopy(config)
    *path, last = key.split(".")
    node = config
    for part in path:
        node = node[part]
    node[last] = value
    return config


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("modle", {}, ["x.yaml: unknown key 'modle'", "Did you mean 'model'?"]),
        ("method", "flexlra", ["x.yaml: method.name: 'flexlra' is unknown", "Did you mean 'flexlora'?"]),
        ("model.rank", 0, ["x.yaml: model.rank: 0"]),
        ("data.train", "trian.csv", ["trian.csv: no such file; did you mean", "train.csv"]),
        ("data.label", "lable", ["no column 'lable'; did you mean 'label'? There are: text, label"]),
        ("data.text", "sentence", ["no column 'sentence'", "text, label"]),
        ("data.clients", 9, ["9 clients", "only 7 examples"]),
        ("data.partition", {"name": "by_column", "column": "who"}, ["no column 'who'"]),
        ("data.clients", None, ["needs the number of clients"]),
        ("model.name", "./nowhere", ["model.name: no folder", "nowhere"]),
        ("model.name", "package:no_such_thing/model", ["package 'no_such_thing' is not installed"]),
        ("model.name", "some/model", ["model.name: 'some/model' cannot be loaded as a text classifier"]),
        ("device", "gpu", ["device: 'gpu' is not available"]),
    ],
)
@pytest.mark.parametrize("out", [None, "out"])
def test_a_mistake_is_one_message_and_leaves_nothing(
    key: str, value: Any, parts: list[str], out: str | None, texts: Config, here: Path
) -> None:
    path = here.parent / "x.yaml"
    path.write_text(yaml.safe_dump(at(texts, key, value)))
    message = refused("run", path, *(["--out", out] if out else []))
    for part in parts:
        assert part in message
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.targets=[qproj]"], ["model.targets: 'qproj' matches no linear layer", "q_proj (4)", "all-linear"]),
        (["model.rank=0"], ["model.rank: 0"]),
        (["data.clients=97"], ["97 clients", "only 96 examples"]),
        (["fleet.0.rank=8"], ["fleet.0.rank: 8 exceeds model.rank, 4"]),
        (["fleet.0.rank=null"], ["fleet.0", "states no rank"]),
        (["rounds"], ["--set rounds: must be key=value"]),
    ],
)
def test_mistakes_that_only_the_model_shows(
    overrides: list[str], parts: list[str], digits_file: Path, here: Path
) -> None:
    sets = [word for override in overrides for word in ("--set", override)]
    message = refused("run", digits_file, *sets)
    for part in parts:
        assert part in message
    assert list(here.iterdir()) == []


def test_an_adapter_of_another_model_is_refused(digits_file: Path, here: Path, adapters: list[Path]) -> None:
    message = refused("run", digits_file, "--set", f"model.adapter={adapters[0]}")
    assert "is none of the model's targets: another model?" in message
    assert str(adapters[0]) in message
    assert list(here.iterdir()) == []


def test_a_folder_that_holds_something_is_refused(run_folder: tuple[Path, Config], digits_file: Path) -> None:
    folder, _ = run_folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert f"already holds a run; `polyrank resume {folder}`" in refused("run", digits_file, "--out", folder)
    assert "is not an empty folder" in refused("run", digits_file, "--out", folder.parent)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_folder_that_cannot_be_made_is_refused(digits_file: Path, here: Path) -> None:
    (here / "file").write_text("")
    assert "file/run" in refused("run", digits_file, "--out", "file/run", "--set", "rounds=1")
    assert (here / "file").read_text() == ""


def test_files_that_cannot_be_read_are_refused(here: Path) -> None:
    assert "nowhere.yaml: cannot be read" in refused("run", "nowhere.yaml")
    assert "cannot be read" in refused("data", here)
    (here / "list.yaml").write_text("- 1")
    assert "must be a mapping with keys" in refused("run", "list.yaml")


def test_training_that_diverges_says_so(digits_file: Path) -> None:
    sets = ["local.lr=1e30", "local.optimizer=sgd", "local.clip=null"]
    result = call("run", digits_file, *(word for s in sets for word in ("--set", s)), "--json")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "round 0, client 'client_" in result.stderr
    assert "lower local.lr" in result.stderr


# --- merge


def factors(seed: int, d_out: int, d_in: int, rank: int, scale: float) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, d_in, generator=generator, dtype=torch.float64)
    return LowRank(A, torch.randn(d_out, rank, generator=generator, dtype=torch.float64), scale)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters: unequal ranks, the last without layer ``m.b``, all with alpha 8 and a head."""
    folder = tmp_path_factory.mktemp("adapters")
    held = [{"m.a": 2, "m.b": 2}, {"m.a": 4, "m.b": 4}, {"m.a": 6}]
    for i, ranks in enumerate(held):
        layers = {n: factors(10 * i + len(n), *((7, 9) if n == "m.a" else (5, 6)), r, 8 / r) for n, r in ranks.items()}
        dense = {"head.weight": torch.full((2, 3), float(i), dtype=torch.float64)}
        write_adapter(folder / str(i), Adapter(layers, dense), AdapterInfo("tiny", "SEQ_CLS", False, ("head",)))
    return [folder / str(i) for i in range(3)]


def deltas(folder: Path) -> dict[str, Tensor]:
    return {name: delta(x).double() for name, x in read_adapter(folder)[0].layers.items()}


def weighted_mean(parts: Mapping[float, Tensor]) -> Tensor:
    return sum(w * x for w, x in parts.items()) / sum(parts)


def truncated(matrix: Tensor, rank: int) -> Tensor:
    U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] @ torch.diag(S[:rank]) @ Vt[:rank]


def test_merge_is_the_exact_mean_over_those_that_hold_a_layer(adapters: list[Path], here: Path) -> None:
    printed = json.loads(
        done("merge", *adapters, "--method", "flexlora", "--weights", "1,2,5", "--out", "out", "--json")
    )
    one, two, three = map(deltas, adapters)
    found = deltas(here / "out")
    torch.testing.assert_close(found["m.a"], weighted_mean({1: one["m.a"], 2: two["m.a"], 5: three["m.a"]}))
    torch.testing.assert_close(found["m.b"], weighted_mean({1: one["m.b"], 2: two["m.b"]}))
    lacking = f"{adapters[2]}: lacks 1 of 2 layers (m.b); the others alone decide"
    assert printed == [{"folder": "out", "ranks": {"m.a": 7, "m.b": 5}, "notes": [lacking]}]
    adapter, info = read_adapter(here / "out")
    torch.testing.assert_close(adapter.dense["head.weight"], torch.full((2, 3), 12 / 8, dtype=torch.float64))
    assert info == AdapterInfo("tiny", "SEQ_CLS", False, ("head",))
    assert [x.scale * x.rank for x in adapter.layers.values()] == pytest.approx([8, 8])


def test_merge_to_a_rank_is_the_best_approximation(adapters: list[Path], here: Path) -> None:
    done("merge", *adapters, "--method", "flexlora", "--out", "whole")
    done("merge", *adapters, "--method", "flexlora", "--rank", "3", "--out", "three")
    done("merge", *adapters, "--method", "flexlora", "--client-ranks", "2,6", "--out", "clients")
    whole = deltas(here / "whole")
    for folder, rank in (("three", 3), ("clients/client_0", 2), ("clients/client_1", 6)):
        found = deltas(here / folder)
        for name, x in read_adapter(here / folder)[0].layers.items():
            assert x.rank == min(rank, *x.shape)
            torch.testing.assert_close(found[name], truncated(whole[name], rank), atol=1e-9, rtol=1e-7)
    assert sorted(path.name for path in (here / "clients").iterdir()) == ["client_0", "client_1"]


def test_merge_writes_the_whole_beside_the_clients_where_a_rank_is_given(adapters: list[Path], here: Path) -> None:
    out = done("merge", *adapters, "--rank", "3", "--client-ranks", "2", "--out", "out")
    assert "out: 2 layers of rank 3" in out
    assert "out/client_0: 2 layers of rank 2" in out
    assert read_adapter(here / "out")[0].layers["m.a"].rank == 3


@pytest.mark.parametrize("method", METHODS)
def test_merge_equals_the_functions(method: str, adapters: list[Path], here: Path, tmp_path: Path) -> None:
    folders = adapters
    if method in ("ffa_lora", "fedsvd"):  # one A, nested rows
        shared = factors(0, 7, 9, 6, 1.0).A
        folders = [tmp_path / f"shared{i}" for i in range(3)]
        for i, folder in enumerate(folders):
            rank = 2 * i + 2
            layer = LowRank(shared[:rank], factors(i + 1, 7, 9, rank, 1.0).B, 8 / rank)
            write_adapter(folder, Adapter({"m.a": layer}), AdapterInfo("tiny"))
    if method == "lokr":  # has no rule for low-rank layers
        assert "this method trains LoKr" in refused("merge", *folders, "--method", method, "--out", "out")
        return
    if method == "rolora":
        message = refused("merge", *folders, "--method", method, "--out", "out")
        assert "averages B under one shared A, but the adapters' A differ" in message
        return
    done(
        "merge",
        *folders,
        "--method",
        method,
        "--weights",
        "3,1,2",
        "--rank",
        "4",
        "--client-ranks",
        "3",
        "--out",
        "out",
    )
    merged = merge(folders, method_with(method, []), [3, 1, 2])
    assert merged.alpha == pytest.approx(8)
    for folder, expected in (("out", merged.whole(4)), ("out/client_0", merged.client(3))):
        write_adapter(tmp_path / "expected" / folder, expected, merged.info)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (here / folder / name).read_bytes() == (tmp_path / "expected" / folder / name).read_bytes()
        assert all(torch.isfinite(matrix).all() for matrix in deltas(here / folder).values())


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"fedsvd", "ffa_lora", "lokr", "rolora"}))
def test_a_client_of_more_rank_than_was_merged_can_train_it(method: str, adapters: list[Path]) -> None:
    """A row of zeros in A and B has no gradient: rows that hold nothing start fresh."""
    merged = merge(adapters, method_with(method, []))
    whole = merged.whole()
    for name, x in merged.client(12).layers.items():
        assert x.rank == min(12, *x.shape)
        assert x.A.any(dim=1).all()
        torch.testing.assert_close(delta(x), delta(whole.layers[name]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["flexlora", "flora", "fedex_lora"])
def test_exact_methods_merge_to_the_mean_of_products(method: str, adapters: list[Path], here: Path) -> None:
    """Where all hold the layer; alike weights, as fedex_lora has no others."""
    done("merge", *adapters, "--method", method, "--out", "out")
    due = sum(deltas(folder)["m.a"] for folder in adapters) / 3
    torch.testing.assert_close(deltas(here / "out")["m.a"], due, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("method", ["ffa_lora", "fedsvd"])
def test_a_shared_down_factor_merges_exactly_under_any_scale(method: str, here: Path, tmp_path: Path) -> None:
    shared = factors(0, 7, 9, 4, 1.0).A
    layers = [LowRank(shared[:rank], factors(rank, 7, 9, rank, 1.0).B, 8 / rank) for rank in (2, 4)]
    for i, layer in enumerate(layers):
        write_adapter(tmp_path / str(i), Adapter({"m.a": layer}), AdapterInfo("tiny"))
    done("merge", tmp_path / "0", tmp_path / "1", "--method", method, "--weights", "1,3", "--out", "out")
    due = weighted_mean({1: delta(layers[0]), 3: delta(layers[1])})
    torch.testing.assert_close(deltas(here / "out")["m.a"], due, atol=1e-9, rtol=1e-7)


def test_merge_takes_options_of_the_rule(adapters: list[Path], here: Path) -> None:
    done("merge", *adapters, "--method", "flexlora", "--set", "layers=zero", "--out", "out")
    one, two, _ = map(deltas, adapters)
    torch.testing.assert_close(deltas(here / "out")["m.b"], (one["m.b"] + two["m.b"]) / 3)


def test_merge_honours_how_each_adapter_states_its_scale(tmp_path: Path, here: Path) -> None:
    """The same factors, their scales given by lora_alpha, rank_pattern, alpha_pattern or use_rslora."""
    one, two = factors(1, 7, 9, 4, 1.0), factors(2, 5, 6, 2, 1.0)
    plain = {"r": 4, "lora_alpha": 8, "rank_pattern": {"m.b": 2}}
    stated = {
        "plain": (plain, 8 / 4, 8 / 2),
        "rslora": ({**plain, "use_rslora": True}, 8 / 2, 8 / 2**0.5),
        "pattern": ({**plain, "alpha_pattern": {"m.a": 3}}, 3 / 4, 8 / 2),
        "regex": ({"r": 2, "lora_alpha": 1, "rank_pattern": {r".*\.a": 4}, "alpha_pattern": {"b": 6}}, 1 / 4, 6 / 2),
    }
    for name, (config, scale_a, scale_b) in stated.items():
        folder = tmp_path / name
        write_adapter(folder, Adapter({"m.a": one, "m.b": two}), AdapterInfo("tiny"))
        path = folder / "adapter_config.json"
        old = {key: value for key, value in json.loads(path.read_text()).items() if not key.endswith("_pattern")}
        path.write_text(json.dumps({**old, **config}))
        done("merge", folder, "--method", "flexlora", "--out", f"out_{name}")
        found = deltas(here / f"out_{name}")
        torch.testing.assert_close(found["m.a"], scale_a * one.B @ one.A)
        torch.testing.assert_close(found["m.b"], scale_b * two.B @ two.A)


def damaged(source: Path, folder: Path, change: Callable[[Config], None]) -> Path:
    adapter, info = read_adapter(source)
    write_adapter(folder, adapter, info)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return folder


def test_merge_refuses_and_leaves_nothing(adapters: list[Path], here: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_adapter(other, Adapter({"m.a": factors(0, 8, 9, 2, 1.0)}), AdapterInfo("tiny"))
    renamed = damaged(adapters[0], tmp_path / "renamed", lambda c: c.update(base_model_name_or_path="another"))
    dora = damaged(adapters[0], tmp_path / "dora", lambda c: c.update(use_dora=True))
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, part in (
        ([other], "m.a has shape (8, 9)"),
        ([renamed], "adapters of different base models cannot be merged"),
        ([dora], "more than a plain LoRA"),
        ([empty], "no adapter_config.json"),
        ([here / "nowhere"], "no adapter_config.json"),
        (["--method", "flexlra"], "Did you mean 'flexlora'?"),
        (["--set", "spaec=factor"], "Did you mean 'space'?"),
        (["--weights", "1,2"], "--weights: 2 numbers for 3 adapters"),
        (["--weights", "1,2,x"], "--weights: '1,2,x' is not a list of numbers"),
        (["--weights", "1,2,-3"], "must be finite and at least 0"),
        (["--weights", "1,2,nan"], "must be finite and at least 0"),
        (["--client-ranks", "0,2"], "must be finite and at least 1"),
        (["--client-ranks", "2.5"], "--client-ranks: '2.5'"),
    ):
        assert part in refused("merge", *adapters, *arguments, "--out", "out")
        assert list(here.iterdir()) == []
    result = call("merge", *adapters, "--rank", "0", "--out", "out")
    assert result.exit_code == 2
    assert "rank" in result.stderr
    (here / "taken").mkdir()
    (here / "taken" / "note").write_text("mine")
    assert "is not an empty folder" in refused("merge", *adapters, "--out", "taken")
    assert os.listdir(here / "taken") == ["note"]
