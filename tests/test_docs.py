"""What the documentation shows runs: the Python blocks of README.md and docs/, and every doctest of the package.

The blocks of a page share one namespace and an empty working directory, so a page reads, and runs, from top to bottom.
A block right after the comment ``<!-- skip: reason -->`` is not run, and its reason is reported.
"""

import doctest
import importlib
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from polyrank.experiment.loading import parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = [path for path in sorted((ROOT / "src").rglob("*.py")) if ">>> " in path.read_text()]

FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<info>[^`\n]*)$")
SKIP = re.compile(r"^\s*<!--\s*skip:\s*(?P<reason>.*?)\s*-->\s*$")


@dataclass(frozen=True)
class Block:
    """A Python block: its code, the line it starts on, and why it is not run, if it is not."""

    code: str
    line: int
    skip: str | None


def blocks(text: str) -> list[Block]:
    """The blocks fenced as ``python``, in order; fences inside other fences are text."""
    found: list[Block] = []
    lines = text.splitlines()
    before, number = "", 0  # the last line of prose that was not empty; the next line, from 0
    while number < len(lines):
        fence = FENCE.match(lines[number])
        if fence is None:
            before = lines[number] if lines[number].strip() else before
            number += 1
            continue
        start = number + 1
        end = next((i for i in range(start, len(lines)) if lines[i].strip() == fence["ticks"]), None)
        if end is None:
            raise ValueError(f"line {start}: the block is never closed")
        if re.match(r"python\b", fence["info"].strip()):
            skip = SKIP.match(before)
            code = textwrap.dedent("\n".join(lines[start:end]))
            found.append(Block(code, start + 1, skip["reason"] if skip else None))
        before, number = "", end + 1
    return found


def cases() -> list[tuple[Path, Block | None]]:
    """One case a page that has something to run, and one for each block that is skipped."""
    found: list[tuple[Path, Block | None]] = []
    for page in (page for page in PAGES if page.exists()):
        of_page = blocks(page.read_text())
        found += [(page, None)] * any(block.skip is None for block in of_page)
        found += [(page, block) for block in of_page if block.skip is not None]
    return found


def case_name(value: Path | Block | None) -> str:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else f"line{value.line}" if value else "runs"


@pytest.mark.parametrize(("page", "skipped"), cases(), ids=case_name)
def test_page(page: Path, skipped: Block | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if skipped is not None:
        pytest.skip(f"{page.name}:{skipped.line}: {skipped.skip}")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": page.stem}
    for block in blocks(page.read_text()):
        if block.skip is None:
            # Empty lines in front, so that a traceback names the line of the page.
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_doctests(path: Path) -> None:
    parts = path.relative_to(ROOT / "src").with_suffix("").parts
    module = importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.testmod(module, optionflags=options)
    assert result.attempted
    assert result.failed == 0


def test_the_experiment_of_a_real_deployment_is_one() -> None:
    page = (ROOT / "docs" / "deploy.md").read_text()
    (written,) = re.findall(r"```yaml\n(# experiment\.yaml\n.*?)```", page, re.DOTALL)
    experiment = parse(yaml.safe_load(written), "experiment.yaml", ROOT)
    assert experiment.data.train is None
    assert experiment.deployment.clients == 2


TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_tests_that_pages_name_are_there() -> None:
    named = {match.groups() for page in PAGES for match in TEST.finditer(page.read_text())}
    assert len(named) > 10
    missing = [f"{file}::{name}" for file, name in named if f"\ndef {name}(" not in (ROOT / file).read_text()]
    assert missing == []


PROSE = re.compile(r"(`{3,}).*?\1|`[^`]*`", re.DOTALL)  # what is not prose
OPEN = re.compile(r"\b(TODO|TBD|XXX|FIXME|[A-Z][A-Z0-9]+_[A-Z0-9_]+)\b|\{\{|\}\}|\?\?\?")
FIGURE = re.compile(r"\b[A-Z]{4,}\d+\b")  # also in what a command is said to print


def unfilled(text: str) -> list[str]:
    """What somebody meant to fill in later: names in capitals stand for figures that are not there."""
    return [place[0] for place in (*OPEN.finditer(PROSE.sub("", text)), *FIGURE.finditer(text))]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_a_page_has_no_unfilled_places(page: Path) -> None:
    assert unfilled(page.read_text()) == []


def test_unfilled_places_are_found() -> None:
    text = "It takes FLEX_4096 s.\n| krum | KR_1024 s | {{ seconds }} |\nTODO: why\n```sh\nA_B=1 # XXX\n```\nSet `C_D`."
    assert unfilled(text) == ["FLEX_4096", "KR_1024", "{{", "}}", "TODO"]
    assert unfilled("```text\nverified, to VALUE1 of the largest\n```") == ["VALUE1"]


PAGE = """\
```python
a = 1
```

<!-- skip: needs a model -->

```python title="b.py"
b = 2
```

- in a list:

    ```python
    c = 3
      # deeper
    ```

````text
```python
not_code
```
````
```sh
d
```
```pythonic
e
```
"""


def test_blocks_finds_python_and_only_python() -> None:
    assert blocks(PAGE) == [
        Block("a = 1", 2, None),
        Block("b = 2", 8, "needs a model"),
        Block("c = 3\n  # deeper", 14, None),
    ]


def test_blocks_refuses_a_block_that_never_ends() -> None:
    with pytest.raises(ValueError, match="line 2: the block is never closed"):
        blocks("text\n```python\na = 1\n")


def test_there_are_pages_and_modules_to_run() -> None:
    assert PAGES[0].exists()
    assert any(skipped is None for _, skipped in cases())
    assert MODULES
