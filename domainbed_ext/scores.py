"""The figures of a set of runs: what each selection method chose, and its means and errors over trials.

Numbers agree with DomainBed's: means are taken over the same values before any rounding, and an error is the
standard deviation (ddof = 0) over trials by the root of their number.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import pandas as pd

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
                        if values := recorded(scores, count):
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


def recorded(scores: Iterable[Score], key: str) -> list[int]:
    """The values of a key that the chosen records may lack."""
    return [score.selection.record[key] for score in scores if score.selection.record.get(key) is not None]


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
