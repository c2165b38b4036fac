"""The page's part on paired differences: a table of all pairs of methods, of which two selects choose.

Everything is computed before, so that choosing needs no server. Each pair is there once; the script of the page turns
its signs round where the methods are chosen in the other order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from domainbed_ext.report.conclusion import Conclusion
from domainbed_ext.report.differences import METRICS
from domainbed_ext.report.inference.sign_test import Signs
from domainbed_ext.report.methods import label_of
from domainbed_ext.report.pairs import ComparedPairs, PairsOf, Row, against, all_pairs
from domainbed_ext.report.results import Results
from domainbed_ext.report.tables.differences import HEADS, caption, cells, higher_in
from domainbed_ext.system.commands import format_command

PAIRS = 1_000  # of all comparisons: some 3 MB


class PairRow(NamedTuple):
    """A row of the table.

    Attributes:
        metric: Name of the metric.
        first: Id of the method.
        second: Id of the one that is subtracted.
        cells: Figures.
        lower: The figure of "Higher in" with the methods in the other order.
    """

    metric: str
    first: str
    second: str
    cells: list[str]
    lower: str


@dataclass(frozen=True)
class PairsPart:
    """The pairs of a comparison.

    Attributes:
        title: What the methods were run on.
        methods: Ids and labels of the methods that were compared, in the order of tables.
        chosen: The pair that is chosen first, the best method and the next; empty if not both are there.
        rows: Rows of the table.
        caption: What the columns are.
    """

    title: str
    methods: list[tuple[str, str]]
    chosen: tuple[str, ...]
    rows: list[PairRow]
    caption: str
    heads: tuple[str, ...] = HEADS
    metrics: tuple[str, ...] = tuple(METRICS.values())


def pairs_parts(results: Results, conclusions: Sequence[Conclusion]) -> list[PairsPart]:
    """The pairs of each comparison, as the page shows them.

    Args:
        results: Figures of the runs.
        conclusions: Conclusions of the comparisons, which say what is chosen first.

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
    ranking = {conclusion.title: conclusion.ranking for conclusion in conclusions}
    return [_part(compared, ranking.get(compared.comparison.title, []), note) for compared in results.compare(pairs_of)]


def _part(compared: ComparedPairs, ranking: Sequence[str], note: str) -> PairsPart:
    names = {name for pair in compared.pairs for name in pair}
    chosen = tuple(name for name in ranking[:2])
    there = chosen in compared.pairs or chosen[::-1] in compared.pairs
    return PairsPart(
        compared.comparison.title,
        [(name, label_of(name)) for name in compared.comparison.algorithms if name in names],
        chosen if there else (),
        list(map(_row, compared.rows)),
        caption(compared) + note,
    )


def _row(row: Row) -> PairRow:
    signs = row.difference.signs
    turned = Signs(signs.lower, signs.higher, signs.equal)
    return PairRow(METRICS[row.metric], row.algorithm, row.reference, cells(row), higher_in(turned))
