"""The figures and tables of single-source runs, which are trained on one environment and tested on all others.

Selection is by the source's holdout, whose accuracy is also the in-domain one. Errors are standard deviations over
trials, and tables are laid out, as in Zhu et al., Asymmetry in Low-Rank Adapters of Foundation Models (2024), tables 11
to 13.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from domainbed_ext import divergence
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.model_selection import SOURCE_HOLDOUT, Record, training_environments
from domainbed_ext.report.differences import TRIALS_ALONE, Resampling
from domainbed_ext.report.environments import environment_labels
from domainbed_ext.report.figures import Comparison, Figures, Place
from domainbed_ext.report.methods import algorithm_order
from domainbed_ext.report.scores import Metric, Score
from domainbed_ext.report.summary import Summary, summarise_spread
from domainbed_ext.report.tables import bounds
from domainbed_ext.report.tables.captions import holdout_share, train_share, warning, without_in_domain
from domainbed_ext.report.tables.columns import Column, Figure, Trainable, make_table
from domainbed_ext.report.tables.table import Table

Quantity = Literal["accuracy", "gap"]


class Row(NamedTuple):
    """A row of a table."""

    dataset: str
    algorithm: str
    source: int


@dataclass(frozen=True, eq=False)
class SourceComparison(Comparison):
    """The methods trained on one environment of a data set.

    Attributes:
        source_env: Index of that environment.
    """

    source_env: int
    error = "standard deviation over trials"
    unit = "trials"
    scores_per_trial = 1  # a run is tested on all other environments

    @property
    def source(self) -> str:
        """Label of the environment trained on."""
        return self.environments[self.source_env]

    @property
    def title(self) -> str:
        """Data set and source."""
        return f"{self.dataset}, from {self.source} alone"

    def summarise(self, values: Sequence[float]) -> Summary | None:
        """Mean and standard deviation over trials."""
        return summarise_spread(values)

    def comparable(self, algorithm: str, summary: Summary | None) -> Summary | None:
        """A mean over fewer trials than there are is not to be called the best."""
        return summary and summary._replace(complete=not self.incomplete(algorithm))

    def tested_on(self, score: Score) -> str:
        """All other environments."""
        return "Avg"

    def places(self, metric: Metric) -> list[Place]:
        """The source, or each test domain and their mean."""
        if metric in ("out_of_domain", "gap_target"):
            test_domains = [(env, label) for env, label in enumerate(self.environments) if env != self.source_env]
            return [*test_domains, (None, "Avg")]
        return [(None, self.source)]

    def roles(self) -> list[str]:
        """The environments, each with its role: the source is in-domain (ID), all others are out-of-domain (OOD)."""
        return [f"{label} ({'ID' if env == self.source_env else 'OOD'})" for env, label in enumerate(self.environments)]

    def metric_of(self, quantity: Quantity, env: int | None) -> tuple[Metric, int | None]:
        """The metric that an accuracy or a gap on an environment is.

        Args:
            quantity: Accuracy, or train accuracy minus accuracy.
            env: Environment; the source stands for its holdout, None for the mean over the test domains.

        Returns:
            Metric, and the test domain.
        """
        if env == self.source_env:
            return ("in_domain" if quantity == "accuracy" else "gap_source"), None
        return ("out_of_domain" if quantity == "accuracy" else "gap_target"), env


class SingleSource(Figures):
    """The figures of single-source runs.

    Args:
        records: Records of such runs alone, in any order.
        adapted_shapes: Shapes of the layers that an adapter adapts, for the bounds on the gap.
        resampling: How images are drawn for the intervals of differences.

    Attributes:
        sources: Indices of the environments that were trained on, ascending, of each data set.
    """

    def __init__(
        self,
        records: Sequence[Record],
        adapted_shapes: bounds.AdaptedShapes = bounds.no_shapes,
        resampling: Resampling = TRIALS_ALONE,
    ) -> None:
        self.environments = environment_labels(records)
        self.algorithms = sorted({record["args"]["algorithm"] for record in records}, key=algorithm_order)
        self._adapted_shapes = adapted_shapes
        groups: defaultdict[tuple[Row, int], list[Record]] = defaultdict(list)
        for record in records:
            groups[_row(record), record["args"]["trial_seed"]].append(record)
        self.sources = {
            dataset: sorted({row.source for row, _ in groups if row.dataset == dataset})
            for dataset in self.environments
        }
        trials: defaultdict[str, set[int]] = defaultdict(set)
        scores: defaultdict[tuple[str, int], dict[str, list[Score]]] = defaultdict(dict)
        for (row, trial_seed), members in sorted(groups.items()):
            trials[row.dataset].add(trial_seed)
            if (selection := SOURCE_HOLDOUT.select(members, row.source)) is not None:
                scores[row.dataset, row.source].setdefault(row.algorithm, []).append(Score(selection))
        diverged = divergence.count(records, _row)
        self._comparisons: dict[tuple[str, int], SourceComparison] = {}
        for dataset, sources in self.sources.items():
            for source in sources:
                self._comparisons[dataset, source] = SourceComparison(
                    dataset,
                    self.environments[dataset],
                    SOURCE_HOLDOUT,
                    # Methods may have been given different sources.
                    [algorithm for algorithm in self.algorithms if algorithm in scores[dataset, source]],
                    scores[dataset, source],
                    len(trials[dataset]),
                    {row.algorithm: count for row, count in diverged.items() if row[::2] == (dataset, source)},
                    resampling,
                    source,
                )
        self.comparisons = list(self._comparisons.values())

    def comparison(self, dataset: str, source: int) -> SourceComparison:
        """The methods trained on one environment of a data set."""
        return self._comparisons[dataset, source]

    @property
    def main(self) -> list[Comparison]:
        """All: there is one selection method."""
        return self.comparisons

    @staticmethod
    def setting(record: Record, labels: Sequence[str]) -> str:
        """Names the source."""
        return f"trained on {labels[training_environments(record)[0]]} alone"

    def tables(self, reference: str | None = None) -> list[Table]:
        """Accuracy and gap of every data set and source.

        Args:
            reference: Id of the method that all others are compared with; None for no such table.
        """
        tables = []
        for comparison in self._comparisons.values():
            title = f"{comparison.dataset}, single source {comparison.source}"
            tables += [accuracy_table(comparison), gap_table(comparison)]
            tables += self.compared_methods(comparison, title, reference)
            tables += bounds.bounds_tables(comparison, title, self._adapted_shapes)
        return tables


def accuracy_table(comparison: SourceComparison) -> Table:
    """A row per algorithm, a column per environment and their out-of-domain mean, as in tables 11 and 12."""
    source = comparison.source
    return make_table(
        f"{comparison.dataset}, single source {source}: accuracy",
        comparison.algorithms,
        [Trainable("Trainable", comparison), *_by_environment(comparison, "accuracy", ranked=True)],
        f"Trained on {source} alone. Trainable: parameters, and their share of all. {source} (ID): in-domain accuracy, "
        f"on its held-out {holdout_share(_records(comparison))}; the other columns (OOD): out-of-domain accuracy, on "
        "environments not trained on; OOD mean: over those. In %, mean ± standard deviation over trials. Step and "
        "hyperparameters are selected by the in-domain accuracy."
        + without_in_domain(comparison)
        + warning([comparison]),
        comparison.incomplete,
    )


def gap_table(comparison: SourceComparison) -> Table:
    """Train accuracy minus the accuracy on each environment, as in table 13.

    Args:
        comparison: The methods trained on one environment.

    Returns:
        The table. Gaps are not set in bold: a method that learns nothing has the smallest.
    """
    return make_table(
        f"{comparison.dataset}, single source {comparison.source}: generalisation gap",
        comparison.algorithms,
        [Figure("Train", comparison, "train"), *_by_environment(comparison, "gap")],
        f"Train: accuracy on the images of {comparison.source} trained on{train_share(_records(comparison))}. Other "
        "columns: train accuracy minus the accuracy on that environment, and on the OOD ones in the mean, in "
        "percentage points, mean ± standard deviation over trials."
        + without_in_domain(comparison)
        + warning([comparison]),
        comparison.incomplete,
    )


def _by_environment(comparison: SourceComparison, quantity: Quantity, ranked: bool = False) -> list[Column]:
    headers: list[tuple[int | None, str]] = [*enumerate(comparison.roles()), (None, "OOD mean")]
    return [Figure(header, comparison, *comparison.metric_of(quantity, env), ranked) for env, header in headers]


def _records(comparison: Comparison) -> list[Record]:
    return [record for algorithm in comparison.algorithms for record in comparison.records(algorithm)]


def _row(record: Record) -> Row:
    sources = training_environments(record)
    if len(sources) != 1:
        raise BenchmarkError(
            f"run {record['run']} is called single_source but was trained on {len(sources)} environments"
        )
    return Row(record["args"]["dataset"], record["args"]["algorithm"], sources[0])
