"""What an analysis declares about itself."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from matplotlib.figure import Figure

from domainbed_ext.analyse.runs import Sweep
from domainbed_ext.report.tables.table import Table

Row = TypeVar("Row")


def _nothing(parser: argparse.ArgumentParser) -> None:
    pass


@dataclass(frozen=True)
class Analysis(Generic[Row]):
    """An analysis of a sweep's runs: what it computes, and how that is shown.

    Attributes:
        name: Name in the command line, and of its files.
        title: Title of its plot.
        summary: What it computes, in a line.
        row: Dataclass of numbers, strings and lists of such: what a line of its results is.
        compute: Function of a sweep and of the options that computes the rows.
        tables: Function that makes tables of rows.
        figure: Function that draws rows; None of it if there is nothing to draw.
        add_options: Function that adds its options to its parser.
        options: Names of these options, which its results record.
    """

    name: str
    title: str
    summary: str
    row: Callable[..., Row]
    compute: Callable[[Sweep, argparse.Namespace], list[Row]]
    tables: Callable[[Sequence[Row]], list[Table]]
    figure: Callable[[Sequence[Row]], Figure | None]
    add_options: Callable[[argparse.ArgumentParser], None] = _nothing
    options: Sequence[str] = field(default_factory=list)

    def parse(self, rows: Sequence[Mapping[str, Any]]) -> list[Row]:
        """Makes rows of what JSON has of them, where null stands for a number that is not finite.

        Args:
            rows: Rows as JSON objects.
        """
        return [self.row(**{name: _number(value) for name, value in row.items()}) for row in rows]


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(each) for each in value]
    return float("nan") if value is None else value
