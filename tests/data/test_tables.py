"""Local files and hub data sets become the same splits, and say clearly when they cannot."""

import csv
import inspect
import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from polyrank.data import DATASETS, DataError, Dataset, files, hold_out, hub, limit

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"

TRAIN = {"text": ["one, two", 'a "b"\nc', "007", "é 你"], "label": ["no", "yes", "no", "yes"], "who": [3, 1, 3, 2]}
TEST = {"text": ["x", "y"], "label": ["yes", "maybe"], "who": [1, 1]}


def write(path: Path, rows: dict[str, list]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([list(rows), *zip(*rows.values(), strict=True)])
    else:
        lines = (json.dumps(dict(zip(rows, row, strict=True))) for row in zip(*rows.values(), strict=True))
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def png(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (3, 3), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    datasets = pytest.importorskip("datasets", reason="the extra 'hub' is not installed")
    # The variables are read at import, which another test may have done before.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_every_format_gives_the_same_splits(tmp_path, suffix):
    train, test = (write(tmp_path / f"{n}.{suffix}", r) for n, r in (("train", TRAIN), ("test", TEST)))
    data = files(train=train, test=test, text="text", columns=["who"])
    assert data.kind == "text"
    assert data.classes == ("maybe", "no", "yes")
    assert data.train.inputs == TRAIN["text"]
    assert data.train.labels.tolist() == [1, 2, 1, 2]
    assert data.test.labels.tolist() == [2, 0]
    assert data.train.labels.dtype == np.int64
    assert data.train.columns["who"].tolist() == [3, 1, 3, 2]
    assert len(data.validation) == 0
    part = data.train.select(np.array([3, 0]))
    assert (part.inputs, part.labels.tolist()) == (["é 你", "one, two"], [2, 1])
    assert part.columns["who"].tolist() == [2, 3]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("texts", [["007", "08"], ["2020-01-01", "2020-01-02"], ["NA", "null"]])
def test_texts_that_look_like_something_else_stay_texts(tmp_path, suffix, texts):
    path = write(tmp_path / f"train.{suffix}", {"text": texts, "label": [0, 1]})
    assert files(train=path, test=path, text="text").train.inputs == texts


def test_several_text_columns_are_joined_and_empty_ones_left_out(tmp_path):
    rows = {"a": ["x", "y", None], "b": ["1", "", "3"], "label": [0, 1, 1]}
    path = write(tmp_path / "t.parquet", rows)
    assert files(train=path, test=path, text=["b", "a"]).train.inputs == ["1 x", "y", "3"]


def test_class_names_come_from_a_list_a_file_or_the_labels(tmp_path):
    path = write(tmp_path / "t.parquet", {"text": ["a", "b"], "label": [0, 2]})
    names = tmp_path / "labels.json"
    names.write_text('["x", "y", "z"]')
    assert files(train=path, test=path, text="text").classes == ("0", "2")
    assert files(train=path, test=path, text="text", classes=names).classes == ("x", "y", "z")
    assert files(train=path, test=path, text="text", classes=["p", "q", "r"]).classes == ("p", "q", "r")
    words = write(tmp_path / "w.csv", {"text": ["a", "b"], "label": ["z", "x"]})
    assert files(train=words, test=words, text="text", classes=names).train.labels.tolist() == [2, 0]


def test_images_as_bytes_hub_pairs_and_arrays(tmp_path):
    images = [png(0), png(255)]
    plain = write(tmp_path / "plain.parquet", {"image": images, "label": [0, 1]})
    pairs = [{"bytes": image, "path": None} for image in images]
    paired = write(tmp_path / "paired.parquet", {"image": pairs, "label": [0, 1]})
    for path in (plain, paired):
        data = files(train=path, test=path, image="image")
        assert (data.kind, data.train.inputs) == ("image", images)
    raw = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    np.savez(tmp_path / "raw.npz", images=raw, labels=np.array([1, 0], np.uint8), writer=np.array([5, 6]))
    path = tmp_path / "raw.npz"
    data = files(train=path, test=path, image="images", label="labels", columns=["writer"])
    np.testing.assert_array_equal(data.train.inputs, raw[..., None])
    assert data.test.labels.tolist() == [1, 0]
    assert data.train.select(np.array([1])).columns["writer"].tolist() == [6]


def _refused(message: str, **options) -> None:
    with pytest.raises(DataError, match=message):
        files(**options)


def test_missing_files_and_columns_are_named_with_what_there_is(tmp_path):
    train, test = write(tmp_path / "train.parquet", TRAIN), write(tmp_path / "test.csv", TEST)
    _refused(r"test\.cvs: no such file; did you mean .*test\.csv", train=train, test=tmp_path / "test.cvs", text="text")
    _refused(r"absent.x\.csv: no such file", train=tmp_path / "absent" / "x.csv", test=test, text="text")
    _refused(
        r"train\.parquet: no column 'lable'; did you mean 'label'\? There are: text, label, who",
        train=train, test=test, text="text", label="lable",
    )  # fmt: skip
    _refused(r"train\.parquet: no column 'body'", train=train, test=test, text="body")
    bare = write(tmp_path / "bare.csv", {"text": ["a"], "label": ["no"]})
    _refused(r"bare\.csv: no column 'who'", train=train, test=bare, text="text", columns=["who"])
    _refused("exactly one of text and image", train=train, test=test)
    _refused("exactly one of text and image", train=train, test=test, text="text", image="text")
    other = tmp_path / "train.arrow"
    other.write_bytes(b"")
    _refused(r"no format '\.arrow'.* \.csv, ", train=other, test=test, text="text")


def test_columns_are_checked_before_any_file_is_read(tmp_path):
    train = write(tmp_path / "train.csv", TRAIN)
    with train.open("a") as file:
        file.write("a,row,with,too,many,columns\n" * 200_000)
    test = write(tmp_path / "test.csv", TEST)
    _refused(r"no column 'lable'", train=test, validation=test, test=test, text="text", label="lable")
    _refused(
        r"train\.csv: row 5: has 6 cells, and the header 3: 'a,row,with,too,many,columns'",
        train=train,
        test=test,
        text="text",
    )


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.jsonl", "t.npz"])
def test_a_file_that_is_not_what_its_name_says(tmp_path, name):
    path = tmp_path / name
    for content in (b"\x00\xff nonsense", b"", b"PK\x03\x04 cut"):
        path.write_bytes(content)
        _refused(name, train=path, test=path, text="text")


def test_json_is_an_array_or_one_object_a_line(tmp_path):
    path = tmp_path / "t.json"
    path.write_text('[{"text": "007", "label": 0},\n {"text": "b", "label": 1}]')
    assert files(train=path, test=path, text="text").train.inputs == ["007", "b"]
    path.write_text('"text"')
    _refused("one object a line, or one array of them", train=path, test=path, text="text")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"text": ["a", "b"], "label": [0, -1]}, r"label -1 \(a hidden test label"),
        ({"text": ["a", "b"], "label": [0, None]}, r"column 'label' is empty in row 2"),
        ({"text": ["a", "b"], "label": [0.5, 1.0]}, r"column 'label' holds double"),
        ({"text": [1, 2], "label": [0, 1]}, r"text column 'text' holds int64"),
        ({"text": [], "label": []}, "t.parquet"),
    ],
)
def test_values_that_cannot_be_used(tmp_path, rows, message):
    path = write(tmp_path / "t.parquet", rows)
    _refused(message, train=path, test=path, text="text")


