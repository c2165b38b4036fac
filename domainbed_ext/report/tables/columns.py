"""The columns of a table of methods: what each shows of a comparison, and the records that it comes from."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from domainbed_ext.model_selection import Record
from domainbed_ext.report.methods import adaptation_of, group_starts, has_objectives, id_of, objective_of, row_label_of
from domainbed_ext.report.summary import DIVERGED, Summary
from domainbed_ext.report.tables.table import MISSING, NOT_RECORDED, Cell, Origin, Table

if TYPE_CHECKING:
    from domainbed_ext.report.figures import Comparison
    from domainbed_ext.report.scores import Metric


def narrow(cell: Summary | None) -> str:
    """A cell of a table that is to fit a terminal, without the error that a single trial does not have."""
    if cell is None:
        return MISSING
    if np.isnan(cell.mean):
        return DIVERGED
    return f"{cell.mean:.1f}" + (f"±{cell.err:.1f}" if cell.trials > 1 else "")


class Column(ABC):
    """A column of a table, which has a row per method."""

    header: str

    @abstractmethod
    def text(self, algorithm: str) -> str:
        """The cell of a method."""

    @abstractmethod
    def origins(self, algorithm: str) -> list[Origin]:
        """Returns what the cell comes from."""

    def ranked_value(self, algorithm: str) -> Summary | None:
        """What the cell is ranked by in its column; None if it is not ranked."""
        return None

    def is_near(self, algorithm: str, best: str) -> bool:
        """Whether a method is within one standard error of the best one, paired by trial."""
        return False

    def error(self, algorithm: str) -> str:
        """The error that the text of the cell leaves out; empty if there is none."""
        return ""


@dataclass(frozen=True)
class Figure(Column):
    """A metric's mean over trials and its error.

    Attributes:
        header: Head of the column.
        comparison: The methods under one selection method.
        metric: What to average.
        env: Test domain; None for the mean over all.
        ranked: Whether the best and the second best are set apart.
        form: Function that writes a summary.
    """

    header: str
    comparison: "Comparison"
    metric: "Metric"
    env: int | None = None
    ranked: bool = False
    form: Callable[[Summary | None], str] = narrow

    def summary(self, algorithm: str) -> Summary | None:
        """Mean and error of a method."""
        return self.comparison.summary(algorithm, self.metric, self.env)

    def text(self, algorithm: str) -> str:
        """The mean, with its error; "-" of what cannot be measured."""
        summary = self.summary(algorithm)
        if summary is None:
            return NOT_RECORDED if self.comparison.unmeasured(algorithm, self.metric) else MISSING
        return self.form(summary)

    def origins(self, algorithm: str) -> list[Origin]:
        """The chosen records that are averaged."""
        return origins(self.comparison.records(algorithm, self.env))

    def ranked_value(self, algorithm: str) -> Summary | None:
        """The summary, as far as it can be compared with the other methods'."""
        return self.comparison.comparable(algorithm, self.summary(algorithm)) if self.ranked else None

    def is_near(self, algorithm: str, best: str) -> bool:
        """Whether a method is within one standard error of the best one, paired by trial."""
        return self.comparison.is_near(algorithm, best, self.metric, self.env)


@dataclass(frozen=True)
class Average(Column):
    """DomainBed's average of other columns: of their unrounded means, missing if one of them is.

    Attributes:
        header: Head of the column.
        columns: Columns that are averaged.
        comparison: Where the average comes from; None if from several comparisons.
    """

    header: str
    columns: Sequence[Figure]
    comparison: "Comparison | None" = None

    def ranked_value(self, algorithm: str) -> Summary | None:
        """The average, which has no error."""
        summaries = [column.summary(algorithm) for column in self.columns]
        present = [summary for summary in summaries if summary is not None]
        if len(present) < len(summaries):
            return None
        mean = sum(summary.mean for summary in present) / len(present)
        return Summary(mean, float("nan"), 0, all(summary.complete for summary in present))

    def text(self, algorithm: str) -> str:
        """The average."""
        return narrow(self.ranked_value(algorithm))

    def is_near(self, algorithm: str, best: str) -> bool:
        """Whether a method's average over the columns of one comparison is within one standard error of the best."""
        return self.comparison is not None and self.comparison.is_near(algorithm, best, self.columns[0].metric)

    def error(self, algorithm: str) -> str:
        """The error of the mean over trials, where every trial has all columns."""
        if self.comparison is None or (average := self.ranked_value(algorithm)) is None or not average.complete:
            return ""
        summary = self.comparison.summary(algorithm, self.columns[0].metric)
        has_error = summary is not None and summary.trials > 1 and np.isfinite(summary.err)
        return f"{summary.err:.1f}" if summary and has_error else ""

    def origins(self, algorithm: str) -> list[Origin]:
        """All chosen records of the comparison."""
        return origins(self.comparison.records(algorithm)) if self.comparison else []


