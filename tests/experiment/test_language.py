"""What a language model is asked before and after a run, from the file to the summary, and by command on its own."""

import importlib.util
import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from typer.testing import CliRunner

from local.test_prompts import WORDS, tokenizer
from polyrank.cli import app
from polyrank.data.choices import Layout, read_questions
from polyrank.data.source import DataError
from polyrank.experiment.store import Run
from polyrank.report.gather import gather
from polyrank.report.page import page
from polyrank.report.screen import Screen
from polyrank.report.tables import summarise
from polyrank.report.terminal import results_table

HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)


def printed(*arguments: object) -> Any:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(count: int) -> list[dict[str, Any]]:
    """Questions of known words; the right choice by index."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        words = rng.choice(WORDS, size=9, replace=False).tolist()
        choices = [words[4], " ".join(words[5:7]), " ".join(words[6:9])]
        question = " ".join(words[: 1 + number % 4])
        rows.append({"question": question, "choices": choices, "answer": number % 3, "subject": f"s{number % 2}"})
    return rows


def experiment(folder: Path, **evaluate: Any) -> Path:
    """A tiny Llama with a tokenizer of whole words, two clients and two rounds."""
    name = tokenizer(folder / "model")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=96,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(name)
    rng = np.random.default_rng(1)
    rows = [
        {"instruction": " ".join(words[:3]), "input": "", "output": " ".join(words[3:])}
        for words in (rng.choice(WORDS, size=6).tolist() for _ in range(40))
    ]
    raw = {
        "rounds": 2,
        "model": {"name": name, "targets": "all-linear", "max_length": 32},
        "data": {
            "name": "instructions",
            "template": "plain",
            "clients": 2,
            "train": str(lines(folder / "train.jsonl", rows[:30])),
            "test": str(lines(folder / "test.jsonl", rows[30:])),
        },
        "fleet": [{"rank": 4}],
        "local": {"lr": 0.05, "batch": 4},
        "evaluate": {"choices": {"file": "choices.jsonl", "subject": "subject"}, **evaluate},
        "log": [],
    }
    lines(folder / "choices.jsonl", asked(14))
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("language")
    path = experiment(folder, clients=True, generate={"samples": 4, "max_tokens": 6, "every": 2})
    return folder / "run", printed("run", path, "--out", folder / "run")


def test_a_run_tells_what_its_model_is_asked(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished
    for part in ("before", "final", "selected"):
        found = summary[part]["choices"]
        assert found["questions"] == 14
        assert found["chance"] == pytest.approx(1 / 3)
        assert found["subjects"]["s0"]["questions"] == found["subjects"]["s1"]["questions"] == 7
        assert summary[part]["generate"]["exact_match"] <= 1
        assert summary[part]["test"]["perplexity"] == pytest.approx(np.exp(summary[part]["test"]["loss"]))
    assert summary["before"]["choices"] != summary["final"]["choices"]
    records = list(Run.open(folder).records())
    assert "generate/exact_match" not in records[0]["metrics"]
    assert "generate/exact_match" in records[1]["metrics"]
    assert not [key for key in records[1]["metrics"] if key.startswith("choices")]
    samples = json.loads((folder / "samples.json").read_text())["samples"]
    assert len(samples) == 4
    test = {json.loads(line)["output"] for line in (folder.parent / "test.jsonl").read_text().splitlines()}
    assert {sample["reference"] for sample in samples} <= test
    assert [s["before"] for s in samples] != [s["final"] for s in samples]


def test_commands_find_the_same_on_the_exported_adapter(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished
    found = printed("evaluate", folder, "--choices", folder.parent / "choices.jsonl")
    assert {key: found[key] for key in summary["final"]["choices"]} == summary["final"]["choices"]
    samples = json.loads((folder / "samples.json").read_text())["samples"]
    asked_of = lines(folder.parent / "prompts.jsonl", [{"instruction": s["prompt"].strip()} for s in samples])
    asked_of.write_bytes(b"\xef\xbb\xbf" + asked_of.read_bytes())
    answers = printed("generate", folder, "--file", asked_of, "--tokens", 6)["answers"]
    assert [a["answer"] for a in answers] == [s["final"] for s in samples]
    for name, data, message in (
        ("x.jsonl", b'{"prompt": "a"}', "row 1 is"),
        ("x.jsonl", "{}é".encode("latin-1"), "line 1 is not UTF-8"),
        ("x.txt", "é".encode("utf-16"), "its bytes look like UTF-16"),
    ):
        (folder.parent / name).write_bytes(data)
        refused = invoke("generate", folder, "--file", folder.parent / name)
        assert (refused.exit_code, message in " ".join(refused.stderr.split())) == (2, True), refused.stderr
    shown = invoke("generate", folder, "--prompt", samples[0]["prompt"].strip(), "--tokens", 6, "--best")
    assert samples[0]["selected"].strip() in shown.output
    found = printed("evaluate", folder)
    assert found["perplexity"] == pytest.approx(summary["final"]["test"]["perplexity"], rel=1e-4)


@pytest.mark.parametrize("options", [[], ["--merge"]])
def test_an_exports_card_lets_it_answer(
    finished: tuple[Path, dict[str, Any]], options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, summary = finished
    assert invoke("export", folder, "--out", tmp_path / "out", *options).exit_code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card
    assert f"| final | {summary['final']['choices']['accuracy']:.4f} |" in card
    assert f"{summary['final']['test']['perplexity']:.4f}" in card
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "out")
    told: dict[str, Any] = {"print": lambda text: told.update(text=text)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of Transformers
        exec(code, told)
    answers = printed("generate", folder, "--prompt", "Name three colours.", "--tokens", 60)["answers"]
    assert told["text"].endswith(answers[0]["answer"])


def test_the_report_is_of_nats_per_token(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="the extra `report` is not installed")
    folder, summary = finished
    gathered = gather([folder])
    table = summarise(gathered)
    titles = [column.title for column in table.columns]
    assert titles[:3] == ["nats per token, final", "nats per token, selected", "perplexity"]
    assert "multiple choice" in titles
    assert table.rows[0].method == "fedit"  # the untrained model is below, though its figure is the larger one
    text = page(gathered, table)
    assert f"reached {summary['final']['test']['loss']:.3f} nats" in text
    assert 'id="samples"' in text
    assert summary["final"]["clients"].keys() == gathered.runs[0].rounds[-1].clients.keys()
    worst = max(own["loss"] for own in summary["final"]["clients"].values())
    assert table.rows[0].values["worst"].mean == worst
    shown = Screen(width=200, file=io.StringIO())
    shown.print(results_table(summary))
    printed_table = shown.file.getvalue()
    assert "test loss, nats per token" in printed_table
    assert f"{summary['before']['choices']['accuracy']:.2%}" in printed_table


def test_mistakes_are_found_before_training(tmp_path: Path) -> None:
    path = experiment(tmp_path, generate={"max_tokens": 96})
    result = invoke("run", path, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "evaluate.generate.max_tokens: 96 leaves no room for a prompt: the model has 96 positions" in result.output
    result = invoke("run", path, "--out", tmp_path / "b", "--set", "evaluate.choices.file=choice.jsonl")
    assert "choice.jsonl: no such file; did you mean" in result.output
    result = invoke("run", path, "--out", tmp_path / "c", "--set", "evaluate.choices.answer=reply")
    assert "no column 'reply'" in result.output
    result = invoke("run", "--set", "evaluate.generate={samples: 2}", "--out", tmp_path / "d")
    assert "evaluate.generate: digits is classified; it is of causal language models" in result.output
    assert not list(tmp_path.glob("*/rounds.jsonl"))


def test_layouts(tmp_path: Path) -> None:
    """A list, columns, or the end of the question; an index, a letter or the text, with words before it."""

    def read(row: dict[str, Any], **layout: Any) -> Any:
        return read_questions(lines(tmp_path / "x.jsonl", [row]), Layout(**layout))[0]

    listed = {"question": "Q", "choices": ["no", "yes, or no"], "answer": 1}
    assert read(listed)[2:5] == ("", ("no", "yes, or no"), 1)
    assert read(listed | {"answer": "B"}).answer == 1
    assert read(listed | {"answer": "yes, or no"}).answer == 1
    assert read(listed | {"answer": "So: yes, or no"})[2:5] == ("So: ", ("no", "yes, or no"), 1)
    assert read({"question": "Q", "a": 1, "b": 2, "answer": 0}, choices=["a", "b"]).choices == ("1", "2")
    ended = {"question": "Is A. or B. so? Options: A. 47,XY,+13, B. x B.C., C. z", "answer": "The answer is: C. z"}
    assert read(ended, choices=None)[2:5] == ("The answer is: ", ("A. 47,XY,+13", "B. x B.C.", "C. z"), 2)
    lettered = read(listed, letters=True)
    assert lettered[1:5] == ("Q\nA. no\nB. yes, or no", "", ("A", "B"), 1)
    array = tmp_path / "x.json"
    array.write_text(json.dumps([listed, listed]))
    assert len(read_questions(array, Layout())) == 2
    with pytest.raises(DataError, match=r"question 1: the answer 'maybe' is none of the choices"):
        read(listed | {"answer": "maybe"})
    with pytest.raises(DataError, match=r"question 1: its question ends with no choices such as"):
        read(listed, choices=None)


@pytest.mark.skipif(not HAS_HARNESS, reason="lm-eval is not installed")
def test_lm_evaluation_harness_finds_the_same(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """It loads the exported adapter, and its accuracies are those of the same prompts."""
    folder, summary = finished
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder.parent / "choices.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\n",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(task))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lm_eval
        from lm_eval.tasks import TaskManager

        found: Any = lm_eval.simple_evaluate(
            model="hf",
            model_args=f"pretrained={folder.parent / 'model'},peft={folder / 'adapter'},dtype=float32",
            tasks=["tiny"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            device="cpu",
            batch_size=4,
            bootstrap_iters=0,
        )
    due, own = summary["final"]["choices"], found["results"]["tiny"]
    assert own["acc,none"] == pytest.approx(due["accuracy"])
    assert own["acc_norm,none"] == pytest.approx(due["accuracy_norm"])
