"""Whatever is in a file, a command ends: with 0, 1 or 2, with a message that names the file, and in bounded time.

`POLYRANK_FUZZ` cases of each kind are tried, from `POLYRANK_FUZZ_FROM` on: the number of a case is its seed.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification
from typer.testing import CliRunner

import talking
from broken import VALUES, WORDS, broken, changed, damaged
from polyrank.cli import app
from polyrank.cli.endings import ending
from polyrank.core.lowrank import Adapter, LowRank
from polyrank.deploy.site import Site
from polyrank.local.adapters import AdapterInfo, write_adapter

CASES = int(os.environ.get("POLYRANK_FUZZ", "8"))
FIRST = int(os.environ.get("POLYRANK_FUZZ_FROM", "0"))
SECONDS = int(os.environ.get("POLYRANK_FUZZ_SECONDS", "20"))  # of the processor, for one command
Config = dict[str, Any]


class Endless(BaseException):
    """A command that takes too long."""


def ends(arguments: list[Any], names: tuple[str, ...], what: str) -> None:
    """Calls a command, which ends as it must."""

    def late(*_: Any) -> None:
        raise Endless(what)

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    except BaseException as error:
        raise AssertionError(f"{what}: polyrank {arguments}: {type(error).__name__}: {error}") from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    told = f"{what}: polyrank {arguments}: {result.exit_code}\n{result.output[:3000]}"
    assert result.exit_code in (0, 1, 2), told
    assert "out of memory" not in result.stderr, told
    if result.exit_code:
        assert "error: " in result.stderr, told
        assert len(result.stderr) < 6000, told
        assert any(name in result.stderr for name in names), told


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


def called(*arguments: Any) -> None:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def written(path: Path, config: Config) -> Path:
    path.write_text(
        yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8", errors="surrogatepass"
    )
    return path


# --- what is right, and then broken


@pytest.fixture(scope="module")
def digits(digits_config: Config) -> Config:
    return {**digits_config, "rounds": 2, "device": "cpu", "threads": 1, "log": []}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table in each format with an experiment for it, a model that reads texts, and one that sees images."""
    folder = tmp_path_factory.mktemp("tables")
    talking.llama(folder / "llama")
    rows = [{"text": f"w{i} w{i % 5}", "label": "ab"[i % 2], "site": f"s{i % 3}"} for i in range(30)]
    (folder / "texts.csv").write_text("text,label,site\n" + "".join(",".join(row.values()) + "\n" for row in rows))
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "texts.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "texts.parquet")
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (30, 8, 8), np.uint8), np.arange(30) % 2
    np.savez(folder / "images.npz", image=pixels, label=labels, site=np.array([row["site"] for row in rows]))
    pictures = []
    for index, form in enumerate(("png", "jpeg", "gif", "bmp", "tiff", "webp") * 5):
        Image.fromarray(pixels[index]).save(folder / f"one.{form}")
        pictures.append({"image": (folder / f"one.{form}").read_bytes(), "label": "ab"[index % 2], "site": "s"})
    pq.write_table(pa.Table.from_pylist(pictures), folder / "images.parquet")
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=2,
    )
    ViTForImageClassification(config).save_pretrained(folder / "vit")
    for name in ("texts.csv", "texts.jsonl", "texts.json", "texts.parquet", "images.npz", "images.parquet"):
        kind, model = ("text", "llama") if name.startswith("texts") else ("image", "vit")
        experiment = {
            "rounds": 1,
            "device": "cpu",
            "threads": 1,
            "log": [],
            "model": {
                "name": f"./{model}",
                "targets": "attention",
                "rank": 2,
                **({"max_length": 16} if kind == "text" else {}),
            },
            "data": {
                **{"name": "files", "train": name, "test": name, kind: kind, "columns": ["site"]},
                "partition": {"name": "by_column", "column": "site"},
            },
            "fleet": [{"rank": 2}],
            "local": {"batch": 8},
        }
        written(folder / f"{name}.yaml", experiment)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of the same model."""
    folder = tmp_path_factory.mktemp("adapters")
    generator = torch.Generator().manual_seed(0)
    for rank in (2, 3):
        layers = {
            name: LowRank(torch.randn(rank, 6, generator=generator), torch.randn(5, rank, generator=generator))
            for name in ("m.a", "m.b")
        }
        write_adapter(folder / f"rank-{rank}", Adapter(layers), AdapterInfo("tiny"))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, digits: Config) -> Path:
    """A finished run, one with a round to go, one of a language model, and a study."""
    folder = tmp_path_factory.mktemp("runs")
    called("run", written(folder / "digits.yaml", digits), "--out", folder / "finished", "--quiet")
    shutil.copytree(folder / "finished", folder / "halfway")
    (folder / "halfway" / "summary.json").unlink()
    (folder / "language").mkdir()
    spoken = {
        **talking.experiment(folder / "language"),
        "rounds": 1,
        "log": [],
        "evaluate": {"generate": {"max_tokens": 3, "samples": 2}},
    }
    called("run", written(folder / "talking.yaml", spoken), "--out", folder / "spoken", "--quiet")
    called(
        "compare",
        folder / "digits.yaml",
        "--set",
        "rounds=1",
        "--methods",
        "fedit,local",
        "--out",
        folder / "study",
        "--quiet",
    )
    return folder


# --- experiments


@pytest.mark.parametrize("seed", range(FIRST, FIRST + CASES))
def test_experiments(seed: int, digits: Config, here: Path, tables: Path) -> None:
    rng = Random(seed)
    source = rng.choice((digits, digits, digits, yaml.safe_load((tables / "texts.csv.yaml").read_text())))
    if source is not digits:
        for name in ("texts.csv", "llama"):
            (here / name).symlink_to(tables / name)
    path = here / "experiment.yaml"
    if rng.random() < 0.15:
        written(path, source)
        broken(path, rng)
        if path.is_dir():
            return
    else:
        written(path, changed(source, rng))
    if not path.exists():
        return
    command = rng.choice(
        (
            *(["plan"], ["plan"], ["plan", "--png", here / "p.png"], ["data"], ["data"], ["profile", "--ranks", "1,2"]),
            *(["compare", "--dry-run"], ["run"]),
        )
    )
    out = ["--out", here / "out"] if command[0] in ("run", "compare") else []
    ends([command[0], path, *command[1:], *out], (path.name, *map(str, source)), f"case {seed}")


@pytest.mark.parametrize("seed", range(FIRST, FIRST + CASES))
def test_overrides(seed: int, digits: Config, here: Path) -> None:
    rng = Random(seed)
    flat = list(_flat(digits))
    key = rng.choice([*flat, *(key + ".x" for key in flat), "", "fleet.9.rank", "method.aggregate.rows", "fleet", "x"])
    value = rng.choice(
        [
            str(rng.choice(VALUES)),
            yaml.safe_dump(rng.choice(VALUES))[:-1],
            "[",
            "{",
            "&a [*a]",
            "!!int x",
            "2001-99-99",
            "'",
        ]
    )
    command = rng.choice((["plan"], ["data"], ["compare", "--dry-run", "--out", "study"]))
    option = rng.choice(("--set", "--set", "--grid")) if command[0] == "compare" else "--set"
    ends(
        [command[0], written(here / "e.yaml", digits), *command[1:], f"{option}={key}={value}"],
        (key.split(".")[0] or option, "e.yaml"),
        f"case {seed}",
    )


def _flat(value: Any, prefix: str = "") -> Iterator[str]:
    if prefix:
        yield prefix
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))


# --- tables and images


@pytest.mark.parametrize("seed", range(FIRST, FIRST + CASES))
def test_tables(seed: int, tables: Path, here: Path) -> None:
    rng = Random(seed)
    name = rng.choice(("texts.csv", "texts.jsonl", "texts.json", "texts.parquet", "images.npz", "images.parquet"))
    for other in ("llama", "vit"):
        (here / other).symlink_to(tables / other)
    shutil.copy(tables / f"{name}.yaml", here)
    if name == "images.parquet" and rng.random() < 0.7:
        table = pq.read_table(tables / name).to_pylist()
        row = rng.choice(table)
        row["image"] = damaged(row["image"], rng)
        pq.write_table(pa.Table.from_pylist(table), here / name)
        how = "an image"
    else:
        shutil.copy(tables / name, here)
        how = broken(here / name, rng)
    command = rng.choice(
        (["data"], ["data"], ["data", "--export", here / "shares"], ["plan"], ["run", "--out", here / "out"])
    )
    ends([command[0], here / f"{name}.yaml", *command[1:]], (name,), f"case {seed}, {how}")


# --- adapters and models


@pytest.mark.parametrize("seed", range(FIRST, FIRST + CASES))
def test_adapters(seed: int, adapters: Path, here: Path) -> None:
    rng = Random(seed)
    shutil.copytree(adapters, here / "a")
    path = rng.choice([p for p in sorted((here / "a").rglob("*")) if p.is_file()])
    how = broken(path, rng)
    method = rng.choice(("rb_lora", "flexlora", "fedit"))
    more = rng.choice(([], [], ["--client-ranks", "1,2"], ["--rank", "1"], ["--weights", "1,2"]))
    ends(
        ["merge", here / "a/rank-2", here / "a/rank-3", "--method", method, "--out", here / "out", *more],
        (path.parent.name,),
        f"case {seed}, {how}",
    )


@pytest.mark.parametrize("seed", range(FIRST, FIRST + CASES))
def test_models(seed: int, tables: Path, here: Path) -> None:
    rng = Random(seed)
    name, model = rng.choice((("texts.csv", "llama"), ("texts.csv", "llama"), ("images.npz", "vit")))
    for file in (name, f"{name}.yaml"):
        shutil.copy(tables / file, here)
    shutil.copytree(tables / model, here / model)
    path = rng.choice([p for p in sorted((here / model).rglob("*")) if p.is_file()])
    how = broken(path, rng)
    command = rng.choice((["plan"], ["run", "--out", here / "out"], ["run", "--out", here / "out"], ["profile"]))
    ends([command[0], here / f"{name}.yaml", *command[1:]], (model, name), f"case {seed}, {how}")


# --- folders of runs and studies


@pytest.mark.parametrize("seed", range(FIRST, FIRST + CASES))
def test_runs(seed: int, runs: Path, here: Path) -> None:
    rng = Random(seed)
    name = rng.choice(("finished", "halfway", "spoken", "study"))
    shutil.copytree(runs / name, here / name)
    if name == "spoken":
        shutil.copytree(runs / "language", here / "language")
    path = rng.choice([p for p in sorted((here / name).rglob("*")) if p.is_file() and "tensorboard" not in p.parts])
    how = broken(path, rng)
    ends(rng.choice(COMMANDS[name])(here / name), (path.name, name), f"case {seed}, {path.relative_to(here)}, {how}")


Command = Callable[[Path], list[Any]]
ANY: tuple[Command, ...] = (
    lambda run: ["report", run, "--out", "r.html"],
    lambda run: ["report", run, "--out", "r.html", "--tables", "tables"],
    lambda run: ["watch", run, "--once"],
    lambda run: ["watch", run, "--json"],
)
RUN: tuple[Command, ...] = (
    *ANY,
    lambda run: ["resume", run],
    lambda run: ["resume", run, "--json"],
    lambda run: ["evaluate", run],
    lambda run: ["export", run, "--out", "exported"],
    lambda run: ["export", run, "--out", "exported", "--merge"],
    lambda run: ["plan", run / "experiment.yaml", "--scores", run],
)
COMMANDS: dict[str, tuple[Command, ...]] = {
    "finished": RUN,
    "halfway": RUN,
    "spoken": (*RUN, *(lambda run: ["generate", run, "--prompt", "w1", "--tokens", 2],) * 4),
    "study": (*ANY, lambda run: ["report", run, "--out", "r.html", "--figures", "figures"]),
}


# --- questions and prompts


@pytest.mark.parametrize("seed", range(FIRST, FIRST + CASES))
def test_questions(seed: int, runs: Path, here: Path) -> None:
    rng = Random(seed)
    path = here / rng.choice(("asked.jsonl", "asked.json", "asked.csv", "asked.txt"))
    rows = [{"instruction": "w1", "question": f"w{i}", "choices": ["w1", "w2"], "answer": i % 2} for i in range(4)]
    lines = [json.dumps(row) for row in rows]
    tables = {".json": json.dumps(rows), ".csv": "question,choices,answer\n" + 'w1,"[""w1"", ""w2""]",0\n' * 3}
    path.write_text(tables.get(path.suffix, "\n".join(lines) + "\n"))
    how = broken(path, rng)
    command = rng.choice((["generate", "--tokens", 2, "--file"], ["evaluate", "--choices"]))
    ends([command[0], runs / "spoken", *command[1:], path], (path.name,), f"case {seed}, {how}")


# --- federations and sites


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployment that is never started, with a book of runs and of nodes, and each site's configuration."""
    folder = tmp_path_factory.mktemp("federation") / "fed"
    ports = ["--port", "1", "--superlink-port", "2", "--listen", "127.0.0.1"]
    called("deploy", "init", folder, "--host", "127.0.0.1", "--names", "a,b", *ports)
    asked = {"--out": folder / "asked", "--federation": json.loads((folder / "deploy.json").read_text())["federation"]}
    called("deploy", "request", "c", *(part for pair in asked.items() for part in pair))
    (folder / "state" / "runs.jsonl").write_text('{"id": "1", "folder": "/x"}\n{"id": "2", "folder": "/y"}\n')
    site = {"model": "digits-vit", "rehearse": {"experiment": "../../../e.yaml", "client": "client_0"}, "rank": 2}
    for name in ("a", "b"):
        written(folder / "nodes" / name / "site.yaml", site)
    return folder


