"""Fills what one attacker can do into docs/threats.md, from what `bench/attacks.py` stored.

python docs/threats.py
"""

import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "bench" / "results" / "attacks.json"
PAGE = ROOT / "docs" / "threats.md"
BEGIN, END = "<!-- written by docs/threats.py -->", "<!-- end -->"
COLUMNS = ("none", "accuracy"), ("flip", "accuracy"), ("backdoor", "accuracy"), ("backdoor", "planted")


def page() -> str:
    """The page with its figures."""
    text = PAGE.read_text()
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{table()}\n{END}", text, flags=re.DOTALL)


def table() -> str:
    """Every rule under every attack, with the deployment's trust and without."""
    record = json.loads(RECORD.read_text())
    runs = {(row["rule"], row["attack"], row["trust"]): row["runs"] for row in record["rows"]}
    rules = list(dict.fromkeys(rule for rule, *_ in runs))
    on, settings, seeds = record["machine"], record["settings"], len(runs[rules[0], "none", "off"])
    lines = [
        f"`size_cap: {settings['size_cap']:g}` and `clip: {settings['clip']:g}`; means over {seeds} seeds, with the "
        f"least and the most; {on['cpu']}, torch {on['torch']}, {on['date']}.",
        "",
        "| rule | trust | accuracy, no attack | accuracy, flip | accuracy, backdoor | planted, backdoor |",
        "|---|---|---|---|---|---|",
    ]
    for rule in rules:
        for trust in ("off", "on"):
            cells = [shown(runs[rule, attack, trust], key) for attack, key in COLUMNS]
            lines.append(f"| `{rule}` | {trust} | {' | '.join(cells)} |")
    honest = [run["bounded"] for rule in rules for run in runs[rule, "none", "on"]]
    updates = 10 * record["rounds"] * len(honest)
    lines += ["", f"Without an attack, {sum(honest)} of {updates} updates counted as less than they were."]
    return "\n".join(lines)


def shown(runs: list[dict[str, Any]], key: str) -> str:
    values = [run[key] for run in runs]
    return f"{mean(values):.0%} ({min(values):.0%} to {max(values):.0%})"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