@dataclass(frozen=True)
class Trainable(Column):
    """Trainable parameters and their share, as a range where the chosen hyperparameters differ in rank.

    Attributes:
        header: Head of the column.
        comparison: The methods under one selection method.
    """

    header: str
    comparison: "Comparison"

    def text(self, algorithm: str) -> str:
        """The number, or the smallest and the largest."""
        if not self.comparison.scores(algorithm):
            return MISSING
        trainable, total = (
            self.comparison.recorded(algorithm, key) for key in ("trainable_parameters", "total_parameters")
        )
        if not trainable:
            return NOT_RECORDED
        text = " to ".join(f"{count:,}" for count in sorted({min(trainable), max(trainable)}))
        if len(trainable) == len(total):
            shares = {f"{100 * part / whole:.3g}": part / whole for part, whole in zip(trainable, total, strict=True)}
            ends = sorted(shares, key=lambda share: shares[share])
            text += f" ({' to '.join(dict.fromkeys((ends[0], ends[-1])))}%)"
        return text

    def origins(self, algorithm: str) -> list[Origin]:
        """All chosen records."""
        return origins(self.comparison.records(algorithm))


def make_table(
    title: str,
    algorithms: Sequence[str],
    columns: Sequence[Column],
    caption: str,
    lack_of: Callable[[str], str] = lambda algorithm: "",
) -> Table:
    """A table with a row per method.

    Args:
        title: What the table shows.
        algorithms: Ids of the methods, in order.
        columns: Columns after the methods' names.
        caption: What the columns are.
        lack_of: Function of an id that says what the method's runs lack.

    Returns:
        The table, with the best and the second best of ranked columns. Where there are objectives, each row names its
        adaptation and its objective, and the rows of an adaptation are set apart from the next.
    """
    if has_objectives(algorithms):
        heads = ["Algorithm", "Adaptation", "Objective"]
        names = [
            [id_of(algorithm, lack_of(algorithm)), adaptation_of(algorithm), objective_of(algorithm)]
            for algorithm in algorithms
        ]
    else:
        heads = ["Algorithm"]
        names = [[row_label_of(algorithm, lack_of(algorithm))] for algorithm in algorithms]
    table = lay_out(title, heads, names, algorithms, columns, caption)
    table.algorithms, table.breaks = list(algorithms), group_starts(algorithms)
    table.lacks = list(map(lack_of, algorithms))
    return table


def lay_out(
    title: str,
    heads: Sequence[str],
    names: Sequence[Sequence[str]],
    algorithms: Sequence[str],
    columns: Sequence[Column],
    caption: str,
) -> Table:
    """A table whose rows have names of the caller's choice.

    Args:
        title: What the table shows.
        heads: Heads of the columns of names.
        names: Names of each row.
        algorithms: Id by which the columns know each row.
        columns: Columns after the names.
        caption: What the columns are.

    Returns:
        The table, with the best and the second best of ranked columns.
    """
    grid = [[column.ranked_value(algorithm) for column in columns] for algorithm in algorithms]
    best, second = ranked(grid, len(heads))
    cells = [
        ((row, number), algorithm, column)
        for row, algorithm in enumerate(algorithms)
        for number, column in enumerate(columns, len(heads))
    ]
    leaders = {number: algorithms[row] for row, number in sorted(best, reverse=True)}
    datasets = {column.comparison.dataset for column in columns if isinstance(column, Figure)}
    return Table(
        title,
        [*heads, *(column.header for column in columns)],
        [
            [*name, *(column.text(algorithm) for column in columns)]
            for name, algorithm in zip(names, algorithms, strict=True)
        ],
        caption,
        best,
        second,
        {place: column.origins(algorithm) for place, algorithm, column in cells},
        len(heads),
        near={
            place
            for place, algorithm, column in cells
            if place not in best
            and (leader := leaders.get(place[1])) is not None
            and grid[place[0]][place[1] - len(heads)] is not None
            and column.is_near(algorithm, leader)
        },
        errors={place: error for place, algorithm, column in cells if (error := column.error(algorithm))},
        dataset=datasets.pop() if len(datasets) == 1 else "",
    )


def ranked(grid: Sequence[Sequence[Summary | None]], shift: int = 1) -> tuple[set[Cell], set[Cell]]:
    """The cells with the highest and the second highest mean of their column, as printed.

    Args:
        grid: Rows of summaries; those that are None or incomplete are not compared.
        shift: Number of a table's columns to the left of the grid.

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
            first, *lower = sorted(set(means.values()), reverse=True)
            best |= {(row, number) for row, mean in means.items() if mean == first}
            second |= {(row, number) for row, mean in means.items() if lower and mean == lower[0]}
    return best, second


def origins(records: Iterable[Record]) -> list[Origin]:
    """Where numbers come from, each record once."""
    return list(dict.fromkeys(Origin(record["run"], int(record["step"])) for record in records))
