"""The command line, ``polyrank``: one function a command. Importing it adds the commands to `app`."""

from polyrank.cli import runs, language, watching, compare, report, plans, export, merging  # noqa: I001 - in the order
from polyrank.cli import catalogue, deploy, keys, deployed  # in which --help shows them
from polyrank.cli.app import app, main

__all__ = [
    "app",
    "catalogue",
    "compare",
    "deploy",
    "deployed",
    "export",
    "keys",
    "language",
    "main",
    "merging",
    "plans",
    "report",
    "runs",
    "watching",
]
