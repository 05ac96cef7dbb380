"""Makes docs/performance.md from what the benches stored, goals and figures side by side.

python docs/performance.py
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))  # for the modules that benches share

from records import stored  # noqa: E402
from verdicts import Verdict, cells  # noqa: E402

PAGE = ROOT / "docs" / "performance.md"

HEAD = """\
# Performance

This page is written by `python docs/performance.py` from the records of `make bench`; a test keeps it up to date.
Goals that are missed stay here as missed. A figure without a goal is for the reader. Ratios are medians over turns in
which all routes alternate, with the least and the most in brackets. They depend on the machine; `make bench` makes them
on yours. How well memory is predicted is on [a page of its own](memory.md).
"""
# Heading, bench, part of the bench, what is compared.
SECTIONS = (
    (
        "A round against a centralised run",
        "round",
        "centralised",
        "The training of a federated round of ten clients (ranks 4 to 24 on query and value, three steps each, texts of"
        " 32 words), as a share of what one PEFT model takes for the same examples in batches of the same size, in a"
        " plain loop. *minilm* has MiniLM's size (6 blocks of width 384), *small* 4 blocks of width 256; weights are"
        " random.",
    ),
    (
        "A round against the usual loops",
        "round",
        "usual",
        "How many times as long the same training takes with PEFT and a new Trainer for every client, and with a deep"
        " copy of the model and a new Accelerator for every client. The *usual round* is the latter with what is around"
        " it: importance by a backward pass per example through the graph of 32, a data loader per client, a dense"
        " decomposition per module, evaluation of 512 examples in a plain loop; against a round of `federate` that does"
        " the same work. Texts of whole rounds have 8 to 32 words; the usual round pads them all to the longest.",
    ),
    (
        "The same losses",
        "round",
        "losses",
        "All routes see the same examples in the same order from the same start. Client by client the losses must"
        " agree, relatively; the centralised model sees one client's examples after another's, and so learns more.",
    ),
    (
        "Evaluation's share",
        "round",
        "evaluation",
        "Of our whole round, with 512 examples evaluated every round. Evaluating every n-th round, or fewer examples,"
        " is `evaluate.every` and `evaluate.samples`.",
    ),
    (
        "Memory of a simulated round",
        "round",
        "memory",
        "The most that torch allocates at any moment of a round's training and aggregation, beside the base, as a share"
        " of three times the cohort's adapters plus what one batch takes.",
    ),
    (
        "Aggregation",
        "aggregate",
        None,
        "The exact mean of products without ever forming one, against a dense decomposition.",
    ),
    (
        "Factorisation",
        "compress",
        None,
        "What `compress` takes of the matrix products that no exact route avoids: Gram matrices in float64, for a"
        " float32 one is not exact, and the products that make the result; the goal is for both layers together, and"
        " is missed if all products are counted in float32. And a model's modules of equal shape"
        " together, against one dense decomposition after another.",
    ),
    (
        "Robust aggregation",
        "robust",
        None,
        "CPU seconds for one layer and ten clients of ranks 4 to 64, on one core. A trimmed mean of products has full"
        " rank; the distance of what blocks of rows find at rank 64 is held against that of the best approximation,"
        " which is found by forming the matrix.",
    ),
    (
        "Importance of layers",
        "importance",
        None,
        "Gradients of single examples in one backward pass, against a pass per example: through the graph of a batch,"
        " as released code does, and one by one.",
    ),
    ("Many registered clients", "scale", None, "What registering clients takes, beside those that take part."),
    ("Frozen prefixes", "prefix", None, "Rounds in which only upper layers are trained."),
    (
        "What Flower adds",
        "deploy",
        None,
        "Rounds of a deployment on one machine, over TLS with node keys, all of its processes on the same cores. A"
        " small round's seconds are Flower's: a node polls, and starts a process for every message.",
    ),
)


def page() -> str:
    """The page."""
    return "\n".join([HEAD, *(line for section in SECTIONS for line in lines(*section))])


def lines(heading: str, bench: str, part: str | None, text: str) -> Iterator[str]:
    """A section, with a table for each machine; nothing where nothing is stored."""
    runs = [(on, [v for v in found if part in (None, v["part"])]) for on, found in stored(bench)]
    runs = [(on, found) for on, found in runs if found]
    if runs:
        yield from (f"## {heading}", "", text, "")
    for on, found in runs:
        yield from (f"`python bench/{bench}.py` on {described(on)}.", "")
        yield from table(found)


def table(found: list[Verdict]) -> Iterator[str]:
    yield from ("| | goal | figure | |", "|---|---|---|---|")
    for v in found:
        *shown, said = cells(v)
        yield f"| {' | '.join(shown)} | {f'**{said}**' if v['met'] is False else said} |"
    yield ""


def described(on: dict[str, Any]) -> str:
    """A machine in words; older records say less."""
    where = on["gpu"] if on.get("gpu") else f"{on['cpu']}, {on['cores']} cores, {on['threads']} of torch's threads"
    libraries = "".join(f"{name} {on[name]}, " for name in ("torch", "transformers", "peft", "numpy") if name in on)
    commit = f", commit {on['commit']}" if "commit" in on else ""
    return f"{where}; load {on['load']:.1f}; {libraries}Python {on['python']}; {on['date']}{commit}"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
