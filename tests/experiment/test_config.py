"""The configuration: what is accepted, what is refused and how, and that a resolved experiment is the same one."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from transformers import BertConfig

from polyrank.core.method import Method
from polyrank.experiment.build import build
from polyrank.experiment.config import SLOTS, ConfigError, Experiment, json_schema
from polyrank.experiment.loading import load, method_with, parse, read_yaml
from polyrank.experiment.machine import on_this_machine
from polyrank.experiment.planning import describe, group_budgets, server_rank
from polyrank.methods import METHODS
from polyrank.methods.aggregate.rb_lora import rb_lora

FILES = sorted((Path(__file__).parents[2] / "experiments").glob("*.yaml"))
Config = dict[str, Any]


def changed(config: Config, key: str, value: Any) -> Config:
    """A copy with one key set; ``None`` removes it."""
    config = copy.deepcopy(config)
    *path, last = key.split(".")
    node: Any = config
    for part in path:
        node = node[int(part)] if isinstance(node, list) else node[part]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return config


def parsed(config: Config) -> Experiment:
    return parse(config, "file.yaml", Path("/folder"))


def refusal(config: Config) -> str:
    with pytest.raises(ConfigError) as refused:
        parsed(config)
    return str(refused.value)


def answers(method: Method) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Each answer of a method as a function and its options."""
    for slot in SLOTS:
        bound = getattr(method, slot)
        yield (slot, bound.func, bound.keywords) if isinstance(bound, partial) else (slot, bound, {})
    yield "penalty", method.penalty, {}
    yield "dense", method.dense, {}
    yield "form", (method.form, method.rank), {}
    yield "hold", method.hold, {}
    yield "boost", method.boost, {}


def same_method(one: Method, other: Method) -> bool:
    """Whether two methods give the same answers, options left at their defaults or written out alike."""

    def filled(method: Method) -> list[tuple[str, Any, dict[str, Any]]]:
        found = []
        for slot, function, options in answers(method):
            defaults = getattr(function, "__kwdefaults__", None) or {}
            found.append((slot, function, {**defaults, **options}))
        return found

    return filled(one) == filled(other)