def test_labels_and_classes_must_agree(tmp_path):
    path = write(tmp_path / "t.parquet", {"text": ["a", "b"], "label": [0, 2]})
    words = write(tmp_path / "w.parquet", {"text": ["a"], "label": ["positve"]})
    _refused("label 2, but there are 2 classes", train=path, test=path, text="text", classes=["x", "y"])
    _refused(
        "no class 'positve'; did you mean 'positive'",
        train=words, test=words, text="text", classes=["negative", "positive"],
    )  # fmt: skip
    (tmp_path / "labels.json").write_text('{"x": 1}')
    _refused("JSON list", train=path, test=path, text="text", classes=tmp_path / "labels.json")
    _refused("absent.json", train=path, test=path, text="text", classes=tmp_path / "absent.json")


def test_images_that_are_not(tmp_path):
    text = write(tmp_path / "t.parquet", TRAIN)
    _refused("image column 'text' holds string", train=text, test=text, image="text")
    none = write(tmp_path / "n.parquet", {"image": [png(1), None], "label": [0, 0]})
    _refused("no bytes in row 2", train=none, test=none, image="image")
    np.savez(tmp_path / "f.npz", images=np.zeros((2, 3, 3)), labels=np.zeros(3, int))
    path = tmp_path / "f.npz"
    _refused(r"array 'images' has shape \(2, 3, 3\)", train=path, test=path, image="images", label="labels")
    np.savez(path, images=np.zeros((2, 3, 3), bool), labels=np.zeros(2, int))
    _refused("bool", train=path, test=path, image="images", label="labels")


