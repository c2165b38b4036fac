"""What the report knows of a protocol: its comparisons, its tables, and the words for where a run was tested.

Tables, plots and page read figures through these classes alone. What differs between the protocols is in
`leave_one_out` and `single_source`.
"""

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, get_args

import numpy as np

from domainbed_ext.divergence import Count
from domainbed_ext.model_selection import Record, SelectionMethod, mean, unmeasured
from domainbed_ext.protocols import protocol_of
from domainbed_ext.report.differences import Differences, Resampling
from domainbed_ext.report.methods import adaptation_of, label_of, objective_of
from domainbed_ext.report.scores import Metric, Score
from domainbed_ext.report.summary import Summary
from domainbed_ext.report.tables.differences import difference_table
from domainbed_ext.report.tables.frontier import frontier_rows, frontier_tables
from domainbed_ext.report.tables.objectives import objectives_table
from domainbed_ext.report.tables.table import Table
from domainbed_ext.system import strict_json

Place = tuple[int | None, str]
"""An environment and its label; the environment None stands for the mean over the test domains."""


@dataclass(frozen=True, eq=False)
class Comparison(ABC):
    """The methods on one data set under one selection method: the rows of a table, the points of a panel.

    Attributes:
        dataset: Name of the data set.
        environments: Labels of its environments.
        selection: Selection method.
        algorithms: Ids of the methods, in the order of tables.
        by_algorithm: Scores of each method, by trial and test domain.
        num_trials: Number of trials that there are runs of.
        diverged: Number of diverged runs of each method.
        resampling: How images are drawn for the intervals of differences.
        error: What the error of a mean is.
        unit: What scores are called, in the plural.
    """

    dataset: str
    environments: list[str]
    selection: SelectionMethod
    algorithms: list[str]
    by_algorithm: Mapping[str, list[Score]]
    num_trials: int
    diverged: Mapping[str, Count]
    resampling: Resampling
    error: ClassVar[str]
    unit: ClassVar[str]

    @property
    @abstractmethod
    def title(self) -> str:
        """Title of the panel in plots."""

    @property
    @abstractmethod
    def source(self) -> str:
        """Label of the single source; empty if there are several."""

    @property
    @abstractmethod
    def scores_per_trial(self) -> int:
        """Number of scores of a complete trial."""

    @abstractmethod
    def summarise(self, values: Sequence[float]) -> Summary | None:
        """Mean over trials and its error, of one value in [0, 1] per trial."""

    @abstractmethod
    def tested_on(self, score: Score) -> str:
        """Label of what a score is of: one test domain, or "Avg" of all of its run's."""

    @abstractmethod
    def places(self, metric: Metric) -> list[Place]:
        """Returns what a metric is known of."""

    @cached_property
    def differences(self) -> Differences:
        """The paired differences between the methods."""
        return Differences(self, self.resampling)

    def tested(self, metric: Metric, score: Score) -> list[int | None]:
        """What a score's metric is known of: its test domains, or None where the metric is of no test domain.

        Args:
            metric: Accuracy or gap.
            score: Score of one of the methods.
        """
        return [env for env, _ in self.places(metric) if env is not None and env in score.test_envs] or [None]

    def scores(self, algorithm: str, env: int | None = None) -> list[Score]:
        """The chosen records of a method, by trial and test domain.

        Args:
            algorithm: Id of the method.
            env: Test domain that a score must have; None for all scores.
        """
        scores = self.by_algorithm.get(algorithm, [])
        return scores if env is None else [score for score in scores if env in score.test_envs]

    def records(self, algorithm: str, env: int | None = None) -> list[Record]:
        """The records of `scores`."""
        return [score.record for score in self.scores(algorithm, env)]

    def trials(self, algorithm: str) -> int:
        """Number of trials that have a score."""
        return len({score.trial_seed for score in self.scores(algorithm)})

    def summary(self, algorithm: str, metric: Metric, env: int | None = None) -> Summary | None:
        """Mean and error over trials, in percent.

        Args:
            algorithm: Id of the method.
            metric: What to average.
            env: Test domain; None for each trial's mean over those it has.

        Returns:
            Summary; None where no run was selected, or the metric is `unmeasured`.
        """
        if self.unmeasured(algorithm, metric):
            return None
        by_trial = self._by_trial(algorithm, metric, env)
        summary = self.summarise([mean(values) for values in by_trial.values()])
        expected = self.scores_per_trial if env is None else 1
        return summary and summary._replace(complete=all(len(values) == expected for values in by_trial.values()))

    def trial_means(self, algorithm: str, metric: Metric, env: int | None = None) -> dict[int, float]:
        """The mean of each trial over the test domains that it has, in [0, 1], by the trial's seed.

        Args:
            algorithm: Id of the method.
            metric: What to average.
            env: Test domain; None for all.
        """
        return {trial: mean(values) for trial, values in self._by_trial(algorithm, metric, env).items()}

    def is_near(self, algorithm: str, best: str, metric: Metric, env: int | None = None) -> bool:
        """Whether a method is within one standard error of the best one, of their difference paired by trial.

        Args:
            algorithm: Id of the method.
            best: Id of the method with the highest mean.
            metric: What is compared.
            env: Test domain; None for the mean over all.

        Returns:
            False where they share fewer than two trials.
        """
        one, other = (self.trial_means(name, metric, env) for name in (best, algorithm))
        paired = np.array([one[trial] - other[trial] for trial in one.keys() & other.keys()])
        return len(paired) > 1 and bool(paired.mean() <= paired.std(ddof=1) / math.sqrt(len(paired)))

    def _by_trial(self, algorithm: str, metric: Metric, env: int | None) -> dict[int, list[float]]:
        by_trial: defaultdict[int, list[float]] = defaultdict(list)
        for score in self.scores(algorithm, env):
            by_trial[score.trial_seed].append(score.value(metric, env))
        return by_trial

    def unmeasured(self, algorithm: str, metric: Metric = "in_domain") -> str:
        """Why a method has no figure, in a sentence; empty if it was measured, or no run was selected.

        Args:
            algorithm: Id of the method.
            metric: What would be averaged.
        """
        if metric not in ("in_domain", "gap_source"):
            return ""
        return next((reason for record in self.records(algorithm) if (reason := unmeasured(record))), "")

    def comparable(self, algorithm: str, summary: Summary | None) -> Summary | None:
        """The summary as it is ranked: incomplete where it must not be called the best."""
        return summary

    def incomplete(self, algorithm: str) -> str:
        """What a row's averages lack, as "3 of 4 environments" or "5 of 6 results"; empty if nothing, or everything."""
        scores = self.scores(algorithm)
        domains = len({tuple(score.test_envs) for score in scores})
        if not scores:
            return ""
        if domains < self.scores_per_trial:
            return f"{domains} of {self.scores_per_trial} environments"
        expected, there = self.scores_per_trial * self.num_trials, sum(len(score.trials) for score in scores)
        return f"{there} of {expected} {self.unit}" if there < expected else ""

    def recorded(self, algorithm: str, key: str) -> list[int]:
        """The values of a key that records may lack, of the chosen records that have it."""
        return [record[key] for record in self.records(algorithm) if record.get(key) is not None]

    def rows(self, algorithm: str) -> Iterator[dict[str, Any]]:
        """A method's figures as rows of `results.csv`."""
        scores = self.scores(algorithm)
        figures: list[tuple[str, str, Summary | None]] = [
            (metric, place, self.summary(algorithm, metric, env))
            for metric in get_args(Metric)
            for env, place in self.places(metric)
        ]
        figures += [(count, "Avg", summary) for count, summary in self._parameter_counts(algorithm)]
        for metric, place, summary in figures:
            if summary is not None:
                yield {
                    **self.key(algorithm),
                    "metric": metric,
                    "environment": place,
                    **summary._asdict(),
                    "protocol": " ".join(sorted({protocol_of(score.record) for score in scores})),
                    "source": self.source,
                    "diverged": self.diverged.get(algorithm, Count(0, 0)).diverged,
                    **self.labels(algorithm),
                }

    def selected_rows(self, algorithm: str) -> Iterator[dict[str, Any]]:
        """Where a method's figures come from, as rows of `selected.csv`."""
        for score in self.scores(algorithm):
            yield {
                **self.key(algorithm),
                "trial_seed": score.trial_seed,
                "environment": self.tested_on(score),
                "val_acc": score.selection.val_acc,
                **{metric: score.value(metric) for metric in get_args(Metric)},
                "run": score.record["run"],
                "step": score.selection.step,
                "hparams_seed": score.selection.hparams_seed,
                "hparams": strict_json.dumps(score.record.get("hparams"), sort_keys=True),
                "protocol": protocol_of(score.record),
                "source": self.source,
                **self.labels(algorithm),
            }

    def key(self, algorithm: str) -> dict[str, str]:
        """The first columns of a method's rows in CSV files."""
        return {"dataset": self.dataset, "algorithm": algorithm, "selection": self.selection.name}

    @staticmethod
    def labels(algorithm: str) -> dict[str, str]:
        """The last columns of a method's rows in CSV files."""
        return {
            "label": label_of(algorithm),
            "adaptation": adaptation_of(algorithm),
            "objective": objective_of(algorithm),
        }

    def _parameter_counts(self, algorithm: str) -> Iterator[tuple[str, Summary]]:
        """The mean of each count of parameters that was recorded, in numbers, which have no error."""
        for count in ("trainable_parameters", "total_parameters"):
            if values := self.recorded(algorithm, count):
                yield count, Summary(float(np.mean(values)), math.nan, self.trials(algorithm))


