"""The tables of a report: DomainBed's own, of generalisation that DomainBed lacks, and the single-source ones.

A table is a grid of strings made from `Results`; `grid` shows it on a terminal, as Markdown, as CSV or as LaTeX.
"""

from domainbed_ext.model_selection import LEAVE_ONE_DOMAIN_OUT, SelectionMethod
from domainbed_ext.report.leave_one_out import Metric, Results, Summary
from domainbed_ext.report.summary import labelled
from domainbed_ext.report.tables import bounds
from domainbed_ext.report.tables import single_source as single_tables
from domainbed_ext.report.tables.cells import origins, parameters, train_share, warning
from domainbed_ext.report.tables.table import (
    MISSING,
    NOT_RECORDED,
    Cell,
    Origin,
    Table,
    latex,
    markdown,
    narrow,
    ranked,
    show,
)

__all__ = [
    "all_tables",
    "averages_table",
    "bounds_tables",
    "domain_table",
    "generalisation_table",
    "latex",
    "markdown",
    "show",
]


def all_tables(results: Results) -> list[Table]:
    """Every table of a report: DomainBed's for each selection method, then generalisation, then single source."""
    tables: list[Table] = []
    if results.environments:
        for method in results.methods:
            for dataset in results.environments:
                tables.append(_in_words(domain_table(results, method, dataset), results, method, [dataset]))
            averages = averages_table(results, method)
            tables.append(_in_words(averages, results, method, list(results.environments)))
        for dataset in results.environments:
            tables.append(generalisation_table(results, results.main_method, dataset))
            tables += bounds_tables(results, results.main_method, dataset)
    if results.single:
        tables += single_tables.all_tables(results.single)
    return tables


def domain_table(results: Results, method: SelectionMethod, dataset: str) -> Table:
    """DomainBed's table of one data set: a row per algorithm, a column per test environment."""
    names = results.environments[dataset]
    table = _accuracy_table(
        f"{dataset}, model selection: {method.title}",
        [*names, "Avg"],
        results.algorithms,
        [
            [results.summary(method, dataset, algorithm, "out_of_domain", env) for env in range(len(names))]
            for algorithm in results.algorithms
        ],
        "Accuracy on each test environment in %, mean +/- standard error over trials. "
        f"Selection: {method.description}." + warning(results, method, [dataset]),
    )
    for row, algorithm in enumerate(results.algorithms):
        scores = results.scores(method, dataset, algorithm)
        for env in [*range(len(names)), None]:
            chosen = [score.selection.record for score in scores if env in (None, score.group.test_env)]
            table.origins[row, len(names) + 1 if env is None else env + 1] = origins(chosen)
    return table


def averages_table(results: Results, method: SelectionMethod) -> Table:
    """DomainBed's table over data sets: the mean over trials of each trial's mean over test environments."""
    datasets = list(results.environments)
    table = _accuracy_table(
        f"Averages, model selection: {method.title}",
        [*datasets, "Avg"],
        results.algorithms,
        [
            [results.summary(method, dataset, algorithm, "out_of_domain") for dataset in datasets]
            for algorithm in results.algorithms
        ],
        "Each trial's mean accuracy over test environments in %, mean +/- standard error over trials."
        + warning(results, method, datasets),
    )
    for row, algorithm in enumerate(results.algorithms):
        for column, dataset in enumerate(datasets, 1):
            scores = results.scores(method, dataset, algorithm)
            table.origins[row, column] = origins(score.selection.record for score in scores)
    return table


