"""Names that mean something elsewhere, to a terminal, a browser, TeX or Markdown, are shown as they are."""

import csv
import io
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import markdown as python_markdown
import numpy as np
import pytest
from PIL import Image
from rich.control import strip_control_codes
from rich.text import Text

from polyrank.engines.events import Answered, Asked, Phase
from polyrank.report import charts, tables, text
from polyrank.report.card import _table
from polyrank.report.figures import split_heat_map
from polyrank.report.gather import Gathered, gather
from polyrank.report.page import page
from polyrank.report.paper import drawn
from polyrank.report.progress import Progress
from polyrank.report.screen import Rows, Screen
from polyrank.report.tables import summarise
from polyrank.report.terminal import heat_map
from recorded import write_hostile

NAMES = {
    "markup": "ward[/red]",
    "style": "[bold red]north[/] [lr 1e-3] [/b]",
    "link": "[link=http://x.y]z[/link]",
    "emoji": "a:smile:b :warning:",
    "number": "site 0012 'x' None http://a.b",
    "backslash": "end\\",
    "bracket": "end\\[",
    "colour": "\x1b[31mred\x1b[0m",
    "title": "\x1b]0;owned\x07\x9b2J",
    "return": "real\rfake",
    "lines": "a\nerror: b\tc",
    "direction": "\u202egpj.exe\u2066x\u200f",
    "separators": "a\u2028b\ufeff\x00\x7f\x85",
    "bytes": "caf\udce9",
    "formula": "a$b $\\frac$ ${x}^2$",
    "table": "a|b & 50% #1 _x_ ~^ {y} \\hline",
    "code": "`x` ``y``",
    "html": "</script><b>&amp; '\"",
    "fields": "%{x} {0} {{y}} %s",
    "underscore": "_hidden_",
    "letters": "Ärztehaus 東京 😀",
}
names = pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)


def screen(**options: object) -> tuple[Screen, io.StringIO]:
    file = io.StringIO()
    return Screen(file=file, width=400, **options), file


# --- the terminal


@names
def test_a_screen_prints_text_as_it_is(name: str) -> None:
    console, file = screen()
    console.print(name, soft_wrap=True)
    console.print(Text(name), soft_wrap=True)  # it leaves some control characters out by itself
    console.say(name)
    shown, kept = text.visible(name), text.visible(strip_control_codes(name))
    assert file.getvalue().expandtabs() == f"{shown}\n{kept}\n{text.one_line(name)}\n".expandtabs()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202a-\u202e\u2066-\u2069\ud800-\udfff]", file.getvalue())
    assert shown.isprintable() or set(shown) & set("\n\t")


@names
def test_a_terminal_gets_no_commands_from_a_name(name: str) -> None:
    """With colours: what is left without the screen's own styles is the text."""
    console, file = screen(force_terminal=True, color_system="truecolor", legacy_windows=False)
    console.say(name, "bold")
    assert re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue()) == f"{text.one_line(name)}\n"


@names
def test_a_row_is_a_line(name: str) -> None:
    table = Rows()
    table.add_column(name)
    table.add_column("n")
    table.add_row(name, "1")
    console, file = screen()
    console.print(table)
    shown = text.one_line(name)
    assert [line.rstrip() for line in file.getvalue().splitlines()] == [f"{shown}  n", f"{shown}  1"]


def test_further_lines_of_a_message_are_set_in() -> None:
    console, file = screen()
    console.error("one\nerror: two\n\x1bthree", before="1/2 [b]: ")
    assert file.getvalue() == "1/2 [b]: error: one\n  error: two\n  \\x1bthree\n"


@names
def test_what_is_shown_of_a_run_is_text(name: str) -> None:
    console, file = screen(force_terminal=True, color_system=None, height=40)
    progress = Progress(console, 3, 0)
    progress.told(Asked(0, {name: name}, {name: 10}))
    progress.told(Answered(name, 1.0, 10, None))
    console.print(progress.view())
    progress.told(Phase(name))
    console.print(progress.view())
    console.print(heat_map(np.array([[1, 2]]), [name], [name], [name, "b"], 400))
    assert file.getvalue().count(text.one_line(name)) >= 5
    assert "\x1b" not in file.getvalue()


