"""Outputs of independent implementations, reproduced by `polyrank merge` from adapters on disk.

Each case's clients are written as PEFT adapters and merged by the command that users run. Released code that ignores
scales gets adapters of scale 1 (alpha = r), and rules that do not renormalise for missing layers get ``layers=zero``.
Rules that need more than the adapters (an earlier state, a factor that was frozen) are tested with the functions.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from polyrank.cli import app
from polyrank.core.lowrank import Adapter, LowRank, delta
from polyrank.local.adapters import AdapterInfo, read_adapter, write_adapter


def _direct() -> ModuleType:
    """The tests of the functions themselves, whose reading of the cases is used here too."""
    spec = importlib.util.spec_from_file_location("polyrank_gold_cases", Path(__file__).with_name("test_gold.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


direct = _direct()
Results = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True)
class Merging:
    """A case, and the command on its clients' adapters."""

    round: Any
    folder: Path

    def adapters(self, scaled: bool) -> list[Adapter]:
        return [update.adapter for update in self.round.updates(scaled)]

    def __call__(self, method: str, adapters: list[Adapter], *options: str, weights: bool = True) -> Path:
        """The folder that the command wrote."""
        folders = [self.folder / f"in{i}" for i in range(len(adapters))]
        saved = tuple({name.split(".")[0].split("/")[0] for adapter in adapters for name in adapter.dense})
        for folder, adapter in zip(folders, adapters, strict=True):
            dense = {name.replace("/", "."): tensor for name, tensor in adapter.dense.items()}
            write_adapter(folder, replace(adapter, dense=dense), AdapterInfo(modules_to_save=saved))
        out = self.folder / f"out{len(list(self.folder.glob('out*')))}"
        sizes = ["--weights", ",".join(map(str, self.round.sizes))] if weights else []
        arguments = ["merge", *map(str, folders), "--method", method, *sizes, *options, "--out", str(out)]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return out


def deltas_in(folder: Path, prefix: str, kind: str = "dW") -> Results:
    for name, x in read_adapter(folder)[0].layers.items():
        yield f"{prefix}/{name}/{kind}", delta(x)


def factors_in(folder: Path) -> Results:
    """A and B as the rule left them: the scale that the file states is part of B."""
    adapter, _ = read_adapter(folder)
    for name, x in adapter.layers.items():
        yield f"g/{name}/A", x.A
        yield f"g/{name}/B", x.B * x.scale
    for name, tensor in adapter.dense.items():
        yield f"g/{name.replace('.', '/')}", tensor


def with_zero_rows(found: Any, shape: tuple[int, ...]) -> Any:
    """A file leaves out what contributes nothing: rows of A and columns of B that are zero."""
    return np.pad(found, [(0, due - size) for size, due in zip(found.shape, shape, strict=True)])


def to_clients(folder: Path, ranks: list[int], prefix: Callable[[int, int], str]) -> Results:
    for index, rank in enumerate(ranks):
        yield from deltas_in(folder / f"client_{index}", prefix(index, rank))


def listed(ranks: list[int]) -> str:
    return ",".join(map(str, ranks))


# --- one function per method of the manifest: the keys it can answer, with what the command wrote


def flexlora(merge: Merging) -> Results:
    adapters, ranks = merge.adapters(scaled=True), sorted(set(merge.round.ranks))
    yield from deltas_in(merge("flexlora", adapters, "--set", "layers=zero"), "g")
    out = merge("flexlora", adapters, "--set", "layers=zero", "--client-ranks", listed(ranks))
    yield from to_clients(out, ranks, lambda _, rank: f"r{rank}")


def rb_lora_product(merge: Merging) -> Results:
    adapters, ranks = merge.adapters(scaled=True), merge.round.ranks
    yield from deltas_in(merge("rb_lora", adapters), "g")
    out = merge("rb_lora", adapters, "--client-ranks", listed(ranks))
    yield from to_clients(out, ranks, lambda index, _: f"c{index}")


def rb_lora_factor(merge: Merging) -> Results:
    adapters, ranks = merge.adapters(scaled=False), merge.round.ranks
    yield from factors_in(merge("rbla", adapters))
    out = merge("rb_lora", adapters, "--set", "space=factor", "--client-ranks", listed(ranks))
    yield from to_clients(out, ranks, lambda index, _: f"c{index}")


def exact(merge: Merging) -> Results:
    for method in ("flexlora", "flora"):
        yield from deltas_in(merge(method, merge.adapters(scaled=True), "--set", "layers=zero"), "g")


def flora(merge: Merging) -> Results:
    yield from deltas_in(merge("flora", merge.adapters(scaled=False), "--set", "layers=zero"), "g", "BA")


