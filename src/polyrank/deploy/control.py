"""Flower's command line, `flwr`, as functions. Its answers are JSON; what it says otherwise becomes an error."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from polyrank.deploy.layout import LINK, DeployError, Deployment, environment, program
from polyrank.files import write_text

_PATIENCE = 60.0  # seconds for one command
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class ControlError(DeployError):
    """The SuperLink did not do what was asked, or does not answer."""


def flwr(deployment: Deployment, *arguments: str) -> dict[str, Any]:
    """What a command of `flwr` answers.

    Raises:
        ControlError: with what it said.
    """
    text = _said(deployment, *arguments, "--format", "json")
    start = text.find("{")
    try:
        answer, _ = json.JSONDecoder().raw_decode(text[max(start, 0) :])
    except ValueError:
        raise ControlError(f"flwr {' '.join(arguments)}: {plain(text).strip() or 'no answer'}") from None
    if not answer.get("success"):
        raise ControlError(f"flwr {' '.join(arguments)}: {answer.get('error-message') or answer}")
    return dict(answer)


def connect(deployment: Deployment) -> None:
    """Writes the configuration from which `flwr` knows the SuperLink."""
    deployment.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    text = (
        f'[superlink]\ndefault = "{LINK}"\n\n[superlink.{LINK}]\naddress = "{deployment.superlink}"\n'
        f'root-certificates = "{deployment.authority}"\n'
    )
    write_text(deployment.home / "config.toml", text)


def register(deployment: Deployment, key: Path, name: str) -> str:
    """Makes the public key in a file known under a node's name; returns the id Flower gives it."""
    return str(flwr(deployment, "supernode", "register", str(key), LINK, "--name", name)["node-id"])


def unregister(deployment: Deployment, node_id: str) -> None:
    """Makes a node's key unknown again: it is refused from then on, and can never be made known again."""
    flwr(deployment, "supernode", "unregister", node_id, LINK)


def nodes(deployment: Deployment) -> dict[str, str]:
    """The state of every registered node, by id: ``registered``, ``online`` or ``offline``."""
    listed = flwr(deployment, "supernode", "list", LINK)["nodes"]
    return {str(node["node-id"]): str(node["status"]) for node in listed if node["status"] != "unregistered"}


def start_run(deployment: Deployment, folder: str) -> str:
    """Starts a run of the app on a folder; returns the run's id."""
    app = str(deployment.folder / "app")
    return str(flwr(deployment, "run", app, LINK, "--run-config", f'folder="{folder}"')["run-id"])


def stop_run(deployment: Deployment, run_id: str) -> None:
    """Stops a run."""
    flwr(deployment, "stop", run_id, LINK)


def status(deployment: Deployment, run_id: str) -> tuple[str, str] | None:
    """A run's status and what Flower adds to it; None of a run that is unknown.

    The status is ``pending``, ``starting``, ``running``, ``finished:completed``, ``finished:failed`` or
    ``finished:stopped``.
    """
    try:
        runs = flwr(deployment, "list", LINK, "--run-id", run_id)["runs"]
    except ControlError as error:
        if "not found" in str(error).lower():
            return None
        raise
    return (str(runs[0]["status"]), str(runs[0]["status-details"])) if runs else None


def statuses(deployment: Deployment) -> dict[str, str]:
    """The status of every run, by id."""
    return {str(run["run-id"]): str(run["status"]) for run in flwr(deployment, "list", LINK)["runs"]}


def log_lines(deployment: Deployment, run_id: str) -> list[str]:
    """What a run's ServerApp has printed."""
    return plain(_said(deployment, "log", run_id, LINK, "--show")).splitlines()


def plain(text: str) -> str:
    """Text without the colours that Flower writes into files, too."""
    return _ANSI.sub("", text)


def _said(deployment: Deployment, *arguments: str) -> str:
    """The standard output of `flwr`; where it has none, what it wrote to standard error."""
    try:
        done = subprocess.run(
            [program("flwr"), *arguments],
            env=environment(deployment.home),
            cwd=deployment.folder / "state",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
        )
    except subprocess.TimeoutExpired:
        raise ControlError(f"flwr {' '.join(arguments)}: no answer within {_PATIENCE:.0f} s") from None
    return done.stdout or done.stderr
