"""What all commands share: the application, its options, and how mistakes end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console

from polyrank import __version__
from polyrank.experiment.embedded import embedded as embedded

app = typer.Typer(
    name="polyrank",
    help="Fine-tune one Hugging Face model across clients that cannot afford the same LoRA.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out, err = Console(), Console(stderr=True)

Set = Annotated[list[str] | None, typer.Option("--set", help="Override a key, for example --set rounds=5. Repeatable.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]


def main() -> None:
    """The entry point. Mistakes in the input end in one message and exit code 2, an interrupt in 130."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    app()


@contextmanager
def mistakes() -> Iterator[None]:
    """Turns errors that the user can mend into a message and exit code 2."""
    from polyrank.errors import InputError, TrainingError

    try:
        yield
    except (InputError, TrainingError, ImportError, OSError) as error:
        err.print(f"[red]error:[/] {plain(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1 if isinstance(error, TrainingError) else 2) from None


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def numbers(
    option: str, text: str | None, count: int | None, *, least: float, whole: bool = False
) -> list[float] | None:
    """The numbers of an option such as ``--weights 10,20``; None where it was not given."""
    from polyrank.experiment.config import ConfigError

    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option}: {text!r} is not a list of numbers such as 10,20,30") from None
    if whole and not all(value.is_integer() for value in values):
        raise ConfigError(f"{option}: {text!r}: every number must be whole")
    if any(not least <= value < float("inf") for value in values):
        raise ConfigError(f"{option}: {text!r}: every number must be finite and at least {least:g}")
    if count is not None and len(values) != count:
        raise ConfigError(f"{option}: {len(values)} numbers for {count} adapters")
    return values


def plain(text: str) -> str:
    """Text in which brackets are no markup."""
    return text.replace("[", "\\[")
