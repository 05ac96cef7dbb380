"""The summary table: its numbers from the records, what it says in words, and its formats."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from polyrank.report import tables
from polyrank.report.answers import answers
from polyrank.report.gather import gather
from polyrank.report.goal import ACCURACY
from polyrank.report.measures import Value, over_seeds
from polyrank.report.tables import Column, Row, Table, leaders, summarise
from recorded import write_run, write_study


def plain_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def test_the_numbers_are_the_records(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", ("hralora",), (0, 1, 2))
    (row,) = [row for row in summarise(gather([study])).rows if row.entry]
    folders = [study / f"runs/hralora/seed-{seed}" for seed in range(3)]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    finals = [s["final"]["test"]["accuracy"] for s in summaries]
    assert row.values["final"].mean == pytest.approx(np.mean(finals))
    assert row.values["final"].spread == pytest.approx(np.std(finals, ddof=1))
    assert row.values["selected"].mean == pytest.approx(np.mean([s["selected"]["test"]["accuracy"] for s in summaries]))
    assert row.values["mcc"].mean == pytest.approx(np.mean([s["final"]["test"]["mcc"] for s in summaries]))
    assert row.values["up"].mean == pytest.approx(np.mean([s["bytes_up"] for s in summaries]))
    assert row.values["wall"].mean == pytest.approx(1.5)
    assert row.seeds == "3"
    own = [[v["accuracy"] for v in s["final"]["clients"].values()] for s in summaries]
    assert row.values["worst"].mean == pytest.approx(np.mean([min(o) for o in own]))
    assert row.values["uneven"].mean == pytest.approx(np.mean([np.std(o) for o in own]))
    # by hand: d_out = 32, d_in = 16; A and B are trained in even rounds, B alone in odd ones; 170 of the head
    counts = [
        [sum(own.values()) * (48 if line["factors"] == "AB" else 32) + 170 for own in line["ranks"].values()]
        for folder in folders[:1]
        for line in plain_lines(folder)
    ]
    assert row.values["largest"].single[0] == np.max(counts)
    assert row.values["average"].single[0] == pytest.approx(np.mean(counts))


def test_memory_is_measured_or_said_to_be_predicted(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", ("fedit",), (0,))
    memory = summarise(gather([study])).rows[0].values["memory"]
    assert (memory.mean, memory.note) == (7.2e7, "")
    study = write_study(tmp_path / "other", ("fedit",), (0, 1))  # seed 1 has not measured any
    table = summarise(gather([study]))
    memory = table.rows[0].values["memory"]
    assert memory.note == "predicted"
    assert memory.mean == pytest.approx(
        max(v for line in plain_lines(study / "runs/fedit/seed-0") for v in line["predicted_memory"].values())
    )
    assert "MiB (p)" in tables.markdown(table)


def test_rows_are_ranked_and_unfinished_seeds_are_counted(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study")
    (study / "runs/fedit/seed-1/summary.json").unlink()
    table = summarise(gather([study]))
    assert [row.method for row in table.rows] == ["single", "hralora", "hetlora", "fedit", "local", "zero_shot"]
    fedit = table.rows[3]
    assert fedit.seeds == "1 of 2"
    assert fedit.values["final"].spread is None
    assert table.rows[-1].values["up"] is None
    assert table.rows[-1].values["selected"] is None


def test_baselines_of_a_summary_are_rows_of_their_own(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "fedit")
    summary = json.loads((run / "summary.json").read_text())
    alone = {"single": {"test": {"accuracy": 0.9}}, "local": {"mean_accuracy": 0.4}}
    (run / "summary.json").write_text(json.dumps({**summary, "baselines": alone}))
    table = summarise(gather([run]))
    assert [(row.method, row.values["final"].mean) for row in table.rows if row.entry is None] == [
        ("single", 0.9),
        ("local", 0.4),
        ("zero_shot", 0.1),
    ]
    assert any("as expected" in note for note in tables.ordering(table))


def test_the_order_of_baselines_is_checked_in_words(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", seeds=(0, 1, 2))
    table = summarise(gather([study]))
    single, local = (
        tables.said(ACCURACY, row.values["final"]) for row in table.rows if row.method in ("single", "local")
    )
    assert tables.ordering(table) == (
        f"No federated method is above pooled training (single, {single}), as expected.",
        f"No federated method is below training alone (local, {local}), as expected.",
    )
    for seed in range(3):
        path = study / f"runs/single/seed-{seed}/summary.json"
        summary = json.loads(path.read_text())
        summary["final"]["test"]["accuracy"] = 0.842 + 0.01 * seed
        path.write_text(json.dumps(summary))
    said = tables.ordering(summarise(gather([study])))
    assert said[0].startswith("The expected order does not hold: above pooled training (single, ")
    assert "hralora" in said[0]
    assert "hetlora" not in said[0]
    assert said[1] == "Within the spread over seeds of pooled training: hetlora."


@pytest.mark.parametrize(
    ("a", "b", "word"),
    [((0.9, 0.91), (0.5, 0.52), "more"), ((0.5, 0.6), (0.54, 0.58), "alike"), ((0.1,), (0.2,), "less")],
)
def test_a_difference_counts_beyond_the_larger_spread(a: tuple, b: tuple, word: str) -> None:
    assert tables.beats(over_seeds(a), over_seeds(b)) == word


def test_formats_hold_the_same_numbers(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", ("hralora", "fedit"))
    table = summarise(gather([study]))
    rows = list(csv.DictReader(io.StringIO(tables.as_csv(table))))
    assert float(rows[0]["final (share)"]) == table.rows[0].values["final"].mean
    assert float(rows[0]["final (share) sd"]) == table.rows[0].values["final"].spread
    shown = tables.written("percent", table.rows[0].values["final"])
    assert f"| hralora | - | 2 | {shown} |" in tables.markdown(table)
    assert shown.replace("±", r"$\pm$") in tables.latex(table)
    assert {len(line.split(" & ")) for line in tables.latex(table).splitlines() if "&" in line} == {
        len(table.columns) + 3
    }


def test_names_cannot_break_a_format() -> None:
    row = Row("a|b_c & <i>", "100% {x}\\y", "1", {"final": over_seeds([0.5])}, None)
    table = Table(tables.columns_for(ACCURACY)[:1], (row,))
    assert r"| a\|b_c &#38; &#60;i&#62; | 100% {x}\\y | 1 | 50.00 |" in tables.markdown(table)
    assert r"a|b\_c \& <i> & 100\% \{x\}\textbackslash{}y & 1 & 50.00 \\" in tables.latex(table)
    assert next(csv.DictReader(io.StringIO(tables.as_csv(table))))["method"] == "a|b_c & <i>"


def test_answers_name_the_winner_and_how_sure_it_is(tmp_path: Path) -> None:
    def answered(folder: Path):
        gathered = gather([folder])
        return answers(gathered, summarise(gathered))

    clear = answered(write_study(tmp_path / "clear", seeds=(0, 1, 2)))
    assert clear.title == "hralora leads with 87.27 ± 0.49 %"
    assert "more than the spread" in clear.lead
    assert {f.title: f.careful for f in clear.facts}["Trust"] is False
    one = answered(write_study(tmp_path / "one", ("hralora", "hetlora"), (0,)))
    assert one.title == "hralora leads on one seed"
    assert "one seed" in one.lead
    alone = answered(write_run(tmp_path / "alone", "fedit"))
    assert alone.title.startswith("fedit reached")
    assert "3 rounds" in alone.lead
    going = answered(write_run(tmp_path / "going", "fedit", done=2))
    assert going.title == "No run has finished yet"
    assert "after round 2" in going.facts[1].says
    base = answered(write_run(tmp_path / "base", "zero_shot"))
    assert base.title.startswith("zero_shot reached")


@pytest.mark.parametrize(
    ("means", "better", "best"),
    [
        ((5, 5, 7), "low", {"a", "b"}),
        ((5, 5, 7), "high", {"c"}),
        ((5, 5, 5), "high", set()),
        ((5, None, 5), "low", {"a", "c"}),
        ((None, None, None), "low", set()),
    ],
)
def test_rows_that_are_best_together_lead(means: tuple[float | None, ...], better: str, best: set[str]) -> None:
    values = [None if mean is None else Value(mean, None, (mean,)) for mean in means]
    rows = [Row(name, "", "1", {"x": value}, None) for name, value in zip("abc", values, strict=True)]
    assert leaders([Column("x", "x", "What it is.", "score", better)], rows) == {"x": best}
