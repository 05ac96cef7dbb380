"""Text that users chose, as other languages have it: in a terminal, on a page, in Markdown, in LaTeX."""

from __future__ import annotations

import re
from html import escape

_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, but tabs and line feeds
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # what turns the direction of the text around
    "\u2028\u2029\ufeff\ud800-\udfff]"  # separators, byte-order marks, and bytes of a path that are no UTF-8
)
_MARKDOWN = re.compile(r"[\\`*\[\]|]|(?<!\w)_|_(?!\w)")
_ENTITY = re.compile(r"[<>&~$]")  # no Markdown takes these for more than a letter
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "·": r"$\cdot$",
}
_LATEX |= {sign: f"\\{sign}" for sign in "&%$#_{}"}


def visible(text: str) -> str:
    r"""Text in which what would act on a terminal, or turn text around, stands as its escape.

    >>> visible("ward\x1b[31m")
    'ward\\x1b[31m'
    """
    return _INVISIBLE.sub(lambda sign: _escape(sign[0]), text)


def one_line(text: str) -> str:
    r"""`visible` text on one line.

    >>> one_line("two\nlines")
    'two\\nlines'
    """
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def _escape(sign: str) -> str:
    return {"\r": "\\r"}.get(sign, f"\\x{ord(sign):02x}" if ord(sign) < 256 else f"\\u{ord(sign):04x}")


def markdown(text: str) -> str:
    r"""Text that Markdown shows as it is, also in a table's cell.

    >>> markdown("a|b_c *d*")
    'a\\|b_c \\*d\\*'
    """
    escaped = _MARKDOWN.sub(lambda sign: "\\" + sign[0], one_line(text))
    return _ENTITY.sub(lambda sign: f"&#{ord(sign[0])};", escaped)


def code(text: str) -> str:
    """Text as a span of code in Markdown.

    >>> code("a`b")
    '`` a`b ``'
    """
    plain = one_line(text)
    fence = "`" * (max(map(len, re.findall("`+", plain)), default=0) + 1)
    return f"{fence} {plain} {fence}" if "`" in plain else f"{fence}{plain}{fence}"


def in_figure(text: str) -> str:
    """Text as matplotlib draws it where it reads no formulas; it leaves names that begin with "_" out of legends."""
    plain = one_line(text)
    return f" {plain}" if plain.startswith("_") else plain


def latex(text: str) -> str:
    r"""Text that LaTeX prints as it is.

    >>> latex("a_b & 5%")
    'a\\_b \\& 5\\%'
    """
    return "".join(_LATEX.get(sign, sign) for sign in one_line(text))


def label(text: str) -> str:
    """Text that Plotly shows as it is: it reads tags, and fills in fields.

    >>> label("<b> %{x}")
    '&lt;b&gt; %&#123;x}'
    """
    return escape(visible(text), quote=False).replace("%{", "%&#123;")
