"""A table as a grid of strings, and the forms it takes: terminal, Markdown, CSV and LaTeX.

What the strings are is the business of `tables`, `single_tables` and `paper`; the HTML page is `page`'s.
"""

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from domainbed_ext.report.leave_one_out import Results, Summary
from domainbed_ext.report.summary import DIVERGED

MISSING = "X"
NOT_RECORDED = "-"
LATEX_ESCAPES = str.maketrans(
    {character: "\\" + character for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"�": "?", "−": "$-$", "≥": r"$\geq$", "×": r"$\times$", "²": r"$^2$", "√": r"$\surd$", "σ": r"$\sigma$"}
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
        title: what it shows.
        columns: the header.
        rows: as many strings each as there are columns; without rows, title and caption stand alone.
        caption: what the columns are and what to mind.
        best: the cells to set in bold.
        second: the cells to underline in LaTeX.
        origins: where a cell's number comes from.
        texts: number of columns, from the left, that are words and not figures.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    caption: str
    best: set[Cell] = field(default_factory=set)
    second: set[Cell] = field(default_factory=set)
    origins: dict[Cell, list[Origin]] = field(default_factory=dict)
    texts: int = 1

    def to_rich(self) -> RichTable:
        """For the terminal; title and caption, which rich would wrap to its width, are left to the caller."""
        grid = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for number, column in enumerate(self.columns):
            grid.add_column(Text(column), justify="left" if number < self.texts else "right")
        for r, row in enumerate(self.rows):
            grid.add_row(*(Text(cell, "bold green" if (r, c) in self.best else "") for c, cell in enumerate(row)))
        return grid

    def to_markdown(self) -> str:
        """For GitHub."""
        alignment = ["---"] * self.texts + ["---:"] * (len(self.columns) - self.texts)
        lines = [self.columns, alignment, *self._marked(escape_markdown, "**{}**", "{}")]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def to_csv(self) -> str:
        """The strings as they are; for numbers to calculate with there is `results.csv`."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
        return text.getvalue()

    def to_latex(self) -> str:
        """A table environment, best in bold and second underlined; needs booktabs and adjustbox."""
        lines = [
            [escape_latex(column) for column in self.columns],
            *self._marked(escape_latex, r"\textbf{{{}}}", r"\underline{{{}}}"),
        ]
        head, *body = (" & ".join(line) + r" \\" for line in lines)
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


def ranked(grid: Sequence[Sequence[Summary | None]], shift: int = 1) -> tuple[set[Cell], set[Cell]]:
    """The cells with the highest and the second highest mean of their column, as printed.

    Args:
        grid: rows of summaries; those that are incomplete are not compared.
        shift: number of a table's columns to the left of the grid.

    Returns:
        The best and the second best; none in a column of fewer than two to compare, and no second where all
        are the best.
    """
    best: set[Cell] = set()
    second: set[Cell] = set()
    for number, column in enumerate(zip(*grid, strict=True), shift):
        means = {
            row: round(cell.mean, 1)
            for row, cell in enumerate(column)
            if cell is not None and cell.complete and not np.isnan(cell.mean)
        }
        if len(means) > 1:
            first, *others = sorted(set(means.values()), reverse=True)
            best |= {(row, number) for row, mean in means.items() if mean == first}
            second |= {(row, number) for row, mean in means.items() if others and mean == others[0]}
    return best, second


def narrow(cell: Summary | None) -> str:
    """A cell of a table that is to fit a terminal, without the error that a single trial does not have."""
    if cell is None:
        return MISSING
    if np.isnan(cell.mean):
        return DIVERGED
    return f"{cell.mean:.1f}" + (f"±{cell.err:.1f}" if cell.trials > 1 else "")


def signed(value: float) -> str:
    """A difference with its sign; zero has +."""
    return f"{round(value, 1) + 0.0:+.1f}"  # rounded first and + 0.0, or it would be -0.0 at times


def show(console: Console, results: Results, tables: Iterable[Table]) -> None:
    """Prints tables; piped, nothing is coloured, wrapped or cut off if the console is wide enough.

    Args:
        console: where to.
        results: the figures that the tables show, for a word on their number.
        tables: the tables.
    """
    diverged = f", {results.diverged_runs} diverged" if results.diverged_runs else ""
    console.print(f"{len(results.runs)} runs, {len(results.records)} records{diverged}", highlight=False)
    if warning := results.duplicates():
        console.print(Text(f"Note: {warning}", "yellow"), soft_wrap=True)
    for table in tables:
        console.print()
        console.print(Text(table.title, "bold"), soft_wrap=True)
        if table.rows:
            console.print(table.to_rich())
        console.print(Text(table.caption, "dim"), soft_wrap=not console.is_terminal)


def markdown(results: Results, tables: Iterable[Table]) -> str:
    """Tables as one Markdown page."""
    warning = results.duplicates()
    parts = ["# Results", *([f"Note: {escape_markdown(warning)}"] if warning else [])]
    for table in tables:
        grid = [table.to_markdown()] if table.rows else []
        parts += [f"## {escape_markdown(table.title)}", *grid, escape_markdown(table.caption)]
    return "\n\n".join(parts) + "\n"


def latex(tables: Iterable[Table]) -> str:
    """Tables as one LaTeX document; each is a table environment that can be taken out."""
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
    return text.translate(LATEX_ESCAPES).replace(" +/- ", "±").replace("±", r" $\pm$ ")


def escape_markdown(text: str) -> str:
    """Text that GitHub shows as it is."""
    return re.sub(r"([|*_\\<>\[\]])", r"\\\1", text)
