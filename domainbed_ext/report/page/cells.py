"""How the page shows the heads and cells of tables: numbers apart from their errors, labels and full names."""

import re
from typing import Any, NamedTuple

from markupsafe import Markup, escape

from domainbed_ext.report.environments import full_names
from domainbed_ext.report.methods import label_of
from domainbed_ext.report.page.run_details import in_words
from domainbed_ext.report.tables.table import Table, minus

_ROLE = re.compile(r"(.*?)( \((?:ID|OOD)\))?")


class CellParts(NamedTuple):
    """A cell of figures.

    Attributes:
        figure: Number.
        error: Error after the sign ±, or empty.
        interval: Interval in parentheses, or empty.
        marks: Classes of the page: best, near.
    """

    figure: str
    error: str
    interval: str
    marks: str


def cell_of(table: Table, row: int, column: int) -> CellParts:
    """Parts a cell of figures, which are set in different sizes and aligned.

    Args:
        table: Table.
        row: Row from 0.
        column: Column from 0.
    """
    place = row, column
    figure, error, interval = split(table.rows[row][column])
    marks = "best" if place in table.best else "near" if place in table.near else ""
    return CellParts(figure, error or table.errors.get(place, ""), interval, marks)


def split(cell: str) -> tuple[str, str, str]:
    """Number, error and interval of a cell, with minus signs.

    Args:
        cell: Text of a cell.
    """
    if match := re.fullmatch(r"(\S+) (\([^\s%]+ to [^\s%]+\))", cell):
        return minus(match[1]), "", minus(match[2])
    if match := re.fullmatch(r"(.*?)\s*(?:±|\+/-)\s*(\S+)", cell, re.DOTALL):
        return minus(match[1]), match[2], ""
    return minus(cell), "", ""


def error_widths(table: Table) -> list[int]:
    """The characters of the longest error of each column: errors of a column are set in boxes of one width.

    Args:
        table: Table with rows.
    """
    return [
        max((len(cell_of(table, row, column).error) for row in range(len(table.rows))), default=0)
        if column >= table.texts
        else 0
        for column in range(len(table.columns))
    ]


def head_of(table: Table, column: int) -> Markup:
    """The head of a column; the label of an environment explains itself on hover.

    Args:
        table: Table.
        column: Column from 0.
    """
    head = table.columns[column]
    label, role = _ROLE.fullmatch(head).groups(default="")  # type: ignore[union-attr]
    name = full_names(table.dataset).get(label) if table.dataset and column >= table.texts else None
    if name is None:
        return escape(head)
    return Markup('<abbr title="{}">{}</abbr>{}').format(name, label, role)


def key_of(table: Table) -> str:
    """What the labels in the heads stand for, as a line below the table; empty if nothing is abbreviated."""
    names = full_names(table.dataset) if table.dataset else {}
    heads = [_ROLE.fullmatch(head)[1] for head in table.columns[table.texts :]]  # type: ignore[index]
    return ", ".join(f"{label}: {names[label]}" for label in dict.fromkeys(heads) if label in names)


def breakable(name: str) -> Markup:
    """A method's id that may wrap between its parts, as after the comma of `BA@rank=8,lr=0.001`, and nowhere else.

    Args:
        name: Id of a method.
    """
    return Markup(re.sub(r"(?<=\w)([@+,])(?=\w)", r"\1<wbr>", str(escape(name))))


def number(value: float) -> str:
    """One decimal, or a dash for what was not measured.

    Args:
        value: Accuracy in %.
    """
    return f"{value:.1f}" if value == value else "–"


FILTERS: dict[str, Any] = {
    "breakable": breakable,
    "label": label_of,
    "minus": minus,
    "number": number,
    "split": split,
    "words": in_words,
}
