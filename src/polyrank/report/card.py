"""The model card of an export: what a run's folder says of it, and what only who publishes it can say.

A card is a function of the run and the options of the export: no time of day, no machine's path. Its header is what the
hub reads; its code runs as printed, with the export's folder as the working directory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import yaml

from polyrank.data import HUB_NAMES
from polyrank.experiment.catalogue import entries
from polyrank.experiment.export import Export
from polyrank.experiment.planning import BUILT_IN_MODELS
from polyrank.report.terminal import size

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_METRICS = {"accuracy": "accuracy", "loss": "loss", "macro_f1": "macro F1", "mcc": "Matthews correlation"}
_OPEN = "*To be filled in by who publishes this.*"


@dataclass(frozen=True)
class _Task:
    """How a kind of model is used: the classes of Transformers that load it, and an example of an input."""

    tag: str
    model: str
    inputs: str
    imports: str
    example: str


_TASKS = {
    "text": _Task(
        "text-classification",
        "AutoModelForSequenceClassification",
        "AutoTokenizer",
        "",
        'prepare(["A text of yours."], truncation=True, padding=True, return_tensors="pt")',
    ),
    "image": _Task(
        "image-classification",
        "AutoModelForImageClassification",
        "AutoImageProcessor",
        "from PIL import Image\n",
        'prepare(Image.new("{mode}", (32, 32)), return_tensors="pt")  # an image of yours',
    ),
}


def model_card(
    export: Export, *, base: str | None = None, licence: str | None = None, repo: str | None = None
) -> str:
    """The README.md of an export.

    Args:
        export: what is published.
        base: the base's name on the hub, where the run has loaded a copy.
        licence: the hub's name of the licence; None: none is stated.
        repo: the repository that it is uploaded to.
    """
    hub_base = base or _hub_base(export)
    header = {
        **({"base_model": hub_base} if hub_base else {}),
        **({"base_model_relation": "finetune" if export.merged else "adapter"} if hub_base else {}),
        "library_name": "transformers" if export.merged else "peft",
        "pipeline_tag": _TASKS[export.kind].tag,
        **({"license": licence} if licence else {}),
        **({"datasets": [dataset]} if (dataset := _hub_dataset(export)) else {}),
        "metrics": ["accuracy"],
        "tags": ["federated-learning", "lora" if export.info.rank is None else "lokr", "polyrank", *_method_tag(export)],
        **({"model-index": _index(export, dataset)} if export.faithful else {}),
    }
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---",
        f"# {repo.split('/')[-1] if repo else _title(export)}",
        *_opening(export, hub_base),
        "## How to load it",
        *_code(export, repo),
        "## How it was trained",
        *_training(export),
        "## Results",
        *_results(export),
        "## Privacy",
        _privacy(export),
        "## Licence",
        _licence(licence),
        "## Limits and intended use",
        *_limits(export),
        "## Environment",
        _environment(export),
    ]
    return "\n\n".join(parts) + "\n"


def _title(export: Export) -> str:
    return f"{export.summary['method']} on {export.experiment.data.name}"


def _hub_base(export: Export) -> str | None:
    """The base's name, where it is one of the hub's."""
    name = export.experiment.model.name
    return name if _HUB_NAME.fullmatch(name) and name not in BUILT_IN_MODELS else None


def _hub_dataset(export: Export) -> str | None:
    """The data set's name, where it is one of the hub's."""
    data = export.experiment.data
    path = HUB_NAMES.get(data.name) or (str(data.path) if data.name == "hub" else "")
    return path if path.count("/") == 1 and _HUB_NAME.fullmatch(path) else None


def _method_tag(export: Export) -> list[str]:
    return [export.summary["method"]]


def _index(export: Export, dataset: str | None) -> list[dict[str, Any]]:
    """The figures as the hub reads them; of what is exported, and of the round beside it."""
    name, summary = export.experiment.data.name, export.summary
    rounds = {"final round": summary["final"], "round selected on validation": summary["selected"]}
    found = [
        {"type": {"accuracy": "accuracy", "macro_f1": "f1", "mcc": "matthews_correlation"}[key], "value": round(value, 4)}
        | {"name": f"Test {_METRICS[key]}, {which}"}
        for which, of in rounds.items()
        if of
        for key, value in of["test"].items()
        if key in ("accuracy", "macro_f1", "mcc")
    ]
    task = {"type": _TASKS[export.kind].tag}
    result = {"task": task, "dataset": {"name": name, "type": dataset or name, "split": "test"}, "metrics": found}
    return [{"name": _title(export), "results": [result]}]


def _opening(export: Export, hub_base: str | None) -> Iterator[str]:
    base = f"`{hub_base}`" if hub_base else _unpublished(export.experiment.model.name)
    what, cut = "LoKr" if export.info.rank is not None else "LoRA", export.cut
    which = "selected on validation" if export.selected else "final"
    if export.merged:
        yield (
            f"A {export.kind} classifier: {base} with the {which} {what} adapter of a federated run merged into its "
            f"weights ({export.merged}). It needs Transformers and nothing else."
        )
    else:
        yield f"A {what} adapter for {base}, the {which} one of a federated run, in PEFT's format."
    if cut.rank is not None:
        worst, error = cut.worst
        lost = f"at a relative error of {cut.overall:.2e} overall and {error:.2e} in the worst layer, `{worst}`"
        yield f"Every layer is its best approximation of rank at most {cut.rank}" + (f", {lost}." if error else ".")
    classes = list(export.setting["classes"])
    shown = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
    yield f"{len(classes)} classes: {shown}. Their names are in `config.json`."


def _unpublished(name: str) -> str:
    if name in BUILT_IN_MODELS:
        return f"`{name}`, a small model that polyrank trains by itself"
    if name.startswith("package:"):
        return f"`{name.removeprefix('package:')}`, a folder of an installed Python package"
    return f"`{name.rstrip('/').rpartition('/')[2]}`, a folder on the machine of the run"


def _code(export: Export, repo: str | None) -> Iterator[str]:
    task, model = _TASKS[export.kind], export.experiment.model
    place = f'"{repo}"' if repo else '"."  # this folder, or its name on the hub'
    mode = "L" if export.channels == 1 else "RGB"
    resized = export.kind == "image" and model.image_size is not None and not export.merged
    call = "model(**inputs, interpolate_pos_encoding=True)" if resized else "model(**inputs)"
    dtype = "" if model.dtype == "auto" else f', dtype="{model.dtype}"'
    if export.merged:
        imports, load = f"from transformers import {task.inputs}, {task.model}", f"model = {task.model}.from_pretrained(place).eval()"
    else:
        imports = f"from peft import PeftConfig, PeftModel\nfrom transformers import AutoConfig, {task.inputs}, {task.model}"
        load = (
            "base = PeftConfig.from_pretrained(place).base_model_name_or_path\n"
            "config = AutoConfig.from_pretrained(place)  # the base's, with these classes\n"
            f"model = {task.model}.from_pretrained(base, config=config, ignore_mismatched_sizes=True{dtype})\n"
            "model = PeftModel.from_pretrained(model, place).eval()"
        )
    code = (
        f"import torch\n{task.imports}{imports}\n\nplace = {place}\n{load}\n"
        f"prepare = {task.inputs}.from_pretrained(place)\n\n"
        f"inputs = {task.example.format(mode=mode)}\n"
        f"with torch.inference_mode():\n    logits = {call}.logits\n"
        "print(model.config.id2label[int(logits.argmax())])"
    )
    yield f"```python\n{code}\n```"
    if export.kind == "text":
        yield f"Texts are cut at {model.max_length} tokens, as in training."
    else:
        yield "Whole images are resized, bilinear, and normalised as in training."


def _training(export: Export) -> Iterator[str]:
    e, setting, summary = export.experiment, export.setting, export.summary
    method = next((m for m in entries("methods") if m["name"] == summary["method"]), None)
    said = f"{method['description'].rstrip('.')}. Reference: {method['reference']}" if method else "no federation"
    local, members = e.local, setting.get("members")
    split = ", ".join(f"{k}: {v}" for k, v in e.data.partition.model_dump(exclude_none=True).items() if k != "name")
    sizes = sorted(member["examples"] for member in (members or {}).values())
    spread = f"; {sizes[0]} to {sizes[-1]} examples a client, median {median(sizes):g}" if sizes else ""
    passes = f"{local.steps} steps" if local.steps else f"{local.epochs} epoch{'s' * (local.epochs != 1)}"
    ranks = sorted({x.rank for x in export.adapter.layers.values()})
    held = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "LoKr"
    yield _table(
        ("", ""),
        [
            ("data", f"{e.data.name}, {e.data.partition.name}" + (f" ({split})" if split else "") + spread),
            ("clients", f"{setting['clients']}, {_cohort(e.cohort)} a round"),
            ("method", f"`{summary['method']}`: {said}"),
            ("rounds", f"{summary['rounds']}, {passes} of batches of {local.batch} each, {local.optimizer} at {local.lr:g}"),
            ("seed", str(summary["seed"])),
            ("adapter", f"{held} on {len(setting['modules'])} modules"),
            ("traffic", f"{size(summary['bytes_up'])} up, {size(summary['bytes_down'])} down, all rounds and clients"),
        ],
    )
    yield "Clients by what they can afford:"
    yield _table(
        ("group", "clients", "rank per module", "limited by"),
        [(g["name"], str(g["clients"]), str(g["rank"]), g["limit"]) for g in setting["groups"]],
    )


def _cohort(cohort: int | None) -> str:
    return "all of them" if cohort is None else str(cohort)


def _results(export: Export) -> Iterator[str]:
    summary = export.summary
    final, selected = summary["final"], summary["selected"]
    rows = [("before", summary["before"]["test"]), (f"final, round {final['round'] + 1}", final["test"])]
    if selected:
        rows.append((f"selected on validation, round {selected['round'] + 1}", selected["test"]))
    names = {"single": "baseline: one adapter on the pooled data", "local": "baseline: best client alone"}
    baselines = {name: found["test"] for name, found in summary.get("baselines", {}).items() if "test" in found}
    rows += [(names.get(name, f"baseline: {name}"), found) for name, found in baselines.items()]
    columns = [key for key in _METRICS if key in final["test"]]
    which = "selected" if export.selected else "final"
    yield f"On the test split, which was read once, at the end. This is the {which} one."
    shown = [(name, *(f"{found[key]:.4f}" if key in found else "" for key in columns)) for name, found in rows]
    yield _table(("", *(_METRICS[key] for key in columns)), shown)
    if not export.faithful:
        why = f"weights in {export.merged}" if export.merged not in (None, "float32") else "compression"
        yield f"These figures are the run's own; {why} may have changed them, and what is here was not evaluated again."


def _privacy(export: Export) -> str:
    promised = export.summary.get("privacy")
    if not promised:
        return "No differential privacy was promised: an adapter can give away what it was trained on."
    each = (f"epsilon {p['epsilon']:.3g} at delta {p['delta']:g} for {whom}" for whom, p in promised.items())
    return f"Differentially private: {'; '.join(each)}. Choices made on validation or test data are not part of it."


def _licence(licence: str | None) -> str:
    stated = f"This work: `{licence}`." if licence else f"This work: not stated. {_OPEN}"
    return f"{stated} The base model and the training data have licences of their own, which the run does not know. {_OPEN}"


def _limits(export: Export) -> Iterator[str]:
    yield (
        f"It knows the {len(export.setting['classes'])} classes above and gives one of them to any input. It was measured "
        "on the test split of its own data set only: other sources, languages or cameras were not tried, nor was any harm "
        "that its mistakes could do."
    )
    yield f"Intended use, use that is out of scope, and known biases of the data: {_OPEN}"


def _environment(export: Export) -> str:
    found: Mapping[str, Any] = export.summary["environment"]
    return _table(("", ""), [(name, str(value)) for name, value in found.items() if value is not None])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])
