"""Tables of results: DomainBed's own, and one of generalisation that DomainBed lacks.

A table is a grid of strings made from `Results`, shown by rich, as Markdown or as LaTeX.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from domainbed_ext.model_selection import SelectionMethod
from domainbed_ext.scores import Metric, Results, Score, Summary, recorded

MISSING = "X"
NOT_RECORDED = "-"
LATEX_ESCAPES = str.maketrans(
    {character: "\\" + character for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$"}
)


@dataclass
class Table:
    """A grid of strings.

    Attributes:
        title: what it shows.
        columns: the header.
        rows: as many strings each as there are columns.
        caption: what the columns are and what to mind.
        best: (row, column) of the cells to set in bold.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    caption: str
    best: set[tuple[int, int]]

    def to_rich(self) -> RichTable:
        """For the terminal; title and caption, which rich would wrap to its width, are left to the caller."""
        grid = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for number, column in enumerate(self.columns):
            grid.add_column(Text(column), justify="right" if number else "left")
        for r, row in enumerate(self.rows):
            grid.add_row(*(Text(cell, "bold green" if (r, c) in self.best else "") for c, cell in enumerate(row)))
        return grid

    def to_markdown(self) -> str:
        """For GitHub."""
        lines = [
            self.columns,
            ["---", *["---:"] * (len(self.columns) - 1)],
            *self._marked(_markdown, "**{}**"),
        ]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def to_latex(self) -> str:
        """A table environment; needs booktabs and adjustbox."""
        lines = [[_latex(column) for column in self.columns], *self._marked(_latex, r"\textbf{{{}}}")]
        head, *body = (" & ".join(line) + r" \\" for line in lines)
        return "\n".join(
            [
                r"\begin{table}[htb]",
                r"\centering",
                rf"\caption{{{_latex(self.title)}. {_latex(self.caption)}}}",
                r"\adjustbox{max width=\textwidth}{%",
                rf"\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}",
                r"\toprule",
                head,
                r"\midrule",
                *body,
                r"\bottomrule",
                r"\end{tabular}}",
                r"\end{table}",
            ]
        )

    def _marked(self, escape: Callable[[str], str], bold: str) -> list[list[str]]:
        return [
            [bold.format(escape(cell)) if (r, c) in self.best else escape(cell) for c, cell in enumerate(row)]
            for r, row in enumerate(self.rows)
        ]


def all_tables(results: Results) -> list[Table]:
    """Every table of a report: DomainBed's for each selection method, then generalisation."""
    tables: list[Table] = []
    for method in results.methods:
        tables += [domain_table(results, method, dataset) for dataset in results.environments]
        tables.append(averages_table(results, method))
    return tables + [generalisation_table(results, results.main_method, dataset) for dataset in results.environments]


def domain_table(results: Results, method: SelectionMethod, dataset: str) -> Table:
    """DomainBed's table of one data set: a row per algorithm, a column per test environment."""
    names = results.environments[dataset]
    grid = [
        [results.summary(method, dataset, algorithm, "out_of_domain", env) for env in range(len(names))]
        for algorithm in results.algorithms
    ]
    return _accuracy_table(
        f"{dataset}, model selection: {method.title}",
        [*names, "Avg"],
        results.algorithms,
        grid,
        "Accuracy on each test environment in %, mean +/- standard error over trials. "
        f"Selection: {method.description}." + _warning(results, method, [dataset]),
    )


def averages_table(results: Results, method: SelectionMethod) -> Table:
    """DomainBed's table over data sets: the mean over trials of each trial's mean over test environments."""
    datasets = list(results.environments)
    grid = [
        [results.summary(method, dataset, algorithm, "out_of_domain") for dataset in datasets]
        for algorithm in results.algorithms
    ]
    return _accuracy_table(
        f"Averages, model selection: {method.title}",
        [*datasets, "Avg"],
        results.algorithms,
        grid,
        "Each trial's mean accuracy over test environments in %, mean +/- standard error over trials."
        + _warning(results, method, datasets),
    )


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
    rows = [
        [
            f"{algorithm} ({lack})" if (lack := results.incomplete(method, dataset, algorithm)) else algorithm,
            _parameters(results.scores(method, dataset, algorithm)),
            *map(_narrow, cells),
        ]
        for algorithm, cells in zip(results.algorithms, grid, strict=True)
    ]
    return Table(
        f"{dataset}, generalisation",
        ["Algorithm", "Trainable", "In domain", "Out of domain", "Train", "Gap source", "Gap target"],
        rows,
        "Trainable: parameters, and their share of all. In domain: accuracy on the held-out 20 % of the training "
        "environments. Out of domain: on the test environment. Train: on the 80 % trained on"
        f"{_train_share(results, method, dataset)}. Gap source = train − in domain, gap target = train − "
        "out of domain. In %, mean +/- standard error over trials of each trial's mean over test environments. "
        f"Selection: {method.description}." + _warning(results, method, [dataset]),
        {(row, column + 2) for row, column in _best([cells[:2] for cells in grid])},
    )