DEPLOY: tuple[Command, ...] = (
    lambda fed: ["status", fed / "nodes/a"],
    lambda fed: ["logs", fed],
    lambda fed: ["add", fed, fed / "asked/request.json", "--fingerprint", "SHA256:x"],
    lambda fed: ["request", "a", "--out", fed / "nodes/a", "--rotate"],
    lambda fed: ["accept", fed / "nodes/a", fed / "answers/a.json"],
    lambda fed: ["remove", fed, "a"],
    lambda fed: ["renew", fed],
    lambda fed: ["renew", fed, "--authority", "new"],
    lambda fed: ["down", fed],
    lambda fed: ["join", fed / "nodes/a", "--data", "nowhere"],
)
PLAIN = (".json", ".jsonl", ".yaml", ".crt", ".pub", ".key")


@pytest.mark.parametrize("seed", range(FIRST, FIRST + 2 * CASES))
def test_federations(seed: int, federation: Path, here: Path) -> None:
    rng = Random(seed)
    shutil.copytree(federation, here / "fed")
    path = rng.choice([p for p in sorted((here / "fed").rglob("*")) if p.suffix in PLAIN])
    how = broken(path, rng)
    command = rng.choice(DEPLOY)(here / "fed")
    ends(["deploy", *command], ("fed", "nowhere"), f"case {seed}, {path.relative_to(here)}, {how}")


