"""How instructions become prompts: templates as data files, one JSON each in ``templates/``."""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Literal

from polyrank.data.source import DataError, Prompting, Turn, unknown
from polyrank.files import from_json, read_text

FOLDER = Path(__file__).with_name("templates")
CHAT = "chat"

Template = Literal["alpaca", "alpaca_short", "chat", "plain", "vigogne"] | Path
"""A name in ``templates/``, ``chat``, or a JSON file with ``with_input`` and ``without_input``."""

_FORMS = {"with_input": ("instruction", "input"), "without_input": ("instruction",)}
_FIELD = re.compile(r"\{([A-Za-z_]\w*)\}")


def prompt_of(template: str, turn: Turn) -> str:
    """What stands before the response; nothing before plain text. For any template but ``chat``."""
    if not (turn.instruction or turn.input):
        return ""
    form = _read(template)["with_input" if turn.input else "without_input"]
    # One pass, so that braces in the data stay as they are.
    head, _, tail = form.partition("{instruction}")
    return head.replace("{input}", turn.input) + turn.instruction + tail.replace("{input}", turn.input)


def check_template(template: str) -> None:
    """Refuses a template that is none.

    Raises:
        DataError: naming those there are, or what its file lacks.
    """
    if template != CHAT:
        _read(template)


def form_of(prompting: Prompting) -> str:
    """A fingerprint of what is said and what of it is learnt, whatever the template's file is called."""
    forms = CHAT if prompting.template == CHAT else [_read(prompting.template)[key] for key in _FORMS]
    return hashlib.sha256(json.dumps([forms, prompting.train_on_inputs]).encode()).hexdigest()[:16]


@cache
def _read(template: str) -> dict[str, str]:
    own = FOLDER / f"{template}.json"
    path = own if own.is_file() else Path(template)
    if not path.is_file():
        said = template if path.suffix else path.name
        raise unknown("template", said, [*sorted(p.stem for p in FOLDER.glob("*.json")), CHAT, "a JSON file"])
    try:
        forms: dict[str, str] = from_json(read_text(path))
    except (OSError, ValueError) as error:
        raise DataError(f"data.template: {path}: not JSON: {error}") from None
    for key, fields in _FORMS.items():
        form = forms.get(key) if isinstance(forms, dict) else None
        for field in fields:
            if not isinstance(form, str) or form.count(f"{{{field}}}") != 1:
                raise DataError(f"data.template: {path}: {key} must be a text with {{{field}}} in it, once")
        strange = [field for field in _FIELD.findall(str(form)) if field not in fields]
        if strange:
            valid = " and ".join(f"{{{field}}}" for field in fields)
            raise DataError(
                f"data.template: {path}: {key} names {{{strange[0]}}}, which nothing fills in; its fields are {valid}"
                " (data.instruction and data.input name the columns that do)"
            )
    return forms