def many(tmp_path, validation: bool = False) -> Dataset:
    rows = {"text": [str(i) for i in range(300)], "label": [0] * 200 + [1] * 90 + [2] * 10}
    path = write(tmp_path / "m.parquet", rows)
    return files(train=path, test=path, validation=path if validation else None, text="text")


def test_hold_out_is_stratified_disjoint_and_leaves_test_alone(tmp_path):
    whole = many(tmp_path)
    held = hold_out(whole, 0.1, np.random.default_rng(0))
    assert np.bincount(held.validation.labels).tolist() == [20, 9, 1]
    assert sorted(held.train.inputs + held.validation.inputs) == sorted(whole.train.inputs)
    assert held.test is whole.test
    again = hold_out(whole, 0.1, np.random.default_rng(0))
    assert again.validation.inputs == held.validation.inputs
    assert hold_out(held, 0.5, np.random.default_rng(1)) is held
    for fraction in (0.0, 1.0, 0.001):
        with pytest.raises(DataError, match="at least one on each side"):
            hold_out(whole, fraction, np.random.default_rng(0))


def test_limit_cuts_splits_in_proportion_and_independently(tmp_path):
    whole = many(tmp_path, validation=True)
    cut = limit(whole, {"train": 30, "test": 1000}, np.random.default_rng(0))
    assert np.bincount(cut.train.labels).tolist() == [20, 9, 1]
    assert (len(cut.validation), len(cut.test)) == (300, 300)
    other = limit(whole, {"train": 30, "validation": 7}, np.random.default_rng(0))
    assert other.train.inputs == cut.train.inputs
    assert len(other.validation) == 7
    alone = limit(whole, {"validation": 7}, np.random.default_rng(0))
    assert alone.validation.inputs == other.validation.inputs
    with pytest.raises(DataError, match="no split 'tests'; did you mean 'test'"):
        limit(whole, {"tests": 3}, np.random.default_rng(0))
    with pytest.raises(DataError, match="limit of split 'test' is 0"):
        limit(whole, {"test": 0}, np.random.default_rng(0))


def same(first: Dataset, second: Dataset) -> None:
    for split in ("train", "validation", "test"):
        one, two = getattr(first, split), getattr(second, split)
        assert list(one.inputs) == list(two.inputs)
        np.testing.assert_array_equal(one.labels, two.labels)


def test_the_hub_and_local_files_are_one_path(tmp_path, offline):
    paths = {n: str(write(tmp_path / f"{n}.parquet", r)) for n, r in (("train", TRAIN), ("test", TEST))}
    data = hub(path="parquet", data_files=paths, text="text", columns=["who"])
    same(data, files(train=paths["train"], test=paths["test"], text="text"))
    assert data.train.columns["who"].tolist() == [3, 1, 3, 2]
    assert data.classes == ("maybe", "no", "yes")


def test_hub_images_are_not_decoded_and_class_names_are_the_hubs(tmp_path, offline):
    import datasets

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"img": [{"bytes": png(i), "path": None} for i in (1, 2)], "label": [1, 0]}
    folder = tmp_path / "pets"
    folder.mkdir()
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))
    data = hub(path=str(folder), image="img")
    assert data.train.inputs == [png(1), png(2)]
    assert data.classes == ("cat", "dog")
    local = files(train=folder / "train.parquet", test=folder / "test.parquet", image="img")
    same(data, local)
    assert local.classes == ("cat", "dog")


def test_hub_errors_name_the_split_the_column_and_the_data_set(tmp_path, offline):
    paths = {n: str(write(tmp_path / f"{n}.parquet", r)) for n, r in (("train", TRAIN), ("test", TEST))}
    with pytest.raises(DataError, match=r"parquet: no split 'tets'; did you mean 'test'\? There are: train, test"):
        hub(path="parquet", data_files=paths, text="text", test="tets")
    with pytest.raises(DataError, match=r"split 'train': no column 'sentence'"):
        hub(path="parquet", data_files=paths, text="sentence")
    with pytest.raises(DataError, match=r"nobody/has-this: the data set could not be loaded"):
        hub(path="nobody/has-this", text="text")