# --- what is refused


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("sed", 1, ["file.yaml: unknown key 'sed'.", "Did you mean 'seed'?", "Valid: absent, baselines, cohort"]),
        ("model.target", ["q"], ["model: unknown key 'target'.", "Did you mean 'targets'?"]),
        ("data.client", 3, ["data: unknown key 'client'.", "Did you mean 'clients'?"]),
        ("data.partition.alhpa", 3, ["data.partition: unknown key 'alhpa'.", "Did you mean 'alpha'?"]),
        ("data.partition.name", "dirchlet", ["data.partition.name: 'dirchlet'", "Did you mean 'dirichlet'?", "shards"]),
        ("data.name", "digit", ["data.name: 'digit' is unknown.", "Did you mean 'digits'?", "sst2"]),
        ("data.limit.trian", 9, ["data.limit.trian", "'train', 'validation' or 'test'"]),
        ("method.name", "rblora", ["method.name: 'rblora' is unknown.", "Did you mean 'rb_lora'?", "flexlora"]),
        ("method", "rb-lora", ["method.name: 'rb-lora' is unknown.", "Did you mean 'rb_lora'?"]),
        ("method.agregate", {}, ["method: unknown key 'agregate'.", "Did you mean 'aggregate'?"]),
        ("method.aggregate", "flexlra", ["method.aggregate.name: 'flexlra'", "Did you mean 'flexlora'?"]),
        ("method.aggregate", {"row": "zero"}, ["method.aggregate: unknown key 'row'.", "Did you mean 'rows'?"]),
        ("method.aggregate", {"rows": "zeros"}, ["method.aggregate.rows: 'zeros'", "'renormalise', 'zero' or 'keep'"]),
        ("method.factors", {"name": "both", "first": "A"}, ["method.factors: unknown key 'first'."]),
        ("model.rank", 0, ["model.rank: 0 should be greater than or equal to 1"]),
        ("fleet.1.rank", 0, ["fleet.1.rank: 0 should be greater than or equal to 1"]),
        ("model.rank", 4.5, ["model.rank: 4.5"]),
        ("model.rank", "four", ["model.rank: 'four'"]),
        ("model.alpha", 0, ["model.alpha: 0 should be greater than 0"]),
        ("model.name", None, ["model.name: missing"]),
        ("rounds", None, ["rounds: missing"]),
        ("rounds", 0, ["rounds: 0"]),
        ("seed", -1, ["seed: -1"]),
        ("cohort", 0, ["cohort: 0"]),
        ("absent", 1.0, ["absent: 1.0 should be less than 1"]),
        ("fleet", [], ["fleet: []", "at least 1"]),
        ("fleet.0.uplink", "-1 Mbit/s", ["fleet.0.uplink: '-1 Mbit/s' must be more than 0"]),
        ("fleet.0.uplink", "0 Mbit/s", ["fleet.0.uplink: '0 Mbit/s' must be more than 0"]),
        ("fleet.0.uplink", 7, ["fleet.0.uplink: 7 needs a unit, for example '7.08 Mbit/s'"]),
        ("fleet.0.uplink", "7 Mb/s", ["fleet.0.uplink: '7 Mb/s' is not a quantity such as '7.08 Mbit/s'", "Mbit/s"]),
        ("fleet.0.memory", "2 gibibytes", ["fleet.0.memory: '2 gibibytes' is not a quantity", "GiB"]),
        ("fleet.0.flops", "ten TFLOP/s", ["fleet.0.flops: 'ten TFLOP/s' is not a quantity"]),
        ("simulation", {"cache": "much"}, ["simulation.cache: 'much' is not a quantity", "nor auto, nor off"]),
        ("fleet.0.memory", "1.2.3 GiB", ["fleet.0.memory: '1.2.3 GiB' is not a quantity"]),
        ("fleet.0.share", 0.4, ["fleet: shares sum to 0.9, not 1"]),
        ("fleet.0.share", "1/0", ["fleet.0.share: '1/0' is not a share"]),
        ("fleet.0.share", "half", ["fleet.0.share: 'half' is not a share"]),
        ("fleet.0.share", 1.5, ["fleet.0.share: 1.5"]),
        ("local.lr", -0.1, ["local.lr: -0.1 must be "]),
        ("local.clip", 0, ["local.clip: 0"]),
        ("local.batch", 0, ["local.batch: 0 must be at least 1"]),
        ("local.momentum", 1.0, ["local.momentum: 1.0"]),
        ("local.optimizer", "adam", ["local.optimizer: 'adam'", "'adamw' or 'sgd'"]),
        ("local.schedule", "cos", ["local.schedule: 'cos'", "'cosine'"]),
        ("local.learning_rate", 1, ["local: unknown key 'learning_rate'."]),
        ("baselines", ["singel"], ["baselines.0: 'singel'", "'single' or 'local'"]),
        ("expected", {"accuracy": 0.5}, ["expected.tolerance: missing"]),
    ],
)
def test_refused_with_the_key_the_value_and_what_is_valid(
    key: str, value: Any, parts: list[str], digits_config: Config
) -> None:
    message = refusal(changed(digits_config, key, value))
    assert message.startswith("file.yaml: ")
    assert len(message.splitlines()) == 1
    for part in parts:
        assert part in message


def test_every_mistake_is_named_once(digits_config: Config) -> None:
    config = changed(changed(digits_config, "sed", 1), "model.rank", 0)
    assert "unknown key 'sed'" in refusal(config)
    config = changed(changed(digits_config, "rounds", 0), "model.rank", 0)
    lines = refusal(config).splitlines()
    assert [line.split(":")[1] for line in lines] == [" rounds", " model.rank"]


