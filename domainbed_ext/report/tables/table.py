"""A table as a grid of strings, and the forms it takes: terminal, Markdown and CSV; `latex` has its LaTeX.

`columns` makes the tables of methods, `paper` those beside the numbers of Zhu et al. (2024). The HTML page has its own
template of them.
"""

import csv
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

MISSING = "X"
NOT_RECORDED = "-"
NEGATIVE = re.compile(r"(?<![\w-])-(?=\d)")  # a sign, not a hyphen

Cell = tuple[int, int]
"""A row and a column, from 0."""

Shown = Literal["open", "folded", "files"]
"""How the page shows a table: open, in a fold that a click opens, or not at all, for it is in the files alone."""


class Origin(NamedTuple):
    """A record that a cell comes from: its run's folder and its step."""

    run: str
    step: int


@dataclass
class Table:
    """A grid of strings.

    Attributes:
        title: What the table shows.
        columns: Heads of the columns.
        rows: Rows of as many strings as there are columns; without rows, title and caption stand alone.
        caption: What the columns are, and what keeps the figures from meaning what they seem to.
        best: Cells to set in bold.
        second: Cells to underline in LaTeX.
        origins: Records that a cell's number comes from.
        texts: Number of columns, from the left, that are words and not figures.
        algorithms: Id of each row's method; empty where rows are of something else than one method each.
        lacks: What the runs of each of `algorithms` lack; empty if nothing.
        breaks: Rows that begin a group, and are set apart from those above.
        near: Cells within one standard error of the best of their column.
        errors: Errors that DomainBed's form of a cell leaves out, which the page and LaTeX show.
        dataset: Name of the data set whose environments the heads name; empty if of none or several.
        shown: How the page shows the table.
        group: Number of rows that belong together when the page sorts, from the first.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    caption: str
    best: set[Cell] = field(default_factory=set)
    second: set[Cell] = field(default_factory=set)
    origins: dict[Cell, list[Origin]] = field(default_factory=dict)
    texts: int = 1
    algorithms: list[str] = field(default_factory=list)
    lacks: list[str] = field(default_factory=list)
    breaks: set[int] = field(default_factory=set)
    near: set[Cell] = field(default_factory=set)
    errors: dict[Cell, str] = field(default_factory=dict)
    dataset: str = ""
    shown: Shown = "open"
    group: int = 1

    def to_rich(self) -> RichTable:
        """For the terminal, without title and caption, which rich would wrap to the width of the grid."""
        grid = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for number, column in enumerate(self.columns):
            grid.add_column(Text(column), justify="left" if number < self.texts else "right")
        for r, row in enumerate(self.rows):
            if r in self.breaks:
                grid.add_section()
            grid.add_row(*(Text(cell, "bold green" if (r, c) in self.best else "") for c, cell in enumerate(row)))
        return grid

    def to_markdown(self) -> str:
        """For GitHub."""
        alignment = ["---"] * self.texts + ["---:"] * (len(self.columns) - self.texts)
        lines = [self.columns, alignment, *self._marked()]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def to_csv(self) -> str:
        """The strings as they are; `results.csv` has the numbers."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
        return text.getvalue()

    @property
    def slug(self) -> str:
        """The title as the name of a file or a label: lower-case letters, digits and hyphens."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")

    def _marked(self) -> list[list[str]]:
        """The rows in Markdown, the best in bold."""
        return [
            [("**{}**" if (r, c) in self.best else "{}").format(escape_markdown(cell)) for c, cell in enumerate(row)]
            for r, row in enumerate(self.rows)
        ]


def signed(value: float) -> str:
    """A difference with its sign; zero has +."""
    return f"{round(value, 1) + 0.0:+.1f}"  # rounded first and + 0.0, or it would be -0.0 at times


def minus(text: str) -> str:
    """Text with minus signs for hyphens before numbers.

    Args:
        text: Text with numbers, such as that of a cell.
    """
    return NEGATIVE.sub("−", text)


def print_tables(console: Console, tables: Iterable[Table], headline: str, note: str = "") -> None:
    """Prints tables; piped, nothing is coloured, wrapped or cut off if the console is wide enough.

    Args:
        console: Console to print on.
        tables: Tables in order.
        headline: First line.
        note: Warning below it; empty for none.
    """
    console.print(headline, highlight=False)
    if note:
        console.print(Text(f"Note: {note}", "yellow"), soft_wrap=True)
    for table in tables:
        console.print()
        console.print(Text(table.title, "bold"), soft_wrap=True)
        if table.rows:
            console.print(table.to_rich())
        console.print(Text(table.caption, "dim"), soft_wrap=not console.is_terminal)


def render_markdown(tables: Iterable[Table], note: str = "", heading: str = "Results") -> str:
    """Renders tables as one Markdown page.

    Args:
        tables: Tables in order.
        note: Warning above them; empty for none.
        heading: Heading of the page.
    """
    parts = [f"# {heading}", *([f"Note: {escape_markdown(note)}"] if note else [])]
    for table in tables:
        grid = [table.to_markdown()] if table.rows else []
        parts += [f"## {escape_markdown(table.title)}", *grid, escape_markdown(table.caption)]
    return "\n\n".join(parts) + "\n"


def escape_markdown(text: str) -> str:
    """Text that GitHub shows as it is."""
    return re.sub(r"([|*_\\<>\[\]])", r"\\\1", text)
