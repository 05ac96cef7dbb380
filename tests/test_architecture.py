"""Who may import whom, read from the syntax tree of every source file; nothing is imported to find out."""

import ast
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "polyrank"
MOST_LINES = 600

# What each part of the package may import of the others: no arrow points upward, and `cli` is above everything.
# "" is polyrank/__init__.py, the public surface.
MAY_IMPORT = {
    "core": {"core"},
    "errors": set(),
    "version": set(),
    "methods": {"core", "methods"},
    "files": set(),
    "text": set(),
    "data": {"core", "errors", "files", "data"},
    "local": {"core", "errors", "files", "data", "local"},
    "engines": {"core", "errors", "files", "text", "version", "data", "local", "engines"},
    "experiment": {"", "core", "methods", "errors", "files", "text", "data", "local", "engines", "experiment"},
    "report": {"", "core", "methods", "errors", "files", "text", "data", "local", "engines", "experiment", "report"},
    "": {"version", "core", "methods", "data", "local", "engines", "experiment"},
    "__main__": {"cli"},
}
MAY_IMPORT["deploy"] = MAY_IMPORT["report"] | {"deploy"}
MAY_IMPORT["cli"] = MAY_IMPORT["deploy"] | {"cli"}
PURE = {"core", "methods"}  # beyond the standard library, these know torch and numpy only
PURE_LIBRARIES = {"annotated_types", "numpy", "torch"}
ONLY_IN = {
    "transformers": {
        "polyrank.local.configs",
        "polyrank.local.hf",
        "polyrank.local.peft_layers",
        "polyrank.local.pretrained",
        "polyrank.local.processors",
        "polyrank.local.quantized",
        "polyrank.local.saved",
    },
    "peft": {"polyrank.local.peft_layers"},
    "flwr": {"polyrank.engines.flower", "polyrank.engines.pieces", "polyrank.deploy.client", "polyrank.deploy.server"},
    "matplotlib": {"polyrank.report.figures", "polyrank.report.paper"},
    "plotly": {"polyrank.report.page"},
    "jinja2": {"polyrank.report.page"},
    "huggingface_hub": {"polyrank.local.upload"},
    "bitsandbytes": {"polyrank.local.quantized"},
    "opacus": {"polyrank.local.dp"},
    "lm_eval": set(),
    "rouge_score": {"polyrank.local.generate"},
    "pandas": {"polyrank.experiment.results"},
    "mlflow": {"polyrank.experiment.loggers.mlflow"},
    "tensorboard": {"polyrank.experiment.loggers.tensorboard"},
    "torch.utils.tensorboard": {"polyrank.experiment.loggers.tensorboard"},
    "wandb": {"polyrank.experiment.loggers.wandb"},
}
UNPICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
PICKLING_CALLS = {"load", "save"}  # of torch
PARSERS = {"json.load", "json.loads", "yaml.load", "yaml.safe_load"}  # that nest and grow without bounds
MAY_PARSE = {"polyrank.files", "polyrank.deploy.supervise"}  # the second reads what it wrote, and imports nothing
PRINTERS = {"sys.stdout.write", "sys.stderr.write", "typer.echo", "typer.secho", "click.echo", "click.secho"}
MAY_SHOW = {"polyrank.report.screen"}


def module_name(path: Path, root: Path = ROOT) -> str:
    parts = ("polyrank", *path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}
PACKAGES = {name for name, path in SOURCES.items() if path.name == "__init__.py"}
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in SOURCES.items()}


def part_of(module: str) -> str:
    """The part of the package a module belongs to: the second word of its dotted name."""
    return module.split(".")[1] if "." in module else ""


