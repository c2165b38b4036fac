"""From records to tables: DomainBed's own, and one of generalisation that DomainBed lacks.

`Results` holds every chosen record; a table is a grid of strings made from it, shown by rich, as Markdown or
as LaTeX. Numbers agree with DomainBed's: means are taken over the same values before any rounding, and an error
is the standard deviation (ddof = 0) over trials by the root of their number.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.model_selection import (
    LEAVE_ONE_DOMAIN_OUT,
    ORACLE,
    TRAINING_DOMAIN,
    Group,
    Record,
    Selection,
    SelectionMethod,
    accuracy,
    group_records,
    num_environments,
    training_environments,
)

Metric = Literal["out_of_domain", "in_domain", "train", "gap_source", "gap_target"]

# DomainBed's labels, for records that do not name their environments (its own), and its order of data sets.
ENVIRONMENTS = {
    "ColoredMNIST": ["+90%", "+80%", "-90%"],
    "RotatedMNIST": ["0", "15", "30", "45", "60", "75"],
    "VLCS": ["C", "L", "S", "V"],
    "PACS": ["A", "C", "P", "S"],
    "OfficeHome": ["A", "C", "P", "R"],
    "TerraIncognita": ["L100", "L38", "L43", "L46"],
    "DomainNet": ["clip", "info", "paint", "quick", "real", "sketch"],
}
ALGORITHMS = ["BA", "BOnly", "AOnly", "LP", "FullFT"]

MISSING = "X"
NOT_RECORDED = "-"
LATEX_ESCAPES = str.maketrans(
    {character: "\\" + character for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$"}
)


def algorithm_order(name: str) -> tuple[object, ...]:
    """Sorts algorithms: ours first, each followed by its @variants (rank=8 before rank=16), then others."""
    family, _, variant = name.partition("@")
    place = ALGORITHMS.index(family) if family in ALGORITHMS else len(ALGORITHMS)
    natural = [(part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", variant)]
    return place, family, natural


def dataset_order(name: str) -> tuple[int, str]:
    """Sorts data sets as DomainBed does, those it does not know after them by name."""
    known = list(ENVIRONMENTS)
    return (known.index(name) if name in known else len(known)), name


class Summary(NamedTuple):
    """A mean over trials and its standard error, in percent; incomplete where a trial lacks an environment."""

    mean: float
    err: float
    trials: int
    complete: bool = True

    def __str__(self) -> str:
        return f"{self.mean:.1f} +/- {self.err:.1f}"


def summarise(values: Sequence[float]) -> Summary | None:
    """Mean and standard error in percent of one accuracy per trial; None of none.

    Args:
        values: accuracies in [0, 1].

    Returns:
        The summary. One trial has error 0, as in DomainBed's tables, though its spread is not known.
    """
    if not values:
        return None
    return Summary(100 * float(np.mean(values)), 100 * float(np.std(values)) / float(np.sqrt(len(values))), len(values))


@dataclass(frozen=True)
class Score:
    """The chosen record of one group: one trial's figure on one test environment."""

    group: Group
    selection: Selection

    def __getitem__(self, metric: Metric) -> float:
        """An accuracy, or a difference of two, in [0, 1]."""
        if metric == "out_of_domain":
            return self.selection.test_acc
        if metric == "in_domain":
            return self._over_training_environments("out")
        if metric == "train":
            return self._over_training_environments("in")
        return self["train"] - self["in_domain" if metric == "gap_source" else "out_of_domain"]

    def _over_training_environments(self, split: Literal["in", "out"]) -> float:
        record = self.selection.record
        return float(np.mean([accuracy(record, env, split) for env in training_environments(record)]))