# --- pages, tables, figures


class Reader(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("path", "circle", "rect"):  # the look of a method follows from its name
            self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(re.sub(r"(?s)(<script>).*?(</script>)", r"\1\2", html))
    return reader


def gathered(folder: Path, name: str) -> Gathered:
    return gather([write_hostile(folder / "study", name)])


@names
def test_a_page_shows_names_as_text(name: str, tmp_path: Path) -> None:
    plain, found = gathered(tmp_path / "a", "plain"), gathered(tmp_path / "b", name)
    expected, reader = read(page(plain, summarise(plain))), read(page(found, summarise(found)))
    assert reader.tags == expected.tags
    assert any(f"mine {text.visible(name)}" in part for part in reader.text)
    data = next(part for part in reader.text if part.startswith("[{"))
    assert json.loads(data)


@names
def test_a_table_in_markdown_shows_names_as_text(name: str, tmp_path: Path) -> None:
    """By another reader: Python-Markdown."""
    for made in (tables.markdown(summarise(gathered(tmp_path, name))), _table(("", "x"), [(text.markdown(name), "1")])):
        root = ET.fromstring(f"<r>{python_markdown.markdown(made, extensions=['tables'])}</r>")
        cells = ["".join(cell.itertext()) for cell in root.iter("td")]
        shown = re.sub(r"\s+", " ", text.one_line(name)).strip()
        assert any(cell.strip() in (shown, f"mine {shown}") for cell in cells), (cells, shown)
        assert all(child.tag in ("tr", "table", "thead", "tbody", "th", "td", "r") for child in root.iter())


@names
def test_code_in_markdown_is_as_it_is(name: str) -> None:
    root = ET.fromstring(python_markdown.markdown(f"by {text.code(name)}."))
    (span,) = root.iter("code")
    assert span.text == text.one_line(name).strip()


@names
def test_a_table_for_programs_has_the_names_themselves(name: str, tmp_path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(tables.as_csv(summarise(gathered(tmp_path, name))), newline="")))
    assert rows[0]["method"] == f"mine {text.visible(name)}"


@names
def test_a_table_for_tex_has_no_commands_of_a_name(name: str, tmp_path: Path) -> None:
    made = tables.latex(summarise(gathered(tmp_path, name)))
    line = next(line for line in made.splitlines() if line.startswith("mine "))
    method = line.split(" & ")[0].removeprefix("mine ")
    known = r"\\textbackslash\{\}|\\textasciitilde\{\}|\\textasciicircum\{\}|\$\\pm\$|\$\\cdot\$|\\[&%$#_{}]"
    assert not re.search(r"[\\&%$#_{}~^\x00-\x1f]", re.sub(known, "", method))


@pytest.mark.parametrize(
    "name", [NAMES[key] for key in ("formula", "html", "colour", "underscore", "letters", "bytes")]
)
def test_figures_show_names_as_text(name: str, tmp_path: Path) -> None:
    """The SVG says so, read as XML; formulas would be paths, and end in errors."""
    found = gathered(tmp_path, name)
    sections, _ = charts.sections(found, summarise(found))
    made = {chart.key: chart for section in sections for chart in section.charts}
    files = dict(drawn(made["attendance"]))
    root = ET.fromstring(next(data for file, data in files.items() if file.endswith(".svg")))
    shown = {"".join(part.itertext()) for part in root.iter("{http://www.w3.org/2000/svg}text")}
    assert any(text.one_line(name)[-6:].strip() in part for part in shown), shown
    split_heat_map(tmp_path / "split.png", np.array([[1, 2]]), [name], [name, name], name)
    Image.open(tmp_path / "split.png").verify()