def test_infinite_quantities_are_refused(digits_config: Config) -> None:
    assert "must be more than 0" in refusal(changed(digits_config, "fleet.0.memory", "1e999 B"))
    assert "lr" in refusal(changed(digits_config, "local.lr", float("nan")))
    assert "alpha" in refusal(changed(digits_config, "model.alpha", float("inf")))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[1, 2]", "must be a mapping with keys seed, rounds"),
        ("", "must be a mapping"),
        ("a: [", "not YAML"),
        (None, "cannot be read: No such file"),
        (b"\xff\xfe\xfa", "not YAML: its bytes look like UTF-16; save the file as UTF-8"),
        (b"rounds: 1\n# \xe9", "not YAML: line 2 is not UTF-8 (byte 0xe9, as of Latin-1"),
    ],
)
def test_files_that_are_no_experiment(text: Any, part: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as refused:
        load(path)
    assert str(path) in str(refused.value)
    assert part in str(refused.value)


def test_a_file_may_begin_with_a_mark_of_byte_order(digits_file: Path, tmp_path: Path) -> None:
    marked = tmp_path / "marked.yaml"
    marked.write_bytes(b"\xef\xbb\xbf" + digits_file.read_bytes())
    assert load(marked).resolved() == load(digits_file).resolved()


def test_ranks_that_do_not_go_together_are_refused_before_a_model_is_loaded(
    digits_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polyrank.experiment.build.load_base", lambda *arguments: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=r"fleet\.1\.rank: 4 exceeds model\.rank, 3"):
        build(parsed(changed(changed(digits_config, "model.rank", 3), "model.name", "./nowhere")))
    ranks = changed(changed(digits_config, "fleet.0.rank", None), "fleet.1.rank", None)
    with pytest.raises(ConfigError, match=r"fleet\.0.* states no rank.*method\.estimate=least"):
        build(parsed(ranks))
    with pytest.raises(ConfigError, match=r"method\.estimate: gives a rank of 9, above model\.rank, 4"):
        build(parsed(changed(digits_config, "method", {"name": "fedit", "estimate": {"rank": 9}})))


# --- overrides


def test_set_reaches_every_depth(digits_file: Path) -> None:
    experiment = load(
        digits_file,
        [
            "rounds=7",
            "model.targets=[k_proj]",
            "fleet.1.rank=3",
            "data.limit.train=50",
            "data.partition=shards",
            "data.partition.per_client=3",
            "method=flexlora",
            "method.aggregate.rank=16",
            "local.lr=1e-3",
            "expected={accuracy: 0.5, tolerance: 0.1}",
        ],
    )
    assert (experiment.rounds, experiment.model.targets, experiment.fleet[1].rank) == (7, ["k_proj"], 3)
    assert experiment.data.limit == {"train": 50, "validation": 40, "test": 60}
    assert (experiment.data.partition.name, experiment.data.partition.per_client) == ("shards", 3)
    assert experiment.build_method().aggregate.keywords["rank"] == 16
    assert experiment.build_method().aggregate.func is METHODS["flexlora"]().aggregate
    assert experiment.local.lr == 1e-3
    assert experiment.expected.accuracy == 0.5


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("rounds", "--set rounds: must be key=value"),
        ("=3", "--set =3: must be key=value"),
        ("rounds=[", "--set rounds=[: the value is not YAML"),
        ("rounds=many", "rounds: 'many'"),
        ("fleet.7.rank=3", "'7' is not a position in a list of 2"),
        ("fleet.small.rank=3", "'small' is not a position in a list of 2"),
        ("rounds.x=3", "rounds is 3, not a section"),
        ("rounds.x.y=3", "rounds is 3, not a section"),
        ("method.agregate.rank=3", "unknown key 'agregate'"),
        ("modle.rank=3", "unknown key 'modle'"),
        ("method={name: trimmed_mean, aggregate: {trim: 0.5}}", "method.aggregate.trim: 0.5"),
        ("method={name: krum, aggregate: {keep: 0}}", "method.aggregate.keep: 0"),
        ("method={name: norm_clipping, aggregate: {bound: 0.0}}", "method.aggregate.bound: 0.0"),
    ],
)
def test_bad_overrides_are_refused(override: str, part: str, digits_file: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load(digits_file, [override])
    assert part in str(refused.value)


@pytest.mark.parametrize("text", ["1e-3", "1.e-3", "+.1E-2", "0.001", "1.0e-3"])
def test_powers_of_ten_are_numbers(text: str) -> None:
    assert read_yaml(f"lr: {text}") == {"lr": 0.001}
    assert read_yaml("[1e3x, e3, 1-3]") == ["1e3x", "e3", "1-3"]


def test_a_method_by_name_with_options_of_its_rule() -> None:
    assert same_method(method_with("rb_lora", []), METHODS["rb_lora"]())
    aggregate = method_with("rb_lora", ["space=factor", "align=true"]).aggregate
    assert aggregate.func is rb_lora
    assert aggregate.keywords["space"] == "factor"
    assert aggregate.keywords["align"] is True
    assert method_with("hetlora", ["layers=zero"]).aggregate.keywords["pruning"] is True
    krum = method_with("krum", ["byzantine=2", "keep=3", "few=skip"]).aggregate.keywords
    assert (krum["byzantine"], krum["keep"], krum["few"], krum["rows"]) == (2, 3, "skip", "keep")
    with pytest.raises(ConfigError, match="Did you mean 'rb_lora'"):
        method_with("rb_lor", [])
    with pytest.raises(ConfigError, match="unknown key 'layer'"):
        method_with("flexlora", ["layer=zero"])


# --- units


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("memory", "2 GiB", 2 * 2**30),
        ("memory", "1.5 GB", 1.5e9),
        ("memory", "512MiB", 2**29),
        ("memory", "100 B", 100),
        ("uplink", "7.08 Mbit/s", 7.08e6),
        ("uplink", "1e3 kbit/s", 1e6),
        ("downlink", "1 MB/s", 8e6),
        ("downlink", "1 Gbit/s", 1e9),
        ("flops", "10 TFLOP/s", 1e13),
        ("share", "1/2", 0.5),
    ],
)
def test_units(key: str, text: str, value: float, digits_config: Config) -> None:
    group = parsed(changed(digits_config, f"fleet.0.{key}", text)).fleet[0]
    assert getattr(group, key) == pytest.approx(value, rel=1e-12)


