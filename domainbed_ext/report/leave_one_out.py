"""The figures and tables of runs that are trained on all environments but one, which they are tested on.

Numbers agree with DomainBed's: means are taken over the same values before any rounding, and an error is the
standard deviation (ddof = 0) over trials by the root of their number.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from domainbed_ext import divergence
from domainbed_ext.model_selection import (
    LEAVE_ONE_DOMAIN_OUT,
    ORACLE,
    TRAINING_DOMAIN,
    Group,
    Record,
    SelectionMethod,
    group_records,
)
from domainbed_ext.report.differences import TRIALS_ALONE, Resampling
from domainbed_ext.report.environments import environment_labels
from domainbed_ext.report.figures import Comparison, Figures, Place
from domainbed_ext.report.methods import algorithm_order
from domainbed_ext.report.missing_pairs import Pairs
from domainbed_ext.report.scores import Metric, Score
from domainbed_ext.report.summary import Summary, summarise
from domainbed_ext.report.tables import bounds
from domainbed_ext.report.tables.captions import holdout_share, train_share, warning, without_in_domain
from domainbed_ext.report.tables.columns import Average, Figure, Trainable, make_table
from domainbed_ext.report.tables.table import MISSING, Table


@dataclass(frozen=True, eq=False)
class LeaveOneOutComparison(Comparison):
    """The methods on one data set, each environment in turn the test domain."""

    error = "standard error over trials"
    unit = "results"
    source = ""

    @property
    def title(self) -> str:
        """The data set."""
        return self.dataset

    @property
    def scores_per_trial(self) -> int:
        """One per environment."""
        return len(self.environments)

    def summarise(self, values: Sequence[float]) -> Summary | None:
        """Mean and standard error over trials."""
        return summarise(values)

    def tested_on(self, score: Score) -> str:
        """Label of the test domain."""
        return self.environments[score.test_envs[0]]

    def places(self, metric: Metric) -> list[Place]:
        """Every metric is known by test domain."""
        return [*enumerate(self.environments), (None, "Avg")]


class LeaveOneOut(Figures):
    """The figures of leave-one-out runs.

    Args:
        records: Records of such runs alone, in any order.
        methods: Selection methods; None for training-domain validation, oracle and, where there are runs with two test
            environments, leave-one-domain-out cross-validation.
        adapted_shapes: Shapes of the layers that an adapter adapts, for the bounds on the gap.
        resampling: How images are drawn for the intervals of differences.

    Attributes:
        methods: Selection methods, in the order given.
        pairs: Runs with two test environments, and those that are missing.
    """

    def __init__(
        self,
        records: Sequence[Record],
        methods: Sequence[SelectionMethod] | None = None,
        adapted_shapes: bounds.AdaptedShapes = bounds.no_shapes,
        resampling: Resampling = TRIALS_ALONE,
    ) -> None:
        groups = group_records(records)
        self.environments = environment_labels(records)
        self.algorithms = sorted({group.algorithm for group in groups}, key=algorithm_order)
        self.pairs = Pairs(records, self.environments, self.algorithms)
        if methods is None:
            has_pairs = any(len(record["args"]["test_envs"]) == 2 for record in records)
            methods = [TRAINING_DOMAIN, *([LEAVE_ONE_DOMAIN_OUT] if has_pairs else []), ORACLE]
        self.methods = list(methods)
        self._adapted_shapes = adapted_shapes
        scores = self._select(groups)
        trials: defaultdict[str, set[int]] = defaultdict(set)
        for group in groups:
            trials[group.dataset].add(group.trial_seed)
        diverged = divergence.count(records, lambda record: (record["args"]["dataset"], record["args"]["algorithm"]))
        self._comparisons = {
            (method.name, dataset): LeaveOneOutComparison(
                dataset,
                labels,
                method,
                self.algorithms,
                scores[method.name, dataset],
                len(trials[dataset]),
                {algorithm: count for (name, algorithm), count in diverged.items() if name == dataset},
                resampling,
            )
            for dataset, labels in self.environments.items()
            for method in self.methods
        }
        self.comparisons = list(self._comparisons.values())

    def _select(self, groups: dict[Group, list[Record]]) -> defaultdict[tuple[str, str], dict[str, list[Score]]]:
        """The chosen records by selection method and data set, then by algorithm."""
        scores: defaultdict[tuple[str, str], dict[str, list[Score]]] = defaultdict(dict)
        for method in self.methods:
            for group, members in groups.items():
                if (selection := method.select(members, group.test_env)) is not None:
                    scores[method.name, group.dataset].setdefault(group.algorithm, []).append(Score(selection))
        return scores

    def comparison(self, method: SelectionMethod, dataset: str) -> Comparison:
        """The methods on one data set under one selection method."""
        return self._comparisons[method.name, dataset]

    @property
    def main_method(self) -> SelectionMethod:
        """The selection method of the generalisation tables and the plots: training-domain, if it is among them."""
        return TRAINING_DOMAIN if TRAINING_DOMAIN in self.methods else self.methods[0]

    @property
    def main(self) -> list[Comparison]:
        """Those of the main selection method."""
        return [self.comparison(self.main_method, dataset) for dataset in self.environments]

    @staticmethod
    def setting(record: Record, labels: Sequence[str]) -> str:
        """Names the test domains."""
        test_envs = record["args"]["test_envs"]
        return f"test domain{'s' if len(test_envs) > 1 else ''} " + " and ".join(labels[env] for env in test_envs)

    def tables(self, reference: str | None = None) -> list[Table]:
        """DomainBed's tables for each selection method, then those of generalisation.

        Args:
            reference: Id of the method that all others are compared with; None for no such table.
        """
        tables: list[Table] = []
        for method in self.methods:
            compared = [self.comparison(method, dataset) for dataset in self.environments]
            made = [self._explained(domain_table(comparison), [comparison]) for comparison in compared]
            averages = self._explained(averages_table(compared), compared)
            # Of one data set, they are the column Avg of its table.
            averages.shown = "folded" if len(compared) > 1 else "files"
            if method is not self.main_method:
                for table in made:
                    table.shown = "folded"
            tables += [*made, averages]
        for comparison in self.main:
            tables.append(generalisation_table(comparison))
            tables += self.compared_methods(comparison, comparison.dataset, reference)
            tables += bounds.bounds_tables(comparison, comparison.dataset, self._adapted_shapes)
        return tables

    def _explained(self, table: Table, compared: Sequence[Comparison]) -> Table:
        """Says which runs are missing, and leaves out a grid that would hold nothing but X."""
        if compared[0].selection is LEAVE_ONE_DOMAIN_OUT:
            missing = [sentence for each in compared if (sentence := self.pairs.sentence(each.dataset))]
            table.caption = " ".join([table.caption, *missing])
        if all(cell == MISSING for row in table.rows for cell in row[1:]):
            table.rows, table.origins = [], {}
            table.caption = f"No figure can be given yet. {table.caption}"
        return table


def domain_table(comparison: Comparison) -> Table:
    """DomainBed's table of one data set: a row per algorithm, a column per test environment."""
    columns = [
        Figure(label, comparison, "out_of_domain", env, ranked=True, form=str)
        for env, label in enumerate(comparison.environments)
    ]
    return make_table(
        f"{comparison.dataset}, model selection: {comparison.selection.title}",
        comparison.algorithms,
        [*columns, Average("Avg", columns, comparison)],
        "Accuracy on each test domain in %, mean ± standard error over trials. "
        f"Selection: {comparison.selection.description}." + warning([comparison]),
    )


