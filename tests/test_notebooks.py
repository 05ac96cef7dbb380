"""The notebooks run, from top to bottom, offline; they are stored without outputs and use what is documented."""

import ast
import json
import re
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_SECONDS = 60  # on a thread of a machine that does nothing else


def name_of(path: Path) -> str:
    return path.stem


def code_of(path: Path) -> str:
    cells = json.loads(path.read_text())["cells"]
    lines = [line for cell in cells if cell["cell_type"] == "code" for line in "".join(cell["source"]).splitlines()]
    return "\n".join(line for line in lines if not line.startswith("!"))


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["add_a_method", "quickstart"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    book = json.loads(path.read_text())
    nbformat.validate(nbformat.from_dict(book))
    assert "widgets" not in book["metadata"]
    for cell in book["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_imports_what_is_documented(path: Path) -> None:
    documented = set(re.findall(r"^::: (polyrank\S*)$", (ROOT / "docs" / "api.md").read_text(), re.M)) | {"polyrank"}
    tree = ast.parse(code_of(path))
    used = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    used |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    own = {module for module in used if module and module.split(".")[0] == "polyrank"}
    assert own <= documented
    assert "polyrank" in own


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_links_to_what_is_there(path: Path) -> None:
    text = "\n".join("".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] != "code")
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert all((path.parent / link).exists() for link in links), links


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    book = nbformat.read(path, as_version=4)
    work = tmp_path / "work"
    work.mkdir()
    started = time.monotonic()
    NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(work)}}).execute()
    assert time.monotonic() - started < 5 * MOST_SECONDS
    for cell in book.cells:
        if cell.cell_type == "code" and "!" in cell.source:
            shown = "".join(output.get("text", "") for output in cell.outputs)
            assert "error" not in shown.replace("relative error", ""), shown
