"""A split written to a file per client, and read back: the same examples, whatever clients and columns are called."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import talking
from polyrank.cli import app
from polyrank.data import (
    DATASETS,
    DataError,
    Dataset,
    Source,
    outline,
    per_client,
    write_per_client,
)
from polyrank.data.source import Prompting, Turn
from polyrank.experiment.loading import parse
from polyrank.experiment.publishing import chosen
from polyrank.experiment.session import Session
from polyrank.experiment.shares import share_data
from polyrank.experiment.store import Run
from polyrank.report.loading import loading_code

HOSTILE = ["First Citizen:", "../../etc", "CON", "con", "a/b", "a_b", "", ".", "é", "x" * 300, "nul.txt", "-rf", "A_B"]


def texts(**columns: np.ndarray) -> Dataset:
    source = Source([f"text {n}" for n in range(12)], np.arange(12) % 3, columns)
    few = np.arange(3)
    return Dataset("mine", "text", source, source.select(few), source.select(few + 3), ("no", "yes", "b"))


def shares(*sizes: int) -> dict[str, np.ndarray]:
    ends = np.cumsum(sizes)
    return {f"client_{n}": np.arange(end - size, end) for n, (size, end) in enumerate(zip(sizes, ends, strict=True))}


def test_texts(tmp_path: Path) -> None:
    made = texts(who=np.array(["é", "b", "c"] * 4, object), age=np.arange(12))
    found = write_per_client(tmp_path / "out", made, shares(5, 3), {"text": "review", "label": "stars"}, seed=4)
    assert found["seed"] == 4
    assert found["clients"]["client_1"] == {"file": "clients/client_1.parquet", "examples": 3}
    table = pq.read_table(tmp_path / "out" / "clients" / "client_1.parquet").to_pydict()
    assert table == {
        "review": ["text 5", "text 6", "text 7"],
        "stars": ["b", "no", "yes"],
        "who": ["c", "é", "b"],
        "age": [5, 6, 7],
    }
    again = per_client(folder=tmp_path / "out")
    assert again.train.inputs == made.train.inputs[:8]
    assert again.train.labels.tolist() == made.train.labels[:8].tolist()
    assert again.train.columns["client"].tolist() == ["client_0"] * 5 + ["client_1"] * 3
    assert again.train.columns["age"].tolist() == list(range(8))
    assert (again.test.inputs, again.validation.inputs) == (made.test.inputs, made.validation.inputs)
    assert again.classes == made.classes
    # A site reads its own file with the options that the manifest has.
    options = {key: value for key, value in found["data"].items() if key != "name"}
    own = tmp_path / "out" / "clients" / "client_1.parquet"
    site = DATASETS[found["data"]["name"]](train=own, test=own, **options)
    assert (site.train.inputs, site.train.labels.tolist()) == (made.train.inputs[5:8], [2, 0, 1])
    known = outline("per_client", {"folder": tmp_path / "out"})
    assert (known.kind, known.classes, known.examples) == ("text", 3, 8)


def test_raw_and_encoded_images(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1), np.uint8)
    for name, inputs in (("raw", pixels), ("encoded", [bytes([n] * 5) for n in range(6)])):
        source = Source(inputs, np.arange(6) % 2, {"who": np.array(list("abcabc"), object)})
        made = Dataset(name, "image", source, source.select(np.arange(0)), source.select(np.arange(2)), ("0", "1"))
        write_per_client(tmp_path / name, made, shares(4, 2))
        again = per_client(folder=tmp_path / name)
        assert np.array_equal(again.train.inputs, inputs)
        assert again.train.labels.tolist() == [0, 1] * 3
        assert again.train.columns["who"].tolist() == list("abcabc")
        assert len(again.validation) == 0


def test_instructions_with_a_template_of_their_own(tmp_path: Path) -> None:
    own = tmp_path / "mine.json"
    own.write_text(json.dumps({"with_input": "{instruction}/{input}:", "without_input": "{instruction}:"}))
    turns = [Turn(f"ask {n}", "about" if n == 3 else "", f"say {n}") for n in range(8)]
    source = Source(turns, np.arange(8) % 2, {"input": np.arange(8)})
    part = source.select(np.arange(2))
    made = Dataset("x", "causal", source, part, part, ("a", "b"), part, Prompting(str(own), True))
    found = write_per_client(tmp_path / "out", made, shares(3, 5))
    assert found["data"]["input"] == "input_"  # a kept column has the name already
    assert found["data"]["template"] == "template.json"
    assert str(tmp_path) not in json.dumps(found)
    again = per_client(folder=tmp_path / "out")
    assert again.train.inputs == turns
    assert again.importance is not None
    assert again.importance.inputs == turns[:2]
    assert again.train.columns["input"].tolist() == list(range(8))
    assert again.prompting == Prompting(str(tmp_path / "out" / "template.json"), True)


def test_plain_text_stays_plain(tmp_path: Path) -> None:
    source = Source([Turn("", "", f"line {n}") for n in range(4)], np.zeros(4, np.int64))
    made = Dataset("x", "causal", source, source.select(np.arange(0)), source, ("0",), prompting=Prompting("plain"))
    found = write_per_client(tmp_path / "out", made, shares(2, 2), {"response": "speech", "instruction": None})
    assert pq.read_schema(tmp_path / "out" / "clients" / "client_0.parquet").names == ["speech"]
    assert found["data"]["instruction"] is None
    assert per_client(folder=tmp_path / "out").train.inputs == source.inputs


def test_names_that_no_file_system_takes(tmp_path: Path) -> None:
    own = {name: np.array([n % 12]) for n, name in enumerate(HOSTILE)}
    found = write_per_client(tmp_path / "out", texts(), own)
    written = [entry["file"] for entry in found["clients"].values()]
    assert len({name.casefold() for name in written}) == len(HOSTILE)
    for name in written:
        plain = Path(name).stem
        assert Path(name).parent.as_posix() == "clients"
        assert plain.upper() not in {"CON", "NUL"}
        assert not plain.startswith((".", "-"))
        assert plain.isascii()
        assert len(plain) < 100
    assert sorted(os.listdir(tmp_path / "out" / "clients")) == sorted(Path(name).name for name in written)
    again = per_client(folder=tmp_path / "out")
    assert again.train.columns["client"].tolist() == HOSTILE


def test_numbers_stay_numbers_and_a_column_keeps_its_name(tmp_path: Path) -> None:
    made = texts(client=np.array(["x"] * 12, object))
    found = write_per_client(tmp_path / "out", made, {"2": np.arange(3), "10": np.arange(3, 6)})
    assert found["client_column"] == "client_"
    columns = per_client(folder=tmp_path / "out").train.columns
    assert columns["client_"].tolist() == [2, 2, 2, 10, 10, 10]
    assert columns["client"].tolist() == ["x"] * 6


def test_nothing_is_overwritten_and_manifests_are_read_with_care(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("x")
    with pytest.raises(FileExistsError, match="exists already; choose another --export"):
        write_per_client(tmp_path / "used", texts(), shares(5))
    assert os.listdir(tmp_path) == ["used"]
    with pytest.raises(DataError, match=r"manifest.json: cannot be read"):
        per_client(folder=tmp_path / "used")
    path = tmp_path / "used" / "manifest.json"
    for held in ([], {"version": 2}, {"version": 1}, {"version": 1, "clients": {"a": {}}, "server": {}, "data": {}}):
        path.write_text(json.dumps(held))
        with pytest.raises(DataError, match="not a manifest"):
            per_client(folder=tmp_path / "used")
    write_per_client(tmp_path / "out", texts(), shares(5))
    (tmp_path / "out" / "clients" / "client_0.parquet").unlink()
    with pytest.raises(DataError, match=r"client_0\.parquet: no such file"):
        per_client(folder=tmp_path / "out")


def finished(folder: Path, raw: dict[str, Any]) -> Run:
    session = Session(Run.create(folder, parse(raw, "test", Path())))
    for _ in session.rounds():
        pass
    session.finish()
    return session.run


@pytest.mark.parametrize("what", ["instructions", "digits"])
def test_a_simulation_of_clients_that_read_their_files_back(
    tmp_path: Path, what: str, digits_config: dict[str, Any]
) -> None:
    """The same examples, and the same bytes in the end."""
    raw = talking.experiment(tmp_path) if what == "instructions" else digits_config
    raw = {**raw, "data": {**raw["data"], "importance": 6}, "seed": 3, "threads": 1}
    file = tmp_path / "experiment.json"
    file.write_text(json.dumps(raw))
    result = CliRunner().invoke(app, ["data", str(file), "--export", str(tmp_path / "out")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "folder:" in result.stdout
    refused = CliRunner().invoke(app, ["data", str(file), "--export", str(tmp_path / "out")])
    assert refused.exit_code != 0
    assert "choose another --export" in refused.stderr
    data = {
        "name": "per_client",
        "folder": str(tmp_path / "out"),
        "partition": {"name": "by_column", "column": "client"},
    }
    one, other = (share_data(parse({**raw, "data": own}, "x", Path())) for own in (raw["data"], data))
    assert list(one.clients) == list(other.clients)
    for number in range(len(one.clients)):
        mine, theirs = (s.dataset.train.select(s.partition[number]) for s in (one, other))
        assert np.array_equal(mine.inputs, theirs.inputs) if what == "digits" else mine.inputs == theirs.inputs
        named = ([s.dataset.classes[k] for k in part.labels] for s, part in ((one, mine), (other, theirs)))
        assert next(named) == next(named)
    assert other.dataset.importance is not None
    assert len(other.dataset.importance) == 6
    first, second = finished(tmp_path / "a", raw), finished(tmp_path / "b", {**raw, "data": data})
    part = "adapter/adapter_model.safetensors"
    assert (first.folder / part).read_bytes() == (second.folder / part).read_bytes()
    assert first.summary()["final"]["test"] == second.summary()["final"]["test"]
    if what == "instructions":  # an export says how the model was asked
        said = [loading_code(chosen(run)) for run in (first, second)]
        assert said[0] == said[1]
        assert "### Instruction:" in said[0]
