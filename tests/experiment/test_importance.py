"""Importance in experiments: what the server keeps for it, runs that are planned by it, and plans without it."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyrank.core.method import Boost, Method
from polyrank.data import DataError, set_apart
from polyrank.experiment import config as config_module
from polyrank.experiment.build import build
from polyrank.experiment.config import ConfigError, Experiment
from polyrank.experiment.forecast import forecast
from polyrank.experiment.loading import parse, read_yaml
from polyrank.experiment.session import Session
from polyrank.experiment.shares import Shares, kept_for_importance, share_data
from polyrank.experiment.store import Run
from polyrank.methods.named import METHODS, fedit
from sittings import contents

Config = dict[str, Any]
NOTE = "importance is measured in the run; the ranks shown are those of equal scores"
SAMPLED = {"name": "sampled", "layers": 2}


@pytest.fixture
def config(digits_config: Config) -> Config:
    return copy.deepcopy(digits_config)


def experiment_of(config: Config, score: Any = None, **changes: Any) -> Experiment:
    method = {"name": "fedit", **({} if score is None else {"score": score, "allocate": SAMPLED})}
    return parse({**config, "method": method, **changes}, "test", Path())


def with_data(config: Config, **options: Any) -> Config:
    return {**config, "data": {**config["data"], **options}}


# --- what the server keeps


def images(shares: Shares, split: str = "importance") -> list[bytes]:
    return [image.tobytes() for image in getattr(shares.dataset, split).inputs]


def test_as_many_are_kept_as_are_measured_on(config: Config) -> None:
    for score, due in (
        (None, 0),
        ("weight_norm", 0),
        ({"name": "fisher", "samples": 12}, 12),
        ({"name": "gradient_norm", "samples": 7}, 7),
        ({"name": "fisher", "samples": 12, "on": "clients"}, 0),
    ):
        experiment = experiment_of(config, score)
        assert kept_for_importance(experiment) == due
        shares = share_data(experiment)
        assert len(shares.dataset.importance or ()) == due
        assert sum(len(own) for own in shares.indices().values()) == len(shares.dataset.train) == 96 - due


def test_what_is_named_is_kept_by_every_method_and_is_the_same(config: Config) -> None:
    config = with_data(config, importance=20)
    scores = [None, "weight_norm", {"name": "fisher", "samples": 12}, {"name": "gradient_norm", "on": "clients"}]
    found = [share_data(experiment_of(config, score)) for score in scores]
    found.append(share_data(experiment_of(config, method={"name": "flora"})))
    for shares in found[1:]:
        assert images(shares) == images(found[0])
        assert images(shares, "train") == images(found[0], "train")
        assert shares.partition.order.tolist() == found[0].partition.order.tolist()
    assert len(images(found[0])) == 20
    assert not set(images(found[0])) & set(images(found[0], "train"))
    assert images(share_data(experiment_of(config, seed=1))) != images(found[0])
    more = share_data(experiment_of(with_data(config, importance=21)))
    assert images(more, "validation") == images(found[0], "validation")


def test_all_that_is_kept_needs_a_number(config: Config) -> None:
    score = {"name": "fisher", "samples": None}
    with pytest.raises(ConfigError, match=r"data\.importance: missing; method\.score, fisher, measures on all"):
        share_data(experiment_of(config, score))
    world = build(experiment_of(with_data(config, importance=9), score))
    assert len(world.clients.holdout.labels) == 9


@pytest.mark.parametrize("count", [96, 500])
def test_something_must_be_left_to_train_on(config: Config, count: int) -> None:
    with pytest.raises(DataError, match=rf"{count} of 96 training examples cannot be kept .*data\.importance"):
        share_data(experiment_of(with_data(config, importance=count)))


def test_what_is_set_apart_is_drawn_uniformly(config: Config) -> None:
    dataset = share_data(experiment_of(config)).dataset
    counts = np.zeros(len(dataset.train))
    where = {image.tobytes(): i for i, image in enumerate(dataset.train.inputs)}
    for seed in range(300):
        kept = set_apart(dataset, 24, np.random.default_rng(seed)).importance
        counts[[where[image.tobytes()] for image in kept.inputs]] += 1
    assert 40 < counts.min() < counts.max() < 115  # 75 expected; 5 standard deviations are 38


# --- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "method.score.every: 0 should be greater than or equal to 1"),
        ({"after": -1}, "method.score.after: -1 should be greater than or equal to 0"),
        ({"smoothing": 1.0}, "method.score.smoothing: 1.0 should be less than 1"),
        ({"samples": 0}, "method.score.samples: 0 should be greater than or equal to 1"),
        ({"on": "server"}, "method.score.on: 'server' should be 'holdout' or 'clients'"),
        ({"form": "diagonal"}, "method.score.form: 'diagonal' should be 'trace', 'squared' or 'norm'"),
        ({"target": "loss"}, "method.score.target: 'loss' should be 'log_likelihood' or 'logit'"),
        ({"labels": "own"}, "method.score.labels: 'own' should be 'given' or 'sampled'"),
        ({"evry": 2}, "Did you mean 'every'?"),
    ],
)
def test_options_are_checked(config: Config, options: Config, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        experiment_of(config, {"name": "fisher", **options})
    assert message in str(refused.value)


@pytest.mark.parametrize("count", [0, -1, 2.5])
def test_a_number_to_keep_is_one(config: Config, count: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.importance"):
        experiment_of(with_data(config, importance=count))


def test_the_key_on_is_a_word() -> None:
    """PyYAML would have it that ``on`` is True."""
    assert read_yaml("{name: fisher, on: clients, off: [yes, no]}") == {
        "name": "fisher",
        "on": "clients",
        "off": ["yes", "no"],
    }
    assert read_yaml("[true, False, TRUE]") == [True, False, True]


def test_resolved_it_is_the_same_scorer(config: Config) -> None:
    experiment = experiment_of(config, {"name": "fisher", "on": "clients", "every": 3, "form": "norm"})
    again = parse(experiment.resolved(), "resolved", Path())
    assert again.build_method().score.keywords == experiment.build_method().score.keywords
    assert again.resolved()["method"]["score"]["on"] == "clients"


# --- runs


def finished(session: Session) -> list[Any]:
    states = [session.state for _ in session.rounds()]
    session.finish()
    return states


@pytest.mark.parametrize(
    "score",
    [
        {"name": "fisher", "samples": 10, "every": 2, "after": 1, "smoothing": 0.5},
        {"name": "fisher", "on": "clients", "samples": 6, "labels": "sampled", "form": "norm"},
        {"name": "gradient_norm", "samples": 10, "every": 3},
    ],
    ids=["fisher", "fisher on clients", "gradient_norm"],
)
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resumed_it_equals_an_uninterrupted_run(score: Config, stop: int, config: Config, tmp_path: Path) -> None:
    changes = {"rounds": 4, "cohort": 3, "absent": 0.2}
    states = finished(Session(Run.create(tmp_path / "whole", experiment_of(config, score, **changes))))
    assert len(set(states[-1].scores.values())) > 4
    rounds = Session(Run.create(tmp_path / "halves", experiment_of(config, score, **changes))).rounds()
    for _ in range(stop):
        next(rounds)
    rounds.close()
    resumed = Session(Run.open(tmp_path / "halves"))
    assert (resumed.state.scores, resumed.state.memory) == (states[stop - 1].scores, states[stop - 1].memory)
    finished(resumed)
    whole, halves = contents(tmp_path / "whole"), contents(tmp_path / "halves")
    assert whole.keys() == halves.keys()
    for name, data in whole.items():
        assert data == halves[name], name


def test_scores_decide_the_ranks_of_a_run(config: Config, tmp_path: Path) -> None:
    """By proportion: the block that matters most gets the highest rank, in the round after the warm-up."""
    score = {"name": "fisher", "samples": 30, "after": 1}
    experiment = parse(
        {**config, "method": {"name": "fedit", "score": score, "allocate": {"name": "proportional"}}}, "test", Path()
    )
    session = Session(Run.create(tmp_path / "run", experiment))
    rounds = session.rounds()
    warm, _ = next(rounds)
    assert all(len(set(ranks.values())) == 1 for ranks in warm.ranks.values())
    record, _ = next(rounds)
    rounds.close()
    spec, ranks = session.world.spec, record.ranks["client_0"]
    blocks: dict[int, float] = {}
    for name, score_ in session.state.scores.items():
        blocks[spec.blocks[name]] = blocks.get(spec.blocks[name], 0.0) + score_
    best = max(blocks, key=lambda block: blocks[block])
    assert {ranks[name] for name in ranks if spec.blocks[name] == best} == {max(ranks.values())}
    assert len(set(ranks.values())) > 1


# --- plans


def test_a_plan_needs_no_data_and_says_so(config: Config) -> None:
    for score, due in (("fisher", True), ({"name": "gradient_norm", "after": 2}, True), ("weight_norm", True)):
        notes = forecast(experiment_of(config, score))["notes"]
        assert (NOTE in notes) is due
    late = forecast(experiment_of(config, {"name": "fisher", "after": 99}))
    assert NOTE not in late["notes"]
    assert NOTE not in forecast(experiment_of(config))["notes"]


def test_a_plan_knows_that_the_server_keeps_examples(config: Config) -> None:
    config["fleet"] = [{"rank": 2, "flops": "1 GFLOP/s"}]

    def compute(**data: Any) -> float:
        return float(
            forecast(experiment_of(with_data(config, **data)))["groups"][0]["traffic"][0]["seconds"]["compute"]
        )

    assert compute(importance=48) == pytest.approx(compute() / 2)


def boosted(rounds: int) -> Callable[[], Method]:
    return lambda: replace(fedit(), boost=Boost(rounds, 2))


@pytest.mark.parametrize(("rounds", "said"), [(2, "1-2"), (20, "1-3")])
def test_a_plan_says_that_a_warm_up_overspends(
    config: Config, rounds: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config["fleet"], config["model"]["rank"] = [{"rank": 2}], 8
    usual = forecast(experiment_of(config))
    monkeypatch.setitem(config_module.METHODS, "fedit", boosted(rounds))
    plan = forecast(experiment_of(config))
    assert f"fedit trains 2 times its budget in rounds {said}, where the server's ranks allow it" in plan["notes"]
    assert set(usual["groups"][0]["ranks"].values()) == {2}
    assert set(plan["groups"][0]["ranks"].values()) == {4}
    traffic = {entry["round"]: entry["bytes_up"] for entry in plan["groups"][0]["traffic"]}
    before = usual["groups"][0]["traffic"][0]["bytes_up"]
    assert traffic[0] > before
    assert traffic.get(2, before) == before
    assert set(traffic) == ({0, 2} if rounds == 2 else {0})
    assert plan["groups"][0]["peak_memory"] > usual["groups"][0]["peak_memory"]


def test_no_method_boosts_without_saying_so(config: Config) -> None:
    for name, method in METHODS.items():
        notes = " ".join(forecast(experiment_of({**config, "rounds": 1}, method={"name": name}))["notes"])
        assert ("times its budget" in notes) == (method().boost is not None)
