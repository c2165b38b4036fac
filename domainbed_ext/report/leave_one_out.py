"""The figures of a set of runs: what each selection method chose, and its means and errors over trials.

Numbers agree with DomainBed's: means are taken over the same values before any rounding, and an error is the
standard deviation (ddof = 0) over trials by the root of their number.
"""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import pandas as pd

from domainbed_ext import divergence
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
    mean,
    training_environments,
    validation_accuracy,
)
from domainbed_ext.protocols import SINGLE_SOURCE, protocol_of
from domainbed_ext.report.single_source import SingleSource, SourceScore, traced
from domainbed_ext.report.summary import (
    ALGORITHMS,
    Summary,
    algorithm_order,
    by_run,
    dataset_order,
    environment_names,
    parameter_counts,
    recorded,
    summarise,
)

__all__ = [
    "ALGORITHMS",
    "Metric",
    "Results",
    "Score",
    "SingleSource",
    "SourceScore",
    "Summary",
    "algorithm_order",
    "dataset_order",
    "recorded",
    "summarise",
]

Metric = Literal["out_of_domain", "in_domain", "train", "gap_source", "gap_target"]


@dataclass(frozen=True)
class Score:
    """The chosen record of one group: one trial's figure on one test environment."""

    group: Group
    selection: Selection

    def __getitem__(self, metric: Metric) -> float:
        """An accuracy, or a difference of two, in [0, 1]."""
        if metric == "out_of_domain":
            return self.selection.test_acc
        record = self.selection.record
        if metric == "in_domain":
            return validation_accuracy(record)
        if metric == "train":
            return mean([accuracy(record, env, "in") for env in training_environments(record)])
        return self["train"] - self["in_domain" if metric == "gap_source" else "out_of_domain"]


