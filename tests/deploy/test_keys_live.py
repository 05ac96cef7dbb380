"""Nodes that come, go, get other keys and expire, and a certificate that is renewed, while a run goes on."""

import json
import ssl
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from polyrank.deploy import (
    certificates,
    control,
    follow,
    identity,
    join,
    operate,
    provision,
    registrar,
    registry,
    renewal,
)
from polyrank.deploy.enrolment import instant, read_answer
from polyrank.deploy.layout import DeployError, Deployment
from polyrank.experiment.loading import load
from polyrank.experiment.store import Run

pytestmark = pytest.mark.deploy

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "digits.yaml"


def soon(true: Callable[[], object], patience: float = 120) -> None:
    deadline = time.monotonic() + patience
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture
def load_on_it(deployment: Deployment, tmp_path: Path) -> Iterator[Run]:
    """A run that the connected nodes work on all the time."""
    (tmp_path / "orders.json").write_text(json.dumps({"nodes": 2, "slow": 3}))
    run = Run.create(tmp_path / "run", load(EXPERIMENT, ["rounds=1000"]))
    follow.submit(deployment, run)
    soon(lambda: list(run.records()))
    yield run
    follow.stop(deployment, run)


def test_nodes_come_and_go_under_load(deployment: Deployment, load_on_it: Run, tmp_path: Path) -> None:
    site, others = tmp_path / "delta", operate.node_ids(deployment)
    request = site / "request.json"

    def let_in(replace: bool = False) -> str:
        provision.add(deployment, request, replace=replace)
        assert operate.settle(deployment)
        identity.accept(site, read_answer(deployment.answer("delta")))
        return operate.node_ids(deployment)["delta"]

    identity.request(site, "delta", deployment.settings.federation)
    ids = [let_in()]
    node = join.join(site, keep=False, check=False)  # the toy app has no model
    try:
        assert join.connected(node, 40) == ids[0]

        assert operate.remove(deployment, "delta")
        with pytest.raises(DeployError, match="was removed on"):
            let_in()
        identity.rotate(site, "delta")
        ids.append(let_in())
        identity.rotate(site, "delta")
        ids.append(let_in(replace=True))
        assert len({*ids}) == 3
        soon(lambda: join.connected(node, 0) == ids[2])  # the node has found its new key by itself

        with registry.changing(deployment) as book:  # its time is over: nobody does anything
            book["nodes"]["delta"]["until"] = instant(datetime.now(UTC))
        soon(lambda: "delta" not in operate.node_ids(deployment))
        soon(lambda: not any(past["id"] for past in registry.read(deployment)["past"]))
        assert [past["why"] for past in registry.read(deployment)["past"]] == ["removed", "replaced", "expired"]
        assert not {*ids} & control.nodes(deployment).keys()
    finally:
        operate.remove(deployment, "delta")
        operate.down(node)
    assert operate.node_ids(deployment) == others

    renewal.renew(deployment, days=77)
    assert operate.restart(deployment, ("superlink", "gateway")) == ["superlink", "gateway"]
    for port in (deployment.settings.port, deployment.settings.superlink_port):
        served = ssl.get_server_certificate(("127.0.0.1", port))
        assert (certificates.expires(served.encode()) - datetime.now(UTC)).days == 76
    done = len(list(load_on_it.records()))
    soon(lambda: len(list(load_on_it.records())) > done)


def test_what_was_interrupted_is_finished(deployment: Deployment, tmp_path: Path) -> None:
    """Ids that were not written down are known again, and who was taken back meanwhile is not let in."""
    others, ids = operate.node_ids(deployment), {}
    for name in ("one", "two"):
        asked = identity.request(tmp_path / name, name, deployment.settings.federation)
        (tmp_path / f"{name}.pub").write_text(f"{asked.key} {name}\n")
        ids[name] = control.register(deployment, tmp_path / f"{name}.pub", name)
        if name == "one":
            provision.add(deployment, tmp_path / "one" / "request.json")
            assert registrar.register(deployment) == {**others, "one": ids["one"]}
    with registry.changing(deployment) as book:
        registry.leave(book, "one", datetime.now(UTC))
    assert registrar.register(deployment) == others
    provision.add(deployment, tmp_path / "two" / "request.json")
    with pytest.raises(DeployError, match="node two: Flower has refused this key before"):
        registrar.register(deployment)
    with registry.changing(deployment) as book:
        registry.leave(book, "two", datetime.now(UTC))
