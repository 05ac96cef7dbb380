"""Language models: ``polyrank generate``, and ``polyrank evaluate --choices``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyrank.cli.app import Json, app, mistakes, out
from polyrank.errors import shortened

if TYPE_CHECKING:
    from polyrank.data.source import Turn


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="An instruction, or a text to go on with. Repeatable.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="One prompt a line, or JSON lines with instruction and input.")
    ] = None,
    best: Annotated[
        bool, typer.Option("--best", help="The validation-selected adapter instead of the final one.")
    ] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Prompts as they are, without the template.")] = False,
    tokens: Annotated[int, typer.Option("--tokens", min=1, max=2**31 - 1, help="Of an answer, at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, max=1e6, help="0: always the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=1e-6, max=1, help="Draw among tokens of this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**53, help="Of draws.")] = 0,
    json_: Json = False,
) -> None:
    """Let a language model answer, with a run's exported adapter loaded by PEFT itself."""
    with mistakes():
        from polyrank.data.source import Turn
        from polyrank.experiment.config import ConfigError
        from polyrank.experiment.language import speaker
        from polyrank.experiment.store import Run
        from polyrank.local.generate import Decoding

        turns = [Turn(text, "", "") for text in prompt or []] + (_turns(file) if file else [])
        if not turns:
            raise ConfigError("generate: nothing to answer: give --prompt or --file")
        stored = Run.open(folder)
        model = speaker(stored, stored.best if best else stored.adapter)
        answers = model.answers(turns, Decoding(tokens, temperature, top_p), seed, raw=raw)
        asked = [{"prompt": t.instruction, **({"input": t.input} if t.input else {})} for t in turns]
        told = [{**question, "answer": answer} for question, answer in zip(asked, answers, strict=True)]
        if json_:
            print(json.dumps({"run": str(folder), "adapter": str(model.adapter), "answers": told}))
            return
        for one in told:
            out.print(one["prompt"], style="bold", soft_wrap=True)
            out.print(one["answer"], soft_wrap=True)


def _turns(file: Path) -> list[Turn]:
    from polyrank.data.formats import read_rows
    from polyrank.data.source import DataError, Turn
    from polyrank.files import read_text

    if file.suffix.lower() not in (".jsonl", ".ndjson", ".json"):
        try:
            lines = read_text(file).splitlines()
        except ValueError as error:
            raise DataError(f"--file: {file}: {error}") from None
        return [Turn(line, "", "") for line in lines if line.strip()]
    rows = read_rows(file)
    for number, row in enumerate(rows, 1):
        if not all(isinstance(part, str) for part in (row.get("instruction"), row.get("input") or "")):
            raise DataError(
                f"--file: {file}: row {number} is {shortened(row)}; it must be a JSON object whose instruction, and "
                "input if there is one, are texts"
            )
    return [Turn(row["instruction"], row.get("input") or "", "") for row in rows]


def choose(folder: Path, file: Path, options: list[str], best: bool, json_: bool) -> None:
    """Prints what a run's adapter is worth by a file of questions, its layout as the run and `options` have it."""
    with mistakes():
        from polyrank.experiment.language import speaker
        from polyrank.experiment.loading import assignment, validated
        from polyrank.experiment.questions import ChoicesConfig
        from polyrank.experiment.store import Run

        stored = Run.open(folder)
        known = stored.experiment().evaluate.choices
        raw: dict[str, Any] = {} if known is None else known.model_dump(mode="json")
        raw |= {"file": str(file), **dict(assignment(option) for option in options)}
        config = validated(ChoicesConfig, raw, "--choices")
        model = speaker(stored, stored.best if best else stored.adapter)
        found = model.choose(config)
        if json_:
            print(json.dumps({"run": str(folder), "adapter": str(model.adapter), "file": str(file), **found}))
            return
        for line in _lines(found):
            out.say(line)


def _lines(found: dict[str, Any]) -> list[str]:
    head = (
        f"{found['questions']} questions: accuracy {found['accuracy']:.2%} ± {found['error'] or 0:.2%}, by character"
        f" {found['accuracy_norm']:.2%}, by token {found['accuracy_token']:.2%}; guessing: {found['chance']:.2%}"
    )
    subjects = found["subjects"].items()
    return [head, *(f"  {name}: {own['accuracy']:.2%} of {own['questions']}" for name, own in subjects)]
