"""Makes docs/results.md from the records of the study, which `python bench/study.py` stores.

python docs/results.py
"""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

PAGE = Path(__file__).with_name("results.md")
RECORDS = Path(__file__).parents[1] / "bench" / "results" / "study.json"

HEAD = """\
# Results

This page is written by `python docs/results.py` from the records of `python bench/study.py`; a test keeps it up to
date. Every named method on the same data, split, clients, schedule and stated rank budgets (4, 8 and 16 per module for
a third of twelve clients each): `experiments/study/`. Runs are short: {rounds} rounds of four clients, so these figures
compare how methods *start*, and say nothing of where they end.

Accuracy is on the test split: of the last round, and of the round that was best on validation; mean and standard
deviation over seeds {seeds}. Bytes and trained parameters are per client and round; seconds are simulated, per round,
of the slowest client. Differences smaller than the spread are none.

Made at {commits}, on {cores} cores, {date}. Of the study's {due} runs, {stored} are stored.
"""
COLUMNS = ["method", "last round", "selected", "trained", "up", "down", "seconds", "seeds"]


def page() -> str:
    """The page."""
    stored = json.loads(RECORDS.read_text())
    runs = stored["runs"]
    seeds = ", ".join(str(seed) for seed in sorted({run["seed"] for run in runs}))
    rounds = ", ".join(str(count) for count in sorted({run["rounds"] for run in runs}))
    known = list(dict.fromkeys(run["commit"] for run in runs))
    commits = f"commit{'s' * (len(known) > 1)} {', '.join(known)}"
    filled = {"rounds": rounds, "seeds": seeds, "commits": commits, "stored": len(runs), "due": stored["due"]}
    lines = [HEAD.format(**filled, **stored["machine"])]
    for setting in dict.fromkeys(run["setting"] for run in runs):
        of_setting = [run for run in runs if run["setting"] == setting]
        before = mean(run["before"] for run in of_setting)
        lines += [f"## {setting}", "", f"Before training: {before:.1%}.", ""]
        lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS), *rows(of_setting), ""]
    return "\n".join(lines)


def rows(runs: list[dict[str, Any]]) -> Iterator[str]:
    """A row for each method, the best mean first."""
    methods = dict.fromkeys(run["method"] for run in runs)
    groups = [[run for run in runs if run["method"] == method] for method in methods]
    for group in sorted(groups, key=lambda group: (-mean(run["final"] for run in group), group[0]["method"])):

        def average(key: str, group: list[dict[str, Any]] = group) -> float:
            return mean(run[key] for run in group)

        cells = [
            f"`{group[0]['method']}`",
            spread([run["final"] for run in group]),
            spread([run["selected"] for run in group if run["selected"] is not None]),
            f"{average('trained'):,.0f}",
            f"{average('bytes_up') / 1e3:,.0f} kB",
            f"{average('bytes_down') / 1e3:,.0f} kB",
            f"{average('seconds'):.1f}",
            str(len(group)),
        ]
        yield "| " + " | ".join(cells) + " |"


def spread(values: list[float]) -> str:
    """Mean and standard deviation, in percent."""
    if not values:
        return "-"
    deviation = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{deviation}"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
