"""``polyrank deploy`` as far as it goes without a server: what it makes, and what it says of mistakes."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from polyrank.cli import app
from polyrank.deploy import join, operate
from polyrank.deploy.layout import DeployError, Deployment
from polyrank.deploy.logs import last, written
from polyrank.deploy.provision import init


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["deploy", *map(str, arguments)], catch_exceptions=False)


def refused(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return result.stderr


@pytest.fixture
def made(tmp_path: Path) -> Deployment:
    return init(tmp_path / "server", ["a", "b"], ["localhost"], port=0, superlink_port=0, listen="127.0.0.1")


def test_init_makes_numbered_or_named_nodes(tmp_path: Path) -> None:
    result = call("init", tmp_path / "d", "--host", "fed.example.org,10.0.0.7", "--nodes", 3)
    assert result.exit_code == 0, result.output
    assert "3 nodes, dialling fed.example.org:8443" in result.stdout
    settings = Deployment.open(tmp_path / "d").settings
    assert settings.names == ("site-1", "site-2", "site-3")
    assert settings.hosts == ("fed.example.org", "10.0.0.7")
    assert call("init", tmp_path / "e", "--host", "h", "--names", "x, y").exit_code == 0
    assert Deployment.open(tmp_path / "e").settings.names == ("x", "y")


def test_mistakes_are_said(made: Deployment, tmp_path: Path) -> None:
    assert "either --nodes N or --names" in refused("init", tmp_path / "d", "--host", "h")
    assert "not an empty folder" in refused("init", made.folder, "--host", "h", "--nodes", 1)
    assert "no deployment here" in refused("up", tmp_path)
    assert "does not answer; `polyrank deploy up" in refused("run", made.folder, tmp_path / "x.yaml")
    assert "not a node's folder: has no node.json" in refused("join", tmp_path)
    assert "not one of a, b" in refused("remove", made.folder, "c")
    assert "no log of that name; there are none yet" in refused("logs", made.folder, "superlink")
    assert "superlink, superexec and gateway" in refused("serve", made.folder, "database")
    assert not (tmp_path / "d").exists()


def test_a_node_is_refused_before_anything_starts(made: Deployment, tmp_path: Path) -> None:
    node = made.node("a")
    assert "'https://h:1' is not host:port" in refused("join", node.folder, "--superlink", "https://h:1")
    assert "no such file" in refused("join", node.folder, "--config", tmp_path / "none.yaml")
    assert "no such file or folder" in refused("join", node.folder, "--data", tmp_path / "none")
    node.key.chmod(0o644)
    assert "others may read it; chmod 600" in refused("join", node.folder)
    assert operate.processes(node) == {}


def test_preflight_says_when_nobody_answers(made: Deployment) -> None:
    assert join.preflight(made.node("a"), made.settings.public) is False


def test_a_port_that_is_taken_is_named(made: Deployment) -> None:
    port = made.settings.superlink_port
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(DeployError, match=f"--superlink-port: port {port} of"),
    ):
        operate.up(made)
    assert operate.processes(made) == {}


def test_nothing_to_end_is_said(made: Deployment) -> None:
    assert call("down", made.folder).stdout == "nothing ran\n"
    shown = call("status", made.folder)
    assert shown.exit_code == 0
    assert "does not answer" in shown.stdout
    assert "valid for 364 days" in shown.stdout


def test_nodes_are_added_and_certificates_renewed(made: Deployment) -> None:
    assert "not registered yet" in call("add", made.folder, "c").stdout
    assert Deployment.open(made.folder).settings.names == ("a", "b", "c")
    assert call("renew", made.folder, "--days", 30).exit_code == 0
    assert operate.status(Deployment.open(made.folder))["certificate_days"] == 29


def test_logs_are_shown_without_colours_and_followed(made: Deployment) -> None:
    (made.logs / "superlink.log").write_text("one\n\x1b[92mtwo\x1b[0m\nthree\n")
    assert last(made, "superlink", 2) == ["two", "three"]
    assert call("logs", made.folder, "--lines", 1).stdout == "three\n"
    lines = written(made, "superlink", 1)
    assert next(lines) == "three"
    with open(made.logs / "superlink.log", "a") as log:
        log.write("four\nhalf")
    assert next(lines) == "four"
    (made.logs / "superlink.log").write_text("anew\n")  # cut off by somebody
    assert next(lines) == "anew"
    with open(made.logs / "superlink.log", "a") as log:
        log.write("the last of the old\n")
    (made.logs / "superlink.log").replace(made.logs / "superlink.log.1")
    (made.logs / "superlink.log").write_text("set aside while it was followed\n")
    assert [next(lines), next(lines)] == ["the last of the old", "set aside while it was followed"]
    (made.logs / "superlink.log").write_text("anew\n")
    (made.logs / "superexec.log").write_text("else\n")
    assert last(made, None, 1) == ["superexec: else", "superlink: anew"]


def test_without_flower_only_deploy_is_missing(tmp_path: Path) -> None:
    code = (
        "import sys\nfor name in ('flwr', 'httpx', 'cryptography'): sys.modules[name] = None\n"
        "from polyrank.cli import main\nmain()"
    )

    def without(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)

    assert without("--version").returncode == 0
    assert "Run a federation across machines" in without("deploy", "--help").stdout
    for arguments in (["init", str(tmp_path / "d"), "--host", "h", "--nodes", "1"], ["down", str(tmp_path)]):
        done = without("deploy", *arguments)
        assert done.returncode == 2
        assert "pip install 'flwr>=1.41,<1.43' (the extra 'flower')" in done.stderr
    assert not (tmp_path / "d").exists()
