"""The figures of single-source runs, which are trained on one environment and tested on all others.

Selection is by the source's holdout, whose accuracy is also the in-domain one. Errors are standard deviations over
trials, as in the tables of Zhu et al., Asymmetry in Low-Rank Adapters of Foundation Models (2024), not DomainBed's
standard errors.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from domainbed_ext import divergence
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.model_selection import (
    SOURCE_HOLDOUT,
    Record,
    Selection,
    accuracy,
    out_of_domain,
    target_accuracy,
    training_environments,
)
from domainbed_ext.protocols import SINGLE_SOURCE
from domainbed_ext.report.summary import Summary, algorithm_order, environment_names, parameter_counts, summarise_spread
from domainbed_ext.system import strict_json

SingleSourceMetric = Literal["accuracy", "gap", "train"]


class Row(NamedTuple):
    """What a row of a table is of."""

    dataset: str
    algorithm: str
    source: int


@dataclass(frozen=True)
class SourceScore:
    """The chosen record of one trial of one source; accuracies and gaps in [0, 1].

    Attributes:
        source: the index of the environment trained on.
        selection: the chosen record and what it was chosen by.
    """

    source: int
    selection: Selection

    @property
    def record(self) -> Record:
        """The chosen record."""
        return self.selection.record

    @property
    def trial_seed(self) -> int:
        """The trial."""
        return int(self.record["args"]["trial_seed"])

    @property
    def val_acc(self) -> float:
        """The accuracy on the source's holdout, by which the record was chosen."""
        return self.selection.val_acc

    @property
    def train(self) -> float:
        """The accuracy on the images trained on."""
        return accuracy(self.record, self.source, "in")

    @property
    def out_of_domain(self) -> float:
        """The mean accuracy over the other environments."""
        return out_of_domain(self.record, self.source)

    @property
    def out_of_domain_gap(self) -> float:
        """Train accuracy minus `out_of_domain`."""
        return self.train - self.out_of_domain

    def accuracy(self, env: int) -> float:
        """On the source's holdout if `env` is the source, else on that test environment."""
        return accuracy(self.record, env, "out") if env == self.source else target_accuracy(self.record, env)

    def gap(self, env: int) -> float:
        """Train accuracy minus the accuracy on an environment."""
        return self.train - self.accuracy(env)


