"""The command line, ``polyrank``: one function a command. Importing it adds the commands to `app`."""

from polyrank.cli import runs, language, watching, compare, report, plans, export, merging, catalogue  # noqa: I001
from polyrank.cli import deploy, keys, deployed, operating, site  # in the order in which --help shows them
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
    "operating",
    "plans",
    "report",
    "runs",
    "site",
    "watching",
]
