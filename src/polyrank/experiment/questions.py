"""What a language model is asked besides its test split, as sections of the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from polyrank.data.choices import Layout
from polyrank.experiment.components import Count, Strict
from polyrank.local.generate import Decoding


class ChoicesConfig(Strict):
    """Multiple choice: which answer the model finds most likely. As it is, for files like the hub's MMLU.

    Attributes:
        file: JSON, JSON lines, CSV or parquet.
        question: the column of questions.
        choices: the column of lists of choices, or a column for each; null: questions end with them
            (``... Options: A. yes, B. no``).
        answer: the column of the right one: its index from 0, its letter, or its text, which may have words before it.
        instruction: the column of instructions.
        subject: the column by which accuracy is reported as well.
        letters: choices are listed below the question and answered by letter.
        lead: how every answer begins, for example ``"Answer: "``.
        template: makes prompts of questions; the data's if not given.
        samples: at most so many questions, drawn once; all if not given.
        every: rounds between measurements; only before and after the run if not given.
    """

    file: Path
    question: str = "question"
    choices: str | list[str] | None = "choices"
    answer: str = "answer"
    instruction: str | None = None
    subject: str | None = None
    letters: bool = False
    lead: str = ""
    template: str | None = None
    samples: Count | None = None
    every: Count | None = None

    def layout(self) -> Layout:
        """Which columns say what."""
        names = ("question", "choices", "answer", "instruction", "subject", "letters", "lead")
        return Layout(**{name: getattr(self, name) for name in names})


class GenerateConfig(Strict):
    """What the model goes on with, before and after the run, from prompts of the test split.

    Attributes:
        samples: how many prompts, drawn once.
        max_tokens: of an answer.
        prompt_tokens: of plain text, so many of the first tokens are the prompt.
        temperature: 0: always the most likely token; above: drawn from the run's seed.
        top_p: draws among the most likely tokens that together have this probability.
        every: rounds between measurements; only before and after the run if not given.
    """

    samples: Count = 5
    max_tokens: Count = 64
    prompt_tokens: Count = 16
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    every: Count | None = None

    def decoding(self) -> Decoding:
        """How tokens are chosen."""
        return Decoding(self.max_tokens, self.temperature, self.top_p)
