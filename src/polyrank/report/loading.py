"""How an export is loaded where polyrank is not, as the Python that its card shows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from polyrank.data.per_client import options_of, read_manifest
from polyrank.data.prompts import CHAT, prompt_of
from polyrank.data.source import Prompting, Turn
from polyrank.experiment.publishing import Export


@dataclass(frozen=True)
class Task:
    """How models of a kind are used.

    Attributes:
        tag: the hub's name of what they do.
        model, inputs: the classes of Transformers that load the model, and what prepares its inputs.
        imports: more that the example needs.
        example: a call of what prepares inputs, with `mode` for an image's, and `prompt` for a language model's.
        asks: the lines that ask the model, and print what it says; `extra` are arguments of its own.
    """

    tag: str
    model: str
    inputs: str
    imports: tuple[str, ...]
    example: str
    asks: tuple[str, ...]


_CLASSES = (
    "with torch.inference_mode():",
    "    logits = model(**inputs{extra}).logits",
    "print(model.config.id2label[int(logits.argmax())])",
)
_TEXT = (
    "with torch.inference_mode():",
    "    tokens = model.generate(**inputs, max_new_tokens=60, do_sample=False)",
    "print(prepare.decode(tokens[0], skip_special_tokens=True))",
)

TASKS = {
    "text": Task(
        "text-classification",
        "AutoModelForSequenceClassification",
        "AutoTokenizer",
        (),
        'prepare(["A text of yours."], truncation=True, padding=True, return_tensors="pt")',
        _CLASSES,
    ),
    "image": Task(
        "image-classification",
        "AutoModelForImageClassification",
        "AutoImageProcessor",
        ("from PIL import Image",),
        'prepare(Image.new("{mode}", (32, 32)), return_tensors="pt")  # an image of yours',
        _CLASSES,
    ),
    "causal": Task("text-generation", "AutoModelForCausalLM", "AutoTokenizer", (), "{prompt}", _TEXT),
}

_QUESTION = Turn("Name three colours.", "", "")


def loading_code(export: Export, repo: str | None = None) -> str:
    """Python that loads an export and asks it once; it runs as it is with the export's folder as working directory.

    Args:
        export: as it was written.
        repo: the repository to load from, in place of the working directory.
    """
    task, model = TASKS[export.kind], export.experiment.model
    place = json.dumps(repo) if repo else '"."  # this folder, or its name on the hub'
    if export.merged:
        imports = [f"from transformers import {task.inputs}, {task.model}"]
        load = [f"model = {task.model}.from_pretrained(place).eval()"]
    else:
        dtype = "" if model.dtype == "auto" else f', dtype="{model.dtype}"'
        imports = ["from peft import PeftConfig, PeftModel"]
        imports += [f"from transformers import AutoConfig, {task.inputs}, {task.model}"]
        load = [
            "base = PeftConfig.from_pretrained(place).base_model_name_or_path",
            "config = AutoConfig.from_pretrained(place)  # the base's, with these classes",
            f"model = {task.model}.from_pretrained(base, config=config, ignore_mismatched_sizes=True{dtype})",
            "model = PeftModel.from_pretrained(model, place).eval()",
        ]
    resized = export.kind == "image" and model.image_size is not None and not export.merged
    extra = ", interpolate_pos_encoding=True" if resized else ""
    example = task.example.format(mode="L" if export.channels == 1 else "RGB", prompt=_prompted(export))
    lines = [
        "import torch",
        *task.imports,
        *imports,
        "",
        f"place = {place}",
        *load,
        f"prepare = {task.inputs}.from_pretrained(place)",
        "",
        f"inputs = {example}",
        *(line.format(extra=extra) for line in task.asks),
    ]
    return "\n".join(lines) + "\n"


def _prompted(export: Export) -> str:
    """A question as the model was asked in training: by its template, or the beginning of a text."""
    if export.kind != "causal":
        return ""
    data: Any = export.experiment.data
    said = options_of(data.folder, read_manifest(data.folder)) if data.name == "per_client" else data.model_dump()
    template = str(said.get("template", Prompting.template))
    if said.get("instruction", "") is None:
        return 'prepare("The beginning of a text of yours", return_tensors="pt")'
    if template == CHAT:
        asked = f'[{{"role": "user", "content": "{_QUESTION.instruction}"}}]'
        options = 'add_generation_prompt=True, return_tensors="pt", return_dict=True'
        return f"prepare.apply_chat_template({asked}, {options})"
    return f'prepare({json.dumps(prompt_of(template, _QUESTION), ensure_ascii=False)}, return_tensors="pt")'
