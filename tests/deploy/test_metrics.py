"""Metrics of a server, as Prometheus' own parser reads them: answers, refusals, sites, certificates, disks."""

import json
import re
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("flwr", reason="the extra `flower` is not installed")
pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")

from prometheus_client import parser

from polyrank.cli import app
from polyrank.core.types import RoundRecord
from polyrank.deploy import operate, registry
from polyrank.deploy.certificates import node_keys
from polyrank.deploy.enrolment import signed
from polyrank.deploy.exposition import Family, exposition, server
from polyrank.deploy.layout import DeployError, Deployment, write_private
from polyrank.deploy.metrics import Metrics, kind_of, serve
from polyrank.deploy.provision import add, init
from polyrank.deploy.renewal import new_authority
from polyrank.engines.audit import Audit
from polyrank.experiment.loading import parse
from polyrank.experiment.store import Run
from polyrank.files import from_yaml

Values = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parsed(page: bytes) -> Values:
    """Every value of a page, by the name and the labels of its sample."""
    families = list(parser.text_string_to_metric_families(page.decode()))
    assert all(family.type in ("counter", "gauge", "summary") for family in families)
    assert all(family.documentation for family in families)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def of(values: Values, name: str, **labels: str) -> float:
    return values[name, tuple(sorted(labels.items()))]


@pytest.fixture
def run(tmp_path: Path, digits_config: dict[str, Any]) -> Run:
    """Two rounds of a run, as the server writes them."""
    folder = tmp_path / 'a "quoted" \\ run'
    run = Run.create(folder, parse({**digits_config, "rounds": 2}, "test", Path()))
    for round_ in range(2):
        ranks = {client: {"layer": 2} for client in ("a", "b")}
        down, up, losses = {"a": 1000, "b": 2000}, {"a": 300, "b": 400 + round_}, {"a": 0.5, "b": 0.25}
        run.append(RoundRecord(round_, "AB", 0.1, ranks, down, up, losses, {"a": 7.0, "b": 8.0}), 1.5 + round_)
    audit = Audit(folder / "audit.jsonl")
    for client in ("a", "b"):
        audit.note("received", 0, client, hash="0", bytes=1)
        audit.note("accepted", 0, client, hash="0", bytes=1)
    audit.note("refused", 0, "c", hash="0", bytes=1, reason="examples: 7 of 'c' is not a number that it can be")
    audit.note("refused", 1, "d", hash="0", bytes=1, reason="examples: 1e9 of 'd' is not a number that it can be")
    audit.note("late", 1, "c", reason="the round is closed")
    return run


@pytest.fixture
def made(tmp_path: Path, run: Run) -> Deployment:
    found = init(tmp_path / "server", ["north", "south"], ["localhost"], port=0, superlink_port=0, metrics_port=0)
    entry = {"id": "17", "folder": str(run.folder)}
    (found.folder / "state" / "runs.jsonl").write_text(json.dumps(entry) + "\n")
    return found


