"""What a language model is asked besides its test split: questions with choices, and prompts to go on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from polyrank.core.lowrank import Adapter, combine
from polyrank.core.rng import stream
from polyrank.core.types import Client
from polyrank.data.choices import read_questions
from polyrank.data.source import DataError, Dataset, Prompting, Turn
from polyrank.experiment.config import ConfigError, Experiment
from polyrank.experiment.machine import default_threads, pick_device
from polyrank.experiment.models import load_base, located
from polyrank.experiment.questions import ChoicesConfig, GenerateConfig
from polyrank.experiment.store import Run, RunError
from polyrank.local.adapters import CONFIG, read_adapter
from polyrank.local.base import Base
from polyrank.local.choices import Choices, likelihoods
from polyrank.local.generate import Decoding, closeness, generate
from polyrank.local.hf import load_exported
from polyrank.local.lengths import positions
from polyrank.local.processors import causal_processor
from polyrank.local.prompter import Prompter
from polyrank.local.vocabulary import check_tokens

Found = dict[str, Any]


class Prompt(NamedTuple):
    """What the model goes on with, as text and as tokens, and what the data goes on with."""

    text: str
    ids: list[int]
    reference: str


@dataclass(frozen=True)
class Language:
    """Questions and prompts, made ready once.

    Attributes:
        prompter: the tokenizer.
        choices: questions with choices; none where nothing asks for them.
        prompts: to go on with, likewise.
        generation: how.
        every: rounds between measurements of ``choices`` and ``generate``, where there are any during the run.
        seed: of draws.
    """

    prompter: Prompter
    choices: Sequence[Choices]
    prompts: Sequence[Prompt]
    generation: GenerateConfig
    every: Mapping[str, int]
    seed: int

    def due(self, done: int) -> Language:
        """What is measured after so many rounds."""
        asked = [name for name, every in self.every.items() if done % every == 0]
        return replace(
            self,
            choices=self.choices if "choices" in asked else (),
            prompts=self.prompts if "generate" in asked else (),
        )

    def measure(self, model: nn.Module) -> tuple[Found, list[str]]:
        """What the model is worth by ``choices`` and ``generate``, and its answers to the prompts."""
        found: Found = {}
        if self.choices:
            found["choices"] = likelihoods(model, self.choices, self.prompter.pad_id).metrics()
        if not self.prompts:
            return found, []
        seeds = [int(stream(self.seed, "generate", n).integers(2**31)) for n in range(len(self.prompts))]
        ids = [prompt.ids for prompt in self.prompts]
        ends = self.prompter.ends(model)
        kept = generate(model, ids, self.generation.decoding(), ends=ends, pad_id=self.prompter.pad_id, seeds=seeds)
        answers = [self.prompter.answer(*pair) for pair in zip(ids, kept, strict=True)]
        found["generate"] = closeness(answers, [prompt.reference for prompt in self.prompts])
        return found, answers

    def of(self, base: Base, models: Mapping[Client, Sequence[Adapter]]) -> tuple[Found, list[str]]:
        """What a run's models are worth: the mean over them; and the answers of the first."""
        found = []
        for parts in models.values():
            with base.attached(combine(parts)):
                found.append(self.measure(base.model))
        return _mean([each for each, _ in found]), found[0][1]


def language(experiment: Experiment, dataset: Dataset, base: Base) -> Language | None:
    """What an experiment asks a language model; None where it asks nothing.

    Raises:
        ConfigError: for a classifier, or answers that are longer than the model.
        DataError: for a file that holds no such questions.
    """
    e = experiment.evaluate
    asked = {name: section for name in ("choices", "generate") if (section := getattr(e, name)) is not None}
    if not asked:
        return None
    if not base.causal:
        name = next(iter(asked))
        raise ConfigError(f"evaluate.{name}: {experiment.data.name} is classified; it is of causal language models")  # type: ignore[attr-defined]
    name = located(experiment.model)
    prompting = dataset.prompting or Prompting()
    prompter = Prompter(name, prompting.template)
    choices: Sequence[Choices] = ()
    if e.choices is not None:
        causal_processor(name, experiment.model.max_length, Prompting(e.choices.template or prompting.template))
        choices = questions(e.choices, Prompter(name, e.choices.template or prompting.template), base, experiment.seed)
    generation = e.generate or GenerateConfig()
    prompts = _prompts(generation, prompter, dataset, base, experiment.seed) if e.generate else ()
    check_tokens(
        [i for question in choices for row in question.rows for i in row], base.model, name, "evaluate.choices"
    )
    check_tokens([i for prompt in prompts for i in prompt.ids], base.model, name, "evaluate.generate")
    every = {name: section.every for name, section in asked.items() if section.every is not None}
    return Language(prompter, choices, prompts, generation, every, experiment.seed)


def questions(config: ChoicesConfig, prompter: Prompter, base: Base, seed: int) -> list[Choices]:
    """The questions of a file as tokens, all or as many as are asked for."""
    found = read_questions(config.file, config.layout())
    kept = list(range(len(found)))
    if config.samples is not None and config.samples < len(found):
        kept = sorted(stream(seed, "evaluate", "choices").choice(len(found), config.samples, replace=False).tolist())
    most = positions(base.model)
    made = []
    for number in kept:
        try:
            made.append(prompter.choices(found[number], most))
        except DataError as error:
            raise DataError(f"{config.file}: question {number + 1}: {error}") from None
    return made


