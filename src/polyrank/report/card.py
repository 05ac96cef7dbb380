"""The model card of an export: what a run's folder says of it, and what only who publishes it can say.

A card is a function of the run and the options of the export: no time of day, no machine's path. Its header is what the
hub reads; its code runs as printed, with the export's folder as the working directory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import yaml

from polyrank.data import HUB_NAMES
from polyrank.experiment.catalogue import entries
from polyrank.experiment.planning import BUILT_IN_MODELS
from polyrank.experiment.publishing import Export
from polyrank.report.loading import TASKS, loading_code
from polyrank.report.terminal import size
from polyrank.report.text import code, markdown

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_METRICS = {
    "accuracy": "accuracy",
    "loss": "loss",
    "perplexity": "perplexity",
    "macro_f1": "macro F1",
    "mcc": "Matthews correlation",
}
_ASKED = {
    "choices": {"accuracy": "multiple choice", "accuracy_norm": "by character", "chance": "guessing"},
    "generate": {"exact_match": "exact match", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"},
}
_MODELS = {"text": "text classifier", "image": "image classifier", "causal": "causal language model"}
_HUB_METRICS = {"accuracy": "accuracy", "macro_f1": "f1", "mcc": "matthews_correlation", "perplexity": "perplexity"}
_OPEN = "*To be filled in by who publishes this.*"


def model_card(export: Export, *, base: str | None = None, licence: str | None = None, repo: str | None = None) -> str:
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
        "pipeline_tag": TASKS[export.kind].tag,
        **({"license": licence} if licence else {}),
        **({"datasets": [dataset]} if (dataset := _hub_dataset(export)) else {}),
        "metrics": ["perplexity" if export.kind == "causal" else "accuracy"],
        "tags": ["federated-learning", "polyrank", _form(export).lower(), export.summary["method"]],
        **({"model-index": _index(export, dataset)} if export.faithful else {}),
    }
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---",
        f"# {markdown(repo.split('/')[-1] if repo else _title(export))}",
        *_opening(export, hub_base),
        "## How to load it",
        f"```python\n{loading_code(export, repo)}```",
        _prepared(export),
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
    return f"{export.summary['method']} on {export.setting['data']}"


def _hub_base(export: Export) -> str | None:
    """The base's name, where it is one of the hub's."""
    name = export.experiment.model.name
    return name if _HUB_NAME.fullmatch(name) and name not in BUILT_IN_MODELS else None


def _hub_dataset(export: Export) -> str | None:
    """The data set's name, where it is one of the hub's."""
    data: Any = export.experiment.data
    path = HUB_NAMES.get(data.name) or (str(data.path) if data.name in ("hub", "hub_instructions") else "")
    return path if path.count("/") == 1 and _HUB_NAME.fullmatch(path) else None


def _form(export: Export) -> str:
    return "LoRA" if export.info.rank is None else "LoKr"


def _index(export: Export, dataset: str | None) -> list[dict[str, Any]]:
    """The figures as the hub reads them; of what is exported, and of the round beside it."""
    name, summary = export.setting["data"], export.summary
    rounds = {"final round": summary["final"], "round selected on validation": summary["selected"]}
    found = [
        {"type": kind, "value": round(of["test"][key], 4), "name": f"Test {_METRICS[key]}, {which}"}
        for which, of in rounds.items()
        for key, kind in _HUB_METRICS.items()
        if of and key in of["test"]
    ]
    task = {"type": TASKS[export.kind].tag}
    result = {"task": task, "dataset": {"name": name, "type": dataset or name, "split": "test"}, "metrics": found}
    return [{"name": _title(export), "results": [result]}]


def _opening(export: Export, hub_base: str | None) -> Iterator[str]:
    base = code(hub_base) if hub_base else _unpublished(export.experiment.model.name)
    what, cut = _form(export), export.cut
    which = "selected on validation" if export.selected else "final"
    regime = export.experiment.regime
    run = "federated run" if regime == "federated" else f"{code(regime)} run, which is none of a federation"
    if export.merged:
        yield (
            f"A {_MODELS[export.kind]}: {base} with the {which} {what} adapter of a {run} merged into its "
            f"weights ({export.merged}). It needs Transformers and nothing else."
        )
    else:
        yield f"A {what} adapter for {base}, the {which} one of a {run}, in PEFT's format."
    if cut.rank is not None:
        worst, error = cut.worst
        lost = f"at a relative error of {cut.overall:.2e} overall and {error:.2e} in the worst layer, {code(worst)}"
        yield f"Every layer is its best approximation of rank at most {cut.rank}" + (f", {lost}." if error else ".")
    if export.kind == "causal":
        yield "It goes on with texts; losses and accuracy below are per token."
        return
    classes = list(export.setting["classes"])
    shown = ", ".join(map(markdown, classes[:20])) + (", ..." if len(classes) > 20 else "")
    yield f"{len(classes)} classes: {shown}. Their names are in `config.json`."


def _unpublished(name: str) -> str:
    if name in BUILT_IN_MODELS:
        return f"{code(name)}, a small model that polyrank trains by itself"
    if name.startswith("package:"):
        return f"{code(name.removeprefix('package:'))}, a folder of an installed Python package"
    return f"{code(name.rstrip('/').rpartition('/')[2])}, a folder on the machine of the run"


def _prepared(export: Export) -> str:
    if export.kind == "causal":
        data: Any = export.experiment.data
        how = "Texts as they are" if data.instruction is None else f"Prompts by the template {code(str(data.template))}"
        return f"{how}, cut at {export.experiment.model.max_length} tokens in training."
    if export.kind == "text":
        return f"Texts are cut at {export.experiment.model.max_length} tokens, as in training."
    grey = " They are grey, of mode L: pipelines, which make them RGB, do not fit." if export.channels == 1 else ""
    return f"Whole images are resized, bilinear, and normalised as in training.{grey}"


def _training(export: Export) -> Iterator[str]:
    setting, summary = export.setting, export.summary
    e: Any = export.experiment  # its sections are made at run time
    local = e.local
    passes = f"{local.steps} steps" if local.steps else f"{local.epochs} epoch{'s' * (local.epochs != 1)}"
    ranks = sorted({x.rank for x in export.adapter.layers.values()})
    held = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "LoKr"
    yield _table(
        ("", ""),
        [
            ("data", markdown(f"{setting['data']}, {_split(export)}")),
            ("clients", f"{setting['clients']}, {e.cohort or 'all of them'} a round"),
            ("method", _method(summary["method"])),
            ("rounds", f"{summary['rounds']}, in each {passes} of batches of {local.batch}"),
            ("optimizer", f"{local.optimizer}, learning rate {local.lr:g}, {local.schedule}"),
            ("seed", str(summary["seed"])),
            ("adapter", f"{held} on {len(setting['modules'])} modules"),
            ("traffic", f"{size(summary['bytes_up'])} up, {size(summary['bytes_down'])} down, all rounds and clients"),
        ],
    )
    yield "Clients by what they can afford:"
    yield _table(
        ("group", "clients", "rank per module", "limited by"),
        [(markdown(g["name"]), str(g["clients"]), str(g["rank"]), g["limit"]) for g in setting["groups"]],
    )


def _method(name: str) -> str:
    """What was run, in a line, with the paper it is from; nothing more for what is run in place of a federation."""
    found = next((entry for entry in entries("methods") if entry["name"] == name), None)
    if found is None:
        return code(name)
    said = found["description"].rstrip(".")
    return f"{code(name)}: {said}" + ("" if found["reference"] in said else f". Reference: {found['reference']}")


def _split(export: Export) -> str:
    """How the data was shared, and what that gave each client."""
    data: Any = export.experiment.data
    options = data.partition.model_dump(exclude_none=True)
    name, said = str(options.pop("name")), ", ".join(f"{key}: {value}" for key, value in options.items())
    sizes = sorted(member["examples"] for member in (export.setting["members"] or {}).values())
    spread = f"; {sizes[0]} to {sizes[-1]} examples a client, median {median(sizes):g}" if sizes else ""
    return name + (f" ({said})" if said else "") + spread


def _results(export: Export) -> Iterator[str]:
    summary = export.summary
    final, selected = summary["final"], summary["selected"]
    rows = [("before", summary["before"]["test"]), (f"final, after {summary['rounds']} rounds", final["test"])]
    if selected:
        rows.append((f"selected on validation, after {selected['round'] + 1} rounds", selected["test"]))
    names = {"single": "baseline: one adapter on the pooled data", "local": "baseline: best client alone"}
    baselines = {name: found["test"] for name, found in summary.get("baselines", {}).items() if "test" in found}
    rows += [(names.get(name, f"baseline: {name}"), found) for name, found in baselines.items()]
    alone = summary.get("baselines", {}).get("local", {})
    if "mean_accuracy" in alone:
        rows.append(("baseline: mean of clients alone", alone.get("mean", {"accuracy": alone["mean_accuracy"]})))
    columns = [key for key in _METRICS if key in final["test"]]
    which = "selected" if export.selected else "final"
    yield f"On the test split, which was read once, at the end. This is the {which} one."
    shown = [(name, *(f"{found[key]:.4f}" if key in found else "" for key in columns)) for name, found in rows]
    yield _table(("", *(_METRICS[key] for key in columns)), shown)
    yield from _asked(summary)
    if not export.faithful:
        why = "compression" if export.cut.overall else f"weights in {export.merged}"
        yield f"These figures are the run's own; {why} may have changed them, and what is here was not evaluated again."


def _asked(summary: Mapping[str, Any]) -> Iterator[str]:
    """What a language model was asked besides. Its answers stay in the run: prompts may be private."""
    parts = {"before": summary["before"], "final": summary["final"], "selected on validation": summary["selected"]}
    for part, names in _ASKED.items():
        told = {name: own[part] for name, own in parts.items() if own and part in own}
        if not told:
            continue
        columns = [key for key in names if key in told["final"]]
        what = "Text that it generates, against references of the test split:"
        if part == "choices":
            what = f"{told['final']['questions']} questions with choices, by which answer it finds most likely:"
        yield what
        rows = [(name, *(f"{found[key]:.4f}" for key in columns)) for name, found in told.items()]
        yield _table(("", *(names[key] for key in columns)), rows)


def _privacy(export: Export) -> str:
    promised = export.summary.get("privacy")
    if not promised:
        return "No differential privacy was promised: an adapter can give away what it was trained on."
    each = (f"epsilon {p['epsilon']:.3g} at delta {p['delta']:g} for {whom}" for whom, p in promised.items())
    return f"Differentially private: {'; '.join(each)}. Choices made on validation or test data are not part of it."


def _licence(licence: str | None) -> str:
    stated = f"This work: {code(licence)}." if licence else f"This work: not stated. {_OPEN}"
    others = "The base model and the training data have licences of their own, which the run does not know."
    return f"{stated} {others} {_OPEN}"


def _limits(export: Export) -> Iterator[str]:
    if export.kind == "causal":
        yield (
            "It may say what is false or harmful, as its base may. It was measured on the test split of its own data "
            "only, by the loss per token."
        )
        yield f"Intended use, use that is out of scope, and known biases of the data: {_OPEN}"
        return
    yield (
        f"It knows the {len(export.setting['classes'])} classes above and gives one of them to any input. It was "
        "measured on the test split of its own data set only: other sources, languages or cameras were not tried, nor "
        "was any harm that its mistakes could do."
    )
    yield f"Intended use, use that is out of scope, and known biases of the data: {_OPEN}"


def _environment(export: Export) -> str:
    found: Mapping[str, Any] = export.summary["environment"]
    return _table(("", ""), [(name, markdown(str(value))) for name, value in found.items() if value is not None])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in cells) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])