def averages_table(compared: Sequence[Comparison]) -> Table:
    """DomainBed's table over data sets: the mean over trials of each trial's mean over test environments."""
    columns = [
        Figure(comparison.dataset, comparison, "out_of_domain", ranked=True, form=str) for comparison in compared
    ]
    return make_table(
        f"Averages, model selection: {compared[0].selection.title}",
        compared[0].algorithms,
        [*columns, Average("Avg", columns)],
        "Each trial's mean accuracy over test domains in %, mean ± standard error over trials." + warning(compared),
    )


def generalisation_table(comparison: Comparison) -> Table:
    """What DomainBed's tables leave out: parameters, in-domain accuracy, and gaps of train to test accuracy.

    Args:
        comparison: The methods on one data set.

    Returns:
        The table. Gaps are train accuracy minus test accuracy, as in table 13 of Zhu et al., Asymmetry in
        Low-Rank Adapters of Foundation Models (2024). They are not set in bold: a method that learns nothing
        has the smallest.
    """
    records = [record for algorithm in comparison.algorithms for record in comparison.records(algorithm)]
    return make_table(
        f"{comparison.dataset}, generalisation",
        comparison.algorithms,
        [
            Trainable("Trainable", comparison),
            Figure("In-domain", comparison, "in_domain", ranked=True),
            Figure("Out-of-domain", comparison, "out_of_domain", ranked=True),
            Figure("Train", comparison, "train"),
            Figure("Gap source", comparison, "gap_source"),
            Figure("Gap target", comparison, "gap_target"),
        ],
        "Trainable: parameters, and their share of all. In-domain: accuracy on the held-out "
        f"{holdout_share(records)} of the training domains. Out-of-domain: on the test domain. Train: on the images "
        f"trained on{train_share(records)}. "
        "Gap source = train − in-domain, gap target = train − out-of-domain accuracy. In %, mean ± standard error over "
        f"trials of each trial's mean over test domains. Selection: {comparison.selection.description}."
        + without_in_domain(comparison)
        + warning([comparison]),
        comparison.incomplete,
    )
