"""The files of `ops/`: who runs in a container, what it may write, what is in an image, and that its commands exist."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click import UsageError

from commands import parse_command

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from polyrank.deploy import join, operate
from polyrank.deploy.layout import Node
from polyrank.files import from_yaml

from .conftest import made as deployment_of
from .test_runs import EXPERIMENT, call, orders, soon

ROOT = Path(__file__).parents[2]
OPS = ROOT / "ops"
DOCKER = shutil.which("docker")
Stage = list[tuple[str, str]]
SECRET = re.compile(r"key|secret|token|passw", re.IGNORECASE)


def stages() -> dict[str, Stage]:
    """Instructions of every stage of the Dockerfile, by its name, after those of the stage that it begins with."""
    text = "\n".join(line for line in (OPS / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    found: dict[str, Stage] = {"": []}
    name = ""
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = list(found.get(base, []))
        found[name].append((word, " ".join(rest.split())))
    return found


def last(stage: Stage, word: str) -> str:
    return [rest for instruction, rest in stage if instruction == word][-1]


def compose() -> dict[str, Any]:
    value: dict[str, Any] = from_yaml((OPS / "compose.yaml").read_text())
    return value


@pytest.mark.parametrize("name", ["server", "site"])
def test_an_image_runs_polyrank_without_privileges(name: str) -> None:
    stage = stages()[name]
    assert last(stage, "USER") == "10001:10001"
    assert [word for word, _ in stage].index("USER") < [word for word, _ in stage].index("CMD")
    command, check = json.loads(last(stage, "CMD")), last(stage, "HEALTHCHECK")
    assert command[0] == "polyrank"
    parsed = parse_command(command[1:])
    assert parsed.params["foreground"] is True
    folder = last(stage, "WORKDIR")
    assert str(parsed.params["folder"]) == folder
    health = json.loads(check.partition("CMD ")[2])
    assert (health[0], str(parse_command(health[1:]).params["folder"])) == ("polyrank", folder)
    for volume in json.loads(last(stage, "VOLUME")):  # Docker gives a new volume the owner that its folder has
        assert any(f"-o polyrank -g polyrank -m 700 {volume}" in rest for word, rest in stage if word == "RUN")


def test_what_is_installed_is_the_wheel_with_the_pinned_torch() -> None:
    build = stages()["build"]
    assert [rest for word, rest in build if word == "COPY"] == ["constraints.txt dist/polyrank-*.whl /build/"]
    assert re.search(r"^torch==\d", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    installs = re.findall(r"pip install ([^&]+)", last(build, "RUN"))
    assert len(installs) == 2
    assert all("-c /build/constraints.txt" in each for each in installs)
    assert installs[0].split()[-1] == "torch"
    assert '"$(ls /build/polyrank-*.whl)[$EXTRAS]"' in installs[1]


def test_nothing_secret_gets_into_an_image() -> None:
    ignored = [line for line in (OPS / "Dockerfile.dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignored == ["*", "!constraints.txt", "!dist/polyrank-*.whl"]
    for stage in stages().values():
        for word, rest in stage:
            assert word not in ("ADD", "ONBUILD")
            if word == "COPY" and rest != "constraints.txt dist/polyrank-*.whl /build/":
                assert rest == "--from=build /opt/polyrank /opt/polyrank"
            if word in ("ENV", "ARG"):
                assert not SECRET.search(rest)


def test_services_run_hardened() -> None:
    whole = compose()
    assert set(whole["services"]) == {"server", "north", "south"}
    for name, service in whole["services"].items():
        assert service["user"] == "10001:10001", name
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices", "env_file"} & set(service)
        assert not any(SECRET.search(str(key)) for key in service.get("environment", ()))
        assert service["mem_limit"]
        assert service["cpus"]
        assert service["pids_limit"]
        for volume in service["volumes"]:
            source, _, *mode = volume.split(":")
            assert source in whole["volumes"] or mode == ["ro"], volume  # what is written is in a volume of a name
            assert "docker.sock" not in source
        stage = stages()[service["build"]["target"]]
        writable = {volume.split(":")[1] for volume in service["volumes"] if not volume.endswith(":ro")}
        assert writable == set(json.loads(last(stage, "VOLUME")))
        assert service["command"] == json.loads(last(stage, "CMD"))
        assert service["healthcheck"]["test"][1:] == json.loads(last(stage, "HEALTHCHECK").partition("CMD ")[2])
        assert (OPS / service["build"]["context"]).resolve() == ROOT
        assert (ROOT / service["build"]["dockerfile"]).is_file()
    assert [name for name, service in whole["services"].items() if "ports" in service] == ["server"]
    volumes = [volume.split(":")[0] for service in whole["services"].values() for volume in service["volumes"]]
    assert len(set(volumes)) == len(volumes)  # no two services share one


@pytest.mark.skipif(
    DOCKER is None or subprocess.run([DOCKER, "compose", "version"], capture_output=True).returncode != 0,
    reason="docker compose is not installed",
)
def test_compose_takes_the_file() -> None:
    assert DOCKER is not None
    done = subprocess.run(
        [DOCKER, "compose", "-f", str(OPS / "compose.yaml"), "config"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_commands_of_the_page_exist() -> None:
    text = (ROOT / "docs" / "deploy.md").read_text().replace("\\\n", " ")
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    found = [match[1] for line in lines if (match := re.search(r"(?<![\w-])polyrank (deploy [^|<>]*)", line))]
    assert len(found) > 20
    for command in found:
        try:
            parse_command(shlex.split(command, comments=True))
        except UsageError as error:
            pytest.fail(f"polyrank {command}: {error.format_message()}")


READ_ONLY = 'mount --make-rprivate / && mount --bind "$0" "$0" && mount -o remount,ro,bind / && exec "$@"'


def confined(folder: Path, *arguments: object) -> subprocess.Popen[bytes]:
    """A command of `polyrank deploy` that may write in one folder, as in a container; the rest is read-only."""
    command = ["unshare", "-m", "sh", "-c", READ_ONLY, str(folder), sys.executable, "-m", "polyrank.cli", "deploy"]
    environment = {**os.environ, "TMPDIR": str(folder), "HOME": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    with open(folder / "output", "wb") as output:
        return subprocess.Popen([*command, *map(str, arguments)], env=environment, stdout=output, stderr=output)


def can_confine() -> bool:
    if shutil.which("unshare") is None:
        return False
    script = READ_ONLY.replace('exec "$@"', "! touch /polyrank-was-here")
    return subprocess.run(["unshare", "-m", "sh", "-c", script, "/tmp"], capture_output=True).returncode == 0


@pytest.mark.deploy
def test_a_server_and_a_site_write_in_their_folders_alone(apps: None, tmp_path: Path) -> None:
    if not can_confine():
        pytest.skip("mounts cannot be made read-only here: needs root and unshare")
    folders = {name: tmp_path / name for name in ("server", "site")}
    made = deployment_of(folders["server"] / "federation", "north")
    folders["site"].mkdir()
    site = Node.open(shutil.move(made.node("north").folder, folders["site"] / "north"))
    server = confined(folders["server"], "up", made.folder, "--gateway", "--foreground")
    nodes = []
    try:
        soon(lambda: "registered" in (folders["server"] / "output").read_text())
        nodes = [confined(folders["site"], "join", site.folder, "--foreground", "--no-keep", "--no-check")]
        assert join.connected(site, 60), operate.tail(site.logs / "supernode.log")
        assert [operate.fault(place) for place in (made, site)] == [None, None]
        run = made.folder / "runs" / "first"
        orders(run.parent, nodes=1)
        arguments = ["run", made.folder, EXPERIMENT, "--set", "rounds=1", "--out", run, "--quiet"]
        done = call(*arguments)
        assert done.exit_code == 0, done.output
    finally:
        for process in (*nodes, server):
            process.terminate()
        codes = [process.wait(60) for process in (*nodes, server)]
    assert codes == [0, 0]
