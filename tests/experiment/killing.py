"""Runs `polyrank` again and again and kills it: a script, whose children find everything imported.

A line of standard input is a plan, in JSON: ``arguments`` of polyrank, and when to kill it with SIGKILL: ``after``
seconds, or at the ``count``-th ``write`` (with a ``share`` of its bytes written), before it is renamed (``replace``) or
after (``replaced``). ``slow`` is how many seconds flushing to disk takes. The answer is a line: the exit status, -9 if
it was killed.
"""

import builtins
import json
import os
import signal
import sys
import time
from typing import Any, NoReturn

import torch.utils.tensorboard  # noqa: F401 - what commands import when they run
import transformers.models.vit.modeling_vit  # noqa: F401

import polyrank.experiment.session
import polyrank.report.progress  # noqa: F401
from polyrank import cli

Plan = dict[str, Any]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Torn:
    """A file that can be killed in the middle of a write."""

    def __init__(self, file: Any, due: "Countdown", share: float) -> None:
        self.file, self.due, self.share = file, due, share

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "Torn":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, data: Any) -> int:
        if self.due.now():
            self.file.write(data[: round(self.share * len(data))])
            self.file.flush()
            die()
        return int(self.file.write(data))


class Countdown:
    def __init__(self, count: int) -> None:
        self.count = count

    def now(self) -> bool:
        self.count -= 1
        return self.count == 0


def prepare(plan: Plan) -> None:
    """Makes this process die, or flush slowly, as planned."""
    flush, rename, opened, due = os.fsync, os.replace, builtins.open, Countdown(plan.get("count", 0))

    def slow(file: int) -> None:
        time.sleep(plan["slow"])
        flush(file)

    def replace(source: Any, target: Any) -> None:
        now = due.now()
        if now and plan["at"] == "replace":
            die()
        rename(source, target)
        if now:
            die()

    def torn(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        found = opened(file, mode, *rest, **more)
        return Torn(found, due, plan["share"]) if mode[0] in "wa" and str(file) != os.devnull else found

    if plan.get("slow"):
        os.fsync = slow
    if plan.get("at") == "write":
        builtins.open = torn  # type: ignore[assignment]
    elif plan.get("at"):
        os.replace = replace  # type: ignore[assignment]


def child(plan: Plan) -> NoReturn:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    prepare(plan)
    sys.argv = ["polyrank", *plan["arguments"]]
    try:
        cli.main()
    except SystemExit as end:
        os._exit(int(end.code or 0))
    finally:
        os._exit(70)


def watched(pid: int, after: float | None) -> int:
    """Waits for a process, and kills it when its time is up; its exit status."""
    ends = time.monotonic() + after if after is not None else float("inf")
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > ends:
            os.kill(pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.001)


if __name__ == "__main__":
    for line in sys.stdin:
        plan = json.loads(line)
        pid = os.fork()
        if not pid:
            child(plan)
        print(watched(pid, plan.get("after")), flush=True)
