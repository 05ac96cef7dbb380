"""What all commands share: the application, its options, and how mistakes end."""

from __future__ import annotations

import io
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from polyrank import __version__
from polyrank.experiment.embedded import embedded as embedded
from polyrank.report.screen import Screen

FAULT = "a fault of polyrank itself"
"""The words that tell an error nobody has foreseen from a user's mistake."""

app = typer.Typer(
    name="polyrank",
    help="Fine-tune one Hugging Face model across clients that cannot afford the same LoRA.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out, err = Screen(), Screen(stderr=True)

Set = Annotated[list[str] | None, typer.Option("--set", help="Override a key, for example --set rounds=5. Repeatable.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]


def main() -> None:
    """The entry point. Mistakes in the input end in one message and exit code 2, an interrupt in 130.

    A fault of polyrank itself ends in a message, too, and exit code 1; its traceback is in a file. With
    ``POLYRANK_TRACEBACK=1`` in the environment it is printed instead.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may know no letters but ASCII's
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            app()
    except Exception as error:
        if os.environ.get("POLYRANK_TRACEBACK"):
            raise
        raise SystemExit(_fault(error)) from None


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    err.say(f"warning: {message}")


def _fault(error: Exception) -> int:
    """Tells of an error that nobody has foreseen, and where its traceback is; returns the exit code."""
    from polyrank.cli.endings import ending

    code, message = ending(error) or (1, None)
    if message is None:
        what = f"{FAULT}: {type(error).__name__}: {error}"
        try:
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", errors="backslashreplace", prefix="polyrank-", suffix=".txt", delete=False
            ) as file:
                traceback.print_exception(error, file=file)
            message = f"{what}\nplease report it with {file.name}, which has the traceback"
        except OSError:
            message = f"{what}\nplease report it with what POLYRANK_TRACEBACK=1 prints"
    err.error(message)
    return code


@contextmanager
def mistakes() -> Iterator[None]:
    """Turns errors that the user can mend into a message and an exit code."""
    try:
        yield
    except (ValueError, RuntimeError, ImportError, OSError, MemoryError) as error:
        from polyrank.cli.endings import ending

        if (found := ending(error)) is None:
            raise
        code, message = found
        err.error(message)
        raise typer.Exit(code) from None


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def numbers(
    option: str, text: str | None, count: int | None, *, least: float, most: float = 1e300, whole: bool = False
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
    if any(value > most for value in values):
        raise ConfigError(f"{option}: {text!r}: every number must be at most {most:g}")
    if count is not None and len(values) != count:
        raise ConfigError(f"{option}: {len(values)} numbers for {count} adapters")
    return values
