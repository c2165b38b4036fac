"""A table as a grid of strings, and the forms it takes: terminal, Markdown, CSV and LaTeX.

`columns` makes the tables of methods, `paper` those beside the numbers of Zhu et al. (2024). The HTML page has its own
template of them.
"""

import csv
import io
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

MISSING = "X"
NOT_RECORDED = "-"
NEGATIVE = re.compile(r"(?<![\w-])-(?=\d)")  # a sign, not a hyphen
LATEX_ESCAPES = str.maketrans(
    {character: "\\" + character for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"�": "?", "−": "$-$", "≥": r"$\geq$", "×": r"$\times$", "²": r"$^2$", "√": r"$\surd$", "σ": r"$\sigma$"}
    | {"‖": r"$\|$", "Δ": r"$\Delta$", "ᵀ": r"$^\top$", "₀": "$_0$", "₁": "$_1$", "₂": "$_2$"}
)

Cell = tuple[int, int]
"""A row and a column, from 0."""


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
        breaks: Rows that begin a group, and are set apart from those above.
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
    breaks: set[int] = field(default_factory=set)

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
        lines = [self.columns, alignment, *self._marked(escape_markdown, "**{}**", "{}")]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def to_csv(self) -> str:
        """The strings as they are; `results.csv` has the numbers."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
        return text.getvalue()

    def to_latex(self) -> str:
        """A table environment, best in bold and second underlined; needs booktabs and adjustbox."""
        lines = [
            [escape_latex(column) for column in self.columns],
            *self._marked(escape_latex, r"\textbf{{{}}}", r"\underline{{{}}}"),
        ]
        head, *rows = (" & ".join(line) + r" \\" for line in lines)
        body = [rf"\addlinespace{chr(10)}{row}" if r in self.breaks else row for r, row in enumerate(rows)]
        grid = [
            r"\adjustbox{max width=\textwidth}{%",
            rf"\begin{{tabular}}{{{'l' * self.texts}{'r' * (len(self.columns) - self.texts)}}}",
            r"\toprule",
            head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}}",
        ]
        return "\n".join(
            [
                r"\begin{table}[htb]",
                r"\centering",
                rf"\caption{{{escape_latex(self.title)}. {escape_latex(self.caption)}}}",
                *(grid if self.rows else []),
                r"\end{table}",
            ]
        )

    def _marked(self, escape: Callable[[str], str], bold: str, underlined: str) -> list[list[str]]:
        def marked(place: Cell, cell: str) -> str:
            form = bold if place in self.best else underlined if place in self.second else "{}"
            return form.format(escape(cell))

        return [[marked((r, c), cell) for c, cell in enumerate(row)] for r, row in enumerate(self.rows)]


def signed(value: float) -> str:
    """A difference with its sign; zero has +."""
    return f"{round(value, 1) + 0.0:+.1f}"  # rounded first and + 0.0, or it would be -0.0 at times


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


def render_latex(tables: Iterable[Table]) -> str:
    """Renders tables as one LaTeX document; each is a table environment that can be copied."""
    preamble = [
        r"\documentclass{article}",
        r"\usepackage[T1]{fontenc}",
        r"\usepackage{booktabs}",
        r"\usepackage{adjustbox}",
        r"\begin{document}",
    ]
    return "\n\n".join(["\n".join(preamble), *(table.to_latex() for table in tables), r"\end{document}"]) + "\n"


def escape_latex(text: str) -> str:
    """Text that LaTeX shows as it is."""
    text = re.sub(r" ?(\+/-|±) ?", r" $\\pm$ ", text.translate(LATEX_ESCAPES))
    return re.sub(NEGATIVE, "$-$", text)


def escape_markdown(text: str) -> str:
    """Text that GitHub shows as it is."""
    return re.sub(r"([|*_\\<>\[\]])", r"\\\1", text)
