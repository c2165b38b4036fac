"""The page's part on paired differences: a table of all pairs of methods, of which two selects choose.

Everything is computed before, so that choosing needs no server. Each pair is there in both directions, of which one is
shown until a script shows what is chosen: without scripts, the table has every pair once.
"""

from dataclasses import dataclass
from typing import NamedTuple

from domainbed_ext.report.differences import METRICS
from domainbed_ext.report.pairs import ComparedPairs, PairsOf, Row, against, all_pairs, compare_pairs
from domainbed_ext.report.results import Results
from domainbed_ext.report.tables.differences import HEADS, caption, cells
from domainbed_ext.system.commands import format_command

PAIRS = 1_000  # of all comparisons: some 5 MB


class PairRow(NamedTuple):
    """A row of the table.

    Attributes:
        metric: Name of the metric.
        first: Id of the method.
        second: Id of the one that is subtracted.
        cells: Figures.
        is_reversed: Whether the row is the reverse of another, and shown on request alone.
    """

    metric: str
    first: str
    second: str
    cells: list[str]
    is_reversed: bool


@dataclass(frozen=True)
class PairsPart:
    """The pairs of a comparison.

    Attributes:
        title: What the methods were run on.
        methods: Ids of the methods that were compared, in the order of tables.
        rows: Rows of the table.
        caption: What the columns are.
    """

    title: str
    methods: list[str]
    rows: list[PairRow]
    caption: str
    heads: tuple[str, ...] = HEADS
    metrics: tuple[str, ...] = tuple(METRICS.values())


def pairs_parts(results: Results) -> list[PairsPart]:
    """The pairs of each comparison, as the page shows them.

    Args:
        results: Figures of the runs.

    Returns:
        Parts; none where there is nothing to compare. Of more than `PAIRS` pairs, those with the best method.
    """
    count = sum(len(all_pairs(comparison)) for comparison in results.panels)
    pairs_of: PairsOf = all_pairs if count <= PAIRS else against()
    note = (
        ""
        if count <= PAIRS
        else (
            f" Of {count:,} pairs these are the ones with the row of the best in-domain accuracy; "
            f"{format_command('compare')} --pairs A:B compares any."
        )
    )
    return [_part(compared, note) for compared in results.compare(pairs_of)]


def _part(compared: ComparedPairs, note: str) -> PairsPart:
    comparison = compared.comparison
    backwards = compare_pairs(comparison, [(second, first) for first, second in compared.pairs])
    names = {name for pair in compared.pairs for name in pair}
    return PairsPart(
        comparison.title,
        [name for name in comparison.algorithms if name in names],
        [*(_row(row, False) for row in compared.rows), *(_row(row, True) for row in backwards.rows)],
        caption(compared) + note,
    )


def _row(row: Row, is_reversed: bool) -> PairRow:
    return PairRow(METRICS[row.metric], row.algorithm, row.reference, cells(row), is_reversed)
