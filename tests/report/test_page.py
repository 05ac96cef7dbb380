"""The page as a file: self-contained, safe, the same every time, and never in the place of anything else."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from polyrank.cli import app
from polyrank.report.make import make
from polyrank.report.page import MARKER
from polyrank.report.web import embedded
from recorded import HOSTILE, write_hostile, write_run, write_study


class Reader(HTMLParser):
    """Elements and ids of a page, and what its attributes load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        self.tags.append(tag)
        self.ids += [own["id"]] if own.get("id") else []
        self.links += [own["href"]] if own.get("href") else []
        self.loads += [own[key] for key in ("src", "srcset", "data", "action") if own.get(key)]


def test_the_page_is_whole(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study")
    assert make([study], study / "report.html") == {"page": study / "report.html"}
    text = (study / "report.html").read_text()
    page = Reader(text)
    assert text.splitlines()[:2] == [MARKER, "<!doctype html>"]
    assert page.loads == []
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("script") == 3
    assert page.tags.count("link") == 0
    assert "default-src 'none'" in text
    assert "@import" not in text
    assert page.tags.count("figure") == len(json.loads(re.search(r'id="charts">(.*?)</script>', text, re.S)[1]))
    assert str(tmp_path) not in text
    assert len(text) < 6_000_000


def test_names_from_files_are_text(tmp_path: Path) -> None:
    study = write_hostile(tmp_path / "study", HOSTILE)
    make([study], tmp_path / "report.html")
    page = Reader((tmp_path / "report.html").read_text())
    assert page.tags.count("script") == 3
    assert "img" not in page.tags
    assert json.loads(embedded({"a": HOSTILE})) == {"a": HOSTILE}
    assert "<" not in embedded({"a": HOSTILE})


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    """In processes that hash differently and stand elsewhere."""
    study = write_study(tmp_path / "study", ("fedit",), (0, 1))
    made = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        command = [sys.executable, "-m", "polyrank.cli", "report", str(study), "--out", str(folder / "r.html")]
        command += ["--figures", str(folder), "--tables", str(folder)]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": seed})
        made.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert made[0].keys() == made[1].keys()
    assert len(made[0]) > 40
    assert [name for name in made[0] if made[0][name] != made[1][name]] == []


def test_only_a_report_is_replaced(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "fedit")
    page = tmp_path / "report.html"
    make([run], page)
    first = page.read_bytes()
    make([run], page)
    assert page.read_bytes() == first
    page.write_text("mine")
    done = CliRunner().invoke(app, ["report", str(run), "--out", str(page)])
    assert done.exit_code == 2
    assert "is no report of polyrank" in done.stderr
    assert page.read_text() == "mine"
    done = CliRunner().invoke(app, ["report", str(run), "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "is a folder" in done.stderr


def test_only_figures_of_a_report_are_replaced(tmp_path: Path) -> None:
    run, figures = write_run(tmp_path / "run", "zero_shot"), tmp_path / "figures"
    make([run], tmp_path / "report.html", figures)
    make([run], tmp_path / "report.html", figures, figures)  # its own, again
    assert (figures / "summary.md").is_file()
    assert (figures / "confusion.pdf").is_file()
    other = tmp_path / "other"
    other.mkdir()
    (other / "confusion.pdf").write_text("mine")
    done = CliRunner().invoke(app, ["report", str(run), "--out", str(tmp_path / "new.html"), "--figures", str(other)])
    assert done.exit_code == 2
    assert "confusion.pdf: exists and was not written by a report" in done.stderr
    assert (other / "confusion.pdf").read_text() == "mine"
    assert not (tmp_path / "new.html").exists()


def test_the_command_says_where_things_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = write_run(tmp_path / "one", "fedit"), write_run(tmp_path / "two", "hralora")
    done = CliRunner().invoke(app, ["report", str(one), "--tables", str(tmp_path / "tables")])
    assert done.exit_code == 0
    assert done.stdout.replace("\n", "").startswith(f"page: {one / 'report.html'}")
    assert sorted(p.name for p in (tmp_path / "tables").glob("summary.*")) == [
        "summary.csv",
        "summary.md",
        "summary.tex",
    ]
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["report", "one", "two", "--json"])
    assert json.loads(done.stdout) == {"page": "report.html"}
    assert two.is_dir()
    done = CliRunner().invoke(app, ["report", "tables"])
    assert done.exit_code == 2
    assert "neither a run nor a study" in done.stderr


@pytest.mark.parametrize("name", ["jinja2", "plotly.offline"])
def test_a_missing_package_is_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", "fedit")
    monkeypatch.setitem(sys.modules, name, None)
    done = CliRunner().invoke(app, ["report", str(run)])
    assert done.exit_code == 2
    assert f"pip install {name.split('.')[0]} (the extra 'report')" in done.stderr
