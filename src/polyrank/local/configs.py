"""A model's config: read, told what kind of model it is of, and asked for sizes, wherever it keeps them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from polyrank.errors import InputError, shortened
from polyrank.files import from_json

AUTO = {
    "text": "AutoModelForSequenceClassification",
    "image": "AutoModelForImageClassification",
    "causal": "AutoModelForCausalLM",
}
WHAT = {"text": "text classifier", "image": "image classifier", "causal": "causal language model"}
_COUNTS, _MOST_PARTS = re.compile(r"(layers?|depths?|blocks|experts)$"), 10_000
_LONGEST = 300  # characters of a library's message


class ModelError(InputError):
    """A model cannot be found, loaded, or used for the task."""


def check_kind(config: Any, kind: str, shown: str) -> None:
    """Refuses a model that Transformers does not have as this kind, with the kinds that it has.

    Args:
        config: the model's.
        kind: ``text``, ``image`` or ``causal``.
        shown: the model's name, for the message.

    Raises:
        ModelError: naming the model's type and class.
    """
    has = [WHAT[other] for other, auto in AUTO.items() if type(config) in getattr(transformers, auto)._model_mapping]
    if WHAT[kind] in has:
        return
    known = f"Transformers has it as {' and '.join(map(a, has))}" if has else "it is none of what polyrank trains"
    raise ModelError(
        f"model.name: {shown} is a {config.model_type} model ({type(config).__name__}) and cannot be loaded as "
        f"{a(WHAT[kind])}, which the data ask for: {known} (text classifiers, image classifiers, causal language "
        "models)"
    )


def check_counts(plain: Mapping[str, Any], shown: str, within: str = "") -> None:
    """Refuses a config of more layers or experts than any model has: they would be built one by one, for ever.

    Raises:
        ModelError: naming the key.
    """
    for name, value in plain.items():
        if isinstance(value, dict):
            check_counts(value, shown, f"{within}{name}.")
        elif _COUNTS.search(str(name)):
            for count in value if isinstance(value, list | tuple) else [value]:
                if isinstance(count, int) and count > _MOST_PARTS:
                    raise ModelError(
                        f"model.name: {shown}: its config.json has {within}{name}: {shortened(value)}, more than "
                        f"{_MOST_PARTS:,}"
                    )


def first_line(error: Exception) -> str:
    """What an error of the library says, without the lists that may follow."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = next(iter(lines), type(error).__name__)
    for listing in (", or contain one of", "Model type should be one of"):
        first = first.partition(listing)[0]
    return first[:_LONGEST].removesuffix(".")


def senses(config: Any) -> list[Any]:
    """The config, and after it that of its images where the model has one: where sizes of images may stand."""
    return [config, *(part for part in [getattr(config, "vision_config", None)] if part is not None)]


def channels(config: Any) -> int:
    """Channels of the model's images."""
    return next((int(n) for c in senses(config) if isinstance(n := getattr(c, "num_channels", None), int)), 3)


def image_size(config: Any) -> int | None:
    """Pixels per side of the model's images; None where its config does not say.

    Raises:
        ModelError: if they are not square.
    """
    for part in senses(config):
        size = getattr(part, "image_size", None)
        if isinstance(size, list | tuple) and size:
            if len(set(size)) > 1:
                shown = " x ".join(map(str, size))
                raise ModelError(
                    f"model.image_size: {config.model_type} takes images of {shown}, and polyrank makes square ones; "
                    "name a model of square images"
                )
            size = size[0]
        if isinstance(size, int):
            return size
    return None


def vocabulary(config: Any) -> int:
    """How many tokens a model of texts knows."""
    text = config.get_text_config()
    return int(getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None) or 256)


def numbers(config: Any, name: str) -> list[int]:
    """Whole numbers that a model of texts states under a name: one, several, or none."""
    stated = getattr(config, name, None)
    stated = getattr(config.get_text_config(), name, None) if stated is None else stated
    return [x for x in (stated if isinstance(stated, list | tuple) else [stated]) if isinstance(x, int)]


def a(what: str) -> str:
    """The word with its article."""
    return f"an {what}" if what[0] in "aeiou" else f"a {what}"


def reason_of(name: str, error: Exception) -> str:
    """Why the library could not make a config of what is in a model's folder.

    Args:
        name: hub name or folder.
        error: what it said, with all the model types that it does know.
    """
    try:
        stated = from_json((Path(name) / "config.json").read_text(encoding="utf-8"))
        kind, code = stated.get("model_type"), stated.get("auto_map")
    except (OSError, ValueError, AttributeError):
        return first_line(error)
    version = f"Transformers {transformers.__version__}"
    if not isinstance(kind, str | None):
        return f"model_type in its config.json is {shortened(kind)}, not a name"
    if kind in transformers.CONFIG_MAPPING:
        return first_line(error)
    if code:
        return f"it needs Python code of its own (auto_map), which polyrank never runs; {version} has no {kind!r}"
    if kind is None:
        return "its config.json has no model_type"
    return f"{version} does not know its model_type, {kind!r}; a newer version may (pip install -U transformers)"
