"""docs/rules.md is what `python docs/rules.py` measures."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from polyrank.methods import AGGREGATORS, METHODS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def rules() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rules", DOCS / "rules.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_is_measured(rules: ModuleType) -> None:
    assert rules.page() == (DOCS / "rules.md").read_text(), "run: python docs/rules.py"


def test_every_rule_and_method_has_a_row(rules: ModuleType) -> None:
    text = rules.PAGE.read_text()
    for section, table in (("## Aggregation rules", AGGREGATORS), ("## Named methods", METHODS)):
        body = text.split(section)[1].split("## ")[0]
        assert [line.split("`")[1] for line in body.splitlines() if line.startswith("| `")] == list(table)


def cells(rules: ModuleType, name: str, **changes: object) -> list[str]:
    method = rules.replace(METHODS[name](), **changes)
    return [cell.strip() for cell in rules.row(name, method).split("|")[2:-1]]


@pytest.mark.parametrize("name", AGGREGATORS)
def test_no_update_outlives_its_turn(rules: ModuleType, name: str) -> None:
    """gamma needs all ranks, and robust rules all updates, before any term can be added; others add as they come."""
    method = rules.replace(rules.fedit(), aggregate=AGGREGATORS[name])
    holding = ("rb_lora", "raflora", "trimmed_mean", "median", "krum", "norm_clipping")
    assert rules.streams(method, rules.start(method)) == (name not in holding)


def test_the_measurement_knows_what_the_literature_does(rules: ModuleType) -> None:
    """Claims that papers prove, so that the table is not merely self-consistent."""
    assert cells(rules, "flora")[:3] == ["yes", "yes", "yes"]
    assert cells(rules, "flexlora")[:3] == ["yes", "yes", "yes"]
    assert cells(rules, "fedex_lora")[:2] == ["yes", "yes"]
    assert cells(rules, "ffa_lora")[:2] == cells(rules, "rolora")[:2] == ["yes", "yes"]
    assert cells(rules, "rb_lora")[0] == "yes"
    assert cells(rules, "rb_lora")[1].startswith("no, ")
    assert cells(rules, "fedit")[0].startswith("no, ")
    assert cells(rules, "fedit")[2].startswith("no, ")
    for name in ("krum", "median", "norm_clipping", "trimmed_mean"):  # no rule that leaves outliers out is a mean
        assert cells(rules, name)[0].startswith("no, ")
        assert cells(rules, name)[2:] == ["yes", "yes", "no", cells(rules, name)[5]]
        assert cells(rules, name)[5].startswith("no, ")
    assert cells(rules, "lokr")[0].startswith("no, ")
    assert cells(rules, "lokr")[1] == cells(rules, "lokr")[3] == "has no ranks"


def test_a_weighted_sum_is_all_that_means_of_factors_need(rules: ModuleType) -> None:
    """Products of two trained factors are not linear in them; with one factor shared, they are."""
    linear = {name for name in METHODS if cells(rules, name)[5] == "yes"}
    assert {"fedit", "rbla", "hetlora_weighted", "hralora", "fedsvd", "ffa_lora", "rolora", "lokr"} <= linear
    assert not linear & {"fedex_lora", "flexlora", "flora", "hetlora", "lora_fair", "rb_lora"}
    only_b = METHODS["ffa_lora"]().factors
    for name in ("fedex_lora", "flexlora", "flora"):
        assert cells(rules, name, factors=only_b)[5] == "yes"
    assert cells(rules, "median", factors=only_b)[5].startswith("no, ")
