"""Fills the times of robust rules into docs/methods.md, from what `bench/robust.py` stored.

python docs/methods.py
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))  # for the modules that benches share

from records import stored  # noqa: E402

PAGE = ROOT / "docs" / "methods.md"
BEGIN, END = "<!-- written by docs/methods.py -->", "<!-- end -->"
SHAPES = ("4096x4096", "1024x4096")
RULES = {
    "trimmed_mean": "ceil(`trim` K) clients of the K that hold a layer, at most (K - 1) / 2",
    "median": "fewer than half",
    "krum": "f = `byzantine` of n >= 2 f + 3",
    "norm_clipping": "nobody moves the mean by more than `bound` / K a round, where all K hold all layers",
}


def page() -> str:
    """The page with its figures."""
    text = PAGE.read_text()
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{table()}\n{END}", text, flags=re.DOTALL)


def table() -> str:
    """What each rule withstands, and how long it takes, by the last record."""
    _, verdicts = stored("robust")[-1]
    seconds = {v["name"]: v["figure"] for v in verdicts}

    def of(rule: str, shape: str) -> str:
        return f"{seconds[f'{shape}: {rule}, CPU seconds']:.2g} s"

    lines = [
        "Times are CPU seconds for one layer and ten clients of ranks 4 to 64 at a server's rank of 64, on one core",
        f"([the record](performance.md#robust-aggregation)); `flexlora`, the exact mean, takes "
        f"{of('flexlora', SHAPES[0])} at 4096 x 4096.",
        "",
        "| rule | withstands | 4096 x 4096 | 1024 x 4096 |",
        "|---|---|---|---|",
        *(f"| `{rule}` | {what} | {' | '.join(of(rule, shape) for shape in SHAPES)} |" for rule, what in RULES.items()),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
