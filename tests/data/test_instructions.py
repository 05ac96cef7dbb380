"""Instructions from arrays of JSON, from the hub and by short names; how they are shared; what is refused."""

import inspect
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyrank.data import DATASETS, PARTITIONERS, DataError, instructions, outline
from polyrank.data.prompts import CHAT, FOLDER, Template, form_of
from polyrank.data.source import Prompting, Turn

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
ROWS = [
    {"instruction": "Add", "input": "1 and 2", "output": "3", "id": 7, "subject": "sums"},
    {"instruction": "Say {hi}", "input": "", "output": "Hi\nthere", "id": 8, "subject": "talk"},
    {"instruction": "Wait", "output": "", "id": 9, "subject": "talk"},
]
TURNS = [Turn("Add", "1 and 2", "3"), Turn("Say {hi}", "", "Hi\nthere"), Turn("Wait", "", "")]


def array(path: Path, rows: Any = ROWS, **how: Any) -> Path:
    path.write_text(json.dumps(rows, **how))
    return path


@pytest.mark.parametrize("how", [{}, {"indent": 2}])
@pytest.mark.parametrize("before", ["", "\n \t"])
def test_an_array_reads_as_lines_do(tmp_path: Path, how: dict[str, Any], before: str) -> None:
    path = array(tmp_path / "a.json", **how)
    path.write_text(before + path.read_text())
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"input": None} | row) + "\n" for row in ROWS))
    for file in (path, lines):
        found = instructions(train=file, test=file, input="input", label="subject", columns=["id"])
        assert found.train.inputs == TURNS
        assert found.train.labels.tolist() == [0, 1, 1]
        assert found.train.columns["id"].tolist() == [7, 8, 9]


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ([1, 2], r"a\.json: not a readable json file: row 1 is not a JSON object"),
        ([], r"a\.json: no column 'instruction'"),
        ([{"instruction": "x", "output": 5}], r"a\.json: row 1: column 'output' holds 5; it must hold text"),
        ([{"instruction": "x", "outptu": "y"}], r"a\.json: row 1: no column 'output'; did you mean 'outptu'\?"),
    ],
)
def test_an_array_that_will_not_do(tmp_path: Path, held: Any, said: str) -> None:
    path = array(tmp_path / "a.json", held)
    with pytest.raises(DataError, match=said):
        instructions(train=path, test=path)


