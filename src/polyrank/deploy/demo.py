"""A whole deployment on this machine: keys, server, nodes, a run, and the same run simulated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from polyrank.deploy import follow, join, operate, provision, registry
from polyrank.deploy.layout import LOOPBACK, DeployError, Deployment
from polyrank.deploy.site_file import read_site
from polyrank.experiment.config import Experiment
from polyrank.experiment.machine import on_this_machine
from polyrank.experiment.session import Session
from polyrank.experiment.store import Run
from polyrank.files import write_text

Say = Callable[[str], None]

CHECKED = ("state/checkpoint.safetensors", "adapter/adapter_model.safetensors")
"""Files of a run that must be the simulator's, byte for byte."""


@dataclass(frozen=True)
class Demo:
    """What came of it.

    Attributes:
        run: the deployed run.
        simulated: the same run in one process.
        outcome: how the deployed one ended.
    """

    run: Run
    simulated: Run
    outcome: follow.Outcome

    @property
    def equal(self) -> bool:
        """Whether both ended with the same bytes."""
        pairs = ((self.run.folder / name, self.simulated.folder / name) for name in CHECKED)
        return all(one.is_file() and one.read_bytes() == other.read_bytes() for one, other in pairs)


def set_up(folder: Path, experiment: Experiment, *, gateway: bool) -> tuple[Deployment, Run]:
    """Keys and one node for each client of the experiment, with what that client has in a simulation; all started.

    Args:
        folder: of the deployment; its run is in ``run``.
        experiment: what will be run.
        gateway: whether nodes connect through nginx, and not to the SuperLink itself.
    """
    names = [f"client_{number}" for number in range(experiment.deployment.clients)]
    deployment = provision.init(folder, names, [LOOPBACK, "localhost"], port=0, superlink_port=0, listen=LOOPBACK)
    run = Run.create(folder / "run-deployed", experiment)
    for name in names:
        site = {"model": experiment.model.name, "device": experiment.device, "threads": 1}
        site["rehearse"] = {"experiment": str((run.folder / "experiment.yaml").resolve()), "client": name}
        path = deployment.node(name).folder / "site.yaml"
        write_text(path, yaml.safe_dump(site, sort_keys=False))
        read_site(path)
    operate.up(deployment, gateway=gateway)
    address = None if gateway else deployment.superlink
    for name in names:
        join.join(deployment.node(name).folder, address)
    for name in names:
        if join.connected(deployment.node(name), 60) is None:
            raise DeployError(f"{name}: not connected; see {deployment.node(name).logs}")
    return deployment, run


def tear_down(deployment: Deployment) -> None:
    """Ends all processes of server and nodes."""
    for name in registry.names(deployment):
        operate.down(deployment.node(name))
    operate.down(deployment)


def demo(folder: Path, experiment: Experiment, shown: follow.Shown, say: Say, *, gateway: bool) -> Demo:
    """Runs an experiment deployed, over TLS and with node keys, and then simulated; all processes are ended.

    Args:
        folder: empty, or not there.
        experiment: whose clients become nodes.
        shown: is told of rounds.
        say: is told of steps.
        gateway: see `set_up`.
    """
    experiment = on_this_machine(experiment, remote=True)
    say(f"keys, certificates and {experiment.deployment.clients} nodes in {folder}; starting them")
    deployment, run = set_up(folder, experiment, gateway=gateway)
    try:
        way = "through the gateway" if gateway else "to the SuperLink"
        say(f"connected over TLS {way}, each with a key of its own")
        outcome = follow.drive(deployment, run, shown, say=say)
    finally:
        tear_down(deployment)
    say("simulating the same run in this process")
    session = Session(Run.create(folder / "run-simulated", experiment))
    for _ in session.rounds():
        pass
    session.finish()
    return Demo(run, session.run, outcome)