def zero_padded(method: str, scaled: bool = False) -> Callable[[Merging], Results]:
    def handler(merge: Merging) -> Results:
        yield from factors_in(merge(method, merge.adapters(scaled), "--set", "layers=zero"))

    return handler


def norm_weighted(merge: Merging) -> Results:
    yield from factors_in(merge("hetlora", merge.adapters(scaled=False)))


def plain_mean(merge: Merging) -> Results:
    yield from factors_in(merge("fedit", merge.adapters(scaled=False), weights=False))


def fedex(merge: Merging) -> Results:
    """The merged adapter is the mean model: W - pre/W + scale B A of what released code leaves."""
    outputs = merge.round.outputs
    for key, found in deltas_in(merge("fedex_lora", merge.adapters(scaled=True), weights=False), "g"):
        layer = key.removesuffix("/dW")
        left = [torch.from_numpy(outputs[f"{layer}/{factor}"]).double() for factor in "BA"]
        before = torch.from_numpy(outputs[f"pre/{layer.removeprefix('g/')}/W"]).double()
        yield f"{layer}/W", found.double() - merge.round.scale(merge.round.ranks[0]) * left[0] @ left[1] + before


def shared_down_factor(merge: Merging) -> Results:
    """The clients' B over the A that was never trained."""
    before = merge.round.before.adapter.layers
    adapters = [
        Adapter({n: LowRank(before[n].A, x.B, 1.0) for n, x in adapter.layers.items()}, adapter.dense)
        for adapter in merge.adapters(scaled=False)
    ]
    yield from factors_in(merge("ffa_lora", adapters, weights=False))


def refactored(merge: Merging) -> Results:
    before = direct.adapter_in(merge.round.outputs, "pre", 1.0)
    yield from deltas_in(merge("fedsvd", [before], weights=False), "g", "BA")


ANSWERS: dict[str, tuple[Callable[[Merging], Results], list[str]]] = {
    "fedex_official": (fedex, ["g/*/W"]),
    "fedit_official": (plain_mean, ["g/*"]),
    "fedsvd_reinit_official": (refactored, ["g/*/BA"]),
    "ffa_official": (shared_down_factor, ["g/*"]),
    "flexlora_official": (flexlora, ["g/*/dW", "r*/*/dW"]),
    "flexlora_repo_hetlora_sqrtscale": (zero_padded("hetlora_weighted", scaled=True), ["g/*/A", "g/*/B"]),
    "flora_official_stack": (flora, ["g/*/BA"]),
    "flora_official_zeropad": (zero_padded("hetlora_weighted"), ["g/*/A", "g/*/B"]),
    "rblora_repo_uniform_hetlora": (zero_padded("hetlora_uniform"), ["g/*"]),
    "rblora_repo_weighted_hetlora": (zero_padded("hetlora_weighted"), ["g/*"]),
    "ref_exact_dW": (exact, ["g/*/dW"]),
    "ref_hetlora_sparsity": (norm_weighted, ["g/*/A", "g/*/B"]),
    "ref_rblora_factor": (rb_lora_factor, ["g/*/A", "g/*/B", "c*/*/dW"]),
    "ref_rblora_product": (rb_lora_product, ["g/*/dW", "c*/*/dW"]),
}
CASES = [case for case in direct.CASES if case["method"] in ANSWERS]


@pytest.mark.skipif(not direct.CASES, reason="../shared/gold is absent")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['method']}-{case['case']}")
def test_merged_adapters_are_the_reference_s(case: dict[str, Any], tmp_path: Path) -> None:
    handler, keys = ANSWERS[case["method"]]
    outputs = direct.load(case["method"], case["case"])
    merge = Merging(direct.Round(direct.load("inputs", case["case"]), outputs), tmp_path)
    answered = set()
    for key, found in handler(merge):
        if not any(direct.fnmatchcase(key, pattern) for pattern in keys):
            continue
        answered.add(key)
        expected = outputs[key].astype(np.float64)
        allowed = case["tol"]["atol_rel_to_max"] * np.abs(expected).max() + case["tol"]["rtol"] * np.abs(expected)
        error = np.abs(with_zero_rows(found.double().numpy(), expected.shape) - expected)
        assert (error <= allowed).all(), f"{key}: off by {error.max():.3g}"
    stated = {key for key in outputs for pattern in keys if direct.fnmatchcase(key, pattern)}
    assert answered == stated - {key for key in stated if key.endswith("/weights")}
    assert answered


@pytest.mark.skipif(not direct.CASES, reason="../shared/gold is absent")
def test_every_answer_is_asked_for() -> None:
    assert {case["method"] for case in CASES} == ANSWERS.keys()
