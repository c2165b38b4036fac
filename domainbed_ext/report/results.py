"""The figures of a set of runs, of whatever protocol."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from functools import cached_property

import pandas as pd

from domainbed_ext.divergence import is_diverged
from domainbed_ext.model_selection import Record, SelectionMethod, group_records
from domainbed_ext.protocols import SINGLE_SOURCE, protocol_of
from domainbed_ext.report.differences import TRIALS_ALONE, Resampling
from domainbed_ext.report.figures import Comparison, Figures
from domainbed_ext.report.leave_one_out import LeaveOneOut
from domainbed_ext.report.methods import algorithm_order
from domainbed_ext.report.pairs import ComparedPairs, PairsOf, compare_pairs
from domainbed_ext.report.single_source import SingleSource
from domainbed_ext.report.summary import Summary
from domainbed_ext.report.tables import bounds
from domainbed_ext.report.tables.table import Table


class Results:
    """The figures of any number of runs, apart by protocol.

    Args:
        records: Records as `load_records` returns them, in any order.
        methods: Selection methods of leave-one-out runs; by default those that the runs allow.
        adapted_shapes: Shapes of the layers that an adapter adapts, for the bounds on the gap.
        resampling: How images are drawn for the intervals of differences.

    Attributes:
        records: Records given.
        runs: Records by run.
        algorithms: Ids of all methods, in the order of tables.
        leave_one_out: Figures of leave-one-out runs; None without any.
        single_source: Figures of single-source runs; None without any.
    """

    def __init__(
        self,
        records: Sequence[Record],
        methods: Sequence[SelectionMethod] | None = None,
        adapted_shapes: bounds.AdaptedShapes = bounds.no_shapes,
        resampling: Resampling = TRIALS_ALONE,
    ) -> None:
        group_records(records)  # refuses a record that lacks what all of this reads
        self.records = records
        self.runs: dict[str, list[Record]] = {}
        for record in records:
            self.runs.setdefault(record["run"], []).append(record)
        self.algorithms = sorted({record["args"]["algorithm"] for record in records}, key=algorithm_order)
        single = [record for record in records if protocol_of(record) == SINGLE_SOURCE]
        left_out = [record for record in records if protocol_of(record) != SINGLE_SOURCE]
        self.leave_one_out = LeaveOneOut(left_out, methods, adapted_shapes, resampling) if left_out else None
        self.single_source = SingleSource(single, adapted_shapes, resampling) if single else None

    @property
    def figures(self) -> list[Figures]:
        """The figures by protocol."""
        return [figures for figures in (self.leave_one_out, self.single_source) if figures is not None]

    @property
    def panels(self) -> list[Comparison]:
        """The comparisons of the plots."""
        return [comparison for figures in self.figures for comparison in figures.main]

    def chosen(self, algorithms: Collection[str]) -> list[Record]:
        """The records that the numbers of the plots come from, in the order of tables.

        Args:
            algorithms: Ids of methods.
        """
        return [
            record
            for comparison in self.panels
            for algorithm in comparison.algorithms
            if algorithm in algorithms
            for record in comparison.records(algorithm)
        ]

    @property
    def headline(self) -> str:
        """How many runs and records there are, how many derived runs, and how many runs diverged."""
        diverged = f", {self.diverged_runs} diverged" if self.diverged_runs else ""
        count = len(self.runs) - self.trained_runs
        derived = f"{count} derived from them, " if count else ""
        return f"{self.trained_runs} runs, {derived}{len(self.records)} records{diverged}"

    @cached_property
    def trained_runs(self) -> int:
        """How many runs were trained, and not derived from others."""
        return sum("derived" not in records[0] for records in self.runs.values())

    @cached_property
    def diverged_runs(self) -> int:
        """How many runs diverged."""
        return sum(any(map(is_diverged, records)) for records in self.runs.values())

    def tables(self, reference: str | None = None) -> list[Table]:
        """Every table of the report.

        Args:
            reference: Id of the method that all others are compared with; None for no such table.
        """
        return [table for figures in self.figures for table in figures.tables(reference)]

    def setting(self, record: Record, labels: Sequence[str]) -> str:
        """Says what a run was trained or tested on.

        Args:
            record: Record of the run.
            labels: Labels of the data set's environments.
        """
        protocol = SingleSource if protocol_of(record) == SINGLE_SOURCE else LeaveOneOut
        return protocol.setting(record, labels)

    def duplicates(self) -> str:
        """A warning of runs that no selection method tells apart; empty if there are none."""
        if not (same := self._pooled):
            return ""
        more = f" (and {len(same) - 1} more such sets)" if len(same) > 1 else ""
        return (
            f"runs {', '.join(same[0])}{more} have the same data set, algorithm, test environments, "
            "trial seed and hyperparameter seed: their records are pooled as if of one run."
        )

    @cached_property
    def _pooled(self) -> list[list[str]]:
        """The names of the runs that no selection method tells apart, set by set."""
        runs: defaultdict[tuple[object, ...], set[str]] = defaultdict(set)
        for record in self.records:
            args = record["args"]
            single = protocol_of(record) == SINGLE_SOURCE
            seeds = args["trial_seed"], args["hparams_seed"]
            runs[args["dataset"], args["algorithm"], single, tuple(args["test_envs"]), seeds].add(record["run"])
        return sorted(sorted(names) for names in runs.values() if len(names) > 1)

    def tidy(self) -> pd.DataFrame:
        """Every figure: a row per data set, algorithm, selection method, metric and environment, in percent.

        The environment "Avg" is the mean over trials of each trial's mean over environments (DomainBed's
        Averages table). Parameter counts are their own metrics, in numbers. "diverged" is the
        number of the row's runs that diverged. Rows of single-source runs name their
        `source`, and their `err` is the standard deviation over trials, not the standard error.
        """
        columns = ["dataset", "algorithm", "selection", "metric", "environment", *Summary._fields]
        columns += ["protocol", "source", "diverged", "label", "adaptation", "objective"]
        return pd.DataFrame([row for figures in self.figures for row in figures.rows()], columns=columns)

    def compare(self, pairs_of: PairsOf) -> list[ComparedPairs]:
        """The paired differences of pairs of methods in each comparison that has any.

        Args:
            pairs_of: Pairs to compare.
        """
        compared = [compare_pairs(comparison, pairs_of(comparison)) for comparison in self.panels]
        return [each for each in compared if each.rows]

    def frontier(self) -> pd.DataFrame:
        """Accuracies along the strength of the update: a row per data set, method, strength and metric, in percent.

        Empty where no run was evaluated at other strengths than its own.
        """
        return pd.DataFrame([row for figures in self.figures for row in figures.frontier_rows()])

    def selected(self) -> pd.DataFrame:
        """Where every figure comes from: a row per chosen record, with its run, step and hyperparameters."""
        return pd.DataFrame([row for figures in self.figures for row in figures.selected_rows()])