def show(console: Console, results: Results, tables: Iterable[Table]) -> None:
    """Prints tables; piped, nothing is coloured, wrapped or cut off if the console is wide enough.

    Args:
        console: where to.
        results: the figures that the tables show, for a word on their number.
        tables: the tables.
    """
    runs = len({record["run"] for record in results.records})
    console.print(f"{runs} runs, {len(results.records)} records", highlight=False)
    if warning := results.duplicates():
        console.print(Text(f"Note: {warning}", "yellow"), soft_wrap=True)
    for table in tables:
        console.print()
        console.print(Text(table.title, "bold"), soft_wrap=True)
        console.print(table.to_rich())
        console.print(Text(table.caption, "dim"), soft_wrap=not console.is_terminal)


def markdown(results: Results, tables: Iterable[Table]) -> str:
    """Tables as one Markdown page."""
    warning = results.duplicates()
    parts = ["# Results", *([f"Note: {_markdown(warning)}"] if warning else [])]
    for table in tables:
        parts += [f"## {_markdown(table.title)}", table.to_markdown(), _markdown(table.caption)]
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
        [algorithm, *(str(cell or MISSING) for cell in cells), f"{average.mean:.1f}" if average else MISSING]
        for algorithm, cells, average in zip(algorithms, grid, averages, strict=True)
    ]
    full = [[*cells, average] for cells, average in zip(grid, averages, strict=True)]
    best = {(row, column + 1) for row, column in _best(full)}
    return Table(title, ["Algorithm", *columns], rows, caption, best)


def _best(grid: list[list[Summary | None]]) -> set[tuple[int, int]]:
    """The cells with the highest mean of their column as printed, among those that can be compared."""
    best: set[tuple[int, int]] = set()
    for number, column in enumerate(zip(*grid, strict=True)):
        means = {
            row: round(cell.mean, 1)
            for row, cell in enumerate(column)
            if cell is not None and cell.complete and not np.isnan(cell.mean)
        }
        if len(means) > 1:
            best |= {(row, number) for row, mean in means.items() if mean == max(means.values())}
    return best


def _narrow(cell: Summary | None) -> str:
    """A cell of a table that is to fit a terminal, without the error that a single trial does not have."""
    if cell is None:
        return MISSING
    return f"{cell.mean:.1f}" + (f"±{cell.err:.1f}" if cell.trials > 1 else "")


def _warning(results: Results, method: SelectionMethod, datasets: list[str]) -> str:
    """What keeps the figures from meaning what they seem to, as sentences to append to a caption."""
    lacking = [
        f"{algorithm}{f' on {dataset}' if len(datasets) > 1 else ''} ({lack})"
        for algorithm in results.algorithms
        for dataset in datasets
        if (lack := results.incomplete(method, dataset, algorithm))
    ]
    trials = {
        len({score.group.trial_seed for score in results.scores(method, dataset, algorithm)})
        for algorithm in results.algorithms
        for dataset in datasets
    }
    alone = " One trial only: its error is not known." if max(trials) == 1 else ""
    return alone + (f" Incomplete: {', '.join(lacking)}." if lacking else "")


def _train_share(results: Results, method: SelectionMethod, dataset: str) -> str:
    """How much of the training images the train accuracies are of, where runs saved time on a part of them."""
    shares = {
        float(score.selection.record["args"].get("train_eval_share") or 1)
        for algorithm in results.algorithms
        for score in results.scores(method, dataset, algorithm)
    }
    return "" if shares <= {1.0} else f" (estimated from {' or '.join(f'{100 * s:g} %' for s in sorted(shares))} of it)"


def _parameters(scores: list[Score]) -> str:
    """Trainable parameters and their share, as a range where the chosen hyperparameters differ in rank."""
    if not scores:
        return MISSING
    trainable, total = recorded(scores, "trainable_parameters"), recorded(scores, "total_parameters")
    if not trainable:
        return NOT_RECORDED
    text = " to ".join(f"{count:,}" for count in sorted({min(trainable), max(trainable)}))
    if len(trainable) == len(total):
        shares = {f"{100 * part / whole:.3g}": part / whole for part, whole in zip(trainable, total, strict=True)}
        ends = sorted(shares, key=lambda share: shares[share])
        text += f" ({' to '.join(dict.fromkeys((ends[0], ends[-1])))}%)"
    return text


def _latex(text: str) -> str:
    return text.translate(LATEX_ESCAPES).replace(" +/- ", "±").replace("±", r" $\pm$ ")


def _markdown(text: str) -> str:
    return re.sub(r"([|*_\\<>\[\]])", r"\\\1", text)