class Figures(ABC):
    """The figures of all runs of one protocol.

    Attributes:
        environments: Labels of each data set's environments, in the order of tables.
        algorithms: Ids of the methods, in the order of tables.
        comparisons: All comparisons, by data set.
    """

    environments: dict[str, list[str]]
    algorithms: list[str]
    comparisons: list[Comparison]

    @property
    @abstractmethod
    def main(self) -> list[Comparison]:
        """The comparisons of the plots, one panel each."""

    @abstractmethod
    def tables(self, reference: str | None = None) -> list[Table]:
        """The tables of the protocol.

        Args:
            reference: Id of the method that all others are compared with; None for no such table.
        """

    @staticmethod
    @abstractmethod
    def setting(record: Record, labels: Sequence[str]) -> str:
        """Says what a run was trained or tested on, to head the list of runs alike.

        Args:
            record: Record of the run.
            labels: Labels of the data set's environments.
        """

    def compared_methods(self, comparison: Comparison, title: str, reference: str | None) -> list[Table]:
        """The tables that set methods side by side: objectives, strengths of the update and paired differences.

        Args:
            comparison: The methods under one selection method.
            title: What they were run on.
            reference: Id of the method that all others are compared with; None for no such table.
        """
        tables = [table] if (table := objectives_table(comparison, title)) else []
        tables += frontier_tables(comparison, title)
        if reference is not None and comparison.scores(reference):
            tables.append(difference_table(comparison, reference, title))
        return tables

    def frontier_rows(self) -> list[dict[str, Any]]:
        """Rows of `frontier.csv`."""
        return [row for comparison in self.main for row in frontier_rows(comparison)]

    def rows(self) -> list[dict[str, Any]]:
        """Rows of `results.csv`."""
        return self._each(lambda comparison, algorithm: comparison.rows(algorithm))

    def selected_rows(self) -> list[dict[str, Any]]:
        """Rows of `selected.csv`."""
        return self._each(lambda comparison, algorithm: comparison.selected_rows(algorithm))

    def _each(self, rows_of: Callable[[Comparison, str], Iterator[dict[str, Any]]]) -> list[dict[str, Any]]:
        """Rows by data set, method and comparison."""
        return [
            row
            for dataset in self.environments
            for algorithm in self.algorithms
            for comparison in self.comparisons
            if comparison.dataset == dataset
            for row in rows_of(comparison, algorithm)
        ]
