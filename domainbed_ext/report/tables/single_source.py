"""The tables of single-source runs, as Zhu et al. (2024) lay theirs out: accuracy (11, 12) and gap (13)."""

from domainbed_ext import divergence
from domainbed_ext.report.leave_one_out import SingleSource, Summary
from domainbed_ext.report.single_source import Row
from domainbed_ext.report.summary import labelled
from domainbed_ext.report.tables import bounds
from domainbed_ext.report.tables.cells import origins, parameters, roles, train_share
from domainbed_ext.report.tables.table import NOT_RECORDED, Origin, Table, narrow, ranked


def all_tables(single: SingleSource) -> list[Table]:
    """Accuracy and gap of every data set and source."""
    return [
        table
        for dataset, sources in single.sources.items()
        for source in sources
        for table in (accuracy_table(single, dataset, source), gap_table(single, dataset, source))
    ]


def accuracy_table(single: SingleSource, dataset: str, source: int) -> Table:
    """A row per algorithm, a column per environment and their mean out of domain, as in tables 11 and 12.

    Args:
        single: the figures.
        dataset: a data set.
        source: the index of the environment trained on.

    Returns:
        The table.
    """
    names = single.environments[dataset]
    algorithms = _algorithms(single, dataset, source)
    environments = [*range(len(names)), None]
    grid = [[_comparable(single, dataset, algorithm, source, env) for env in environments] for algorithm in algorithms]
    rows = [
        [
            labelled(algorithm, single.incomplete(dataset, algorithm, source)),
            parameters(single.scores(dataset, algorithm, source)),
        ]
        + [narrow(cell) for cell in cells]
        for algorithm, cells in zip(algorithms, grid, strict=True)
    ]
    best, second = ranked(grid, shift=2)
    return Table(
        f"{dataset}, single source {names[source]}: accuracy",
        ["Algorithm", "Trainable", *roles(names, source), "OOD mean"],
        rows,
        f"Trained on {names[source]} alone. Trainable: parameters, and their share of all. {names[source]} (ID): "
        f"accuracy on its held-out {_holdout(single, dataset, source)}; the other columns (OOD): on environments not "
        "trained on; OOD mean: over those. In %, mean ± standard deviation over trials. Step and hyperparameters are "
        "selected by the ID accuracy." + _warning(single, dataset, source),
        best,
        second,
        _origins(single, dataset, source, algorithms, len(names) + 3),
    )


def gap_table(single: SingleSource, dataset: str, source: int) -> Table:
    """Train accuracy minus the accuracy on each environment, as in table 13, and the bounds on the gap in domain.

    Args:
        single: the figures.
        dataset: a data set.
        source: the index of the environment trained on.

    Returns:
        The table. Gaps are not set in bold: a method that learns nothing has the smallest.
    """
    names = single.environments[dataset]
    algorithms = _algorithms(single, dataset, source)
    rows = []
    for algorithm in algorithms:
        gaps = [single.summary(dataset, algorithm, source, "gap", env) for env in [*range(len(names)), None]]
        train = single.summary(dataset, algorithm, source, "train")
        records = [score.record for score in single.scores(dataset, algorithm, source)]
        rows.append(
            [
                labelled(algorithm, single.incomplete(dataset, algorithm, source)),
                *map(narrow, [train, *gaps]),
                *bounds.cells(records),
            ]
        )
    columns = ["Algorithm", "Train", *roles(names, source), "OOD mean", "Lemma 4.5", "All trained"]
    known = any(row[-2:] != [NOT_RECORDED] * 2 for row in rows)
    if not known:
        columns, rows = columns[:-2], [row[:-2] for row in rows]
    scores = [score for algorithm in algorithms for score in single.scores(dataset, algorithm, source)]
    return Table(
        f"{dataset}, single source {names[source]}: generalisation gap",
        columns,
        rows,
        f"Train: accuracy on the images of {names[source]} trained on{train_share(s.record for s in scores)}. Other "
        "columns: train accuracy minus the accuracy on that environment, and on the OOD ones in the mean, in "
        "percentage points, mean ± standard deviation over trials. "
        + (bounds.CAPTION if known else "").strip()
        + _warning(single, dataset, source),
        origins=_origins(single, dataset, source, algorithms, len(columns)),
    )


def _algorithms(single: SingleSource, dataset: str, source: int) -> list[str]:
    """Those that have runs of this source: sources may have been given different ones."""
    return [algorithm for algorithm in single.algorithms if single.scores(dataset, algorithm, source)]


def _comparable(single: SingleSource, dataset: str, algorithm: str, source: int, env: int | None) -> Summary | None:
    """An accuracy; of fewer trials than there are, it is not to be called the best."""
    found = single.summary(dataset, algorithm, source, "accuracy", env)
    return found and found._replace(complete=not single.incomplete(dataset, algorithm, source))


def _holdout(single: SingleSource, dataset: str, source: int) -> str:
    shares = {
        float(score.record["args"].get("holdout_fraction") or 0.2)
        for algorithm in single.algorithms
        for score in single.scores(dataset, algorithm, source)
    }
    return f"{' or '.join(f'{100 * share:g}' for share in sorted(shares))} %"


def _warning(single: SingleSource, dataset: str, source: int) -> str:
    """What keeps the figures from meaning what they seem to, as sentences to append to a caption."""
    algorithms = _algorithms(single, dataset, source)
    trials = {len(single.scores(dataset, algorithm, source)) for algorithm in algorithms}
    lacking = [
        f"{algorithm} ({lack})" for algorithm in algorithms if (lack := single.incomplete(dataset, algorithm, source))
    ]
    alone = " One trial only: its spread is not known." if trials == {1} else ""
    diverged = {algorithm: single.diverged[Row(dataset, algorithm, source)] for algorithm in algorithms}
    return alone + (f" Incomplete: {', '.join(lacking)}." if lacking else "") + divergence.sentence(diverged)


def _origins(
    single: SingleSource, dataset: str, source: int, algorithms: list[str], width: int
) -> dict[tuple[int, int], list[Origin]]:
    """Every cell of a row comes from the same records: one run a trial is tested on all environments."""
    return {
        (row, column): origins(score.record for score in single.scores(dataset, algorithm, source))
        for row, algorithm in enumerate(algorithms)
        for column in range(1, width)
    }