@pytest.mark.parametrize("seed", range(FIRST, FIRST + CASES))
def test_sites(seed: int, digits: Config, here: Path) -> None:
    """A site's own configuration, and the experiment that it rehearses: what `deploy keep` reads before it answers."""
    rng = Random(seed)
    written(here / "e.yaml", digits)
    site = {
        "model": "digits-vit",
        "rehearse": {"experiment": "e.yaml", "client": "client_0", "overrides": ["rounds=1"]},
        "privacy": {"examples": {"clip": 1.0, "noise": 1.0}},
        **{"device": "cpu", "threads": 1, "rank": 2, "memory": "1 GiB", "uplink": "1 Mbit/s"},
    }
    path = rng.choice((written(here / "site.yaml", site), here / "e.yaml"))
    how = broken(path, rng)
    error: Exception | None = None
    try:
        Site(here / "site.yaml")
    except Exception as raised:
        error = raised
    if error is not None:
        told = f"case {seed}, {how}: {type(error).__name__}: {error}"
        code, message = ending(error) or (None, "")
        assert code in (1, 2), told
        assert any(name in message for name in ("site.yaml", "e.yaml", *site, *digits)), told
        assert len(message) < 6000, told


# --- the rest


@pytest.mark.parametrize("word", [word for word in WORDS if not word.startswith("-") and "\x00" not in word])
def test_words(word: str, here: Path) -> None:
    """Any word in place of a name, on the command line."""
    for arguments in (["list", word], ["plan", word], ["report", word], ["watch", word], ["merge", word, "--out", "o"]):
        if word not in ("fedit", "digits"):
            ends(arguments, ("",), repr(word))