class SingleSource:
    """The figures of any number of single-source runs.

    Args:
        records: of such runs alone; their order does not matter.

    Attributes:
        environments: the environments' names of each data set, in the order of tables.
        diverged: by data set, algorithm and source, how many runs diverged, of how many.
        sources: the indices of the environments that were trained on, ascending, of each data set.
        algorithms: their names, in the order of tables.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.environments = environment_names(records)
        self.algorithms = sorted({record["args"]["algorithm"] for record in records}, key=algorithm_order)
        groups: defaultdict[tuple[Row, int], list[Record]] = defaultdict(list)
        for record in records:
            args = record["args"]
            groups[_row(record), args["trial_seed"]].append(record)
        self.diverged = divergence.count(records, _row)
        self.sources = {
            dataset: sorted({row.source for row, _ in groups if row.dataset == dataset})
            for dataset in self.environments
        }
        self._trials: defaultdict[str, set[int]] = defaultdict(set)
        self._scores: defaultdict[Row, list[SourceScore]] = defaultdict(list)
        for (row, trial_seed), members in sorted(groups.items()):
            self._trials[row.dataset].add(trial_seed)
            if (selection := SOURCE_HOLDOUT.select(members, row.source)) is not None:
                self._scores[row].append(SourceScore(row.source, selection))

    def rows(self) -> Iterator[tuple[str, str, int]]:
        """Every (data set, algorithm, source) that may have scores, in the order of tables."""
        for dataset, sources in self.sources.items():
            for algorithm in self.algorithms:
                for source in sources:
                    yield dataset, algorithm, source

    def scores(self, dataset: str, algorithm: str, source: int) -> list[SourceScore]:
        """The chosen record of each trial, by trial."""
        return self._scores.get(Row(dataset, algorithm, source), [])

    def summary(
        self, dataset: str, algorithm: str, source: int, metric: SingleSourceMetric, env: int | None = None
    ) -> Summary | None:
        """Mean and sample standard deviation (ddof = 1) over trials, in percent.

        Args:
            dataset: a data set.
            algorithm: an algorithm.
            source: the index of the environment trained on.
            metric: "accuracy", "gap" (train accuracy minus accuracy) or "train".
            env: of the accuracy or the gap; the source means its holdout, None the mean over all others.

        Returns:
            The summary, its `err` the standard deviation (NaN of a single trial); None where there is no run.
        """
        scores = self.scores(dataset, algorithm, source)
        if metric == "train":
            return summarise_spread([score.train for score in scores])
        if metric == "accuracy":
            return summarise_spread([score.out_of_domain if env is None else score.accuracy(env) for score in scores])
        return summarise_spread([score.out_of_domain_gap if env is None else score.gap(env) for score in scores])

    def incomplete(self, dataset: str, algorithm: str, source: int) -> str:
        """What a row lacks, as "2 of 3 trials"; empty if nothing, or everything."""
        seen, expected = len(self.scores(dataset, algorithm, source)), len(self._trials[dataset])
        return f"{seen} of {expected} trials" if 0 < seen < expected else ""

    def tidy(self) -> list[dict[str, Any]]:
        """Every figure as a row of `Results.tidy`; of "out_of_domain" and "gap_target", one per environment too."""
        return [
            {
                "dataset": dataset,
                "algorithm": algorithm,
                "selection": SOURCE_HOLDOUT.name,
                "metric": metric,
                "environment": environment,
                **found._asdict(),
                "protocol": SINGLE_SOURCE,
                "source": self.environments[dataset][source],
                "diverged": self.diverged.get(Row(dataset, algorithm, source), divergence.Count(0, 0)).diverged,
            }
            for dataset, algorithm, source in self.rows()
            for metric, environment, found in self._figures(dataset, algorithm, source)
            if found is not None
        ]

    def _figures(self, dataset: str, algorithm: str, source: int) -> Iterator[tuple[str, str, Summary | None]]:
        """Metric, environment and figure of one row."""
        names = self.environments[dataset]
        others = [*((env, name) for env, name in enumerate(names) if env != source), (None, "Avg")]
        kinds: list[tuple[str, SingleSourceMetric, Sequence[tuple[int | None, str]]]] = [
            ("out_of_domain", "accuracy", others),
            ("in_domain", "accuracy", [(source, names[source])]),
            ("train", "train", [(source, names[source])]),
            ("gap_source", "gap", [(source, names[source])]),
            ("gap_target", "gap", others),
        ]
        for name, metric, places in kinds:
            for env, environment in places:
                yield name, environment, self.summary(dataset, algorithm, source, metric, env)
        scores = self.scores(dataset, algorithm, source)
        for count, mean in parameter_counts(scores, len(scores)):
            yield count, "Avg", mean

    def selected(self) -> list[dict[str, Any]]:
        """Where every figure comes from, as rows of `Results.selected`."""
        return [
            {
                "dataset": dataset,
                "algorithm": algorithm,
                "selection": SOURCE_HOLDOUT.name,
                "trial_seed": score.trial_seed,
                "environment": "Avg",
                "val_acc": score.val_acc,
                "out_of_domain": score.out_of_domain,
                "in_domain": score.accuracy(source),
                "train": score.train,
                "gap_source": score.gap(source),
                "gap_target": score.out_of_domain_gap,
                **traced(score.selection),
                "protocol": SINGLE_SOURCE,
                "source": self.environments[dataset][source],
            }
            for dataset, algorithm, source in self.rows()
            for score in self.scores(dataset, algorithm, source)
        ]


def traced(selection: Selection) -> dict[str, Any]:
    """The columns that lead from a figure back to its run."""
    return {
        "run": selection.record["run"],
        "step": selection.step,
        "hparams_seed": selection.hparams_seed,
        "hparams": strict_json.dumps(selection.record.get("hparams"), sort_keys=True),
    }


def _row(record: Record) -> Row:
    return Row(record["args"]["dataset"], record["args"]["algorithm"], _source(record))


def _source(record: Record) -> int:
    sources = training_environments(record)
    if len(sources) != 1:
        raise BenchmarkError(
            f"run {record['run']} is called single_source but was trained on {len(sources)} environments"
        )
    return sources[0]