def test_a_page_has_what_happened(made: Deployment, run: Run) -> None:
    metrics = Metrics(made, lambda deployment: ({"north": "online", "south": "offline"}, {"17": "running"}))
    metrics.ask()
    for _ in range(2):  # a second scrape counts nothing twice
        values = parsed(metrics.page())
    records, timings, name = list(run.records()), list(run.timings()), str(run.folder)
    assert of(values, "polyrank_rounds_total", run=name) == len(records) == 2
    assert of(values, "polyrank_rounds_planned", run=name) == 2
    for way in ("bytes_up", "bytes_down"):
        total = sum(sum(record[way].values()) for record in records)
        assert of(values, f"polyrank_{way}_total", run=name) == total > 0
    assert of(values, "polyrank_round_seconds_count", run=name) == 2
    assert of(values, "polyrank_round_seconds_sum", run=name) == sum(line["wall_seconds"] for line in timings)
    counts = {"accepted": 2, "refused": 2, "late": 1, "failed": 0, "unanswered": 0}
    for outcome, count in counts.items():
        assert of(values, "polyrank_answers_total", run=name, outcome=outcome) == count
    reason = "examples: N of '*' is not a number that it can be"
    assert of(values, "polyrank_refusals_total", run=name, reason=reason) == 2
    assert of(values, "polyrank_run_active", run=name) == 1
    assert of(values, "polyrank_sites_known") == 2
    assert of(values, "polyrank_sites_connected") == 1
    assert of(values, "polyrank_site_connected", site="south") == 0
    assert of(values, "polyrank_superlink_up") == 0  # nobody has started it
    assert 364 < of(values, "polyrank_certificate_days", certificate="server") < 365
    assert 364 < of(values, "polyrank_site_key_days", site="north") < 365
    assert of(values, "polyrank_disk_free_bytes", folder=str(made.folder)) > 0
    (info,) = [dict(labels) for name, labels in values if name == "polyrank_info"]
    assert set(info) == {"version", "python", "torch", "flwr"}


def test_what_is_added_is_counted_and_what_flower_does_not_say_stays(made: Deployment, run: Run) -> None:
    silent = [False]

    def ask(deployment: Deployment) -> tuple[dict[str, str], dict[str, str]]:
        if silent[0]:
            raise DeployError("no answer")
        return {"north": "online"}, {"17": "finished:completed"}

    metrics = Metrics(made, ask)
    assert metrics.ask()
    name, audit = str(run.folder), Audit(run.folder / "audit.jsonl")
    before = of(parsed(metrics.page()), "polyrank_answers_total", run=name, outcome="failed")
    audit.note("failed", 1, "c", reason="")
    with open(audit.path, "a") as file:
        file.write('{"event": "fai')  # cut short by a crash
    audit.note("failed", 1, "c", reason="")
    silent[0] = True
    assert not metrics.ask()
    values = parsed(metrics.page())
    assert of(values, "polyrank_answers_total", run=name, outcome="failed") == before + 2
    assert of(values, "polyrank_sites_connected") == 1
    assert of(values, "polyrank_run_active", run=name) == 0


def test_sites_that_come_and_go_and_their_keys_are_told(made: Deployment, tmp_path: Path) -> None:
    new_authority(made)
    now = datetime.now(UTC)
    for days in (2, 1):  # two keys of `east`, one after the other, have ended
        shutil.rmtree(tmp_path / "east", ignore_errors=True)
        private, _ = node_keys("east")
        path = tmp_path / "east" / "request.json"
        since = now - timedelta(days=days, hours=12)
        write_private(path, signed(private, "east", made.settings.federation, 1, since))
        add(made, path, now=since)
        with registry.changing(made) as book:
            assert registry.expire(book, since + timedelta(days=1)) == ["east"]
    operate.remove(made, "south")
    values = parsed(Metrics(made, lambda deployment: ({"north": "online"}, {})).page())
    assert of(values, "polyrank_sites_known") == 1
    assert of(values, "polyrank_site_key_days", site="east") == pytest.approx(-0.5, abs=0.01)
    certificates = {dict(labels)["certificate"] for name, labels in values if name == "polyrank_certificate_days"}
    assert certificates == {"server", "authority 1", "authority 2"}
    assert {dict(labels)["site"] for name, labels in values if name == "polyrank_site_key_days"} == {"north", "east"}


def test_a_run_that_cannot_be_read_hides_no_other(made: Deployment, run: Run, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "rounds.jsonl").write_text('{"round": "none"}\n')
    with open(made.folder / "state" / "runs.jsonl", "a") as book:
        book.write(json.dumps({"id": "18", "folder": str(broken)}) + "\n")
    values = parsed(Metrics(made, lambda deployment: ({}, {})).page())
    assert of(values, "polyrank_run_readable", run=str(broken)) == 0
    assert of(values, "polyrank_run_readable", run=str(run.folder)) == 1