def test_thirds_sum_to_one(digits_config: Config) -> None:
    fleet = [{"share": "1/3", "rank": rank} for rank in (1, 2, 3)]
    assert len(parsed(changed(digits_config, "fleet", fleet)).fleet) == 3
    sevenths = [{"share": "1/7", "rank": 1} for _ in range(7)]
    assert len(parsed(changed(digits_config, "fleet", sevenths)).fleet) == 7


def test_the_server_s_rank_is_the_fleet_s_largest(digits_config: Config) -> None:
    experiment = parsed(changed(digits_config, "model.rank", None))
    method = experiment.build_method()
    assert server_rank(experiment, group_budgets(experiment, method, describe(experiment, method))) == 4


# --- resolved


def reloaded(experiment: Experiment) -> Experiment:
    text = yaml.safe_dump(experiment.resolved(), sort_keys=False)
    return parse(yaml.safe_load(text), "resolved", Path("/elsewhere"))


@pytest.mark.parametrize("name", METHODS)
def test_a_resolved_method_is_the_same_method(name: str, digits_config: Config) -> None:
    experiment = parsed(changed(digits_config, "method", name))
    assert same_method(experiment.build_method(), METHODS[name]())
    again = reloaded(experiment)
    assert again.resolved() == experiment.resolved()
    assert same_method(again.build_method(), METHODS[name]())
    assert set(experiment.resolved()["method"]) >= {"name", *SLOTS}


def valid_options(name: str) -> dict[str, Any]:
    """Options that an entry cannot do without."""
    return {"fixed": {"rank": 2}}.get(name, {})


@pytest.mark.parametrize(("slot", "entry"), [(slot, entry) for slot, table in SLOTS.items() for entry in table])
def test_every_answer_can_be_replaced_by_every_other(slot: str, entry: str, digits_config: Config) -> None:
    options = valid_options(entry)
    for given in (entry, {"name": entry, **options}):
        experiment = parsed(changed(digits_config, "method", {"name": "hetlora", "penalty": 0.5, slot: given}))
        found = {name: (function, keywords) for name, function, keywords in answers(experiment.build_method())}
        assert found[slot][0] is SLOTS[slot][entry]
        assert found["penalty"][0].weight == 0.5
        again = reloaded(experiment)
        assert again.resolved() == experiment.resolved()
        assert same_method(again.build_method(), experiment.build_method())


def test_a_method_s_own_options_survive(digits_config: Config) -> None:
    method = {"name": "hetlora", "penalty": 0.25, "decay": 0.5, "prune": False}
    experiment = reloaded(parsed(changed(digits_config, "method", method)))
    built = experiment.build_method()
    assert (built.penalty.weight, built.penalty.decay, built.penalty.prune) == (0.25, 0.5, False)
    assert built.aggregate.keywords["pruning"] is False


