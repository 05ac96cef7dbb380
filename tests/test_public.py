"""The public surface is what `polyrank/__init__.py` exports, no more and no less."""

import json
import os
import subprocess
import sys
from types import ModuleType

import pytest

import polyrank

HEAVY = ("datasets", "flwr", "matplotlib", "opacus", "pandas", "peft", "torch", "transformers")


def by_kind(name: str) -> tuple[int, str]:
    """The order the linter keeps in ``__all__``: CONSTANTS, then Classes, then functions."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2
    return kind, name


def test_all_is_sorted_and_without_duplicates() -> None:
    assert list(polyrank.__all__) == sorted(set(polyrank.__all__), key=by_kind)


@pytest.mark.parametrize("name", polyrank.__all__)
def test_every_exported_name_exists(name: str) -> None:
    assert getattr(polyrank, name, None) is not None


def test_nothing_else_is_public() -> None:
    named = {
        name
        for name, value in {**vars(polyrank), **{name: getattr(polyrank, name) for name in dir(polyrank)}}.items()
        if not name.startswith("_") and (not isinstance(value, ModuleType) or name in polyrank.__all__)
    }
    assert named == {name for name in polyrank.__all__ if not name.startswith("_")}


@pytest.mark.parametrize(
    ("said", "spins"), [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "None")]
)
def test_waiting_threads_spin_shortly_unless_told_otherwise(said: dict[str, str], spins: str) -> None:
    code = "import os, polyrank; print(os.environ.get('GOMP_SPINCOUNT'))"
    without = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    found = subprocess.run([sys.executable, "-c", code], env=without | said, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == spins


def test_importing_polyrank_loads_no_heavy_library() -> None:
    code = f"import json, sys, polyrank; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(shown.stdout) == []


def test_a_process_that_carries_messages_loads_no_torch() -> None:
    pytest.importorskip("flwr", reason="the extra `flower` is not installed")
    code = "import sys, polyrank.deploy.client; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == "False"
