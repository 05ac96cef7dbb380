"""Prompts and choices as tokens, for tokenizers that lack what others have."""

from pathlib import Path

import pytest

from local.test_causal import model_of
from local.test_prompts import tokenizer
from polyrank.data.choices import Question
from polyrank.data.source import DataError, Turn
from polyrank.local.lengths import positions
from polyrank.local.prompter import Prompter

ASKED = Question("Add {x} and y", "x = 1", "It is ", ("2", "x and y"), 0, "sums")


def words(prompter: Prompter, ids: list[int] | tuple[int, ...]) -> str:
    return " ".join(prompter.tokenizer.convert_ids_to_tokens(list(ids)))


def test_choices_stand_behind_the_prompt_and_the_lead(tmp_path: Path) -> None:
    prompter = Prompter(tokenizer(tmp_path), "alpaca_short")
    made = prompter.choices(ASKED, 64)
    before = "<s> ### Instruction: Add {x} and y ### Input: x = 1 ### Response: It is"
    assert [words(prompter, row) for row in made.rows] == [f"{before} 2", f"{before} x and y"]
    assert [words(prompter, row[start:]) for row, start in zip(made.rows, made.starts, strict=True)] == ["2", "x and y"]
    assert (made.characters, made.answer, made.subject) == ((1, 7), 0, "sums")
    assert made.shared == made.starts[0] - 1  # the last token before a choice runs with it: it tells of the first


def test_long_questions_lose_their_beginning(tmp_path: Path) -> None:
    prompter = Prompter(tokenizer(tmp_path), "plain")
    made = prompter.choices(ASKED, 8)
    assert [words(prompter, row) for row in made.rows] == ["x = 1 It is 2", "x = 1 It is x and y"]
    with pytest.raises(DataError, match="a choice of 3 tokens: the model has 3 positions"):
        prompter.choices(ASKED, 3)


@pytest.mark.parametrize(
    ("begins", "ends", "first"), [(True, True, "<s>"), (False, True, "</s>"), (False, False, "<unk>")]
)
def test_an_empty_prompt_still_has_a_token(tmp_path: Path, begins: bool, ends: bool, first: str) -> None:
    prompter = Prompter(tokenizer(tmp_path, begins=begins, ends=ends, pads=False), "plain")
    assert words(prompter, prompter.ids("")) == first
    made = prompter.choices(Question("", "", "", ("Hi", "It is"), 1), 64)
    assert [words(prompter, row) for row in made.rows] == [f"{first} Hi", f"{first} It is"]
    assert made.starts == (1, 1)


def test_a_chat_template_has_special_tokens_of_its_own(tmp_path: Path) -> None:
    prompter = Prompter(tokenizer(tmp_path, chat=True), "chat")
    text = prompter.prompt(Turn("Say hi", "", ""))
    assert words(prompter, prompter.ids(text)) == "<user> Say hi <model>"
    made = prompter.choices(Question("Say hi", "", "", ("Hi", "It is"), 0), 64)
    assert words(prompter, made.rows[1]) == "<user> Say hi <model> It is"
    assert made.starts == (4, 4)


def test_what_ends_a_text(tmp_path: Path) -> None:
    """The tokenizer's end, and all that the model's own generation config names."""
    prompter, model = Prompter(tokenizer(tmp_path)), model_of("llama")
    model.generation_config.eos_token_id = [7, 9]
    assert prompter.ends(model) == [prompter.tokenizer.eos_token_id, 7, 9]
    bare = Prompter(tokenizer(tmp_path / "bare", ends=False))
    model.generation_config.eos_token_id = None
    assert bare.ends(model) == []
    assert positions(model) == 32
    assert positions(model_of("bloom")) == 2048
