"""A disk that is full, at every single write: the message names the file and says how to go on, and that works."""

import errno
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from disk import limited
from polyrank.cli import app

Config = dict[str, Any]
EXACT = ("rounds.jsonl", "setting.json", "confusion.json", "adapter", "best", "state/checkpoint.safetensors")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def contents(folder: Path) -> dict[str, bytes]:
    """What the same experiment writes alike whenever it runs."""
    files = [path for name in EXACT for path in (folder / name, *(folder / name).rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@contextmanager
def full(monkeypatch: pytest.MonkeyPatch, after: int) -> Iterator[list[int]]:
    """A disk that is full at the write of this number, and says so, as write(2) does, without a name."""
    count, flush = [0], os.fsync

    def fsync(number: int) -> None:
        count[0] += 1
        if count[0] == after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield count


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory, digits_config: Config) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    config = {**digits_config, "rounds": 1, "device": "cpu", "threads": 1, "log": []}
    config["data"] = {**config["data"], "limit": {"train": 40, "validation": 20, "test": 20}}
    (folder / "e.yaml").write_text(yaml.safe_dump(config))
    assert call("run", folder / "e.yaml", "--out", folder / "whole", "--quiet").exit_code == 0
    return folder


def stopped(result: Result, folder: Path) -> str:
    """The file that the message of a full disk names."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    first, *more = result.stderr.splitlines()
    found = re.fullmatch(r"error: (.+): (No space left on device|File too large)", first)
    assert found, result.stderr
    assert found[1].startswith(str(folder))
    if (folder / "experiment.yaml").is_file():
        again = f"polyrank resume {shlex.quote(str(folder))}"
        assert more == [f"  what is done is kept; when there is room, continue with: {again}"]
    return found[1]


def goes_on(experiment: Path, folder: Path) -> None:
    """Resumes a run, or runs it anew where nothing was kept, to the very same bytes."""
    begun = (folder / "experiment.yaml").is_file()
    result = call("resume", folder) if begun else call("run", experiment / "e.yaml", "--out", folder)
    assert result.exit_code == 0, result.output
    assert contents(folder) == contents(experiment / "whole")
    whole, found = (json.loads((place / "summary.json").read_text()) for place in (experiment / "whole", folder))
    assert {**found, "wall_seconds": 0} == {**whole, "wall_seconds": 0}


def test_a_run_goes_on_from_a_full_disk_wherever_it_was(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with full(monkeypatch, 0) as count:
        assert call("run", experiment / "e.yaml", "--out", tmp_path / "all", "--quiet").exit_code == 0
    named = set()
    for number in range(1, count[0] + 1):
        folder = tmp_path / f"run [{number}]"
        with full(monkeypatch, number):
            named.add(Path(stopped(call("run", experiment / "e.yaml", "--out", folder, "--quiet"), folder)).name)
        goes_on(experiment, folder)
    files = {"experiment.yaml", "setting.json", "rounds.jsonl", "timings.jsonl", "checkpoint.safetensors"}
    assert named == files | {"summary.json", "confusion.json", "adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("size", [100, 1500, 4000, 12000])
def test_a_run_goes_on_where_files_must_not_grow(size: int, experiment: Path, tmp_path: Path) -> None:
    """The system's own refusal, in the middle of a line or of a tensor."""
    folder = tmp_path / "run"
    with limited(size):
        result = call("run", experiment / "e.yaml", "--out", folder, "--quiet")
    stopped(result, folder)
    goes_on(experiment, folder)


@pytest.mark.parametrize(
    "command",
    [
        lambda run, out: ["export", run, "--out", out],
        lambda run, out: ["export", run, "--out", out, "--merge"],
        lambda run, out: ["report", run, "--out", out / "r.html"],
        lambda run, out: ["report", run, "--out", out / "r.html", "--tables", out],
        lambda run, out: ["data", run / "experiment.yaml", "--png", out / "p.png"],
        lambda run, out: ["profile", run / "experiment.yaml", "--ranks", "2,3", "--out", out / "c.json"],
    ],
    ids=["export", "merged", "report", "tables", "png", "profile"],
)
@pytest.mark.parametrize("size", [150, 30_000])
def test_what_is_written_of_a_run_is_there_or_not(
    command: Callable[[Path, Path], list[Any]], size: int, experiment: Path, tmp_path: Path
) -> None:
    with limited(size):
        result = call(*command(experiment / "whole", tmp_path / "out"))
    if size > 10_000 and result.exit_code == 0:
        return  # small enough
    assert result.exit_code == 1, result.output
    assert re.fullmatch(rf"error: {re.escape(str(tmp_path))}/out\S*: File too large\n", result.stderr), result.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size] == []
    assert call(*command(experiment / "whole", tmp_path / "out")).exit_code == 0
