"""A server's folder is backed up while it is written to, and restored elsewhere."""

import io
import json
import re
import sqlite3
import stat
import subprocess
import sys
import tarfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from disk import limited
from polyrank.cli import app
from polyrank.deploy import operate, registry, supervise
from polyrank.deploy.backup import backup, restore
from polyrank.deploy.follow import submitted
from polyrank.deploy.layout import DeployError, Deployment, nginx
from polyrank.deploy.provision import init
from polyrank.deploy.renewal import drop_authority, new_authority, use_authority

from .conftest import TOY
from .test_runs import soon


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["deploy", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def made(tmp_path: Path) -> Deployment:
    """A server's folder with a database in the mode of Flower's, a run inside, and one elsewhere."""
    found = init(tmp_path / "server", ["north", "south"], ["localhost"], port=0, superlink_port=0, listen="127.0.0.1")
    new_authority(found)  # of which sites are told, while the one before is trusted as well
    run = found.folder / "runs" / "first"
    (run / "state").mkdir(parents=True)
    for name in ("state/checkpoint.safetensors", "rounds.jsonl", "experiment.yaml", "audit.jsonl"):
        (run / name).write_text(name)
    (run / ".rounds.jsonl.1.tmp").write_text("half")
    (found.logs / "superlink.log").write_text("long")
    (found.folder / "models").mkdir()
    (found.folder / "models" / "weights").write_text("large")
    book = [{"id": "1", "folder": str(run)}, {"id": "2", "folder": "/elsewhere/run"}]
    (found.folder / "state" / "runs.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in book))
    with closing(sqlite3.connect(found.folder / "state" / "superlink.db")) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("CREATE TABLE node (id INTEGER PRIMARY KEY, half INTEGER)")
        database.commit()
    return found


@contextmanager
def written_to(path: Path) -> Iterator[list[int]]:
    """A database in which pairs of rows are written all the while; the number of pairs."""
    count, end = [0], threading.Event()

    def write() -> None:
        with closing(sqlite3.connect(path, timeout=30)) as database:
            while not end.is_set():
                database.execute("INSERT INTO node (half) VALUES (0)")
                database.execute("INSERT INTO node (half) VALUES (1)")
                database.commit()
                count[0] += 1

    thread = threading.Thread(target=write)
    thread.start()
    try:
        soon(lambda: count[0] > 100)
        yield count
    finally:
        end.set()
        thread.join()


def test_a_backup_is_whole_while_the_database_is_written_to(made: Deployment, tmp_path: Path) -> None:
    kept = {
        path: path.read_bytes() for path in made.folder.rglob("*") if path.is_file() and "superlink" not in path.name
    }
    with written_to(made.folder / "state" / "superlink.db") as count:
        before = count[0]
        done = call("backup", made.folder, "--out", tmp_path / "b" / "server.tar")
        after = count[0] + 1
    assert done.exit_code == 0, done.output
    assert "not in it, because it is not in" in done.stdout
    assert "/elsewhere/run" in done.stdout
    assert stat.S_IMODE((tmp_path / "b" / "server.tar").stat().st_mode) == 0o600
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["server.tar"]
    again = call("restore", tmp_path / "b" / "server.tar", tmp_path / "c" / "moved")
    assert again.exit_code == 0, again.output
    assert f"as {made.folder} was at" in again.stdout
    moved = Deployment.open(tmp_path / "c" / "moved")
    with closing(sqlite3.connect(moved.folder / "state" / "superlink.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        counts = dict(database.execute("SELECT half, count(*) FROM node GROUP BY half"))
    assert before <= counts[0] == counts[1] <= after
    made_anew = {"nginx.conf", "README.md", "state/runs.jsonl"}
    for path, content in kept.items():
        name = str(path.relative_to(made.folder))
        if name.split("/")[0] in ("nodes", "logs", "models", "run") or name.endswith((".tmp", ".lock")):
            assert not (moved.folder / name).exists()
        elif name not in made_anew and not name.startswith("systemd/"):
            assert (moved.folder / name).read_bytes() == content, name


def test_what_is_restored_names_its_own_place(made: Deployment, tmp_path: Path) -> None:
    backup(made, tmp_path / "server.tar")
    restore(tmp_path / "server.tar", tmp_path / "moved")
    moved = Deployment.open(tmp_path / "moved")
    for path in moved.folder.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
        assert path.is_dir() or str(made.folder).encode() not in path.read_bytes(), path
    assert submitted(moved) == {"1": str(moved.folder / "runs" / "first"), "2": "/elsewhere/run"}
    assert moved.settings == made.settings
    command = [nginx(), "-t", "-p", str(moved.run), "-c", str(moved.folder / "nginx.conf")]
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert [service.name for service in operate.services(moved, True)] == [
        "superlink",
        "superexec",
        "registrar",
        "gateway",
    ]


def test_a_change_of_the_authority_goes_on_where_it_is_restored(made: Deployment, tmp_path: Path) -> None:
    backup(made, tmp_path / "server.tar")
    restore(tmp_path / "server.tar", tmp_path / "moved")
    moved = Deployment.open(tmp_path / "moved")
    assert (registry.read(moved), moved.settings.federation) == (registry.read(made), made.settings.federation)
    use_authority(moved)
    assert [path.name for path in drop_authority(moved)] == ["north.json", "south.json"]


def test_the_nodes_and_the_database_are_those_of_one_moment(made: Deployment, tmp_path: Path) -> None:
    """A node that Flower knows and the registry does not, or the other way round, would be refused for ever."""
    thread = threading.Thread(target=backup, args=(made, tmp_path / "server.tar"))
    with registry.locked(made):
        thread.start()
        soon(lambda: any(tmp_path.glob("*server.tar*")))
        thread.join(0.5)
        with closing(sqlite3.connect(made.folder / "state" / "superlink.db")) as database:
            database.execute("INSERT INTO node (half) VALUES (7)")
            database.commit()
        book = registry.read(made)
        book["nodes"]["north"]["id"] = "7"
        registry.write(made, book)
    thread.join()
    restore(tmp_path / "server.tar", tmp_path / "moved")
    moved = Deployment.open(tmp_path / "moved")
    assert operate.node_ids(moved) == {"north": "7"}
    with closing(sqlite3.connect(moved.folder / "state" / "superlink.db")) as database:
        assert database.execute("SELECT half FROM node").fetchall() == [(7,)]


def test_checkpoints_are_copied_before_the_records_that_may_be_ahead(made: Deployment, tmp_path: Path) -> None:
    backup(made, tmp_path / "server.tar")
    with tarfile.open(tmp_path / "server.tar") as archive:
        names = archive.getnames()
    assert names.index("runs/first/state/checkpoint.safetensors") < names.index("runs/first/rounds.jsonl")
    assert names[-1] == "backup.json"


def test_what_is_not_a_whole_backup_is_refused_and_leaves_nothing(made: Deployment, tmp_path: Path) -> None:
    backup(made, tmp_path / "server.tar")
    data, short = (tmp_path / "server.tar").read_bytes(), tmp_path / "short.tar"
    with tarfile.open(tmp_path / "server.tar") as archive:
        ends = [member.offset for member in archive]
    for size in (0, 100, 700, *ends[1:], ends[-1] + 512):
        short.write_bytes(data[:size])
        with pytest.raises(DeployError, match=re.escape(str(short))):
            restore(short, tmp_path / "moved")
        assert not (tmp_path / "moved").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["server", "server.tar", "short.tar"]


@pytest.mark.parametrize("kind", ["above", "absolute", "link"])
def test_an_archive_that_would_write_elsewhere_is_refused(tmp_path: Path, kind: str) -> None:
    member = tarfile.TarInfo({"above": "../x", "absolute": str(tmp_path / "x"), "link": "x"}[kind])
    if kind == "link":
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        archive.addfile(member, io.BytesIO())
    with pytest.raises(DeployError, match="not what `polyrank deploy backup` writes"):
        restore(tmp_path / "evil.tar", tmp_path / "moved")
    assert [path.name for path in tmp_path.iterdir()] == ["evil.tar"]


def test_mistakes_are_said(made: Deployment, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("")
    for arguments, said in (
        (("backup", made.folder, "--out", tmp_path / "there"), "is there already"),
        (("backup", made.folder, "--out", made.folder / "b.tar"), "lies in the folder that it is a backup of"),
        (("restore", tmp_path / "none.tar", tmp_path / "moved"), "none.tar"),
        (("restore", tmp_path / "there", made.folder), "not an empty folder"),
        (("restore", tmp_path / "there", tmp_path / "with space"), "no spaces"),
    ):
        done = call(*arguments)
        assert (done.exit_code, said in done.stderr) == (2, True), done.output


def test_a_full_disk_is_named_by_the_file(made: Deployment, tmp_path: Path) -> None:
    """Not by the file that is read, and nothing is left behind."""
    (made.folder / "runs" / "first" / "large").write_bytes(b"x" * 60_000)
    out = tmp_path / "server.tar"
    with limited(40_000):
        done = call("backup", made.folder, "--out", out)
    assert (done.exit_code, done.stderr) == (1, f"error: {out}: File too large\n")
    backup(made, out)
    with limited(40_000):
        done = call("restore", out, tmp_path / "moved")
    assert (done.exit_code, done.stderr) == (1, f"error: {tmp_path}/moved/runs/first/large: File too large\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["server", "server.tar"]
    with limited(200):
        done = call("init", tmp_path / "other", "--host", "h", "--nodes", 1)
    assert done.exit_code == 1
    assert re.fullmatch(rf"error: {tmp_path}/other/\S+: File too large\n", done.stderr), done.stderr
    with limited(100), pytest.raises(OSError, match=r"services\.json"):
        supervise.start(tmp_path / "run", operate.services(made, False), {})


@pytest.mark.deploy
def test_a_server_moves_with_its_nodes_registered(apps: None, tmp_path: Path) -> None:
    """It runs in the foreground, as in a container, and its metrics are read; a copy of it takes its place."""
    ports = {"port": 0, "superlink_port": 0, "listen": "127.0.0.1", "metrics_port": 0}
    made = init(tmp_path / "server", ["north", "south"], ["localhost"], **ports, **TOY)
    command = [sys.executable, "-m", "polyrank.cli", "deploy", "up", str(made.folder), "--foreground"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert "2 nodes registered" in server.stdout.readline()
        assert call("health", made.folder).stdout == "healthy\n"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

        def page() -> str:
            with opener.open(f"http://127.0.0.1:{made.settings.metrics_port}/metrics") as answer:
                return str(answer.read().decode())

        soon(lambda: operate.processes(made).get("metrics"))
        soon(lambda: _listens(page))
        assert "polyrank_superlink_up 1\n" in page()
        assert 'polyrank_process_up{process="superexec"} 1\n' in page()
        soon(lambda: "polyrank_flower_answer_timestamp_seconds 0\n" not in page())
        assert call("backup", made.folder, "--out", tmp_path / "server.tar").exit_code == 0
    finally:
        server.terminate()
        server.communicate(timeout=60)
    assert server.returncode == 0
    assert operate.processes(made) == {}
    assert "superlink does not answer" in call("health", made.folder).stderr
    restore(tmp_path / "server.tar", tmp_path / "moved")
    moved = Deployment.open(tmp_path / "moved")
    try:
        ids = operate.up(moved)
        assert ids == operate.node_ids(made)
        assert operate.online(moved) == {"north": "registered", "south": "registered"}
    finally:
        operate.down(moved)


def _listens(page: object) -> bool:
    try:
        return bool(page())  # type: ignore[operator]
    except OSError:
        return False