def test_reasons_are_told_apart_without_what_clients_can_make_up(made: Deployment, run: Run, tmp_path: Path) -> None:
    assert kind_of("its base model is 'abc', the server's is 'd3f'") == "its base model is '*', the server's is '*'"
    assert kind_of("norm 3.5e+10 is above 12") == "norm N is above N"
    audit = Audit(tmp_path / "many" / "audit.jsonl")
    audit.path.parent.mkdir()
    for word in "abcdefghij":
        for other in "abcdefghij":
            audit.note("refused", 0, "x", reason=f"{word}{other}")
    with open(made.folder / "state" / "runs.jsonl", "a") as book:
        book.write(json.dumps({"id": "18", "folder": str(audit.path.parent)}) + "\n")
    values = parsed(Metrics(made, lambda deployment: ({}, {})).page())
    refusals = {
        labels: value
        for (name, labels), value in values.items()
        if name == "polyrank_refusals_total" and dict(labels)["run"] == str(audit.path.parent)
    }
    assert len(refusals) == 31
    assert sum(refusals.values()) == 100


def test_labels_and_values_are_written_as_prometheus_reads_them() -> None:
    family = Family("x", "gauge", 'a \\ and\na "quote"')
    texts = ['"', "\\", "\n", 'a\\"b\\n', "é", "{x},y=1", ""]
    for number, text in enumerate(texts):
        family.add(number + 0.5, label=text, other="z")
    family.add(float("inf"), label="inf")
    family.add(float("-inf"), label="-inf")
    family.add(1e300, label="large")
    values = parsed(exposition([family]))
    assert [of(values, "x", label=text, other="z") for text in texts] == [n + 0.5 for n in range(len(texts))]
    assert of(values, "x", label="large") == 1e300
    assert of(values, "x", label="inf") == float("inf") == -of(values, "x", label="-inf")


@pytest.fixture
def address() -> Iterator[str]:
    web = server(("127.0.0.1", 0), lambda: b"page\n")
    thread = threading.Thread(target=web.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{web.server_address[1]}"
    web.shutdown()
    thread.join()
    web.server_close()


def test_only_metrics_are_served(address: str) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{address}/metrics") as answer:
        assert answer.read() == b"page\n"
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    with pytest.raises(urllib.error.HTTPError, match="404") as refused:
        opener.open(f"{address}/state/superlink.db")
    refused.value.close()


def test_the_port_is_the_settings(made: Deployment, tmp_path: Path) -> None:
    (service,) = [each for each in operate.services(made, False) if each.name == "metrics"]
    assert list(service.command[1:]) == ["deploy", "metrics", str(made.folder)]
    without = init(tmp_path / "without", ["a"], ["h"])
    assert [each.name for each in operate.services(without, False)] == ["superlink", "superexec", "registrar"]
    with pytest.raises(DeployError, match="metrics_port: missing"):
        serve(without)
    port = made.settings.metrics_port
    assert port is not None
    with (web := server(("127.0.0.1", port), bytes)), pytest.raises(DeployError, match=f"port {port} of 127"):
        serve(made)
    web.server_close()


def test_alerts_are_of_metrics_that_there_are(made: Deployment, tmp_path: Path) -> None:
    path = tmp_path / "polyrank.yml"
    done = CliRunner().invoke(app, ["deploy", "alerts", "--out", str(path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (group,) = from_yaml(path.read_text())["groups"]
    assert len(group["rules"]) >= 5
    names = {name for name, _ in parsed(Metrics(made, lambda deployment: ({}, {})).page())}
    for rule in group["rules"]:
        used = set(re.findall(r"polyrank_\w+", rule["expr"]))
        assert used, rule["alert"]
        assert used <= names, rule["alert"]
        assert rule["expr"].count("(") == rule["expr"].count(")")
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]
    again = CliRunner().invoke(app, ["deploy", "alerts", "--out", str(path)], catch_exceptions=False)
    assert again.exit_code == 2
    assert f"--out: {path}: is there already" in again.stderr
