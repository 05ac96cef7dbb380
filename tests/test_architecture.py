"""Who may import whom, read from the syntax tree of every source file; nothing is imported to find out."""

import ast
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "polyrank"
MOST_LINES = 400

# What each part of the package may import of the others: no arrow points upward, and `cli` is above everything.
# "" is polyrank/__init__.py, the public surface.
MAY_IMPORT = {
    "core": {"core"},
    "errors": set(),
    "version": set(),
    "methods": {"core", "methods"},
    "files": set(),
    "data": {"core", "errors", "files", "data"},
    "local": {"core", "errors", "files", "data", "local"},
    "engines": {"core", "errors", "files", "version", "data", "local", "engines"},
    "experiment": {"", "core", "methods", "errors", "files", "data", "local", "engines", "experiment"},
    "report": {"", "core", "methods", "errors", "files", "data", "local", "engines", "experiment", "report"},
    "": {"version", "core", "methods", "data", "local", "engines", "experiment"},
    "deploy": {"", "core", "methods", "errors", "files", "data", "local", "engines", "experiment", "report", "deploy"},
    "__main__": {"cli"},
}
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


@pytest.mark.parametrize("module", SOURCES)
def test_imports_only_what_its_part_may(module: str) -> None:
    assert import_violations(module, imports_of(module)) == []


@pytest.mark.parametrize("module", SOURCES)
def test_never_pickles(module: str) -> None:
    assert pickle_violations(module, TREES[module], imports_of(module)) == []


@pytest.mark.parametrize("module", SOURCES)
def test_is_one_idea_long(module: str) -> None:
    lines = len(SOURCES[module].read_text().splitlines())
    assert lines < MOST_LINES, f"{module} has {lines} lines: split it"


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