def _prompts(config: GenerateConfig, prompter: Prompter, dataset: Dataset, base: Base, seed: int) -> list[Prompt]:
    """Prompts of the test split; of plain text, its first tokens."""
    most = positions(base.model) - config.max_tokens
    if most < 1:
        raise ConfigError(
            f"evaluate.generate.max_tokens: {config.max_tokens} leaves no room for a prompt: the model has"
            f" {positions(base.model)} positions"
        )
    turns: list[Turn] = dataset.test.inputs  # type: ignore[assignment]
    count = min(config.samples, len(turns))
    drawn = stream(seed, "evaluate", "generate").choice(len(turns), count, replace=False)
    return [prompt_of(prompter, turns[number], config.prompt_tokens, most) for number in sorted(drawn.tolist())]


def prompt_of(prompter: Prompter, turn: Turn, prompt_tokens: int, most: int) -> Prompt:
    """A turn as a prompt of at most `most` tokens, the last ones."""
    text = prompter.prompt(turn)
    if text:
        return Prompt(text, prompter.ids(text)[-most:], turn.response)
    ids = prompter.ids(turn.response)
    first = min(prompt_tokens, most, max(len(ids) // 2, 1))
    return Prompt(prompter.text(ids[:first]), ids[:first], prompter.answer(ids[:first], ids[first:]))


@dataclass(frozen=True)
class Speaker:
    """A run's exported adapter on its base, loaded by PEFT, with its tokenizer.

    Attributes:
        experiment: what was run.
        adapter: the adapter's folder.
        base: the base, which carries the adapter.
        prompter: makes prompts as in training.
        plain: whether it was trained on plain text, which has no template.
    """

    experiment: Experiment
    adapter: Path
    base: Base
    prompter: Prompter
    plain: bool

    def choose(self, config: ChoicesConfig) -> Found:
        """What it is worth by a file of questions."""
        template = config.template or self.prompter.template
        causal_processor(located(self.experiment.model), 1, Prompting(template))
        prompter = Prompter(located(self.experiment.model), template)
        asked = questions(config, prompter, self.base, self.experiment.seed)
        return likelihoods(self.base.model, asked, prompter.pad_id).metrics()

    def answers(self, turns: Sequence[Turn], decoding: Decoding, seed: int, *, raw: bool = False) -> list[str]:
        """What it answers to instructions; `raw`: what it goes on with, as for a model of plain text."""
        texts = [t.instruction if raw or self.plain else self.prompter.prompt(t) for t in turns]
        most = positions(self.base.model) - decoding.max_tokens
        if most < 1:
            raise ConfigError(f"--tokens: {decoding.max_tokens}: the model has {most + decoding.max_tokens} positions")
        ids = [self.prompter.ids(text)[-most:] for text in texts]
        seeds = [int(stream(seed, "generate", n).integers(2**31)) for n in range(len(ids))]
        ends, pad = self.prompter.ends(self.base.model), self.prompter.pad_id
        kept = generate(self.base.model, ids, decoding, ends=ends, pad_id=pad, seeds=seeds)
        return [self.prompter.answer(*pair) for pair in zip(ids, kept, strict=True)]


def speaker(run: Run, adapter: Path) -> Speaker:
    """The model of a run with one of its adapters; no data is read.

    Raises:
        RunError: if there is no such adapter.
        ConfigError: if it is not of a causal language model.
    """
    if not (adapter / CONFIG).is_file():
        raise RunError(f"{run.folder}: has no {adapter.name}/ yet; `polyrank resume {run.folder}` finishes the run")
    experiment = run.experiment()
    if read_adapter(adapter)[1].task != "CAUSAL_LM":
        raise ConfigError(f"{run.folder}: its model tells classes; only a causal language model can be asked this")
    torch.set_num_threads(experiment.threads or default_threads())
    device = pick_device(experiment.device)
    base = load_base(experiment.model, "causal", (), device, stream(experiment.seed, "head"))
    load_exported(base, adapter)
    data: Any = experiment.data
    prompter = Prompter(located(experiment.model), getattr(data, "template", Prompting().template))
    return Speaker(experiment, adapter, base, prompter, getattr(data, "instruction", "") is None)


def flat(found: Found) -> dict[str, float]:
    """As metrics of a round: ``choices/accuracy``, ``generate/rougeL``."""
    numbers = ((f"{part}/{key}", value) for part, own in found.items() for key, value in own.items())
    return {key: value for key, value in numbers if isinstance(value, float) and not key.endswith(("chance", "error"))}


def _mean(found: Sequence[Any]) -> Any:
    """The mean of every number in nested mappings of the same keys."""
    if isinstance(found[0], dict):
        return {key: _mean([each[key] for each in found]) for key in found[0]}
    same = all(each == found[0] for each in found)
    return found[0] if same else float(np.mean([each for each in found if each is not None]))
