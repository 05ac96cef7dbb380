"""The units that `init` writes: what they limit, and what systemd says of them."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from commands import parse_command

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from polyrank.deploy.layout import Deployment
from polyrank.deploy.provision import init

ANALYZE = shutil.which("systemd-analyze")


@pytest.fixture
def made(tmp_path: Path) -> Deployment:
    return init(tmp_path / "server", ["north"], ["fed.example.org"], metrics_port=9464)


def units(made: Deployment) -> list[Path]:
    return [*sorted(made.folder.glob("systemd/*.service")), made.node("north").folder / "polyrank-node@.service"]


def settings(unit: Path) -> dict[str, str]:
    """The keys of a unit; none is there twice."""
    pairs = [line.partition("=")[::2] for line in unit.read_text().splitlines() if line[:1].isalpha()]
    assert len({key for key, _ in pairs}) == len(pairs)
    return dict(pairs)


def test_units_limit_what_a_process_may_take_and_write(made: Deployment) -> None:
    names = ["gateway", "metrics", "registrar", "superexec", "superlink"]
    assert [unit.stem for unit in units(made)] == [*(f"polyrank-{name}" for name in names), "polyrank-node@"]
    for unit in units(made):
        found = settings(unit)
        assert (found["Restart"], found["RestartSec"]) == ("on-failure", "10")
        assert (found["ProtectSystem"], found["NoNewPrivileges"], found["PrivateTmp"]) == ("strict", "yes", "yes")
        assert found["MemoryMax"][-1] in "%GM"
        assert found["CPUQuota"].endswith("%")
        assert found["ReadWritePaths"] == found["WorkingDirectory"]
        model = found["Environment"].removeprefix("HF_HOME=")
        assert Path(model).is_relative_to(found["ReadWritePaths"])
        command = shlex.split(found["ExecStart"])
        assert Path(command[0]).name == "polyrank"
        parse_command(command[1:])


@pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_units(made: Deployment, tmp_path: Path) -> None:
    assert ANALYZE is not None
    folder = tmp_path / "units"
    folder.mkdir()
    for unit in units(made):
        # The program of a node is where the site's operator has put it; here there is none.
        text = unit.read_text().replace("/opt/polyrank/bin/polyrank", shutil.which("true") or "/bin/true")
        (folder / unit.name).write_text(text)
    checked = [folder / unit.name.replace("@", "@north") for unit in units(made)]
    done = subprocess.run([ANALYZE, "verify", *map(str, checked)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "polyrank" in line] == []  # of units of the machine, it may
    broken = folder / "polyrank-superlink.service"
    broken.write_text(broken.read_text().replace("MemoryMax=40%", "MemoryMax=much"))
    said = subprocess.run([ANALYZE, "verify", str(broken)], capture_output=True, text=True).stderr
    assert "much" in said