def test_units_shares_and_paths_survive(digits_config: Config, tmp_path: Path) -> None:
    config = copy.deepcopy(digits_config)
    config["fleet"][0] |= {"memory": "2 GiB", "flops": "1.5 TFLOP/s"}
    config["model"] |= {"adapter": "here/adapter"}
    experiment = parse(config, "f", tmp_path)
    again = reloaded(experiment)
    assert again.fleet == experiment.fleet
    assert again.model.adapter == (tmp_path / "here" / "adapter").resolve()
    assert again.resolved() == experiment.resolved()


def test_a_frozen_head_reaches_the_method(digits_config: Config) -> None:
    experiment = parsed(changed(digits_config, "model.head", "freeze"))
    assert experiment.build_method().dense == "freeze"
    assert reloaded(experiment).build_method().dense == "freeze"


# --- the schema


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(json.dumps(json_schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_schema_accepts_every_experiment(path: Path, validator: jsonschema.Draft202012Validator) -> None:
    validator.validate(read_yaml(path.read_text()))
    resolved = load(path).resolved()
    validator.validate(resolved)
    assert load(path).resolved() == resolved


def test_there_are_experiments() -> None:
    assert {path.stem for path in FILES} >= {"digits", "sst2_minilm", "banking77_minilm", "cifar10_vit"}


MISTAKES: list[Callable[[Config], Config]] = [
    lambda c: changed(c, "sed", 1),
    lambda c: changed(c, "model.target", "attention"),
    lambda c: changed(c, "data.partition.alhpa", 1),
    lambda c: changed(c, "fleet.0.rnk", 1),
    lambda c: changed(c, "local.learning_rate", 1),
    lambda c: changed(c, "method.agregate", {}),
    lambda c: changed(c, "method.aggregate", {"name": "fedit", "row": "zero"}),
    lambda c: changed(c, "method.name", "fedti"),
    lambda c: changed(c, "model.rank", 0),
    lambda c: changed(c, "rounds", None),
    lambda c: changed(c, "fleet.0.uplink", 7),
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_schema_rejects_mistakes(
    mistake: Callable[[Config], Config], digits_config: Config, validator: jsonschema.Draft202012Validator
) -> None:
    validator.validate(digits_config)
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(mistake(digits_config))


@pytest.mark.parametrize("name", METHODS)
def test_the_schema_knows_every_method_by_name_alone(
    name: str, digits_config: Config, validator: jsonschema.Draft202012Validator
) -> None:
    for method in (name, {"name": name}, {"name": name, "factors": "only_b"}):
        validator.validate(changed(digits_config, "method", method))
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(changed(digits_config, "method", f"{name}x"))


def test_the_schema_takes_the_method_s_own_rule_with_an_option(
    digits_config: Config, validator: jsonschema.Draft202012Validator
) -> None:
    """What the loader takes, an editor must not underline."""
    config = changed(digits_config, "method", {"name": "flexlora", "aggregate": {"rank": 16}})
    assert parsed(config).build_method().aggregate.keywords["rank"] == 16
    validator.validate(config)


# --- files that extend others


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_a_file_extends_another_beside_it(tmp_path: Path, digits_config: Config) -> None:
    write(
        tmp_path,
        first=yaml.safe_dump(digits_config),
        second="extends: first.yaml\nrounds: 9\nmethod: rb_lora\ndata: {partition: {name: shards, per_client: 3}}\n",
        third="extends: second.yaml\nlocal: {lr: 0.5}\n",
    )
    experiment = load(tmp_path / "third.yaml", ["local.batch=4"])
    assert (experiment.rounds, experiment.method.name) == (9, "rb_lora")
    assert experiment.data.partition.model_dump() == {"name": "shards", "per_client": 3}  # another component: no alpha
    assert experiment.data.clients == digits_config["data"]["clients"]
    assert (experiment.local.lr, experiment.local.batch, experiment.local.epochs) == (0.5, 4, 1)
    assert "extends" not in experiment.resolved()


def test_what_cannot_be_extended(tmp_path: Path) -> None:
    write(tmp_path, a="extends: b.yaml", b="extends: a.yaml", c="extends: ../c.yaml", d="extends: nowhere.yaml")
    for name, part in (
        ("a", "extends this file in turn"),
        ("c", "'../c.yaml' must be the name of a file beside this one"),
        ("d", "nowhere.yaml: cannot be read"),
    ):
        with pytest.raises(ConfigError, match=re.escape(part)):
            load(tmp_path / f"{name}.yaml")


def test_plans_read_the_config_and_runs_the_name(tmp_path: Path, digits_config: Config) -> None:
    BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24).save_pretrained(
        tmp_path / "made"
    )
    config = changed(digits_config, "model", {"name": "some/model", "config": "made", "targets": ["query"], "rank": 2})
    config = changed(config, "data", {"name": "sst2", "clients": 4})
    write(tmp_path, x=yaml.safe_dump(changed(config, "fleet", [{"rank": 2}])))
    experiment = load(tmp_path / "x.yaml")
    spec = describe(experiment, experiment.build_method())
    assert list(spec.modules.values()) == [(16, 16)]
    assert spec.architecture.classes == 2
    assert experiment.resolved()["model"]["name"] == "some/model"


def test_overriding_one_option_of_an_answer_keeps_what_the_method_s_options_made_of_it(digits_config: Config) -> None:
    section = {"name": "hralora", "rank": 3, "every": 7, "allocate": {"leftover": "highest"}, "score": {"form": "norm"}}
    method = parsed(changed(digits_config, "method", section)).resolved()["method"]
    assert (method["allocate"]["rank"], method["allocate"]["leftover"]) == (3, "highest")
    assert (method["score"]["every"], method["score"]["form"]) == (7, "norm")
    with pytest.raises(ConfigError, match=r"method\.every: 0 "):
        parsed(changed(digits_config, "method", {"name": "hralora", "every": 0, "score": {"form": "norm"}}))


def test_what_auto_leaves_to_the_machine_is_decided_before_a_run(digits_config: Config) -> None:
    decided = on_this_machine(parsed(changed(digits_config, "device", "cpu")))
    assert (decided.device, decided.local.precision) == ("cpu", "fp32")
    assert decided.threads >= 1
    asked = changed(changed(digits_config, "device", "cpu"), "local.precision", "bf16")
    assert on_this_machine(parsed(asked)).local.precision == "bf16"


@pytest.mark.parametrize(
    ("changes", "on"),
    [
        ({}, True),
        ({"rounds": 1}, False),
        ({"rounds": 1, "local.epochs": 2}, True),
        ({"rounds": 1, "local.steps": 3}, True),
        ({"method": {"name": "fedit", "dispatch": "whole"}}, False),
        ({"method": {"name": "fedit", "dispatch": "whole"}, "local.epochs": 2}, True),
        ({"local.epochs": 2, "simulation": {"cache": "off"}}, False),
    ],
)
def test_a_cache_is_decided_by_what_comes_again(digits_config: Config, changes: Config, on: bool) -> None:
    config = changed(digits_config, "device", "cpu")
    for key, value in changes.items():
        config = changed(config, key, value)
    cache = on_this_machine(parsed(config)).simulation.cache
    assert (cache == "off") != on
    if on:
        assert isinstance(cache, float)
        assert 0 < cache <= 2**32


def test_a_cache_is_a_quantity(digits_config: Config) -> None:
    asked = parsed(changed(digits_config, "simulation", {"cache": "3 MiB"}))
    assert on_this_machine(asked).simulation.cache == 3 * 2**20
    assert parsed(asked.resolved()).simulation.cache == 3 * 2**20
    with pytest.raises(ConfigError, match=r"simulation\.cache: 3 needs a unit"):
        parsed(changed(digits_config, "simulation", {"cache": 3}))


def test_an_option_that_is_switched_off_stays_off_in_the_resolved_file(digits_config: dict[str, Any]) -> None:
    config = {**digits_config, "local": {"clip": None}, "evaluate": {"samples": None}}
    again = parse(parse(config, "file.yaml", Path()).resolved(), "resolved", Path())
    assert again.local.clip is None
    assert "samples" not in again.resolved()["evaluate"]
