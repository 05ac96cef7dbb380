"""Makes docs/models.md from what `bench/models.py` stored: what works with a tiny model of every family, and what not.

python docs/models.py
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
RECORD = ROOT / "bench" / "results" / "models.json"
TASKS = {"text": "text classifiers", "causal": "language models", "image": "image classifiers"}

HEAD = """\
# Models

This page is written by `python docs/models.py` from the record of `python bench/models.py`; a test keeps it up to date.

polyrank has no list of models that it knows. Whatever Transformers loads for a task is read from its modules: the
linear layers that take an adapter, the blocks that it repeats, the attention in them. What cannot be read is asked of
the model itself, by small passes over your own examples, before anything is trained. The table has {count} families,
each as a tiny model of random weights: their architecture is the real one, and their size is not. Your model is asked
the same questions, whether it is in the table or not.

Each family is planned, runs a round of two and of three clients of unequal ranks, is exported, and the export is
loaded by PEFT. These are the columns:

- *targets*: what `model.targets` may be. `attention` needs linear layers in the attention of a block; `all-linear`
  takes every linear layer of the backbone. *Covered* is their share of the backbone's parameters: kernels of
  convolutions, and experts that a model keeps as one tensor, take no adapter and stay as they are.
- *memory*: whether `plan` predicts the memory of training by a formula. Otherwise `polyrank profile` measures it.
- *padding*: how the texts of a batch are filled up to one length so that none of them notices: on the right, on the
  left, or, where logits depend on how far a text is filled up, every batch to one width.
- *together*: whether several clients can train in one pass of the model, each with its own adapter, and each with the
  result that it gets alone; and by how much the results differ, relatively. At most {together:g} is right. Otherwise
  each client trains alone, which is slower and no less right; the reason is below. `simulation.together: N` is
  refused then.
- *examples*: the same for the gradients of single examples, which `privacy.examples` and importance are made of,
  against one example at a time. At most {examples:g} is right. Otherwise examples are taken one by one.
- *PEFT*: by how much the logits of PEFT's own load of the export differ from polyrank's, relative to the largest.

Where the model itself changes how long texts are, clients that train with `local.dropout` train alone too; *dropout*
says so below.

With {libraries}; {date}.
"""

ROUNDING = (
    "it takes maxima over positions, so a gradient jumps where two are nearly equal: its clients alone differ by as "
    "much when the base's weights change by half a rounding (6e-8)"
)
COLUMNS = ("family", "targets", "covered", "blocks", "memory", "padding", "together", "examples", "PEFT")


def page() -> str:
    """The page."""
    record = json.loads(RECORD.read_text())
    on, rows = record["machine"], record["families"]
    libraries = ", ".join(f"{name} {on[name]}" for name in ("torch", "transformers", "peft"))
    head = HEAD.format(count=len(rows), **record["goals"] | {"libraries": libraries, "date": on["date"]})
    return "\n".join(
        [
            head,
            *(
                line
                for task, title in TASKS.items()
                for line in section(task, title, rows, record["goals"]["together"])
            ),
        ]
    )


def section(task: str, title: str, rows: list[dict[str, Any]], goal: float) -> Iterator[str]:
    """A task's table, with the reasons for what does not hold."""
    own = [row for row in rows if row["task"] == task]
    yield from (f"## {title.capitalize()}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|")
    yield from (f"| {' | '.join(cells(row))} |" for row in own)
    yield from ("", "What is refused, or done one by one, and why:", "")
    yield from (f"- **{row['family']}**, {what}: {shown(why)}" for row in own for what, why in reasons(row, goal))
    yield ""


def cells(row: Mapping[str, Any]) -> Iterator[str]:
    """A family's cells."""
    yield row["family"]
    yield ", ".join(row["targets"]) or "refused"
    if not row["targets"]:
        yield from [""] * 7
        return
    yield f"{row['covered']:.0%}"
    yield str(row["blocks"])
    yield "formula" if row["memory"] else "measured"
    yield row.get("padding") or ""
    if "run" in row["refused"]:
        yield from ["refused"] * 3
        return
    together, examples = row["together"], row["examples"]
    yield "alone" if together is None else size(together)
    yield "refused" if "examples" in row["refused"] else "one by one" if examples is None else size(examples)
    yield "refused" if row["peft"] is None or "export" in row["refused"] else size(row["peft"])


def size(figure: float) -> str:
    return f"{figure:.1e}" if figure else "0"


def reasons(row: Mapping[str, Any], goal: float) -> Iterator[tuple[str, str]]:
    """What a family does not do, and why."""
    refused = row["refused"]
    if not row["targets"]:
        yield "everything", refused["plan all-linear"]
        return
    for targets in ("attention", "all-linear"):
        if f"plan {targets}" in refused:
            yield f"`targets: {targets}`", refused[f"plan {targets}"]
    yield from ((step, why) for step, why in refused.items() if not step.startswith("plan "))
    if "run" in refused:
        return
    if row["apart"]:
        yield "together and examples", row["apart"]
    elif row["apart_dropout"]:
        yield "dropout", row["apart_dropout"]
    elif row["together"] is not None and row["together"] > goal:
        yield "together", ROUNDING
    elif row["together"] is None:
        yield "together", "it has no blocks below its adapter that clients would share, so nothing is gained"
    if row["unused"]:
        yield "adapters", f"{row['unused']} of the {row['layers']} layers do not run as layers, and learn nothing"


def shown(message: str) -> str:
    """A message as Markdown has it."""
    return message.replace("*", r"\*").replace("_", r"\_")


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
