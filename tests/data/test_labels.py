"""Labels are numbered by the values that occur, or by a list of names: alike in all splits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyrank.data import DataError, Dataset, files
from polyrank.experiment.loading import parse
from polyrank.experiment.shares import share_data


def split(path: Path, labels: Any, names: list[str] | None = None) -> Path:
    """A file of as many examples as there are labels; `names`: of classes, as the library `datasets` notes them."""
    texts = [f"t{n}" for n in range(len(labels))]
    if path.suffix == ".csv":
        path.write_text("text,label\n" + "".join(f"{t},{label}\n" for t, label in zip(texts, labels, strict=True)))
        return path
    made = pa.table({"text": texts, "label": labels})
    if names:
        note = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        made = made.replace_schema_metadata({"huggingface": json.dumps(note)})
    pq.write_table(made, path)
    return path


def read(folder: Path, train: Any, test: Any = None, suffix: str = "parquet", **options: Any) -> Dataset:
    paths = {"train": split(folder / f"train.{suffix}", train)}
    paths["test"] = paths["train"] if test is None else split(folder / f"test.{suffix}", test)
    return files(**paths, text="text", **options)


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
@pytest.mark.parametrize(
    "values",
    [
        [0, 1, 2],
        [1, 2, 3],
        [1, 3, 5],
        [2, 9, 10],
        [401, 501, 999],
        [20231105, 20231106, 20241105],
        [4_000_000_000, 4_000_000_001, 5_000_000_000],
        [5, 2**63, 2**63 + 1],
    ],
)
def test_whole_numbers_are_numbered_in_order_whatever_they_are(tmp_path: Path, suffix: str, values: list[int]) -> None:
    dtype = np.uint64 if max(values) >= 2**63 else np.int64
    train, test = np.array(values[::-1] * 2, dtype), np.array(values[:1], np.int64)
    data = read(tmp_path, train, test, suffix)
    assert data.classes == tuple(map(str, values))
    assert data.train.labels.tolist() == [2, 1, 0] * 2
    assert data.test.labels.tolist() == [0]
    assert data.train.labels.dtype == data.test.labels.dtype == np.int64


def test_all_splits_are_numbered_together(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = read(tmp_path, [7, 3], [5, 3])
    assert (data.classes, data.train.labels.tolist(), data.test.labels.tolist()) == (("3", "5", "7"), [2, 0], [1, 0])
    assert caplog.messages == [
        f"{tmp_path / 'train.parquet'}: nothing is learnt of classes that other splits alone have: 5"
    ]
    data = read(tmp_path, ["1", "2"], ["2", "unknown"], "csv")
    assert (data.classes, data.train.labels.tolist(), data.test.labels.tolist()) == (
        ("1", "2", "unknown"),
        [0, 1],
        [1, 2],
    )
    data = read(tmp_path, ["b", "a"], ["a"])
    assert (data.classes, data.train.labels.tolist()) == (("a", "b"), [1, 0])


def test_numbers_written_in_two_ways_are_two_classes(tmp_path: Path) -> None:
    assert read(tmp_path, ["01", "1", "2"], suffix="csv").classes == ("01", "1", "2")


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_labels_below_zero_are_refused(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(
        DataError, match=r"row 2: label -1 \(a hidden test label\? choose another split\); labels are wh"
    ):
        read(tmp_path, [0, 1], [0, -1], suffix)
    with pytest.raises(DataError, match=r"train\.\w+: row 3: label -3; labels are whole numbers from 0, or text"):
        read(tmp_path, [0, 1, -3], suffix=suffix)
    with pytest.raises(DataError, match=r"row 1: label -1 \(a hidden test label"):
        read(tmp_path, ["yes", "no"], [-1, -1], suffix)


def test_a_list_of_classes_is_kept_and_whole_numbers_are_its_indices(tmp_path: Path) -> None:
    data = read(tmp_path, [2, 0], classes=["x", "y", "z"])
    assert (data.classes, data.train.labels.tolist()) == (("x", "y", "z"), [2, 0])
    data = read(tmp_path, ["z", "x"], suffix="csv", classes=["z", "y", "x"])
    assert (data.classes, data.train.labels.tolist()) == (("z", "y", "x"), [0, 2])
    data = read(tmp_path, [4, 0], classes=["1", "2", "3", "4", "5"])
    assert data.train.labels.tolist() == [4, 0]
    for labels, message in (
        ([0, 3], "row 2: label 3, but there are 3 classes; labels are 0 to 2"),
        ([0, -1], r"row 2: label -1 \(a hidden test label.*labels are 0 to 2"),
        (["x", "yy"], "row 2: label: no class 'yy'; did you mean 'y'"),
    ):
        with pytest.raises(DataError, match=message):
            read(tmp_path, labels, classes=["x", "y", "z"])


@pytest.mark.parametrize("labels", [[1, 2], [3, 1]])
def test_labels_that_may_be_names_or_indices_are_refused(tmp_path: Path, labels: list[int]) -> None:
    with pytest.raises(DataError, match=r"label \d may be the class '\d' or an index, from 0, into 1, 2, 3; leave"):
        read(tmp_path, labels, classes=["1", "2", "3"])
    assert read(tmp_path, [str(n) for n in labels], classes=["1", "2", "3"]).classes == ("1", "2", "3")
    assert read(tmp_path, [0, 2], classes=["0", "1", "2"]).train.labels.tolist() == [0, 2]


def test_names_that_stand_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.classes: 'x' stands twice"):
        read(tmp_path, [0, 1], classes=["x", "y", "x"])


def test_names_of_the_metadata_are_kept_and_agree(tmp_path: Path) -> None:
    train = split(tmp_path / "train.parquet", [2, 0], ["no", "yes", "maybe"])
    test = split(tmp_path / "test.parquet", [0], ["no", "yes", "maybe"])
    data = files(train=train, test=test, text="text")
    assert (data.classes, data.train.labels.tolist()) == (("no", "yes", "maybe"), [2, 0])
    split(test, [0], ["yes", "no", "maybe"])
    with pytest.raises(DataError, match=r"test\.parquet: its metadata has other class names than .*train\.parquet's"):
        files(train=train, test=test, text="text")
    split(train, [1, 2], ["1", "2", "3"])  # the library's labels are always indices
    assert files(train=train, test=train, text="text").train.labels.tolist() == [1, 2]


def test_a_file_of_classes_may_begin_with_a_mark_of_byte_order(tmp_path: Path) -> None:
    names = tmp_path / "names.json"
    names.write_text('\ufeff["é", "x"]', encoding="utf-8")
    assert read(tmp_path, [0, 1], classes=names).classes == ("é", "x")
    names.write_bytes('["é", "x"]'.encode("latin-1"))
    with pytest.raises(DataError, match=r"names\.json is not a readable JSON file: line 1 is not UTF-8"):
        read(tmp_path, [0, 1], classes=names)


def test_one_class_alone_is_refused_unless_a_list_names_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = split(tmp_path / "one.csv", ["a"] * 20), split(tmp_path / "two.csv", ["a", "b"])

    def shares(**options: Any) -> Any:
        data = {"name": "files", "train": str(one), "test": str(two), "text": "text", "clients": 2, **options}
        raw = {"rounds": 1, "model": {"name": "x"}, "data": data, "fleet": [{"rank": 2}]}
        return share_data(parse(raw, "x", tmp_path)).dataset

    for test in (one, two):
        with pytest.raises(
            DataError, match=r"files: every training example is of class 'a'; .* list all classes in data"
        ):
            shares(test=str(test))
    with pytest.raises(DataError, match="every training example is of class 'a'"):
        shares(test=str(one), classes=["a"])
    caplog.clear()
    assert shares(classes=["b", "a"]).classes == ("b", "a")
    assert caplog.messages == ["files: every training example is of class 'a', of 2"]
    assert len(files(train=one, test=one, text="text").classes) == 1  # a site may hold one class alone
