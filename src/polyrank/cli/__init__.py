"""The command line, ``polyrank``: one function a command. Importing it adds the commands to `app`."""

from polyrank.cli import (
    catalogue,
    compare,
    deploy,
    deployed,
    export,
    language,
    merging,
    operating,
    plans,
    report,
    runs,
    watching,
)
from polyrank.cli.app import app, main

__all__ = [
    "app",
    "catalogue",
    "compare",
    "deploy",
    "deployed",
    "export",
    "language",
    "main",
    "merging",
    "operating",
    "plans",
    "report",
    "runs",
    "watching",
]