def test_the_hub_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        hub(path="parquet", text="text")


# What each preset's data set looks like on the hub: folder, configuration, columns, splits.
ON_THE_HUB = {
    "ag_news": ("fancyzhx/ag_news", None, {"text": "t"}, "label", ["train", "test"]),
    "banking77": ("legacy-datasets/banking77", None, {"text": "t"}, "label", ["train", "test"]),
    "cifar100": ("uoft-cs/cifar100", None, {"img": png(9), "coarse_label": 4}, "fine_label", ["train", "test"]),
    "ledgar": ("coastalcph/lex_glue", "ledgar", {"text": "t"}, "label", ["train", "validation", "test"]),
    "sst2": ("nyu-mll/glue", "sst2", {"sentence": "t", "idx": 0}, "label", ["train", "validation", "test"]),
}


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_presets_name_their_paths_columns_and_splits(tmp_path, monkeypatch, offline, name):
    # A folder of the same relative path is taken by `datasets` before the hub is asked.
    path, config, columns, label, splits = ON_THE_HUB[name]
    folder = tmp_path / path
    folder.mkdir(parents=True)
    for split in splits:
        hidden = name == "sst2" and split == "test"
        rows = {key: [value, value] for key, value in columns.items()} | {label: [-1, -1] if hidden else [0, 1]}
        write(folder / f"{split}.parquet", rows)
    if config:
        listed = "".join(f"\n  - split: {s}\n    path: {s}.parquet" for s in splits)
        header = f"---\nconfigs:\n- config_name: {config}\n  data_files:{listed}\n"
        (folder / "README.md").write_text(header + "- config_name: other\n  data_files: test.parquet\n---\n")
    monkeypatch.chdir(tmp_path)
    data = DATASETS[name]()
    assert data.kind == ("image" if name == "cifar100" else "text")
    assert len(data.train) == len(data.test) == 2
    assert len(data.validation) == (2 if name == "ledgar" else 0)
    assert data.test.labels.tolist() == [0, 1]


def test_every_component_is_keyword_only_annotated_and_described():
    assert list(DATASETS) == sorted(DATASETS)
    for component in DATASETS.values():
        assert component.__doc__.splitlines()[0].endswith(".")
        for parameter in inspect.signature(component).parameters.values():
            assert parameter.kind is parameter.KEYWORD_ONLY
            assert parameter.annotation is not parameter.empty


def shared(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"no real data: {SHARED / name} is not there")
    return SHARED / name


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "sizes", "classes"), [("sst2", (60_614, 6_735, 872), 2), ("banking77", (10_003, 0, 3_080), 77)]
)
def test_real_texts(name, sizes, classes):
    folder = shared(name)
    validation = folder / "validation.parquet"
    data = files(
        train=folder / "train.parquet",
        test=folder / "test.parquet",
        validation=validation if validation.is_file() else None,
        text="text",
        classes=folder / "labels.json",
    )
    assert tuple(len(split) for split in (data.train, data.validation, data.test)) == sizes
    assert len(data.classes) == classes
    assert (np.bincount(data.train.labels, minlength=classes) > 0).all()
    assert all(data.train.inputs)


@pytest.mark.real
def test_real_images():
    cifar, mnist = shared("cifar10"), shared("mnist")
    data = files(train=cifar / "test.parquet", test=cifar / "test.parquet", image="image")
    assert np.bincount(data.train.labels).tolist() == [1000] * 10
    assert Image.open(io.BytesIO(data.train.inputs[0])).size == (32, 32)
    digits = files(train=mnist / "train.npz", test=mnist / "test.npz", image="images", label="labels")
    assert digits.train.inputs.shape == (20_000, 28, 28, 1)


@pytest.mark.real
def test_real_natural_clients():
    from polyrank.data import PARTITIONERS

    folder = shared("dolly15k")
    data = files(
        train=folder / "train.parquet",
        test=folder / "train.parquet",
        text=["instruction", "context"],
        label="category",
        columns=["client"],
    )
    clients = PARTITIONERS["by_column"](data.train, None, np.random.default_rng(0), column="client")
    assert clients.names == tuple("0123456789")
    held = clients.counts(data.train.labels, len(data.classes)) > 0
    assert len(clients.order) == 14_931
    assert held.sum(axis=1).max() <= 3