class Results:
    """The figures of any number of runs.

    Args:
        records: as `records.load_records` returns them; their order does not matter.
        methods: the selection methods; by default training-domain and oracle, and leave-one-domain-out where
            there are runs with two test environments, which it needs.

    Attributes:
        records: the records given.
        methods: the selection methods, in the order given.
        environments: the environments' names of each data set, in the order of tables.
        algorithms: their names, in the order of tables.
    """

    def __init__(self, records: Sequence[Record], methods: Sequence[SelectionMethod] | None = None) -> None:
        groups = group_records(records)
        self.records = records
        self.algorithms = sorted({group.algorithm for group in groups}, key=algorithm_order)
        self.environments = _environments(records)
        if methods is None:
            pairs = any(len(record["args"]["test_envs"]) == 2 for record in records)
            methods = [TRAINING_DOMAIN, *([LEAVE_ONE_DOMAIN_OUT] if pairs else []), ORACLE]
        self.methods = list(methods)
        self._trials: defaultdict[str, set[int]] = defaultdict(set)
        for group in groups:
            self._trials[group.dataset].add(group.trial_seed)
        self._scores: defaultdict[tuple[str, str, str], list[Score]] = defaultdict(list)
        for method in self.methods:
            for group, members in groups.items():
                if (selection := method.select(members, group.test_env)) is not None:
                    self._scores[method.name, group.dataset, group.algorithm].append(Score(group, selection))

    @property
    def main_method(self) -> SelectionMethod:
        """The method of the generalisation tables and the plot: training-domain, if it is among them."""
        return TRAINING_DOMAIN if TRAINING_DOMAIN in self.methods else self.methods[0]

    def scores(self, method: SelectionMethod, dataset: str, algorithm: str) -> list[Score]:
        """The chosen records of one row of a table, by trial and test environment."""
        return self._scores.get((method.name, dataset, algorithm), [])

    def summary(
        self,
        method: SelectionMethod,
        dataset: str,
        algorithm: str,
        metric: Metric,
        test_env: int | None = None,
    ) -> Summary | None:
        """Mean and error over trials, in percent.

        Args:
            method: the selection method.
            dataset: a data set.
            algorithm: an algorithm.
            metric: what to average.
            test_env: a test environment; None for each trial's mean over those it has.

        Returns:
            The summary; None where no run has been chosen.
        """
        by_trial: defaultdict[int, list[float]] = defaultdict(list)
        for score in self.scores(method, dataset, algorithm):
            if test_env in (None, score.group.test_env):
                by_trial[score.group.trial_seed].append(score[metric])
        found = summarise([float(np.mean(values)) for values in by_trial.values()])
        wanted = len(self.environments[dataset]) if test_env is None else 1
        return found and found._replace(complete=all(len(values) == wanted for values in by_trial.values()))

    def incomplete(self, method: SelectionMethod, dataset: str, algorithm: str) -> str:
        """What a row's averages lack, as "3 of 4 environments"; empty if nothing, or everything."""
        scores = self.scores(method, dataset, algorithm)
        environments, trials = len(self.environments[dataset]), len(self._trials[dataset])
        if (seen := len({score.group.test_env for score in scores})) < environments:
            return f"{seen} of {environments} environments" if seen else ""
        expected = environments * trials
        return f"{len(scores)} of {expected} results" if len(scores) < expected else ""

    def duplicates(self) -> str:
        """A warning of runs that no selection method tells apart; empty if there are none."""
        runs: defaultdict[tuple[object, ...], set[str]] = defaultdict(set)
        for record in self.records:
            args = record["args"]
            seeds = args["trial_seed"], args["hparams_seed"]
            runs[args["dataset"], args["algorithm"], tuple(args["test_envs"]), seeds].add(record["run"])
        same = sorted(sorted(names) for names in runs.values() if len(names) > 1)
        if not same:
            return ""
        more = f" (and {len(same) - 1} more such sets)" if len(same) > 1 else ""
        return (
            f"runs {', '.join(same[0])}{more} have the same data set, algorithm, test environments, "
            "trial seed and hyperparameter seed: their records are pooled as if of one run."
        )

    def tidy(self) -> pd.DataFrame:
        """Every figure: a row per data set, algorithm, selection method, metric and environment, in percent.

        The environment "Avg" is the mean over trials of each trial's mean over environments (DomainBed's
        Averages table). Parameter counts are their own metrics, in numbers.
        """
        rows: list[tuple[object, ...]] = []
        for dataset, names in self.environments.items():
            for algorithm in self.algorithms:
                for method in self.methods:
                    key = dataset, algorithm, method.name
                    for metric in get_args(Metric):
                        for env, name in [*enumerate(names), (None, "Avg")]:
                            if (found := self.summary(method, dataset, algorithm, metric, env)) is not None:
                                rows.append((*key, metric, name, *found))
                    scores = self.scores(method, dataset, algorithm)
                    trials = len({score.group.trial_seed for score in scores})
                    for count in ("trainable_parameters", "total_parameters"):
                        if values := _recorded(scores, count):
                            found = Summary(float(np.mean(values)), float("nan"), trials)
                            rows.append((*key, count, "Avg", *found))
        columns = ["dataset", "algorithm", "selection", "metric", "environment", *Summary._fields]
        return pd.DataFrame(rows, columns=columns)

    def selected(self) -> pd.DataFrame:
        """Where every figure comes from: a row per chosen record, with its run, step and hyperparameters."""
        rows = [
            {
                "dataset": score.group.dataset,
                "algorithm": score.group.algorithm,
                "selection": method.name,
                "trial_seed": score.group.trial_seed,
                "environment": self.environments[dataset][score.group.test_env],
                "val_acc": score.selection.val_acc,
                **{metric: score[metric] for metric in get_args(Metric)},
                "run": score.selection.record["run"],
                "step": score.selection.step,
                "hparams_seed": score.selection.hparams_seed,
                "hparams": json.dumps(score.selection.record.get("hparams"), sort_keys=True),
            }
            for dataset in self.environments
            for algorithm in self.algorithms
            for method in self.methods
            for score in self.scores(method, dataset, algorithm)
        ]
        return pd.DataFrame(rows)


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
            *map(_bare_if_alone, cells),
        ]
        for algorithm, cells in zip(results.algorithms, grid, strict=True)
    ]
    return Table(
        f"{dataset}, generalisation",
        ["Algorithm", "Trainable", "In-domain", "Out-of-domain", "Train", "Gap source", "Gap target"],
        rows,
        "Trainable: parameters, and their share of all. In-domain: accuracy on the held-out 20 % of the training "
        "environments. Out-of-domain: on the test environment. Train: on the 80 % trained on"
        f"{_train_share(results, method, dataset)}. Gap source = train − in-domain, gap target = train − "
        "out-of-domain. In %, mean +/- standard error over trials of each trial's mean over test environments. "
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


def _environments(records: Iterable[Record]) -> dict[str, list[str]]:
    """The names of each data set's environments: as recorded, else DomainBed's, else env0, env1, ..."""
    named: dict[str, tuple[list[str], str]] = {}
    count: defaultdict[str, int] = defaultdict(int)
    for record in records:
        dataset = record["args"]["dataset"]
        count[dataset] = max(count[dataset], num_environments(record))
        if names := record.get("environments"):
            first, run = named.setdefault(dataset, (names, record["run"]))
            if names != first:
                raise BenchmarkError(
                    f"runs {run} and {record['run']} disagree on the environments of {dataset} "
                    f"({', '.join(first)} against {', '.join(names)}): collect them from separate folders"
                )
    environments: dict[str, list[str]] = {}
    for dataset in sorted(count, key=dataset_order):
        names = named[dataset][0] if dataset in named else ENVIRONMENTS.get(dataset, [])
        # Records of fewer or more environments than the names we know are not of the data set that we know.
        environments[dataset] = (
            list(names) if len(names) == count[dataset] else [f"env{env}" for env in range(count[dataset])]
        )
    return environments


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


def _bare_if_alone(cell: Summary | None) -> str:
    """A cell without the error that a single trial does not have."""
    if cell is None:
        return MISSING
    return str(cell) if cell.trials > 1 else f"{cell.mean:.1f}"


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


def _recorded(scores: Iterable[Score], key: str) -> list[int]:
    """The values of a key that the chosen records may lack."""
    return [score.selection.record[key] for score in scores if score.selection.record.get(key) is not None]


def _parameters(scores: list[Score]) -> str:
    """Trainable parameters and their share, as a range where the chosen hyperparameters differ in rank."""
    if not scores:
        return MISSING
    trainable, total = _recorded(scores, "trainable_parameters"), _recorded(scores, "total_parameters")
    if not trainable:
        return NOT_RECORDED
    text = " to ".join(f"{count:,}" for count in sorted({min(trainable), max(trainable)}))
    if len(trainable) == len(total):
        shares = {f"{100 * part / whole:.3g}": part / whole for part, whole in zip(trainable, total, strict=True)}
        ends = sorted(shares, key=lambda share: shares[share])
        text += f" ({' to '.join(dict.fromkeys((ends[0], ends[-1])))}%)"
    return text


def _latex(text: str) -> str:
    return text.translate(LATEX_ESCAPES).replace("+/-", r"$\pm$")


def _markdown(text: str) -> str:
    return re.sub(r"([|*_\\<>\[\]])", r"\\\1", text)
