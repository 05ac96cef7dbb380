"""Charts as plain data: a figure of every kind from three rounds, and what becomes of records that are unlike."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from polyrank.methods.named import METHODS
from polyrank.report import charts
from polyrank.report.charts.curves import client_spread, worst_client
from polyrank.report.charts.outcomes import pareto
from polyrank.report.charts.shapes import Chart, Heat, Lines, scaled, thinned
from polyrank.report.gather import Gathered, gather
from polyrank.report.goal import ACCURACY, NATS
from polyrank.report.paper import drawn
from polyrank.report.styles import COLORS, style_of
from polyrank.report.tables import summarise
from polyrank.report.web import ALPHABET, spec
from recorded import write_run, write_study

KINDS = {
    *("ranking", "accuracy", "accuracy_over_bytes", "accuracy_over_seconds", "loss", "front", "budget_memory"),
    *("budget_uplink", "client_accuracy", "clients", "worst_client", "client_spread", "attendance", "ranks"),
    *("importance", "aggregation_error", "epsilon_clients", "confusion"),
}


def charts_of(gathered: Gathered) -> dict[str, Chart]:
    table = summarise(gathered)
    sections, missing = charts.sections(gathered, table)
    made = [*charts.hero(gathered, table), *(chart for section in sections for chart in section.charts)]
    keys = {chart.key for chart in made}
    assert not keys & {key.replace(" ", "_") for key, _ in missing}
    return {chart.key: chart for chart in made}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Gathered:
    return gather([write_study(tmp_path_factory.mktemp("made") / "study", ("single", "hralora", "fedit"), (0, 1))])


def test_three_rounds_give_every_kind(study: Gathered) -> None:
    assert charts_of(study).keys() == KINDS


@pytest.mark.parametrize("key", sorted(KINDS))
def test_every_kind_is_drawn_twice_alike(study: Gathered, key: str) -> None:
    """On paper in three formats, and for the page as JSON."""
    chart = charts_of(study)[key]
    files = dict(drawn(chart))
    assert files == dict(drawn(chart))
    assert {name.rsplit(".", 1)[1] for name in files} == {"pdf", "svg", "png"}
    assert all(data.startswith((b"%PDF", b"<?xml", b"\x89PNG")) for data in files.values())
    assert b"CreationDate" not in b"".join(files.values())
    assert b"<dc:date>" not in b"".join(files.values())
    assert json.loads(json.dumps(spec(chart), allow_nan=False)) == spec(charts_of(study)[key])


def test_curves_are_means_over_seeds(study: Gathered) -> None:
    entry = study.entries[1]
    line = next(line for line in charts_of(study)["accuracy_over_bytes"].lines if line.label == "hralora")
    accuracy = np.array([[r.metrics["validation/accuracy"] for r in run.rounds] for run in entry.runs])
    sent = np.array([np.cumsum([r.bytes_up + r.bytes_down for r in run.rounds]) for run in entry.runs])
    np.testing.assert_allclose(line.y, accuracy.mean(axis=0))
    np.testing.assert_allclose(line.spread, accuracy.std(axis=0, ddof=1))
    np.testing.assert_allclose(np.array(line.x) / line.x[-1], sent.mean(axis=0) / sent.mean(axis=0)[-1])


def of_clients(study: Gathered, label: str, key: str) -> np.ndarray:
    """What clients have on their own data, as the files say: seeds x rounds x clients."""
    entry = next(entry for entry in study.entries if entry.label == label)
    texts = [(run.folder / "rounds.jsonl").read_text() for run in entry.runs]
    lines = [[json.loads(line) for line in text.splitlines()] for text in texts]
    return np.array([[[own[key] for own in line["client_metrics"].values()] for line in run] for run in lines])


@pytest.mark.parametrize("label", ["single", "hralora", "fedit"])
def test_worst_client_and_spread_are_those_of_the_records(study: Gathered, label: str) -> None:
    """Over seeds: the worst one has the least accuracy; the spread is over clients."""
    made, accuracy = charts_of(study), of_clients(study, label, "accuracy")
    assert (accuracy.min(axis=2) < accuracy.max(axis=2)).all()
    for key, value in (("worst_client", accuracy.min(axis=2)), ("client_spread", accuracy.std(axis=2))):
        line = next(line for line in made[key].lines if line.label == label)
        np.testing.assert_allclose(line.y, value.mean(axis=0))
        np.testing.assert_allclose(line.spread, value.std(axis=0, ddof=1))


def test_of_language_models_the_worst_client_has_the_highest_loss() -> None:
    losses = {"a": 2.5, "b": 3.5, "c": 1.0}
    round_ = SimpleNamespace(clients=losses)
    assert worst_client(NATS)(round_) == 3.5
    assert worst_client(ACCURACY)(round_) == 1.0
    assert client_spread(round_) == pytest.approx(np.std([2.5, 3.5, 1.0]))
    assert worst_client(NATS)(SimpleNamespace(clients={})) is None


def test_only_what_sends_is_drawn_over_bytes(study: Gathered) -> None:
    made = charts_of(study)
    assert [line.label for line in made["accuracy"].lines] == ["single", "hralora", "fedit"]
    assert [line.label for line in made["accuracy_over_bytes"].lines] == ["hralora", "fedit"]
    assert [point.label for point in made["front"].points] == ["hralora", "fedit"]
    assert [level.label for level in made["front"].levels] == ["single"]


def test_a_finished_seed_is_not_mixed_with_an_unfinished_one(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", ("fedit",), (0, 1))
    lines = (study / "runs/fedit/seed-1/rounds.jsonl").read_text().splitlines(keepends=True)
    (study / "runs/fedit/seed-1/rounds.jsonl").write_text(lines[0])
    (study / "runs/fedit/seed-1/summary.json").unlink()
    (line,) = charts_of(gather([study]))["accuracy"].lines
    assert line.x == (1, 2, 3)
    assert line.spread == ()


def test_rank_maps_keep_ranks_and_share_pictures(study: Gathered) -> None:
    maps = {panel.label: panel for panel in charts_of(study)["ranks"].panels}
    assert list(maps) == ["hralora, seed 0", "fedit, seed 0"]
    fedit = maps["fedit, seed 0"]
    assert [frame.label for frame in fedit.frames] == ["rounds 1-3"]
    assert fedit.rows[0] == "client_00 (small)"
    assert set(np.unique(fedit.frames[0].values)) == {2.0, 6.0, 16.0}
    assert fedit.starts == ((0, "block 0"), (4, "block 1"))
    assert len(maps["hralora, seed 0"].frames) == 3
    encoded = spec(charts_of(study)["ranks"])
    codes, rows = encoded["codes"], encoded["panels"][0]["frames"][0]["rows"]
    decoded = [[np.nan if c == ALPHABET[0] else codes[ALPHABET.index(c) - 1] for c in row] for row in rows]
    np.testing.assert_array_equal(decoded, maps["hralora, seed 0"].frames[0].values)


def test_the_page_reads_the_alphabet_that_is_written() -> None:
    """What page.js builds: the printable letters from 35 on, without those that need an escape in HTML or JSON."""
    assert "".join(c for c in map(chr, range(35, 127)) if c not in "\\\"<>&'") == ALPHABET


def test_absence_is_drawn_where_it_was(study: Gathered) -> None:
    chart = charts_of(study)["attendance"]
    values = chart.panels[0].frames[0].values
    assert chart.categories[int(values[0, 1])] == "did not answer"
    assert chart.categories[int(values[1, 2])] == "refused"
    assert (values == 1).sum() == values.size - 2


def test_many_clients_and_layers(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "hralora", clients=1000, layers=224, cohort=100, rounds=3)
    made = charts_of(gather([run]))
    for key in ("ranks", "attendance"):
        assert len(made[key].panels[0].rows) == 60
        assert max(len(name) for name, _ in drawn(made[key])) < 40
    assert len(made["ranks"].panels[0].columns) == 224
    assert "at most 60 of" in made["ranks"].says
    trouble = made["attendance"].panels[0].frames[0].values
    assert (trouble >= 2).any(axis=1).sum() == 2  # those with trouble are among the 60


def test_what_the_records_lack_is_left_out(tmp_path: Path) -> None:
    quiet = charts_of(gather([write_run(tmp_path / "quiet", "fedit", links=False, trouble=False)]))
    assert not {"accuracy_over_seconds", "attendance"} & quiet.keys()
    untrained = charts_of(gather([write_run(tmp_path / "untrained", "zero_shot")]))
    assert untrained.keys() == {"client_accuracy", "clients", "confusion"}
    begun = charts_of(gather([write_run(tmp_path / "begun", "fedit", done=0)]))
    assert begun.keys() == {"budget_memory", "budget_uplink"}
    old = write_run(tmp_path / "old", "fedit")
    (old / "setting.json").unlink()
    assert {"ranks", "importance", "accuracy"} <= charts_of(gather([old])).keys()


def test_missing_values_in_a_round_are_gaps(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "fedit")
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    lines[1]["metrics"] = {}
    lines[1]["losses"] = {}
    lines[2]["aggregation_error"] = float("nan")
    (run / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = charts_of(gather([run]))
    assert made["accuracy"].lines[0].x == (1, 3)
    assert made["loss"].lines[0].x == (1, 3)
    assert made["aggregation_error"].lines[0].x == (1, 2)


def test_the_front_is_what_nothing_beats() -> None:
    assert pareto([(3, 0.9), (1, 0.5), (2, 0.4), (1, 0.6), (4, 0.9)]) == ((1, 0.6), (3, 0.9))
    assert pareto([]) == ()


def test_thinning_keeps_both_ends() -> None:
    assert thinned(3, 5) == [0, 1, 2]
    assert thinned(1000, 4) == [0, 333, 666, 999]
    assert scaled("sent", [3e6], "bytes")[0].title == "sent (MB)"
    assert scaled("sent", [], "bytes")[0].title == "sent (kB)"


def test_long_series_are_thinned(tmp_path: Path) -> None:
    made = charts_of(gather([write_run(tmp_path / "run", "fedit", rounds=900, clients=3, layers=4)]))
    assert len(made["accuracy"].lines[0].x) == 400
    assert len(made["ranks"].panels[0].frames) <= 40
    assert made["attendance"].panels[0].frames[0].values.shape[1] == 200
    assert all(isinstance(chart, Lines | Heat | Chart) for chart in made.values())


def test_every_method_has_a_look_of_its_own() -> None:
    looks = {name: style_of(name) for name in [*METHODS, "single", "local", "zero_shot"]}
    assert len({(look.color, look.marker, look.dash) for look in looks.values()}) == len(looks)
    assert {looks[name].color for name in METHODS} == set(COLORS)
    first = [style_of(name) for name in ("fedit", "hetlora", "flexlora", "rb_lora", "hralora", "fed_hello")]
    assert len({look.color for look in first}) == len({look.marker for look in first}) == 6


def test_a_look_does_not_depend_on_company() -> None:
    assert style_of("fedit").color == "#0072B2"
    assert style_of("mine") == style_of("mine")
    assert style_of("fedit", 1).color == style_of("fedit").color
    assert style_of("fedit", 1).dash != style_of("fedit").dash


def test_colours_differ_for_colour_blind_readers() -> None:
    """Simulated after Machado et al. (2009), severity 1; distances are of CIELAB."""
    blind = {
        "protanopia": [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        "deuteranopia": [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.01182, 0.04294, 0.968881],
        ],
        "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
    }
    colors = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in COLORS])
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    for matrix in [np.eye(3), *map(np.array, blind.values())]:
        labs = _lab(np.clip(linear @ matrix.T, 0, 1))
        gaps = np.linalg.norm(labs[:, None] - labs[None], axis=-1)
        assert gaps[np.triu_indices(len(COLORS), 1)].min() > 9


def _lab(linear: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)
