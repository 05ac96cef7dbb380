"""Columns of tables are read as they are written, or refused with the file, the row (from 1) and the column."""

import codecs
import csv
import decimal
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyrank.data import PARTITIONERS, DataError, Dataset, files, instructions
from polyrank.data.choices import Layout, read_questions

ROWS = 10


def write(path: Path, rows: dict[str, list[Any]]) -> Path:
    """The same table in the format of the path's extension; images in place of texts in an .npz file."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([list(rows), *zip(*rows.values(), strict=True)])
    elif path.suffix == ".npz":
        arrays = {name: np.array(values) for name, values in rows.items() if name != "text"}
        np.savez(path, text=np.zeros((len(rows["text"]), 2, 2), np.uint8), **arrays)
    else:
        found = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
        path.write_text("\n".join(map(json.dumps, found)) if path.suffix == ".jsonl" else json.dumps(found))
    return path


def table(**changed: list[Any]) -> dict[str, list[Any]]:
    usual = {"text": [f"t{n}" for n in range(ROWS)], "label": ["a", "b"] * 5, "site": ["x", "y"] * 5}
    return usual | changed


def read(path: Path) -> Dataset:
    images = path.suffix == ".npz"
    return files(train=path, test=path, columns=["site"], **{"image" if images else "text": "text"})


def sites(data: Dataset) -> tuple[str, ...]:
    names = PARTITIONERS["by_column"](data.train, None, np.random.default_rng(0), column="site").names
    assert names is not None
    return names


def refused(message: str, path: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json", "parquet", "npz"])
@pytest.mark.parametrize(
    "names",
    [
        ("0012", "12"),
        ("007", "0071"),
        ("1.0", "2.0"),
        ("2024-01-02", "2024-01-03"),
        ("2024-01-02T10:00:00", "2024-01-03T10:00:00"),
        ("NA", "null"),
        ("nan", "None"),
        ("False", "true"),
        ("+1", "-0"),
        ("1e3", "A17"),
    ],
)
def test_names_are_text_as_written(tmp_path: Path, suffix: str, names: tuple[str, str]) -> None:
    data = read(write(tmp_path / f"t.{suffix}", table(label=list(names) * 5, site=list(names) * 5)))
    assert sites(data) == data.classes == tuple(sorted(names))


def test_whole_numbers_of_csv_sort_as_numbers_where_nothing_is_lost(tmp_path: Path) -> None:
    ids = ["10", "2", "9"] * 3 + ["2"]
    data = read(write(tmp_path / "t.csv", table(label=ids, site=ids)))
    assert sites(data) == data.classes == ("2", "9", "10")
    data = read(write(tmp_path / "t.csv", table(label=[*ids[:-1], "02"], site=[*ids[:-1], "02"])))
    assert sites(data) == data.classes == ("02", "10", "2", "9")
    large = [str(2**63 + n % 2) for n in range(ROWS)]
    data = read(write(tmp_path / "t.csv", table(label=large, site=large)))
    assert sites(data) == data.classes == (str(2**63), str(2**63 + 1))
    larger = [str(10**30 + n % 2) for n in range(ROWS)]
    assert sites(read(write(tmp_path / "t.csv", table(site=larger)))) == (str(10**30), str(10**30 + 1))


def test_numbers_for_a_megabyte_and_then_text(tmp_path: Path) -> None:
    numbers = [str(n % 3) for n in range(2000)]
    rows = {"text": ["lorem ipsum " * 60] * 2000, "label": [*numbers[:-1], "unknown"], "site": [*numbers[:-1], "A17"]}
    data = read(write(tmp_path / "t.csv", rows))
    assert data.classes == ("0", "1", "2", "unknown")
    assert sites(data) == ("0", "1", "2", "A17")


def test_texts_of_csv_that_are_numbers_or_empty_stay_as_they_are(tmp_path: Path) -> None:
    texts = ["012", "", "1.50", "true", " ", "NA", "2024-01-02", "1", "2", "3"]
    assert read(write(tmp_path / "t.csv", table(text=texts))).train.inputs == texts


@pytest.mark.parametrize("column", ["label", "site"])
@pytest.mark.parametrize(
    ("suffix", "empty"),
    [
        *((suffix, empty) for suffix in ("csv", "json", "jsonl", "parquet", "npz") for empty in ("", "  ", "\u00a0\t")),
        *((suffix, None) for suffix in ("json", "jsonl", "parquet")),
    ],
)
def test_empty_names_are_refused_alike(tmp_path: Path, column: str, suffix: str, empty: str | None) -> None:
    path = write(tmp_path / f"t.{suffix}", table(**{column: ["a", "b"] * 3 + ["a", empty, "b", "a"]}))
    refused(rf"column '{column}' is empty in row 8$", path)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_empty_numbers_and_columns_are_refused_with_their_row(tmp_path: Path, suffix: str) -> None:
    refused(
        "column 'label' is empty in row 8$", write(tmp_path / f"t.{suffix}", table(label=[0, 1] * 3 + [0, None, 1, 0]))
    )
    refused("column 'label' is empty in row 1$", write(tmp_path / f"t.{suffix}", table(label=[None] * ROWS)))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([0.0, 1.0] * 5, "double, such as 0.0 in row 1"),
        ([decimal.Decimal(n % 2) for n in range(ROWS)], "decimal"),
        ([[1, 0], [0, 1]] * 5, "list<"),
        ([b"a", b"b"] * 5, "binary"),
        ([{"a": 1}] * ROWS, "struct<"),
        (np.arange("2024-01-01", "2024-01-11", dtype="datetime64[D]").tolist(), "date32"),
    ],
)
@pytest.mark.parametrize("column", ["label", "site"])
def test_columns_of_parquet_that_name_nothing(tmp_path: Path, column: str, values: list[Any], kind: str) -> None:
    path = write(tmp_path / "t.parquet", table(**{column: values}))
    refused(rf"column '{column}' holds {kind}.*; it must hold whole numbers or text", path)


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", "b"] * 5, pa.large_string()),
        pa.array(["a", "b"] * 5, pa.string_view()),
        pa.array(["a", "b"] * 5).dictionary_encode(),
    ],
)
def test_every_kind_of_text_of_parquet(tmp_path: Path, column: pa.Array) -> None:
    pq.write_table(pa.table(table(text=column, label=column, site=column)), tmp_path / "t.parquet")
    data = read(tmp_path / "t.parquet")
    assert data.classes == sites(data) == ("a", "b")
    assert data.train.inputs == ["a", "b"] * 5


def test_a_null_inside_a_dictionary_is_empty(tmp_path: Path) -> None:
    column = pa.array(["a", None] * 5).dictionary_encode()
    pq.write_table(pa.table(table(label=column)), tmp_path / "t.parquet")
    refused("column 'label' is empty in row 2$", tmp_path / "t.parquet")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "npz"])
def test_true_and_false_are_one_and_zero(tmp_path: Path, suffix: str) -> None:
    data = read(write(tmp_path / f"t.{suffix}", table(label=[True, False] * 5, site=[True, False] * 5)))
    assert data.classes == sites(data) == ("0", "1")
    assert data.train.labels.tolist() == [1, 0] * 5


@pytest.mark.parametrize("column", ["label", "site"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.0, 1.0] * 5, "holds double"),
        ([[0, 1]] * ROWS, r"has shape \(10, 2\)"),
        ([1j, 2j] * 5, "holds complex128"),
    ],
)
def test_arrays_that_name_nothing(tmp_path: Path, column: str, values: list[Any], message: str) -> None:
    refused(rf"'{column}' {message}", write(tmp_path / "t.npz", table(**{column: values})))


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("label", 17, r"column 'label' holds 'a' in row 1 and 17 in row 8; it must hold whole numbers or text"),
        ("site", True, r"column 'site' holds 'x' in row 1 and True in row 8"),
        ("label", ["a"], r"column 'label' holds 'a' in row 1 and \['a'\] in row 8"),
        ("text", 17, r"row 8: column 'text' holds 17; it must hold text, in quotes"),
        ("text", {"a": 1}, r"row 8: column 'text' holds {'a': 1}"),
    ],
)
def test_values_of_json_of_another_kind(tmp_path: Path, suffix: str, column: str, value: Any, message: str) -> None:
    rows = table()
    rows[column][7] = value
    refused(message, write(tmp_path / f"t.{suffix}", rows))


def test_numbers_of_json(tmp_path: Path) -> None:
    data = read(write(tmp_path / "t.jsonl", table(label=[2**64 - 1, 3] * 5)))
    assert data.classes == ("3", str(2**64 - 1))
    refused("more than 64 bits; write them as text", write(tmp_path / "t.jsonl", table(label=[2**64, 3] * 5)))
    refused("'label' holds double", write(tmp_path / "t.jsonl", table(label=[1.0, 2.0] * 5)))


def test_rows_of_json_that_are_wrong_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", table())
    lines = path.read_text().splitlines()
    for row, line, message in (
        (1, '{"label": "a"}', "row 1: no column 'text'. There are: label"),
        (8, '{"site": "x"}', "column 'label' is empty in row 8"),
        (8, '\n{"text": "a", "label"', "row 8: "),
        (8, '["a"]', "row 8 is not a JSON object"),
        (8, '{"text": "a", "label": "b", "label": "c"}', "row 8: key 'label' is given twice"),
    ):
        path.write_text("\n".join([*lines[: row - 1], line, *lines[row:]]))
        refused(message, path)


WHOLE = {
    "t.csv": "text,label,site\nä,a,x\nb,b,y\n",
    "t.jsonl": '{"text": "ä", "label": "a", "site": "x"}\n{"text": "b", "label": "b", "site": "y"}\n',
    "t.json": '[{"text": "ä", "label": "a", "site": "x"}, {"text": "b", "label": "b", "site": "y"}]',
}


@pytest.mark.parametrize("name", WHOLE)
def test_marks_of_byte_order_and_other_encodings(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(codecs.BOM_UTF8 + WHOLE[name].encode())
    assert read(path).train.inputs == ["ä", "b"]
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        path.write_bytes(WHOLE[name].encode(encoding))
        refused("its bytes look like UTF-16; save the file as UTF-8", path)
    path.write_bytes(WHOLE[name].encode("latin-1"))
    line = 2 if name == "t.csv" else 1
    refused(rf"line {line} is not UTF-8 \(byte 0xe4, as of Latin-1.*save the file as UTF-8", path)
    path.write_bytes(WHOLE[name].replace("site", "sité").encode("latin-1"))
    refused("line 1 is not UTF-8", path)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("place", [0, 5, 9])
def test_cells_of_any_length(tmp_path: Path, suffix: str, place: int) -> None:
    texts = [f"t{n}" for n in range(ROWS)]
    texts[place] = "a word, " * (20_000_000 // 8)
    assert read(write(tmp_path / f"t.{suffix}", table(text=texts))).train.inputs == texts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text;label;site\na;b;c\n", r"no column 'text': the header, 'text;label;site', looks separated by ';'"),
        ("text\tlabel\tsite\na\tb\tc\n", "looks separated by tabs; save the file with commas between its columns"),
        (" text,label ,site\na,b,c\n", "no column 'text'; did you mean ' text'. There are: ' text', 'label ', site"),
        ("text,label,site,label\na,b,c,d\n", "2 columns are called 'label'; give each a name of its own"),
        ("text,label,site\na,b,c\n\na,b\n", r"row 2: has 2 cells, and the header 3: 'a,b' "),
        ('text,label,site\n"x\ny",b,c\na,b,c,d\n', r"row 2: has 4 cells, and the header 3: 'a,b,c,d' "),
        ('text,label,site\na,b,c\na,"b,c\nd,e,f\n', r"row 2: has 2 cells, and the header 3"),
        (
            'text,label,site\na,b,c\na,b,"c\nd,e,f\n',
            r"row 2: a double quote begins a cell, and none ends it: 'c\\nd,e,f",
        ),
        ("text,label,site\n", "no examples"),
        ("\n\n", "it is empty"),
    ],
)
def test_csv_that_is_not_what_it_should_be(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    refused(message, path)


def test_the_last_cell_may_hold_lines_and_other_columns_may_share_a_name(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b'x,x,label,text\r\n1,2,a,"b\r\nc"\r\n1,2,b,"d\ne"\r\n\r\n')
    assert files(train=path, test=path, text="text").train.inputs == ["b\r\nc", "d\ne"]


def test_a_folder_that_looks_like_a_column_adds_none(tmp_path: Path) -> None:
    (tmp_path / "label=z").mkdir()
    assert read(write(tmp_path / "label=z" / "t.parquet", table())).classes == ("a", "b")


def test_instructions_read_the_same_columns(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("\ufeffinstruction,output,site,kind\n012,1.0,0012,07\n3,true,12,7\n", encoding="utf-8")
    data = instructions(train=path, test=path, label="kind", columns=["site"])
    assert [(turn.instruction, turn.response) for turn in data.train.inputs] == [("012", "1.0"), ("3", "true")]
    assert sites(data) == ("0012", "12")
    assert data.classes == ("07", "7")
    path.write_text("instruction,output,site,kind\na,b,c,\n")
    with pytest.raises(DataError, match=r"t\.csv: column 'kind' is empty in row 1"):
        instructions(train=path, test=path, label="kind")
    path.write_text('instruction;output\na;b\n"c";d\n')
    with pytest.raises(DataError, match=r"t\.csv: no column 'instruction': .* looks separated by ';'"):
        instructions(train=path, test=path)


def test_questions_read_the_same_files(tmp_path: Path) -> None:
    path, layout = tmp_path / "q.csv", Layout(choices=["a", "b"])
    path.write_text("\ufeffquestion,a,b,answer\n" + "x" * 200_000 + ",01,2,1\n", encoding="utf-8")
    (question,) = read_questions(path, layout)
    assert (len(question.input), question.choices, question.answer) == (200_000, ("01", "2"), 1)
    lines = tmp_path / "q.jsonl"
    lines.write_text(
        "\ufeff" + json.dumps({"question": "x\u2028y", "choices": ["1", "2"], "answer": 0}, ensure_ascii=False)
    )
    assert read_questions(lines, Layout())[0].input == "x\u2028y"
    for data, message in (
        ("question,a,b,answer\né,1,2,0\n".encode("latin-1"), "line 2 is not UTF-8"),
        ("question,a,b,answer\n".encode("utf-16"), "UTF-16"),
        (b"question;a;b;answer\nx;1;2;0\n", "looks separated by ';'"),
        (b"question,a,b,answer\nx,1,2\n", "row 1: has 3 cells, and the header 4"),
        (b"question,a,b,answer\n", "no questions"),
    ):
        path.write_bytes(data)
        with pytest.raises(DataError, match=message):
            read_questions(path, layout)
