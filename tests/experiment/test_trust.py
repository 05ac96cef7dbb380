"""The section ``trust``: what it is in a simulation and in a deployment; and what profiles can be planned with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from polyrank.core.gate import Gate
from polyrank.core.types import ClientProfile, LocalTraining
from polyrank.experiment.config import ConfigError, Experiment
from polyrank.experiment.loading import parse
from polyrank.experiment.machine import on_this_machine
from polyrank.experiment.planning import described, from_config, planned_with
from polyrank.methods import METHODS

LOCAL = LocalTraining()


def experiment(config: dict[str, Any], **more: Any) -> Experiment:
    return parse({**config, **more}, "test.yaml", Path())


def test_bounds_are_a_deployment_s_unless_the_file_says_otherwise(digits_config: dict[str, Any]) -> None:
    left = experiment(digits_config)
    assert left.gate() == Gate(reach=True)
    assert left.gate(remote=True) == Gate(reach=True, size_cap=3.0, clip=3.0)
    stated = experiment(digits_config, trust={"size_cap": 10, "clip": "off"})
    for remote in (False, True):
        assert stated.gate(remote=remote) == Gate(reach=True, size_cap=10.0)


def test_what_is_believed_is_written_into_a_deployed_run_s_file(digits_config: dict[str, Any]) -> None:
    deployed = on_this_machine(experiment(digits_config), remote=True)
    again = parse(yaml.safe_load(yaml.safe_dump(deployed.resolved())), "experiment.yaml", Path())
    assert again.gate() == again.gate(remote=True) == Gate(reach=True, size_cap=3.0, clip=3.0)
    simulated = on_this_machine(experiment(digits_config))
    assert simulated.trust.clip == simulated.trust.size_cap == "auto"


def test_noise_on_the_server_needs_no_other_bound(digits_config: dict[str, Any]) -> None:
    privacy = {"clients": {"clip": 1.0, "noise": 1.0}}
    assert experiment(digits_config, privacy=privacy).gate(remote=True).clip is None
    for key in ("norm", "clip"):
        with pytest.raises(ConfigError, match=rf"trust\.{key}: not with privacy\.clients"):
            experiment(digits_config, privacy=privacy, trust={key: 5})
    on_clients = experiment(digits_config, privacy={"clients": {"clip": 1.0, "noise": 1.0, "where": "client"}})
    assert on_clients.gate(remote=True).clip == 3.0


@pytest.mark.parametrize(("key", "value"), [("clip", 0.5), ("size_cap", 0), ("size_cap", "none"), ("clip", "nan")])
def test_a_bound_below_what_is_usual_is_none(digits_config: dict[str, Any], key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"test\.yaml.*trust\.{key}"):
        experiment(digits_config, trust={key: value})


@pytest.mark.parametrize("method", ["fedit", "straggler", "exclusive", "hralora", "by_network"])
def test_no_profile_breaks_a_plan(digits_config: dict[str, Any], method: str) -> None:
    """Each is planned with, or is refused with a reason; of those that are left, everybody has a budget."""
    asked = experiment(digits_config)
    chosen = METHODS[method]() if method in METHODS else METHODS["fedit"]()
    if method == "by_network":
        from polyrank.methods import ESTIMATORS

        chosen = replace(chosen, estimate=ESTIMATORS[method])
    spec, rank = described(from_config(asked, "meta"), asked, chosen), 4
    numbers: list[Any] = [None, 0, 1, 2, 10**4, 2**53]
    rates: list[Any] = [None, 0, 0.0, 1e-300, 1.0, 1e6, 2**53]
    profiles = [ClientProfile(10, rank=number) for number in numbers]
    profiles += [ClientProfile(10, rank=2, **{key: rate}) for key in ("uplink", "downlink", "memory") for rate in rates]
    profiles += [ClientProfile(10, uplink=rate, downlink=1e6) for rate in rates]
    profiles += [ClientProfile(number, rank=2, uplink=1e6, downlink=1e6) for number in (0, 1, 2**53)]
    left: dict[str, ClientProfile] = {}
    reasons: list[str] = []
    for number, profile in enumerate(profiles):
        try:
            left[f"c{number:03}"] = planned_with(profile, rank, chosen, spec, LOCAL)
        except ValueError as error:
            reasons.append(str(error))
    assert left
    assert reasons
    assert all(5 < len(reason) < 1000 for reason in reasons)
    budgets = chosen.estimate(left, spec, LOCAL)
    assert all(0 <= budgets[client].total <= spec.full_rank * len(spec.modules) for client in left)
    assert any(budgets[client].total for client in left)
    if method == "straggler":
        assert all(budgets[client].total for client in left)
    assert all(profile.rank is None or profile.rank <= rank for profile in left.values())


def test_the_reason_says_what_is_missing(digits_config: dict[str, Any]) -> None:
    asked = experiment(digits_config)
    method = METHODS["fedit"]()
    spec = described(from_config(asked, "meta"), asked, method)

    def reason(name: str, profile: ClientProfile) -> str:
        with pytest.raises(ValueError, match=r".") as caught:
            planned_with(profile, 4, METHODS[name](), spec, LOCAL)
        return str(caught.value)

    assert reason("fedit", ClientProfile(10)).startswith("states no rank; give")
    assert reason("fedit", ClientProfile(10)).endswith("a site states this in its site.yaml")
    assert f"rank: {2**53} is stated, and must be from 1 to" in reason("exclusive", ClientProfile(10, rank=2**53))
    assert "rank: 0 is stated" in reason("straggler", ClientProfile(10, rank=0))
    assert "cannot afford rank 1: upload: has 0 bit/s, and it takes" in reason("straggler", ClientProfile(10, uplink=0))
