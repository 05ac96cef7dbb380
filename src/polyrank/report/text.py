"""Text that users chose, as other languages have it: in a terminal, on a page, in Markdown, in LaTeX."""

from __future__ import annotations

import re
from html import escape

from polyrank.text import one_line as one_line
from polyrank.text import visible as visible

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
