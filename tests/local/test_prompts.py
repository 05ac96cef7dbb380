"""Prompts and responses as tokens: what every template says, and which tokens are learnt, written out by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from polyrank.data import DataError, Source, instructions, prepare_causal, warn_of_silent
from polyrank.data.causal import IGNORED
from polyrank.data.prompts import prompt_of
from polyrank.data.source import Prompting, Turn
from polyrank.local.hf import ModelError
from polyrank.local.processors import causal_processor

ASKED = Turn("Add {x} and y", "x = 1", "It is 2")
BARE = Turn("Say hi", "", "Hi")
WORDS = ["Add", "{x}", "and", "y", "x", "=", "1", "It", "is", "2", "Say", "hi", "Hi", "###", "Instruction:", "Input:"]
WORDS += ["Response:", "<user>", "<model>"]
CHAT = "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<model> ' }}{{ m.content }} {% endfor %}"
CHAT += "{% if add_generation_prompt %}<model> {% endif %}"


def tokenizer(folder: Path, *, begins: bool = True, ends: bool = True, pads: bool = True, chat: bool = False) -> str:
    """A tokenizer of whole words; what it lacks of special tokens is as asked."""
    special = ["<unk>", *["<s>"] * begins, *["</s>"] * ends, *["<pad>"] * pads]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begins:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    named = {"unk_token": "<unk>"} | ({"bos_token": "<s>"} if begins else {})
    named |= ({"eos_token": "</s>"} if ends else {}) | ({"pad_token": "<pad>"} if pads else {})
    fast = PreTrainedTokenizerFast(tokenizer_object=made, **named)
    if chat:
        fast.chat_template = CHAT
    fast.save_pretrained(folder)
    return str(folder)


def learnt(name: str, turn: Turn, prompting: Prompting, length: int = 64) -> tuple[list[str], list[str]]:
    """All tokens of a turn, and those that are learnt."""
    from transformers import AutoTokenizer

    processor = causal_processor(name, length, prompting)
    split = prepare_causal(Source([turn], np.zeros(1, np.int64)), processor.encode, processor.pad_id, "x")
    batch = split.batch(np.array([0]))
    words = AutoTokenizer.from_pretrained(name).convert_ids_to_tokens
    labels = batch["labels"][0]
    return words(batch["input_ids"][0].tolist()), words(labels[labels != IGNORED].tolist())


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYRANK_CACHE", "")


@pytest.mark.parametrize(
    ("template", "begins", "ends"),
    [
        ("alpaca", "Below is an instruction that describes a task, paired", "### Response:\n"),
        ("alpaca_short", "### Instruction:\nAdd {x} and y\n\n### Input:\nx = 1\n\n### Response:\n", ""),
        ("vigogne", "Ci-dessous se trouve une instruction qui décrit une tâche, associée", "### Réponse:\n"),
        ("plain", "Add {x} and y\nx = 1\n", ""),
    ],
)
def test_templates(template: str, begins: str, ends: str) -> None:
    """Braces in the data are text."""
    prompt = prompt_of(template, ASKED)
    assert prompt.startswith(begins)
    assert prompt.endswith(ends)
    assert prompt.count("Add {x} and y") == prompt.count("x = 1") == 1
    assert "x = 1" not in prompt_of(template, BARE)
    assert prompt_of(template, Turn("", "", "All the world's a stage")) == ""


def test_the_response_is_learnt_with_the_end_of_text(tmp_path: Path) -> None:
    name = tokenizer(tmp_path)
    tokens, found = learnt(name, ASKED, Prompting("alpaca_short"))
    assert tokens == [
        "<s>",
        "###",
        "Instruction:",
        "Add",
        "{x}",
        "and",
        "y",
        "###",
        "Input:",
        "x",
        "=",
        "1",
        "###",
        "Response:",
        "It",
        "is",
        "2",
        "</s>",
    ]
    assert found == ["It", "is", "2", "</s>"]
    tokens, found = learnt(name, BARE, Prompting("plain"))
    assert (tokens, found) == (["<s>", "Say", "hi", "Hi", "</s>"], ["Hi", "</s>"])


def test_the_prompt_is_learnt_where_that_is_asked(tmp_path: Path) -> None:
    tokens, found = learnt(tokenizer(tmp_path), ASKED, Prompting("alpaca_short", train_on_inputs=True))
    assert found == tokens  # the first is a label, too, which nothing predicts


def test_plain_text_is_learnt_whole(tmp_path: Path) -> None:
    tokens, found = learnt(tokenizer(tmp_path), Turn("", "", "It is 2"), Prompting("alpaca"))
    assert " ".join(tokens) == "<s> It is 2 </s>"
    assert found == ["It", "is", "2", "</s>"]


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("ends", [False, True])
def test_tokenizers_without_special_tokens(tmp_path: Path, begins: bool, ends: bool) -> None:
    name = tokenizer(tmp_path, begins=begins, ends=ends, pads=False)
    tokens, found = learnt(name, BARE, Prompting("plain"))
    assert tokens == ["<s>"] * begins + ["Say", "hi", "Hi"] + ["</s>"] * ends
    assert found == ["Hi"] + ["</s>"] * ends
    padding = causal_processor(name, 64, Prompting("plain")).pad_id
    assert padding == (1 + begins if ends else int(begins))  # the end of text pads, or its start


def test_a_chat_template_says_where_the_answer_begins(tmp_path: Path) -> None:
    tokens, found = learnt(tokenizer(tmp_path / "chat", chat=True), ASKED, Prompting("chat"))
    assert tokens == ["<user>", "Add", "{x}", "and", "y", "x", "=", "1", "<model>", "It", "is", "2"]
    assert found == ["It", "is", "2"]
    with pytest.raises(ModelError, match=r"data.template: chat: the tokenizer of .* has no chat template"):
        causal_processor(tokenizer(tmp_path / "none"), 64, Prompting("chat"))


def test_what_is_cut_off_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens, found = learnt(tokenizer(tmp_path), ASKED, Prompting("alpaca_short"), length=15)
    assert (len(tokens), found) == (15, ["It"])
    _, found = learnt(tokenizer(tmp_path), ASKED, Prompting("alpaca_short"), length=10)
    assert found == []
    made = causal_processor(str(tmp_path), 10, Prompting("alpaca_short"))
    turns = [ASKED, BARE, Turn("Say hi", "", "")]
    split = prepare_causal(Source(turns, np.zeros(3, np.int64)), made.encode, made.pad_id, "x")
    assert split.silent == 2
    warn_of_silent(split, "train", 10)
    said = "train: of 2 of 3 texts nothing is asked: their response is empty, or cut off"
    assert f"{said} (model.max_length is 10 tokens)" in caplog.text
    cut = prepare_causal(Source([ASKED], np.zeros(1, np.int64)), made.encode, made.pad_id, "x")
    with pytest.raises(DataError, match=r"test: of 1 of 1 texts nothing is asked.* model.max_length is 10 tokens"):
        warn_of_silent(cut, "test", 10)


def test_a_batch_is_padded_on_the_right_and_padding_is_not_learnt(tmp_path: Path) -> None:
    processor = causal_processor(tokenizer(tmp_path), 64, Prompting("plain"))
    split = prepare_causal(Source([BARE, ASKED], np.zeros(2, np.int64)), processor.encode, processor.pad_id, "x")
    batch = split.batch(np.array([0, 1]))
    assert split.lengths.tolist() == [5, 12]
    assert split.targets.tolist() == [2, 4]
    assert batch["attention_mask"].sum(1).tolist() == [5, 12]
    assert batch["input_ids"][0, 5:].tolist() == [processor.pad_id] * 7
    assert batch["labels"][0].tolist() == [IGNORED] * 3 + batch["input_ids"][0, 3:5].tolist() + [IGNORED] * 7


# --- files


def rows(path: Path, *, names: tuple[str, ...] = ("instruction", "input", "output")) -> Path:
    lines = [dict(zip(names, turn, strict=True)) | {"kind": kind} for turn, kind in ((ASKED, "b"), (BARE, "a"))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_columns_are_named_and_categories_numbered(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", names=("q", "about", "a"))
    found = instructions(
        train=path, test=path, instruction="q", input="about", response="a", label="kind", columns=["kind"]
    )
    assert found.kind == "causal"
    assert found.train.inputs == [ASKED, BARE]
    assert found.classes == ("a", "b")
    assert found.train.labels.tolist() == [1, 0]
    assert found.train.columns["kind"].tolist() == ["b", "a"]
    assert found.prompting == Prompting("alpaca", False)


def test_texts_need_no_instruction(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl")
    found = instructions(train=path, test=path, instruction=None)
    assert found.train.inputs == [Turn("", "", "It is 2"), Turn("", "", "Hi")]
    assert len(found.validation) == 0


def test_mistakes_are_named(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"no template 'alpacca'; did you mean 'alpaca'\?"):
        instructions(train=path, test=path, template="alpacca")
    with pytest.raises(
        DataError, match=r"a\.jsonl: row 1: no column 'answer'.*There are: instruction, input, output, kind"
    ):
        instructions(train=path, test=path, response="answer")
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"with_input": "{instruction} {input}", "without_input": "instruction"}))
    with pytest.raises(DataError, match=r"own\.json: without_input must be a text with \{instruction\} in it, once"):
        instructions(train=path, test=path, template=str(own))
    own.write_text(json.dumps({"with_input": "Q {instruction} {input} A ", "without_input": "Q {instruction} A "}))
    found = instructions(train=path, test=path, template=str(own))
    assert found.prompting is not None
    assert prompt_of(found.prompting.template, BARE) == "Q Say hi A "
