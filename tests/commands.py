"""Commands that files and pages name, as the command line itself parses them."""

from collections.abc import Sequence

import typer
from click import Command, Context

from polyrank.cli import app


def parse_command(arguments: Sequence[str]) -> Context:
    """The context of a command of `polyrank`; raises `click.UsageError` where its parser refuses the arguments."""
    command: Command = typer.main.get_command(app)
    rest = list(arguments)
    while commands := getattr(command, "commands", None):
        assert rest, f"{command.name}: no command follows"
        name = rest.pop(0)
        assert name in commands, f"{name!r}: not one of {', '.join(commands)}"
        command = commands[name]
    return command.make_context(command.name, rest)
