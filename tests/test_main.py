"""The program itself, as a shell starts it: its last net, pipes that close, and terminals that know ASCII only."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from polyrank.cli.app import FAULT, app, main


def started(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    command = [sys.executable, "-m", "polyrank.cli", *arguments]
    return subprocess.run(command, capture_output=True, timeout=120, env={**os.environ, **environment})


class SurpriseError(Exception):
    """An error that nobody has foreseen."""


@pytest.fixture
def surprise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A command that fails as no command should, with text that a terminal would act on."""

    def fail() -> None:
        raise SurpriseError("[red]\x1b[31m é :smile:")

    known = list(app.registered_commands)
    app.command("surprise")(fail)
    monkeypatch.setattr(sys, "argv", ["polyrank", "surprise"])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield "surprise"
    app.registered_commands[:] = known


def test_a_fault_is_one_message_and_its_traceback_a_file(
    surprise: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("POLYRANK_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    first, second = shown.err.splitlines()
    assert first == f"error: {FAULT}: SurpriseError: [red]\\x1b[31m é :smile:"
    place = re.fullmatch(r"  please report it with (\S+\.txt), which has the traceback", second)
    assert place is not None
    assert Path(place[1]).parent == tmp_path
    assert "Traceback" in (text := Path(place[1]).read_text())
    assert "SurpriseError" in text


def test_a_fault_where_no_file_can_be_written(
    surprise: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POLYRANK_TRACEBACK", raising=False)
    monkeypatch.setattr("tempfile.tempdir", "/nonexistent")
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    assert "please report it with what POLYRANK_TRACEBACK=1 prints" in capsys.readouterr().err


def test_a_traceback_for_those_who_ask(surprise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYRANK_TRACEBACK", "1")
    with pytest.raises(SurpriseError):
        main()


def test_a_reader_that_stops_is_no_error() -> None:
    """``polyrank schema | head -1``: the pipe is closed long before the end, and nothing is said of it."""
    shell = f"{sys.executable} -m polyrank.cli schema | head -1"
    ended = subprocess.run(["bash", "-c", shell], capture_output=True, timeout=120)
    assert ended.stdout == b"{\n"
    assert ended.stderr == b""


def german(folder: Path) -> str:
    """An experiment whose path and text are not ASCII."""
    path = folder / "é.yaml"
    path.write_text(
        "rounds: 1\nmodel: {name: digits-vit, rank: 2}\ndata: {name: digits, clients: 2}\n"
        "fleet: [{name: großes Gerät 😀, rank: 2}]\n",
        encoding="utf-8",
    )
    return str(path)


def test_a_locale_that_knows_ascii_only(tmp_path: Path) -> None:
    """Files are read as UTF-8 all the same, and what cannot be shown is shown as its escape."""
    ended = started("data", german(tmp_path), LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.isascii()
    assert b"gro\\xdfes" in ended.stdout


def test_a_terminal_that_knows_ascii_only(tmp_path: Path) -> None:
    ended = started("plan", german(tmp_path), "--set", "method=ü", PYTHONIOENCODING="ascii")
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.isascii()
    assert b"Traceback" not in ended.stderr
    assert b"'\\xfc' is unknown" in ended.stderr


def test_streams_keep_what_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the standard output is no text file of Python's own, as in a notebook."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "argv", ["polyrank", "--version"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