def generalisation_table(results: Results, method: SelectionMethod, dataset: str) -> Table:
    """What DomainBed's tables leave out: parameters, in-domain accuracy, and gaps of train to test accuracy.

    Args:
        results: the figures.
        method: the selection method.
        dataset: a data set.

    Returns:
        The table. Gaps are train accuracy minus test accuracy, as in table 13 of Zhu et al., Asymmetry in
        Low-Rank Adapters of Foundation Models (2024). They are not set in bold: a method that learns nothing
        has the smallest.
    """
    metrics: list[Metric] = ["in_domain", "out_of_domain", "train", "gap_source", "gap_target"]
    grid = [
        [results.summary(method, dataset, algorithm, metric) for metric in metrics] for algorithm in results.algorithms
    ]
    chosen = [results.scores(method, dataset, algorithm) for algorithm in results.algorithms]
    rows = [
        [
            labelled(algorithm, results.incomplete(method, dataset, algorithm)),
            parameters(scores),
            *map(narrow, cells),
        ]
        for algorithm, scores, cells in zip(results.algorithms, chosen, grid, strict=True)
    ]
    share = train_share(score.selection.record for scores in chosen for score in scores)
    best, second = ranked([cells[:2] for cells in grid], shift=2)
    return Table(
        f"{dataset}, generalisation",
        ["Algorithm", "Trainable", "In domain", "Out of domain", "Train", "Gap source", "Gap target"],
        rows,
        "Trainable: parameters, and their share of all. In domain: accuracy on the held-out 20 % of the training "
        f"environments. Out of domain: on the test environment. Train: on the 80 % trained on{share}. "
        "Gap source = train − in domain, gap target = train − "
        "out of domain. In %, mean +/- standard error over trials of each trial's mean over test environments. "
        f"Selection: {method.description}." + warning(results, method, [dataset]),
        best,
        second,
        {
            (row, column): origins(score.selection.record for score in scores)
            for row, scores in enumerate(chosen)
            for column in range(1, len(metrics) + 2)
        },
    )


def bounds_tables(results: Results, method: SelectionMethod, dataset: str) -> list[Table]:
    """The bounds on the gap beside the measured one; no table where no run recorded how many images it had."""
    rows: list[list[str]] = []
    sources: dict[Cell, list[Origin]] = {}
    for row, algorithm in enumerate(results.algorithms):
        records = [score.selection.record for score in results.scores(method, dataset, algorithm)]
        gap = results.summary(method, dataset, algorithm, "gap_source")
        rows.append([algorithm, narrow(gap), *bounds.cells(records)])
        sources |= {(row, column): origins(records) for column in range(1, 4)}
    if all(row[2:] == [NOT_RECORDED] * 2 for row in rows):
        return []
    return [
        Table(
            f"{dataset}, bounds on the gap",
            ["Algorithm", "Gap source", "Lemma 4.5", "All trained"],
            rows,
            "Gap source: train − in-domain accuracy in percentage points, mean +/- standard error over trials. "
            + bounds.CAPTION,
            origins=sources,
        )
    ]


def _accuracy_table(
    title: str, columns: list[str], algorithms: list[str], grid: list[list[Summary | None]], caption: str
) -> Table:
    """A table whose last column is DomainBed's average: of the unrounded means, missing if one of them is."""
    averages: list[Summary | None] = []
    for cells in grid:
        found = [cell for cell in cells if cell is not None]
        average = sum(cell.mean for cell in found) / len(cells)
        complete = all(cell.complete for cell in found)
        averages.append(Summary(average, float("nan"), 0, complete) if len(found) == len(cells) else None)
    rows = [
        [algorithm, *(str(cell or MISSING) for cell in cells), narrow(average)]
        for algorithm, cells, average in zip(algorithms, grid, averages, strict=True)
    ]
    best, second = ranked([[*cells, average] for cells, average in zip(grid, averages, strict=True)])
    return Table(title, ["Algorithm", *columns], rows, caption, best, second)


def _in_words(table: Table, results: Results, method: SelectionMethod, datasets: list[str]) -> Table:
    """Says which runs are missing, and leaves out a grid that would hold nothing but X."""
    if method is LEAVE_ONE_DOMAIN_OUT:
        lacking = [sentence for dataset in datasets if (sentence := results.missing_pairs_sentence(dataset))]
        table.caption = " ".join([table.caption, *lacking])
    if all(cell == MISSING for row in table.rows for cell in row[1:]):
        table.rows, table.origins = [], {}
        table.caption = f"No figure can be given yet. {table.caption}"
    return table
