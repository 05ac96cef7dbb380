"""``polyrank deploy`` as far as it goes without a server: what it makes, and what it says of mistakes."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from polyrank.cli import app
from polyrank.deploy import join, operate, registry
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
    made = Deployment.open(tmp_path / "d")
    assert f"federation {made.settings.federation}, dialled as fed.example.org:8443" in result.stdout
    assert "for tests on this machine alone" in result.stdout
    assert registry.names(made) == ["site-1", "site-2", "site-3"]
    assert made.settings.hosts == ("fed.example.org", "10.0.0.7")
    assert call("init", tmp_path / "e", "--host", "h", "--names", "x, y").exit_code == 0
    assert registry.names(Deployment.open(tmp_path / "e")) == ["x", "y"]


def test_mistakes_are_said(made: Deployment, tmp_path: Path) -> None:
    assert "either --nodes N or --names" in refused("init", tmp_path / "d", "--host", "h", "--nodes", 1, "--names", "a")
    assert "not an empty folder" in refused("init", made.folder, "--host", "h", "--nodes", 1)
    assert "no deployment here" in refused("up", tmp_path)
    assert "does not answer; `polyrank deploy up" in refused("run", made.folder, tmp_path / "x.yaml")
    assert "not a node's folder: has no node.json" in refused("join", tmp_path)
    assert "not one of a, b" in refused("remove", made.folder, "c")
    assert "no log of that name; there are none yet" in refused("logs", made.folder, "superlink")
    assert "superlink, superexec, registrar and gateway" in refused("serve", made.folder, "database")
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
    assert shown.stdout.count("valid for 364 days") == 3  # the server's certificate, two nodes' keys


def test_a_site_asks_is_added_and_accepts(made: Deployment, tmp_path: Path) -> None:
    site, federation = tmp_path / "c", made.settings.federation
    assert "--federation: missing" in refused("request", "c", "--out", site)
    asked = call("request", "c", "--federation", federation, "--out", site)
    assert asked.exit_code == 0, asked.output
    key = asked.stdout.partition("key ")[2].partition(",")[0]
    assert "SHA256:" in key
    assert "is not an empty folder" in refused("request", "c", "--federation", federation, "--out", site)
    request = site / "request.json"
    assert call("add", made.folder, request).exit_code == 2  # nobody has compared the fingerprint
    assert call("add", made.folder, request, "--fingerprint", "SHA256:x").exit_code == 2
    assert registry.names(made) == ["a", "b"]
    for _ in range(2):
        added = call("add", made.folder, request, "--fingerprint", key)
        assert added.exit_code == 0, added.output
        assert "the server does not run" in added.stdout
    authority = added.stdout.partition("authority ")[2].partition(":  ")[0].rpartition(":")[0]
    assert registry.names(made) == ["a", "b", "c"]
    assert "no answer of the server yet" in refused("join", site)
    assert call("accept", site, made.answer("c")).exit_code == 2
    assert call("accept", site, made.answer("c"), "--fingerprint", authority).exit_code == 0
    assert "valid for 364 days" in call("status", site).stdout
    assert not any(
        b"PRIVATE" in path.read_bytes()
        for path in made.folder.rglob("*")
        if "nodes" not in path.parts and path.suffix != ".key" and path.is_file()
    )
    assert "its key is refused; `polyrank deploy up" in call("remove", made.folder, "c").stdout
    assert "was removed on" in call("add", made.folder, request, "--fingerprint", key).stderr
    assert call("request", "c", "--out", site, "--rotate").exit_code == 0
    assert "give either" in refused("request", "c", "--out", site, "--rotate", "--renew")


def test_certificates_are_renewed_and_their_end_is_said(made: Deployment) -> None:
    assert call("renew", made.folder, "--days", 31).exit_code == 0
    assert operate.status(Deployment.open(made.folder))["certificate_days"] == 30
    assert call("status", made.folder).stderr == ""
    assert call("renew", made.folder, "--days", 30).exit_code == 0
    shown = call("status", made.folder)
    assert shown.exit_code == 0
    assert "warning: server certificate: 29 days left" in shown.stderr
    levels = {
        each["what"]: each["level"] for each in json.loads(call("status", made.folder, "--json").stdout)["expiry"]
    }
    assert levels == {"server certificate": "warning", "authority": "ok", "key of a": "ok", "key of b": "ok"}


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


def test_a_node_is_connected_if_its_present_process_is(made: Deployment) -> None:
    node = made.node("a")
    node.logs.mkdir()
    log = node.logs / "supernode.log"
    note = "[supervisor] 2026-01-02 03:04:05 supernode"
    log.write_text(f"{note} starts\nINFO : SuperNode ID: 12\n")
    assert join.connected(node, 0) == "12"
    for more, known in (
        (f"{note} ended with code 1; starts again in 1 s\n", None),
        (f"{note} starts\n", None),
        ("INFO : SuperNode ID: 34\n", "34"),
        (f"{note} stopped\n", None),
    ):
        with open(log, "a") as file:
            file.write(more)
        assert join.connected(node, 0) == known