def imported(module: str, tree: ast.AST, modules: set[str], packages: set[str]) -> set[str]:
    """Dotted names of what a module imports, anywhere in its text: modules where the name is one of ours."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= _from(module, node, modules, packages)
        elif isinstance(node, ast.Call) and _called(node.func) in {"import_module", "__import__"}:
            found |= {a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return found


def _from(module: str, node: ast.ImportFrom, modules: set[str], packages: set[str]) -> set[str]:
    base = node.module or ""
    if node.level:
        above = module.split(".")
        above = above[: len(above) - node.level + (module in packages)]
        base = ".".join([*above, *([base] if base else [])])
    members = {f"{base}.{alias.name}" for alias in node.names}
    return members if members <= modules else {base} | (members & modules)


def _called(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def import_violations(module: str, imports: set[str]) -> list[str]:
    """Imports that the tables above do not allow, each as a sentence."""
    part = part_of(module)
    if part not in MAY_IMPORT:
        return [f"{module}: {part!r} has no place in MAY_IMPORT"]
    faults = []
    for name in sorted(imports):
        top = name.split(".")[0]
        if top == "polyrank":
            if part_of(name) not in MAY_IMPORT[part]:
                faults.append(f"{module} imports {name}, which is not below {part!r}")
        elif part in PURE and top not in PURE_LIBRARIES | sys.stdlib_module_names:
            faults.append(f"{module} imports {top}: {part!r} is torch, numpy and the standard library")
        for library, modules in ONLY_IN.items():
            if f"{name}.".startswith(f"{library}.") and module not in modules:
                faults.append(f"{module} imports {library}, which only {', '.join(sorted(modules))} may")
    return faults


def pickle_violations(module: str, tree: ast.AST, imports: set[str]) -> list[str]:
    """Ways in which a module could write or read pickled objects."""
    faults = [f"{module} imports {name}" for name in sorted(imports) if name.split(".")[0] in UNPICKLERS]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            names = {alias.name for alias in node.names} & PICKLING_CALLS
            faults += [f"{module}:{node.lineno} imports torch.{name}" for name in sorted(names)]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in {f"torch.{name}" for name in PICKLING_CALLS} or called.endswith("_pickle"):
            faults.append(f"{module}:{node.lineno} calls {called}")
        for keyword in node.keywords:
            if keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False":
                faults.append(f"{module}:{node.lineno} calls {called} with allow_pickle")
    return faults


def reading_violations(module: str, tree: ast.AST) -> list[str]:
    """Ways in which a module could read what somebody else wrote without the bounds of `polyrank.files`."""
    calls = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & PARSERS
    faults = [f"{module} uses {name}: use from_json or from_yaml" for name in sorted(calls) if module not in MAY_PARSE]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _called(node.func) in {"read_text", "write_text", "open"}:
            whole = ast.unparse(node)
            text = _called(node.func) != "open" or any(mode in whole for mode in ("'r'", "'w'", "'a'", "newline"))
            ours = whole.startswith(("read_text(", "write_text("))
            if text and not ours and "encoding=" not in whole:
                faults.append(f"{module}: {whole}: names no encoding, and that of the user's may be ASCII")
    return faults


def showing_violations(module: str, tree: ast.AST, imports: set[str]) -> list[str]:
    """Ways in which a module could show text on a terminal as more than text, or past the one who shows it.

    `print` is for what a program reads, JSON, and for the version.
    """
    consoles = {"rich.console.Console", "rich", "rich.print"}
    faults = [f"{module} imports {name}: use Screen" for name in sorted(imports & consoles) if module not in MAY_SHOW]
    for node in ast.walk(tree):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.ImportFrom) and node.module in ("rich", "rich.console"):
            names = {alias.name for alias in node.names} & {"Console", "print", "get_console"}
            faults += [f"{module} imports rich's {name}: use Screen" for name in names if module not in MAY_SHOW]
        plain = called == "print" and isinstance(node, ast.Call) and ast.unparse(node.args[0]).startswith("json.dumps(")
        version = called == "print" and isinstance(node, ast.Call) and ast.unparse(node.args[0]) == "__version__"
        if called in PRINTERS or called.endswith("from_markup") or (called == "print" and not (plain or version)):
            faults.append(f"{module} calls {called}: use Screen")
    return faults


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """One import cycle of the graph, its first module repeated at the end; empty if there is none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for after in sorted(graph.get(node, ())):
            if found := visit(after, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def imports_of(module: str) -> set[str]:
    return imported(module, TREES[module], set(SOURCES), PACKAGES)


def test_every_module_imports_only_what_its_part_may() -> None:
    assert [fault for module in SOURCES for fault in import_violations(module, imports_of(module))] == []


def test_no_module_pickles() -> None:
    assert [fault for m in SOURCES for fault in pickle_violations(m, TREES[m], imports_of(m))] == []


def test_files_are_read_and_shown_in_one_place() -> None:
    assert [fault for module in SOURCES for fault in reading_violations(module, TREES[module])] == []
    assert [f for m in SOURCES for f in showing_violations(m, TREES[m], imports_of(m))] == []


def test_every_module_is_one_idea_long() -> None:
    lines = {module: len(path.read_text().splitlines()) for module, path in SOURCES.items()}
    assert [f"{module} has {n} lines: split it" for module, n in lines.items() if n >= MOST_LINES] == []


def test_there_is_no_import_cycle() -> None:
    assert cycle({module: imports_of(module) & set(SOURCES) for module in SOURCES}) == []


def test_there_is_something_to_check() -> None:
    assert {"polyrank.core.lowrank", "polyrank.methods"} <= set(SOURCES)


# The checks are checked: each is shown a small source that breaks its rule, and one that does not.


def faults_of(module: str, source: str) -> list[str]:
    modules = {*SOURCES, module, *(f"polyrank.{part}" for part in MAY_IMPORT if part)}
    return import_violations(module, imported(module, ast.parse(source), modules, PACKAGES))


UPWARD = [
    ("polyrank.core.x", "from polyrank.methods import named"),
    ("polyrank.core.x", "from ..methods.named import fedit"),
    ("polyrank.core.x", "import polyrank"),
    ("polyrank.core.x", "import polyrank.local.hf as hf"),
    ("polyrank.core.x", "def f():\n    from polyrank.experiment import runs"),
    ("polyrank.core.x", "import importlib\nimportlib.import_module('polyrank.methods')"),
    ("polyrank.methods.x", "from polyrank.local import trainer"),
    ("polyrank.methods.x", "from .. import data"),
    ("polyrank.methods.x", "from polyrank.files import write_json"),
    ("polyrank.files", "from polyrank.core import types"),
    ("polyrank.data.x", "from polyrank.methods import METHODS"),
    ("polyrank.data.x", "from polyrank.local import trainer"),
    ("polyrank.local.x", "from polyrank.methods import METHODS"),
    ("polyrank.local.x", "from polyrank.engines import simulator"),
    ("polyrank.engines.x", "from polyrank.experiment import runs"),
    ("polyrank.experiment.x", "from polyrank.report import page"),
    ("polyrank.experiment.x", "from polyrank import cli"),
    ("polyrank.report.x", "import polyrank.cli"),
    ("polyrank.deploy.client", "from polyrank.cli import app"),
    ("polyrank.report.x", "from polyrank.deploy import operate"),
    ("polyrank.elsewhere", "import json"),
]
FOREIGN = [
    ("polyrank.core.x", "import pydantic"),
    ("polyrank.core.x", "from safetensors.torch import save_file"),
    ("polyrank.methods.x", "import scipy.linalg"),
    ("polyrank.local.trainer", "from transformers import AutoModel"),
    ("polyrank.local.adapters", "def f():\n    import peft"),
    ("polyrank.engines.simulator", "import flwr"),
    ("polyrank.experiment.privacy", "from opacus.accountants import RDPAccountant"),
    ("polyrank.core.x", "import opacus"),
    ("polyrank.local.dpsgd", "def f():\n    import opacus.optimizers"),
    ("polyrank.cli", "import matplotlib.pyplot as plt"),
    ("polyrank.report.web", "import plotly.graph_objects"),
    ("polyrank.report.make", "def f():\n    from jinja2 import Template"),
    ("polyrank.cli.export", "from huggingface_hub import HfApi"),
    ("polyrank.report.x", "import pandas"),
    ("polyrank.experiment.session", "def f():\n    from torch.utils.tensorboard import SummaryWriter"),
    ("polyrank.experiment.loggers.wandb", "import mlflow"),
]
ALLOWED = [
    ("polyrank.core.x", "import math, torch\nimport numpy as np\nfrom polyrank.core.rng import stream"),
    ("polyrank.methods.x", "from polyrank.core import lowrank\nfrom . import named"),
    ("polyrank.local.adapters", "from polyrank.files import write_json"),
    ("polyrank.data.x", "import pyarrow\nfrom polyrank.core.rng import stream"),
    ("polyrank.local.dp", "def f():\n    import opacus.optimizers"),
    ("polyrank.local.upload", "def f():\n    from huggingface_hub import HfApi"),
    ("polyrank.local.peft_layers", "import peft\nimport transformers\nfrom polyrank.data import text"),
    ("polyrank.engines.flower", "import flwr\nfrom polyrank.local import cohort"),
    ("polyrank.deploy.client", "import flwr\nfrom polyrank.engines import flower"),
    ("polyrank.report.figures", "import matplotlib.pyplot as plt\nfrom polyrank.experiment import runs"),
    ("polyrank.cli", "from polyrank import __version__\nfrom polyrank.report import page"),
]


@pytest.mark.parametrize(("module", "source"), UPWARD + FOREIGN)
def test_the_import_check_sees(module: str, source: str) -> None:
    assert faults_of(module, source) != []


@pytest.mark.parametrize(("module", "source"), ALLOWED)
def test_the_import_check_allows(module: str, source: str) -> None:
    assert faults_of(module, source) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.save({}, 'x')",
        "from torch import load",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.load('x', allow_pickle=flag)",
        "import pandas as pd\npd.read_pickle('x')",
    ],
)
def test_the_pickle_check_sees(source: str) -> None:
    tree = ast.parse(source)
    assert pickle_violations("m", tree, imported("m", tree, set(), set())) != []


