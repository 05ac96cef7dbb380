"""The public surface is what `polyrank/__init__.py` exports, no more and no less."""

import json
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


def test_importing_polyrank_loads_no_heavy_library() -> None:
    code = f"import json, sys, polyrank; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(shown.stdout) == []


def test_a_process_that_carries_messages_loads_no_torch() -> None:
    pytest.importorskip("flwr", reason="the extra `flower` is not installed")
    code = "import sys, polyrank.deploy.client; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == "False"
