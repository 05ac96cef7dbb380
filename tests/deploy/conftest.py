"""One deployment on loopback for all tests that need one: TLS, node keys, the gateway, two nodes."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from polyrank.deploy import join, operate, provision
from polyrank.deploy.layout import Deployment

APPS = Path(__file__).parent / "apps"
TOY = {"serverapp": "toyfed.server:app", "clientapp": "toyfed.client:app"}


@pytest.fixture(scope="session")
def apps() -> Iterator[None]:
    """The toy app is importable here and in every process that is started from here, as an installed one would be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(APPS)
        patch.setenv("PYTHONPATH", str(APPS), prepend=os.pathsep)
        yield


def made(folder: Path, *names: str) -> Deployment:
    """A deployment of the toy app on loopback, on ports that are free."""
    return provision.init(folder, names, ["localhost"], port=0, superlink_port=0, listen="127.0.0.1", **TOY)


@pytest.fixture(scope="session")
def deployment(apps: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A server with a gateway; nodes ``alpha`` and ``beta`` are connected through it, ``gamma`` is registered only."""
    found = made(tmp_path_factory.mktemp("deployment") / "server", "alpha", "beta", "gamma")
    nodes = [found.node(name) for name in ("alpha", "beta")]
    try:
        operate.up(found, gateway=True)
        for node in nodes:
            join.join(node.folder, keep=False, check=False)  # the toy app has no model
        for node in nodes:
            assert join.connected(node, 60), operate.tail(node.logs / "supernode.log")
        yield found
    finally:
        for place in (*nodes, found):
            operate.down(place)
