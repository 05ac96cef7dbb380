"""A tokenizer, as evaluation needs it: prompts that are answered, and what was answered as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from polyrank.data.choices import Question
from polyrank.data.prompts import CHAT, prompt_of
from polyrank.data.source import DataError, Turn
from polyrank.local.choices import Choices
from polyrank.local.pretrained import padding_of, tokenizer_of
from polyrank.local.processors import located_response


class Prompter:
    """Makes token ids of prompts and text of token ids.

    Attributes:
        pad_id: the token that fills up a batch.
    """

    def __init__(self, name: str, template: str = "alpaca") -> None:
        """For a model's tokenizer, and the template of its instructions; `processors.causal_processor` checks both."""
        self.tokenizer: Any = tokenizer_of(name)
        self.template = template
        self.pad_id = padding_of(name, self.tokenizer)

    def prompt(self, turn: Turn) -> str:
        """What stands before a turn's response."""
        if self.template != CHAT or not (turn.instruction or turn.input):
            return prompt_of("plain" if self.template == CHAT else self.template, turn)
        asked = "\n\n".join(part for part in (turn.instruction, turn.input) if part)
        messages = [{"role": "user", "content": asked}]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def ids(self, prompt: str) -> list[int]:
        """The tokens of a prompt, with what the tokenizer puts before texts; never none."""
        special = self.template != CHAT  # a chat template has its own
        ids = [int(i) for i in self.tokenizer(prompt, add_special_tokens=special, verbose=False)["input_ids"]]
        if ids and ids[-1] == self.tokenizer.eos_token_id and not prompt.endswith(self.tokenizer.eos_token):
            ids = ids[:-1]  # a tokenizer that ends every text would leave nothing to say
        return ids or [self.first]

    @property
    def first(self) -> int:
        """The token that a text begins with where the tokenizer puts none: lm-evaluation-harness's choice, too."""
        known = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return int(next((i for i in known if i is not None), self.pad_id))

    def text(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def answer(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """What tokens add to the text of a prompt: by themselves, some tokenizers take a space from their beginning."""
        before, whole = self.text(prompt), self.text([*prompt, *ids])
        return whole[len(before) :] if whole.startswith(before) else self.text(ids)

    def ends(self, model: nn.Module) -> list[int]:
        """The tokens that end a text: the tokenizer's, and those that the model's generation config names."""
        config: Any = getattr(model, "generation_config", None)
        stated = getattr(config, "eos_token_id", None)
        named = stated if isinstance(stated, list) else [stated]
        return sorted({int(i) for i in (*named, self.tokenizer.eos_token_id) if i is not None})

    def choices(self, question: Question, most: int) -> Choices:
        """A question's choices as tokens; the first tokens are left out where they are more than `most`.

        Raises:
            DataError: for a choice that is longer by itself.
        """
        prompt = self.prompt(Turn(question.instruction, question.input, "")) + question.lead
        rows, starts = [], []
        for choice in question.choices:
            ids, start = located_response(self.tokenizer, prompt, choice, special=self.template != CHAT)
            ended = len(ids) > start + 1 and ids[-1] == self.tokenizer.eos_token_id
            ids = ids[:-1] if ended else ids
            rows.append([self.first, *ids] if start == 0 else ids)
            starts.append(start or 1)
        cut = max(max(map(len, rows)) - most, 0)
        if cut >= min(starts):
            raise DataError(f"a choice of {max(map(len, rows)) - min(starts)} tokens: the model has {most} positions")
        sizes = tuple(map(len, question.choices))
        kept = tuple(tuple(row[cut:]) for row in rows)
        return Choices(kept, tuple(start - cut for start in starts), sizes, question.answer, question.subject)