class Results:
    """The figures of any number of runs. Those of single-source runs are apart, in `single`; all else here is of
    runs that leave one environment (or a pair) out.

    Args:
        records: as `records.load_records` returns them; their order does not matter.
        methods: the selection methods; by default training-domain and oracle, and leave-one-domain-out where
            there are runs with two test environments, which it needs.

    Attributes:
        records: the records given, single-source ones included.
        runs: the same by run.
        methods: the selection methods, in the order given.
        environments: the environments' names of each data set, in the order of tables.
        diverged: by data set and algorithm, how many runs diverged, of how many.
        algorithms: their names, in the order of tables.
        single: the figures of single-source runs; None without any.
    """

    def __init__(self, records: Sequence[Record], methods: Sequence[SelectionMethod] | None = None) -> None:
        everything = group_records(records)  # refuses a record that lacks what all of this reads
        single_source = [record for record in records if protocol_of(record) == SINGLE_SOURCE]
        left_out = [record for record in records if protocol_of(record) != SINGLE_SOURCE]
        groups = group_records(left_out) if single_source else everything
        self.records = records
        self.runs = by_run(records)
        self.single = SingleSource(single_source) if single_source else None
        self.algorithms = sorted({group.algorithm for group in groups}, key=algorithm_order)
        self.environments = environment_names(left_out)
        self.diverged = divergence.count(left_out, _dataset_and_algorithm)
        if methods is None:
            pairs = any(len(record["args"]["test_envs"]) == 2 for record in left_out)
            methods = [TRAINING_DOMAIN, *([LEAVE_ONE_DOMAIN_OUT] if pairs else []), ORACLE]
        self.methods = list(methods)
        self._trials: defaultdict[str, set[int]] = defaultdict(set)
        self._seeds: defaultdict[tuple[str, str, tuple[int, ...]], set[tuple[int, int]]] = defaultdict(set)
        for group in groups:
            self._trials[group.dataset].add(group.trial_seed)
        for record in left_out:
            args = record["args"]
            key = args["dataset"], args["algorithm"], tuple(sorted(args["test_envs"]))
            self._seeds[key].add((args["trial_seed"], args["hparams_seed"]))
        self._scores: defaultdict[tuple[str, str, str], list[Score]] = defaultdict(list)
        for method in self.methods:
            for group, members in groups.items():
                if (selection := method.select(members, group.test_env)) is not None:
                    self._scores[method.name, group.dataset, group.algorithm].append(Score(group, selection))

    @property
    def diverged_runs(self) -> int:
        """How many runs diverged, single-source ones included."""
        counts = [*self.diverged.values(), *(self.single.diverged.values() if self.single else ())]
        return sum(each.diverged for each in counts)

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
        found = summarise([mean(values) for values in by_trial.values()])
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

    def missing_pairs(self, dataset: str, algorithm: str) -> list[tuple[str, str]]:
        """The pairs of test environments that leave-one-domain-out cross-validation lacks runs of.

        Args:
            dataset: a data set.
            algorithm: an algorithm.

        Returns:
            The names of the two environments, of each pair without a run for some trial and hparams_seed that
            there are runs with one test environment for.
        """
        names = self.environments[dataset]
        if len(names) < 3:  # a pair would leave none to train on
            return []
        singles = [self._seeds.get((dataset, algorithm, (env,)), set()) for env in range(len(names))]
        return [
            (names[i], names[j])
            for i, j in itertools.combinations(range(len(names)), 2)
            if (singles[i] | singles[j]) - self._seeds.get((dataset, algorithm, (i, j)), set())
        ]

    def missing_pairs_sentence(self, dataset: str) -> str:
        """What leave-one-domain-out cross-validation lacks on a data set and how to get it; empty if nothing."""
        if len(self.environments[dataset]) < 3:
            return (
                "Leave-one-domain-out cross-validation takes at least three environments, and "
                f"{dataset} has {len(self.environments[dataset])}."
            )
        lacking = {algorithm: self.missing_pairs(dataset, algorithm) for algorithm in self.algorithms}
        pairs = len(self.environments[dataset]) * (len(self.environments[dataset]) - 1) // 2
        parts = [
            f"{algorithm} ({', '.join(map('+'.join, missing)) if len(missing) < pairs else f'all {pairs}'})"
            for algorithm, missing in lacking.items()
            if missing
        ]
        if not parts:
            return ""
        return (
            f"Leave-one-domain-out cross-validation needs a run for every pair of test environments; missing on "
            f"{dataset}: {', '.join(parts)}. Launch the sweep with --pairs."
        )

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
        rows: list[dict[str, object]] = []
        for dataset, names in self.environments.items():
            for algorithm in self.algorithms:
                for method in self.methods:
                    scores = self.scores(method, dataset, algorithm)
                    figures = [
                        (metric, name, self.summary(method, dataset, algorithm, metric, env))
                        for metric in get_args(Metric)
                        for env, name in [*enumerate(names), (None, "Avg")]
                    ]
                    trials = len({score.group.trial_seed for score in scores})
                    figures += [(count, "Avg", mean) for count, mean in parameter_counts(scores, trials)]
                    key = {"dataset": dataset, "algorithm": algorithm, "selection": method.name, "source": ""}
                    diverged = self.diverged.get((dataset, algorithm), divergence.Count(0, 0)).diverged
                    key["protocol"] = " ".join(sorted({protocol_of(score.selection.record) for score in scores}))
                    rows += [
                        {**key, "metric": metric, "environment": name, **found._asdict(), "diverged": diverged}
                        for metric, name, found in figures
                        if found is not None
                    ]
        rows += self.single.tidy() if self.single else []
        columns = ["dataset", "algorithm", "selection", "metric", "environment", *Summary._fields]
        return pd.DataFrame(rows, columns=[*columns, "protocol", "source", "diverged"])

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
                **traced(score.selection),
                "protocol": protocol_of(score.selection.record),
                "source": "",
            }
            for dataset in self.environments
            for algorithm in self.algorithms
            for method in self.methods
            for score in self.scores(method, dataset, algorithm)
        ]
        return pd.DataFrame(rows + (self.single.selected() if self.single else []))


def _dataset_and_algorithm(record: Record) -> tuple[str, str]:
    return record["args"]["dataset"], record["args"]["algorithm"]
