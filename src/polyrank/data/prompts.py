"""How instructions become prompts: templates as data files, one JSON each in ``templates/``."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from polyrank.data.source import DataError, Turn, unknown

FOLDER = Path(__file__).with_name("templates")
CHAT = "chat"


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


@cache
def _read(template: str) -> dict[str, str]:
    own = FOLDER / f"{template}.json"
    path = own if own.is_file() else Path(template)
    if not path.is_file():
        raise unknown("template", template, [*sorted(p.stem for p in FOLDER.glob("*.json")), CHAT, "a JSON file"])
    try:
        forms: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"data.template: {path}: not JSON: {error}") from None
    for key, words in (("with_input", ("{instruction}", "{input}")), ("without_input", ("{instruction}",))):
        form = forms.get(key) if isinstance(forms, dict) else None
        missing = [word for word in words if not isinstance(form, str) or form.count(word) != 1]
        if missing:
            raise DataError(f"data.template: {path}: {key} must be a text with {missing[0]} in it, once")
    return forms
