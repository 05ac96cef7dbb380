"""The terminal: text is printed as text, whoever chose it.

Names of clients, labels, folders and models, and what other programs and models say, come from users. On a `Screen`
none of it is markup, an emoji code or a terminal's command; colours are given as styles, with `rich.text.Text`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

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
    return _INVISIBLE.sub(lambda found: _escape(found[0]), text)


def one_line(text: str) -> str:
    r"""`visible` text on one line.

    >>> one_line("two\nlines")
    'two\\nlines'
    """
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def _escape(sign: str) -> str:
    return {"\r": "\\r"}.get(sign, f"\\x{ord(sign):02x}" if ord(sign) < 256 else f"\\u{ord(sign):04x}")


class Screen(Console):
    """A console that prints every text as it is, and shows what would act on the terminal as its escape."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """A string as text of a width that is known."""
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Whatever is printed, also a `Text` that was made elsewhere."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))

    def say(self, text: str, style: str = "") -> None:
        """One line, however long, and whatever is in it."""
        self.print(Text(one_line(text), style), soft_wrap=True)

    def error(self, message: str, before: str = "") -> None:
        """A message with "error:" in front of it; further lines of it are set in, so that none looks like another.

        Args:
            message: of one line or several.
            before: what comes first on the line.
        """
        first, *more = message.strip("\n").split("\n")
        text = Text.assemble(one_line(before), ("error:", "red"), " ", one_line(first))
        self.print(text, *(f"  {one_line(line)}" for line in more), sep="\n", soft_wrap=True)


class Rows(Table):
    """A table without lines: a row of strings is a line of text, whatever is in it."""

    def __init__(self, *, gap: int = 2, **options: Any) -> None:
        super().__init__(box=None, padding=(0, gap, 0, 0), **options)

    def add_column(self, header: RenderableType = "", *arguments: Any, **options: Any) -> None:
        """A column under its title."""
        super().add_column(_cell(header), *arguments, **options)

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """A row of strings, or of `Text` with a style."""
        super().add_row(*map(_cell, cells), **options)


def _cell(value: Any) -> Any:
    return one_line(value) if isinstance(value, str) else value
