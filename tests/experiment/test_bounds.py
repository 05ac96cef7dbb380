"""Numbers beyond all measure: refused by name, with what would be valid, or answered in seconds. Nothing loops or grows
with a number that somebody wrote."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from transformers import BertConfig
from typer.testing import CliRunner

from polyrank.cli import app
from polyrank.data.partitioners import PARTITIONERS
from polyrank.experiment.config import json_schema
from polyrank.experiment.loading import load

HUGE = 10**30
LONG = f"0x{'f' * 6000}"
WHOLE = "should be less than or equal to 2147483647"


def call(*arguments: object) -> Result:
    """A command, which must not take long."""
    before = time.process_time()
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert time.process_time() - before < 5
    return result


def refusal(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return result.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("override", "part"),
    [
        (f"rounds={HUGE}", f"rounds: {HUGE} should be less than or equal to 100000"),
        ("rounds=2000000000", "rounds: 2000000000 should be less than or equal to 100000"),
        (f"seed={HUGE}", f"seed: {HUGE} should be less than or equal to {2**53}"),
        (f"threads={HUGE}", f"threads: {HUGE} should be less than or equal to 1024"),
        ("simulation.workers=2000", "simulation.workers: 2000 should be less than or equal to 1024"),
        (f"cohort={HUGE}", f"cohort: {HUGE} {WHOLE}"),
        (f"model.rank={HUGE}", f"model.rank: {HUGE} {WHOLE}"),
        (f"model.max_length={HUGE}", f"model.max_length: {HUGE} {WHOLE}"),
        (f"data.clients={HUGE}", f"data.clients: {HUGE} {WHOLE}"),
        (f"data.limit={{train: {HUGE}}}", f"data.limit.train: {HUGE} {WHOLE}"),
        (f"fleet.0.rank={HUGE}", f"fleet.0.rank: {HUGE} {WHOLE}"),
        (f"evaluate.generate={{max_tokens: {HUGE}}}", f"evaluate.generate.max_tokens: {HUGE} {WHOLE}"),
        (f"local.batch={HUGE}", f"local.batch: {HUGE} must be between -2147483647 and 2147483647"),
        ("local.epochs=2000000000", "local.epochs: 2000000000 must be between 1 and 1,000,000"),
        ("local.steps=2000000000", "local.steps: 2000000000 must be between 1 and 1,000,000"),
        (f"method={{name: rb_lora, aggregate: {{rank: {HUGE}}}}}", f"method.aggregate.rank: {HUGE} must be between"),
        (f"method.estimate={{name: fixed, rank: {HUGE}}}", f"method.estimate.rank: {HUGE} must be between"),
        (f"method={{name: fed_hello, groups: [{HUGE}]}}", f"method.groups: [{HUGE}] must be between"),
        (f"data.partition={{name: shards, per_client: {HUGE}}}", f"data.partition.per_client: {HUGE} must be between"),
        (f"method.factors={{name: alternating, warmup: -{HUGE}}}", f"method.factors.warmup: -{HUGE} must be between"),
        (f"deployment.clients={HUGE}", f"deployment.clients: {HUGE} must be between"),
        ("fleet.0.share='1e400'", "fleet.0.share: 'inf' should be a finite number"),
        ("fleet.0.share='1e99999999'", "fleet.0.share"),
        ("fleet.0.share='1e-99999999'", "fleet.0.share"),
        (f"model.alpha={LONG}", "has more than 300 digits"),
        (f"study={{seeds: [{LONG}]}}", "has more than 300 digits"),
        (f"{LONG}=1", "unknown key"),
    ],
)
@pytest.mark.parametrize("command", [["plan"], ["data"], ["compare", "--dry-run", "--out", "study"]], ids="-".join)
def test_what_no_experiment_needs_is_refused(
    command: list[str], override: str, part: str, digits_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert part.split(":")[0] in (message := refusal(*command, digits_file, "--set", override))
    if "'1e" not in override:
        assert part in message


def test_every_whole_number_of_a_file_has_an_upper_bound() -> None:
    """Those of sections are in the schema; options of components are bounded where they are read."""
    schema = json_schema()
    sections = ("ModelConfig", "Group", "EvaluateConfig", "SimulationConfig", "StudyConfig", "DigitsDataCommon")
    parts = [{key: value for key, value in schema["properties"].items()}, *(schema["$defs"][name] for name in sections)]

    def walk(node: Any, key: str) -> list[str]:
        inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        open_ended = isinstance(node, dict) and node.get("type") == "integer" and "maximum" not in node
        return [key] * open_ended + [found for name, value in inner for found in walk(value, f"{key}.{name}")]

    assert [found for part in parts for found in walk(part, part.get("title", ""))] == []


@pytest.mark.parametrize("partition", sorted(PARTITIONERS))
def test_a_billion_clients_are_refused_where_there_are_not_as_many_examples(partition: str, digits_file: Path) -> None:
    options = {"pathological": "classes: 2", "by_quantity": "alpha: 1.0", "by_column": "column: x"}.get(partition, "")
    section = f"data.partition={{name: {partition}, {options}}}"
    message = refusal("data", digits_file, "--set", "data.clients=1000000000", "--set", section)
    assert "data.clients" in message or "data.partition" in message


def test_a_plan_of_a_billion_clients_takes_no_longer(digits_file: Path) -> None:
    for command in (["plan"], ["compare", "--dry-run", "--out", "nowhere"]):
        assert call(command[0], digits_file, *command[1:], "--set", "data.clients=1000000000").exit_code == 0


@pytest.mark.parametrize(
    "method",
    [
        "fedit",
        "{name: rolora, factors: {name: alternating, warmup: 99990}}",
        "{name: hralora, every: 1}",
        "{name: fed_hello, after: 99990}",
    ],
)
def test_as_many_rounds_as_may_be_are_planned_in_seconds(method: str, digits_file: Path) -> None:
    many = ["--set", "rounds=100000", "--set", f"method={method}"]
    found = json.loads(call("plan", digits_file, *many, "--json").stdout)
    assert sum(phase["rounds"] for phase in found["trained"]) == 100_000
    [row] = json.loads(call("compare", "--dry-run", digits_file, *many, "--out", "x", "--json").stdout)[
        "cells"
    ].values()
    assert row["bytes_up"] > 1e9


def test_the_bytes_of_a_study_are_those_of_every_round(digits_file: Path) -> None:
    """Bytes of rounds that train A, B and both, summed in full."""
    turns = ["--set", "method={name: fedit, factors: {name: alternating, warmup: 3}}", "--set", "rounds=8"]
    [traffic] = [
        group["traffic"] for group in json.loads(call("plan", digits_file, *turns, "--json").stdout)["groups"]
    ][:1]
    by_factor = {phase["factors"]: phase["bytes_up"] for phase in traffic}
    assert set(by_factor) == {"A", "B", "AB"}
    experiment = load(digits_file, turns[1::2])
    factors = [experiment.build_method().factors(round_) for round_ in range(8)]
    small = sum(by_factor[one] for one in factors) * 2  # two clients of each group, the larger of twice the rank
    [row] = json.loads(call("compare", "--dry-run", digits_file, *turns, "--out", "x", "--json").stdout)[
        "cells"
    ].values()
    large = json.loads(call("plan", digits_file, *turns, "--json").stdout)["groups"][1]["traffic"]
    large_bytes = {phase["factors"]: phase["bytes_up"] for phase in large}
    assert row["bytes_up"] == small + 2 * sum(large_bytes[one] for one in factors)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["compare", "--dry-run", "--seeds", "1e300"], "--seeds: '1e300': every number must be at most"),
        (["compare", "--dry-run", "--grid", f"rounds={LONG}"], "has more than 300 digits"),
        (["profile", "--ranks", "1e300"], "--ranks: '1e300': every number must be at most"),
        (["generate", "run", "--seed", str(HUGE), "--prompt", "x"], "--seed"),
        (["generate", "run", "--tokens", str(HUGE), "--prompt", "x"], "--tokens"),
        (["watch", "run", "--every", "1e300"], "--every"),
        (["compare", "--jobs", str(HUGE)], "--jobs"),
        (["merge", "a", "--out", "b", "--rank", str(HUGE)], "--rank"),
        (["merge", "a", "--out", "b", "--client-ranks", "1e300"], "--client-ranks"),
        (["deploy", "init", "x", "--nodes", str(HUGE)], "--nodes"),
        (["deploy", "init", "x", "--nodes", "1", "--port", str(HUGE)], "--port"),
        (["deploy", "renew", "x", "--days", str(HUGE)], "--days"),
        (["deploy", "logs", "x", "--lines", str(HUGE)], "--lines"),
        (["deploy", "join", "x", "--wait", "1e300"], "--wait"),
        (["deploy", "demo", "x", "--nodes", str(HUGE)], "--nodes"),
    ],
)
def test_options_have_bounds(arguments: list[str], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert part in refusal(*arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("clients", 0), ("wait", -1), ("wait", 1e300), ("deadline", 0), ("deadline", 1e300), ("quorum", 1.5),
        ("quorum", -1), ("attempts", 0), ("oversample", -1), ("oversample", 1e300), ("poll", -1), ("poll", 1e300),
    ],
)  # fmt: skip
def test_a_server_s_terms_have_bounds(key: str, value: float, digits_file: Path) -> None:
    message = refusal("plan", digits_file, "--set", f"deployment.{key}={value}")
    assert f"deployment.{key}: {value}" in message
    assert "must be" in message


@pytest.mark.parametrize(
    ("key", "value"), [("num_hidden_layers", 10**9), ("model_type", {}), ("model_type", 7), ("num_hidden_layers", HUGE)]
)
def test_a_model_s_config_has_bounds(key: str, value: Any, tmp_path: Path) -> None:
    BertConfig(vocab_size=60, hidden_size=16, num_attention_heads=2, num_hidden_layers=2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    experiment = {
        "rounds": 1,
        "model": {"name": ".", "rank": 2},
        "data": {"name": "files", "train": "a.csv", "test": "b.csv", "text": "text", "classes": ["x", "y"]},
        "fleet": [{"rank": 2}],
    }
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(experiment))
    message = refusal("plan", tmp_path / "e.yaml")
    assert "config.json" in message
    assert key in message
