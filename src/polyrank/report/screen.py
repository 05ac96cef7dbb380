"""The terminal: text is printed as text, whoever chose it.

Names of clients, labels, folders and models, and what other programs and models say, come from users. On a `Screen`
none of it is markup, an emoji code or a terminal's command; colours are given as styles, with `rich.text.Text`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from polyrank.report.text import one_line, visible


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
