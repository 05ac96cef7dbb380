"""The page in a real browser, from disk, without a network. Screenshots go to POLYRANK_SCREENSHOTS, where it is set."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polyrank.report.make import make
from recorded import write_hostile, write_study

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (the extra 'dev')")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium: apt-get install chromium")

VIEWS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    study = write_study(folder / "study", layers=24, clients=12)
    make([study], folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = os.environ.get("POLYRANK_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Any, page_file: Path) -> Iterator[Any]:
    """(width, scheme, file) -> the page, all drawn; fails at the end if it complained or asked for anything."""
    complaints: list[str] = []
    contexts = []

    def open_(width: int, scheme: str, file: Path = page_file) -> Any:
        phone = {"has_touch": True, "is_mobile": True} if width < 500 else {}
        view = {"width": width, "height": 844}
        context = browser.new_context(viewport=view, color_scheme=scheme, offline=True, **phone)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        own = ("file:", "data:", "blob:")
        page.on("request", lambda r: None if r.url.startswith(own) else complaints.append(f"request: {r.url}"))
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready]", timeout=60_000)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_the_page_stands(opened: Any, shots: Path, width: int, scheme: str) -> None:
    page = opened(width, scheme)
    page.screenshot(path=shots / f"report-{width}-{scheme}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    charts = page.evaluate(
        "[...document.querySelectorAll('.chart')].map(c => [c.dataset.chart,"
        " !!c.querySelector('.scatterlayer .trace, .heatmaplayer image'), c.getBoundingClientRect().right])"
    )
    assert len(charts) == 18
    assert [key for key, drawn, right in charts if not drawn or right > width] == []
    dark = scheme == "dark"
    paper = page.evaluate("document.querySelector('.chart')._fullLayout.paper_bgcolor")
    assert paper == ("#121418" if dark else "#ffffff")
    buttons = page.evaluate("[...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title)")
    assert bool(buttons) == (width > 500)
    assert not any("cloud" in title.lower() or "plotly" in title.lower() for title in buttons)


def test_names_from_files_are_text(opened: Any, tmp_path: Path) -> None:
    make([write_hostile(tmp_path / "study")], tmp_path / "report.html")
    page = opened(390, "light", tmp_path / "report.html")
    assert page.evaluate("window.broken") is None
    assert page.evaluate("document.querySelectorAll('.chart a, .chart img, .chart script').length") == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_charts_follow_the_scheme(opened: Any) -> None:
    page = opened(1280, "light")
    page.emulate_media(color_scheme="dark")
    ends = time.monotonic() + 30  # asked from outside: the page's policy lets nothing evaluate text inside it
    while page.evaluate("document.querySelector('.chart')._fullLayout.paper_bgcolor") != "#121418":
        assert time.monotonic() < ends
        page.wait_for_timeout(100)


def test_the_table_sorts_by_hand_and_keyboard(opened: Any) -> None:
    page = opened(1280, "light")
    first = "document.querySelector('#table tbody th').textContent"
    states = "[...document.querySelectorAll('#table thead th')].map(h => h.getAttribute('aria-sort'))"
    names = "[...document.querySelectorAll('#table tbody th')].map(h => h.textContent)"
    assert page.evaluate(first) == "single"
    up = page.get_by_role("button", name="sent up")
    up.click()
    assert sorted(page.evaluate(names)[-3:]) == ["local", "single", "zero_shot"]  # what sends nothing comes last
    assert [state for state in page.evaluate(states) if state] == ["descending"]
    up.press("Enter")
    assert page.evaluate(first) == "hralora"
    assert [state for state in page.evaluate(states) if state] == ["ascending"]
    page.get_by_role("button", name="method").press(" ")
    assert page.evaluate(names) == ["fedit", "hetlora", "hralora", "local", "single", "zero_shot"]


def test_the_slider_turns_rounds_and_the_list_turns_runs(opened: Any) -> None:
    page = opened(1280, "light")
    filled = "document.querySelector('[data-chart=ranks]').data[0].z.flat().filter(v => v !== null).length"
    cells = "JSON.stringify(document.querySelector('[data-chart=ranks]').data[0].z)"
    slider, before = page.locator("[data-frame=ranks]"), page.evaluate(cells)
    slider.press("ArrowRight")
    assert page.locator("#figure-ranks .frame-name").text_content() == "round 2"
    assert slider.get_attribute("aria-valuetext") == "round 2"
    assert page.evaluate(cells) != before
    assert page.evaluate(filled) == 12 * 12
    page.locator("[data-panel=ranks]").select_option(label="fedit, seed 0")
    assert page.evaluate(filled) == 12 * 24
    assert slider.is_disabled()


def test_the_legend_hides_a_method_everywhere(opened: Any) -> None:
    page = opened(1280, "light")
    shown = (
        "[...document.querySelectorAll('.chart')].flatMap(c => c.data)"
        ".filter(t => t.meta === 'hralora' && t.yaxis === undefined && t.visible === true).length"
    )
    before = page.evaluate(shown)
    button = page.locator(".legend button", has_text="hralora")
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert before > 10
    assert page.evaluate(shown) == 0
    button.press("Enter")
    assert page.evaluate(shown) == before


def test_it_prints_light_from_a_dark_screen(opened: Any, shots: Path) -> None:
    page = opened(1280, "dark")
    page.evaluate(
        "addEventListener('beforeprint', () => { window.printed ="
        " document.querySelector('.chart')._fullLayout.paper_bgcolor })"
    )
    data = page.pdf(path=shots / "report-print.pdf", prefer_css_page_size=True, print_background=True)
    assert data.startswith(b"%PDF")
    assert len(data) > 50_000
    assert page.evaluate("window.printed") == "#ffffff"
