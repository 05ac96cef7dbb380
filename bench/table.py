"""Runs every bench and prints one table of goals and figures, from what they stored.

    python bench/table.py               # all of them; a goal that is missed does not stop the others
    python bench/table.py --stored      # only the table
    python bench/table.py --only round  # one (again: several)

Exits with 1 if a bench fails or a goal is missed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from records import stored
from verdicts import lines

FOLDER = Path(__file__).parent
BENCHES = ("aggregate", "compress", "robust", "round", "importance", "memory", "scale", "prefix", "deploy")


def main() -> int:
    here = [name for name in BENCHES if (FOLDER / f"{name}.py").exists()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stored", action="store_true", help="run nothing")
    parser.add_argument("--only", choices=here, action="append")
    options = parser.parse_args()
    names = options.only or here
    failed = [] if options.stored else [name for name in names if not ran(name)]
    found = [{**v, "name": f"{bench}: {v['name']}"} for bench in names for _, own in stored(bench) for v in own]
    print("\n".join(lines(found)))
    missed = [v["name"] for v in found if v["met"] is False]
    print(f"{len(missed)} of {sum(v['met'] is not None for v in found)} goals are missed.")
    if failed:
        print(f"These benches failed or missed a goal: {', '.join(failed)}.")
    return 1 if failed or missed else 0


def ran(bench: str) -> bool:
    """Whether a bench ended well."""
    print(f"bench/{bench}.py", flush=True)
    return subprocess.run([sys.executable, str(FOLDER / f"{bench}.py")]).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