def test_a_broken_array_and_an_object(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text, said in (('[{"instruction": "x"', "not a readable json"), ('"x"', "one object a line, or one array")):
        path.write_text(text)
        with pytest.raises(DataError, match=said):
            instructions(train=path, test=path)


def test_what_is_set_aside_for_testing_is_the_same_whatever_the_seed(tmp_path: Path) -> None:
    rows = [{"instruction": str(n), "output": "x", "kind": "ab"[n % 2]} for n in range(40)]
    path = array(tmp_path / "a.json", rows)
    found = instructions(train=path, label="kind", test_share=0.25)
    assert (len(found.train), len(found.validation), len(found.test)) == (30, 0, 10)
    assert np.bincount(found.test.labels).tolist() == [5, 5]
    assert not {t.instruction for t in found.train.inputs} & {t.instruction for t in found.test.inputs}
    assert instructions(train=path, label="kind", test_share=0.25).test.inputs == found.test.inputs
    with pytest.raises(DataError, match=r"data.test_share: 0.01 of 40 training examples is 0"):
        instructions(train=path, test_share=0.01)


@pytest.fixture
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra 'hub' is not installed")
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.chdir(tmp_path)


# As on the hub: the folder, its columns, its splits.
ON_THE_HUB = {
    "alpaca": ("tatsu-lab/alpaca", ("instruction", "input", "output", "text"), ["train"]),
    "dolly": (
        "databricks/databricks-dolly-15k",
        ("instruction", "context", "response", "category"),
        ["train"],
    ),
    "natural_instructions": (
        "Muennighoff/natural-instructions",
        ("definition", "inputs", "targets", "task_name", "id"),
        ["train", "test"],
    ),
}


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("name", ON_THE_HUB)
def test_short_names_say_columns_and_splits(tmp_path: Path, name: str) -> None:
    path, columns, splits = ON_THE_HUB[name]
    (tmp_path / path).mkdir(parents=True)
    for split in splits:
        rows = {column: [f"{column}{n}" for n in range(20)] for column in columns}
        pq.write_table(pa.table(rows), tmp_path / path / f"{split}.parquet")
    found = DATASETS[name](template="alpaca_short", train_on_inputs=True)
    assert found.kind == "causal"
    assert found.prompting == Prompting("alpaca_short", True)
    assert (len(found.train), len(found.test)) == ((20, 20) if "test" in splits else (18, 2))
    assert {turn[0][: len(columns[0])] for turn in found.train.inputs} == {columns[0]}
    assert {turn[1][: len(columns[1])] for turn in found.train.inputs} == {columns[1]}
    assert {turn[2][: len(columns[2])] for turn in found.train.inputs} == {columns[2]}
    assert list(found.train.columns) == (["task_name"] if name == "natural_instructions" else [])
    assert len(found.classes) == (20 if name == "dolly" else 1)


@pytest.mark.usefixtures("_offline")
def test_the_hub_takes_a_mapping_of_columns(tmp_path: Path) -> None:
    table = pa.table({"q": ["a", "b"], "a": ["c", "d"], "site": [1, 2]})
    for split in ("train", "dev"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    files = {"train": "train.parquet", "dev": "dev.parquet"}
    read = DATASETS["hub_instructions"]
    options = {"path": "parquet", "data_files": files, "instruction": "q", "response": "a", "test": "dev"}
    found = read(**options, columns=["site"], template="plain")
    assert found.test.inputs == [Turn("a", "", "c"), Turn("b", "", "d")]
    assert found.train.columns["site"].tolist() == [1, 2]
    with pytest.raises(DataError, match=r"parquet: no split 'validation'.*There are: train, dev"):
        read(**options, validation="validation")
    with pytest.raises(DataError, match=r"split 'train': no column 'context'"):
        read(**options, input="context")


def test_templates_that_do_not_fit(tmp_path: Path) -> None:
    path, own = array(tmp_path / "a.json"), tmp_path / "own.json"

    def refused(said: str, **options: Any) -> None:
        with pytest.raises(DataError, match=said):
            instructions(train=path, test=path, **options)

    good = {"with_input": "{instruction} {input}", "without_input": "{instruction}"}
    own.write_text(json.dumps(good | {"with_input": "{context} {instruction} {input}"}))
    refused(
        r"own\.json: with_input names \{context\}, which nothing fills in.* \{instruction\} and \{input\}", template=own
    )
    marked = tmp_path / "marked.json"
    marked.write_text("\ufeff" + json.dumps(good), encoding="utf-8")
    assert instructions(train=path, test=path, template=marked).prompting == Prompting(str(marked))
    latin = tmp_path / "latin.json"
    latin.write_bytes(
        json.dumps(good | {"with_input": "{instruction} {input} é"}, ensure_ascii=False).encode("latin-1")
    )
    refused(r"latin\.json: not JSON: line 1 is not UTF-8.*; save the file as UTF-8", template=latin)
    other = tmp_path / "other.json"
    other.write_text(json.dumps(good | {"without_input": "{instruction} {input}"}))
    refused(r"other\.json: without_input names \{input\}", template=other)
    refused(r"no template 'alpacca'; did you mean 'alpaca'\?", template=tmp_path / "alpacca")
    refused("data.input: 'input' needs data.instruction", instruction=None, input="input")
    refused("data.template: chat needs data.instruction", instruction=None, template="chat")
    braces = tmp_path / "braces.json"
    braces.write_text(json.dumps(good | {"without_input": '{instruction} as {"a": 1} or {}'}))
    assert instructions(train=path, test=path, template=braces).prompting == Prompting(str(braces))


def test_only_train_needs_the_columns_that_are_kept(tmp_path: Path) -> None:
    path, other = array(tmp_path / "a.json"), array(tmp_path / "b.json", [{"instruction": "x", "output": "y"}])
    found = instructions(train=path, test=other, validation=other, columns=["id"])
    assert found.train.columns["id"].tolist() == [7, 8, 9]
    assert (found.test.columns, found.validation.columns) == ({}, {})
    with pytest.raises(DataError, match=r"b\.json: row 1: no column 'id'"):
        instructions(train=other, test=path, columns=["id"])


def test_a_template_that_uses_the_input_needs_no_column_for_it(tmp_path: Path) -> None:
    path = array(tmp_path / "a.json")
    assert instructions(train=path, test=path).train.inputs[0] == Turn("Add", "", "3")


def test_the_names_of_templates_are_those_of_the_files() -> None:
    names, other = get_args(Template)
    assert other is Path
    assert sorted(get_args(names)) == sorted([CHAT, *(file.stem for file in FOLDER.glob("*.json"))])


def test_a_form_is_what_is_said_not_what_it_is_called(tmp_path: Path) -> None:
    copied = tmp_path / "mine.json"
    copied.write_text((FOLDER / "alpaca.json").read_text())
    forms = {form_of(Prompting(name)) for name in ("alpaca", "alpaca_short", "plain", "vigogne", "chat")}
    assert len(forms) == 5
    assert form_of(Prompting(str(copied))) == form_of(Prompting("alpaca"))
    assert form_of(Prompting("alpaca", True)) not in forms


SHARED_OUT: dict[str, dict[str, Any]] = {
    "by_column": {"column": "who"},
    "by_quantity": {"sizes": [5, 10, 20]},
    "dirichlet": {"alpha": 0.3},
    "iid": {},
    "pathological": {"classes": 2, "minimum": 1},
    "shards": {"per_client": 2},
}


@pytest.mark.parametrize("name", PARTITIONERS)
def test_every_partitioner_shares_instructions_by_category(tmp_path: Path, name: str) -> None:
    rows = [
        {"instruction": f"do {n}", "output": "x", "kind": ["qa", "sum", "chat"][n % 3], "who": f"site {n % 3}"}
        for n in range(60)
    ]
    path = array(tmp_path / "a.json", rows)
    found = instructions(train=path, test=path, label="kind", columns=["who"])
    split = PARTITIONERS[name](found.train, 3, np.random.default_rng(0), **SHARED_OUT[name])
    held = [turn.instruction for part in split for turn in found.train.select(part).inputs]
    assert len(set(held)) == len(held) == (35 if name == "by_quantity" else 60)
    counts = split.counts(found.train.labels, len(found.classes))
    if name == "by_quantity":
        assert split.sizes.tolist() == [5, 10, 20]
    if name in ("by_column", "shards"):
        assert ((counts > 0).sum(1) <= 2).all()
    if name == "pathological":
        assert ((counts > 0).sum(1) == 2).all()
    if name == "dirichlet":
        assert counts.max(0).sum() > 30


def test_fixed_sizes_need_the_examples(tmp_path: Path) -> None:
    path = array(tmp_path / "a.json")
    found = instructions(train=path, test=path)
    with pytest.raises(DataError, match=r"sizes sum to 1500, but the training split has only 3 examples"):
        PARTITIONERS["by_quantity"](found.train, None, np.random.default_rng(0), sizes=[500, 1000])


def test_outlines(tmp_path: Path) -> None:
    table = tmp_path / "a.parquet"
    pq.write_table(pa.table({"instruction": ["x"] * 40, "output": ["y"] * 40}), table)
    assert outline("instructions", {"train": table, "test": table}).examples == 40
    assert outline("instructions", {"train": table, "test_share": 0.25}).examples == 30
    for name in DATASETS:
        causal = "template" in inspect.signature(DATASETS[name]).parameters
        assert (outline(name, {}).kind == "causal") == causal


def shared(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"no real data: {SHARED / name} is not there")
    return SHARED / name


@pytest.mark.real
def test_real_categories_and_natural_clients() -> None:
    folder = shared("dolly15k")
    found = instructions(
        train=folder / "train.parquet",
        test=folder / "test.parquet",
        input="context",
        response="response",
        label="category",
        columns=["client"],
    )
    assert (len(found.train), len(found.test), len(found.classes)) == (14_931, 80, 8)
    natural = PARTITIONERS["by_column"](found.train, None, np.random.default_rng(0), column="client")
    assert (natural.counts(found.train.labels, 8) > 0).sum(1).max() <= 3
    sizes = [500, 500, 1000, 1000, 1500, 1500, 2000, 2000, 2250, 2500]
    fixed = PARTITIONERS["by_quantity"](found.train, 10, np.random.default_rng(0), sizes=sizes)
    assert fixed.sizes.tolist() == sizes
    skewed = PARTITIONERS["dirichlet"](found.train, 10, np.random.default_rng(0), alpha=0.1)
    assert skewed.counts(found.train.labels, 8).max(0).sum() > 0.3 * len(found.train)
