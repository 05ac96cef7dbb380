"""How an export is loaded where polyrank is not, as the Python that its card shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from polyrank.data.prompts import CHAT, prompt_of
from polyrank.data.source import Turn
from polyrank.experiment.publishing import Export


@dataclass(frozen=True)
class Task:
    """How models of a kind are used.

    Attributes:
        tag: the hub's name of what they do.
        model, inputs: the classes of Transformers that load the model, and what prepares its inputs.
        imports: more that the example needs.
        example: a call of what prepares inputs, with `mode` for an image's.
    """

    tag: str
    model: str
    inputs: str
    imports: tuple[str, ...]
    example: str


TASKS = {
    "text": Task(
        "text-classification",
        "AutoModelForSequenceClassification",
        "AutoTokenizer",
        (),
        'prepare(["A text of yours."], truncation=True, padding=True, return_tensors="pt")',
    ),
    "causal": Task("text-generation", "AutoModelForCausalLM", "AutoTokenizer", (), ""),
    "image": Task(
        "image-classification",
        "AutoModelForImageClassification",
        "AutoImageProcessor",
        ("from PIL import Image",),
        'prepare(Image.new("{mode}", (32, 32)), return_tensors="pt")  # an image of yours',
    ),
}


def loading_code(export: Export, repo: str | None = None) -> str:
    """Python that loads an export and asks it once; it runs as it is with the export's folder as working directory.

    Args:
        export: as it was written.
        repo: the repository to load from, in place of the working directory.
    """
    task, model = TASKS[export.kind], export.experiment.model
    place = f'"{repo}"' if repo else '"."  # this folder, or its name on the hub'
    if export.merged:
        imports = [f"from transformers import {task.inputs}, {task.model}"]
        load = [f"model = {task.model}.from_pretrained(place).eval()"]
    else:
        dtype = "" if model.dtype == "auto" else f', dtype="{model.dtype}"'
        imports = ["from peft import PeftConfig, PeftModel"]
        classifies = export.kind != "causal"
        names = [*(["AutoConfig"] if classifies else []), task.inputs, task.model]
        imports += [f"from transformers import {', '.join(sorted(names))}"]
        own = ", config=config, ignore_mismatched_sizes=True" if classifies else ""
        load = [
            "base = PeftConfig.from_pretrained(place).base_model_name_or_path",
            *(["config = AutoConfig.from_pretrained(place)  # the base's, with these classes"] if classifies else []),
            f"model = {task.model}.from_pretrained(base{own}{dtype})",
            "model = PeftModel.from_pretrained(model, place).eval()",
        ]
    if export.kind == "causal":
        return "\n".join(["import torch", *imports, "", f"place = {place}", *load, *_generating(export)]) + "\n"
    resized = export.kind == "image" and model.image_size is not None and not export.merged
    lines = [
        "import torch",
        *task.imports,
        *imports,
        "",
        f"place = {place}",
        *load,
        f"prepare = {task.inputs}.from_pretrained(place)",
        "",
        f"inputs = {task.example.format(mode='L' if export.channels == 1 else 'RGB')}",
        "with torch.inference_mode():",
        f"    logits = model(**inputs{', interpolate_pos_encoding=True' if resized else ''}).logits",
        "print(model.config.id2label[int(logits.argmax())])",
    ]
    return "\n".join(lines) + "\n"


def _generating(export: Export) -> list[str]:
    """Lines that let a language model answer, with the prompt that it was trained with."""
    data: Any = export.experiment.data
    template, plain = getattr(data, "template", None), getattr(data, "instruction", "") is None
    known = template not in (None, CHAT) and not plain
    prompt = prompt_of(template, Turn("An instruction of yours.", "", "")) if known else "A text of yours."
    first = [f"prompt = {prompt!r}"]
    if template == CHAT and not plain:
        first = [
            'asked = [{"role": "user", "content": "An instruction of yours."}]',
            "prompt = prepare.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)",
        ]
    return [
        "prepare = AutoTokenizer.from_pretrained(place)",
        "",
        *first,
        f'ids = prepare(prompt, add_special_tokens={template != CHAT or plain}, return_tensors="pt")["input_ids"]',
        "with torch.inference_mode():",
        "    answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=40)",
        "print(prepare.decode(answer[0, ids.shape[1] :], skip_special_tokens=True))",
    ]
