"""Text from elsewhere, made fit to be shown: what a client, a server or a user wrote is never a terminal's command."""

from __future__ import annotations

import re

REASON = 500
"""Most signs of what somebody else gives as a reason."""

_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, but tabs and line feeds
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # what turns the direction of the text around
    "\u2028\u2029\ufeff\ud800-\udfff]"  # separators, byte-order marks, and bytes of a path that are no UTF-8
)


def visible(text: str) -> str:
    r"""Text in which what would act on a terminal, or turn text around, stands as its escape.

    >>> visible("ward\x1b[31m")
    'ward\\x1b[31m'
    """
    return _INVISIBLE.sub(lambda sign: _escape(sign[0]), text)


def one_line(text: str, most: int | None = None) -> str:
    r"""`visible` text on one line, of at most `most` signs.

    >>> one_line("two\nlines")
    'two\\nlines'
    >>> one_line("a long reason", most=9)
    'a long...'
    """
    plain = visible(text).replace("\n", "\\n").replace("\t", "\\t")
    return plain if most is None or len(plain) <= most else plain[: most - 3] + "..."


def _escape(sign: str) -> str:
    return {"\r": "\\r"}.get(sign, f"\\x{ord(sign):02x}" if ord(sign) < 256 else f"\\u{ord(sign):04x}")