def test_the_pickle_check_allows_arrays_and_safetensors() -> None:
    tree = ast.parse("import numpy as np\nfrom safetensors.torch import load_file\nnp.load('x', allow_pickle=False)")
    assert pickle_violations("m", tree, imported("m", tree, set(), set())) == []


@pytest.mark.parametrize(
    "source",
    [
        "from rich.console import Console",
        "import rich\nrich.print('[red]')",
        "from rich import print",
        "print(name)",
        "print(json.dumps(x), name) if x else print(f'{name}')",
        "import typer\ntyper.echo(name)",
        "sys.stderr.write(name)",
        "from rich.text import Text\nText.from_markup(name)",
    ],
)
def test_the_check_of_what_is_shown_sees(source: str) -> None:
    tree = ast.parse(source)
    assert showing_violations("m", tree, imported("m", tree, set(), set())) != []


@pytest.mark.parametrize(
    "source",
    [
        *("json.loads(x)", "json.load(f)", "list(map(json.loads, x))", "yaml.safe_load(x)"),
        *("path.read_text()", "path.write_text(x)", "open(path, 'a')", "path.open('r')"),
    ],
)
def test_the_check_of_what_is_read_sees(source: str) -> None:
    assert reading_violations("m", ast.parse(source)) != []


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": {"a"}}, ["a", "b", "c", "a"]),
        ({"a": {"a"}}, ["a", "a"]),
        ({"a": {"b", "c"}, "b": {"c"}, "c": set()}, []),
    ],
)
def test_the_cycle_check_sees(graph: dict[str, set[str]], expected: list[str]) -> None:
    assert cycle(graph) == expected


def test_relative_imports_count_from_the_package() -> None:
    modules = {"polyrank.methods.aggregate", "polyrank.methods.aggregate.sums", "polyrank.methods.named"}
    packages = {"polyrank.methods", "polyrank.methods.aggregate"}

    def of(module: str, source: str) -> set[str]:
        return imported(module, ast.parse(source), modules, packages)

    assert of("polyrank.methods.aggregate", "from .sums import f") == {"polyrank.methods.aggregate.sums"}
    assert of("polyrank.methods.aggregate", "from . import sums") == {"polyrank.methods.aggregate.sums"}
    assert of("polyrank.methods.named", "from .aggregate import sums") == {"polyrank.methods.aggregate.sums"}
    assert of("polyrank.methods.named", "from .aggregate import X") == {"polyrank.methods.aggregate"}
    assert of("polyrank.methods.aggregate.sums", "from .. import named") == {"polyrank.methods.named"}
