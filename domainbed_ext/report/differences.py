"""Differences between two methods, paired: both in the same trial, tested on the same domains.

Runs of one trial share their splits, so a difference within a trial varies less than one across trials. A mean is over
trials, of each trial's mean over test domains. Intervals are those of the hierarchical bootstrap over trials and images
(see `inference.bootstrap`) where the images of all accuracies are known, else over trials alone, which is Student's t:
of three trials, a difference has to be 4.3 standard errors from zero.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from domainbed_ext.model_selection import Record, mean
from domainbed_ext.report.inference.bootstrap import RESAMPLES, Images, resample_accuracies, shared_error
from domainbed_ext.report.inference.power import trials_needed
from domainbed_ext.report.inference.sign_test import Signs
from domainbed_ext.report.inference.student import standard_error, t_test
from domainbed_ext.report.summary import Estimate, estimate
from domainbed_ext.report.tables.table import NOT_RECORDED, signed

if TYPE_CHECKING:
    from domainbed_ext.report.figures import Comparison
    from domainbed_ext.report.scores import Metric, Score

METRICS: Mapping["Metric", str] = {
    "out_of_domain": "Out-of-domain",
    "in_domain": "In-domain",
    "gap_source": "Gap source",
    "gap_target": "Gap target",
}

ImagesOf = Callable[[Record], Mapping[str, Images] | None]
"""Function of a record that returns the images of its accuracies, by their names such as "env0_in_acc"; None where the
run keeps no predictions of that step."""


@dataclass(frozen=True)
class Resampling:
    """How images are drawn.

    Attributes:
        images_of: Images of a record's accuracies.
        seed: Seed of the draws.
        resamples: Number of draws.
    """

    images_of: ImagesOf = lambda record: None
    seed: int = 0
    resamples: int = RESAMPLES


TRIALS_ALONE = Resampling()


class Difference(Estimate):
    """A mean difference over trials, in percentage points."""

    def __str__(self) -> str:
        """The mean with its interval, as "+1.2 (-2.9 to +5.3)"."""
        if math.isnan(self.mean):
            return NOT_RECORDED
        if self.interval is None:
            return signed(self.mean)
        return f"{signed(self.mean)} ({' to '.join(map(signed, self.interval))})"


def difference_over_trials(values: Sequence[float], shared: float = 0.0) -> Difference | None:
    """Mean and 95 % interval, in percentage points, of one difference per trial.

    Args:
        values: Differences in [-1, 1].
        shared: The part of the standard error of their mean that trials share, in percentage points.

    Returns:
        The difference; None of no values.
    """
    over_trials = estimate(values, shared)
    return over_trials and Difference(*over_trials)


class Cell(NamedTuple):
    """Where two methods are compared.

    Attributes:
        trials: Seeds of the trials: several where a method has one result for them, as a soup over trials.
        test_envs: Test domains of both runs.
        env: Environment of the accuracy; None where it is not of one.
    """

    trials: tuple[int, ...]
    test_envs: tuple[int, ...]
    env: int | None


@dataclass(frozen=True)
class PairedDifference:
    """What is known of the difference of two methods in a metric.

    Attributes:
        over_trials: Mean and interval in percentage points.
        cells: Difference in [-1, 1] by trial and environment.
        over_images: Whether the interval is over images too.
        shared_error: The part of the mean's standard error that trials share, in percentage points: 0 if images are not
            known.
    """

    over_trials: Difference
    cells: Mapping[Cell, float]
    over_images: bool
    shared_error: float

    def __str__(self) -> str:
        """Mean and interval."""
        return str(self.over_trials)

    @property
    def mean(self) -> float:
        """Mean over trials, in percentage points; NaN if a run diverged."""
        return self.over_trials.mean

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean; None of one trial."""
        return self.over_trials.interval

    @property
    def trials(self) -> int:
        """Number of trials that both methods have."""
        return self.over_trials.trials

    @cached_property
    def by_trial(self) -> list[float]:
        """The mean over environments of each trial, in percentage points."""
        return [100 * value for value in _means(self.cells, lambda cell: cell.trials).values()]

    @property
    def deviation(self) -> float:
        """Sample standard deviation over trials, in percentage points; NaN of one."""
        return float(np.std(self.by_trial, ddof=1)) if self.trials > 1 else math.nan

    @property
    def trials_needed(self) -> int | None:
        """The number of trials that would show the difference at 5 % with power 0.8; None if unknown or very large."""
        return trials_needed(self.mean, self.deviation, self.shared_error)

    @cached_property
    def signs(self) -> Signs:
        """The sign of the difference in each trial: runs of a trial share images, so they are one observation."""
        return Signs.of(self.by_trial)

    @property
    def p_value(self) -> float:
        """The p-value of the t-test that the interval is of; NaN of one trial, or if a run diverged."""
        return t_test(self.mean, standard_error(self.deviation, self.trials, self.shared_error), self.trials)

    @property
    def p_signs(self) -> float:
        """The p-value of the exact sign test over trials; NaN if a run diverged."""
        return math.nan if math.isnan(self.mean) else self.signs.p_value


class Differences:
    """The differences between the methods of a comparison, each computed once.

    Args:
        comparison: The methods under one selection method.
        resampling: How images are drawn.
    """

    def __init__(self, comparison: "Comparison", resampling: Resampling) -> None:
        self._comparison = comparison
        self._resampling = resampling
        self._computed: dict[tuple[str, str, Metric], PairedDifference | None] = {}
        self._values: dict[tuple[int, Metric, int | None], float] = {}

    def between(self, algorithm: str, reference: str, metric: "Metric") -> PairedDifference | None:
        """The difference of two methods.

        What stands for several trials, as a soup over trials, is paired with the mean over these.

        Args:
            algorithm: Id of the method.
            reference: Id of the method that is subtracted.
            metric: Accuracy or gap.

        Returns:
            The difference; None where no trial has both on the same test domains.
        """
        key = (algorithm, reference, metric)
        if key not in self._computed:
            self._computed[key] = self._compute(*key)
        return self._computed[key]

    def pairs(self, algorithm: str, reference: str) -> list[tuple["Score", "Score"]]:
        """The scores of both methods on the same test domains in the same trials.

        Args:
            algorithm: Id of the method.
            reference: Id of the method that is subtracted.
        """
        of_reference: defaultdict[tuple[tuple[int, ...], int], list[Score]] = defaultdict(list)
        for other in self._comparison.scores(reference):
            for trial in other.trials:
                of_reference[tuple(other.test_envs), trial].append(other)
        pairs: list[tuple[Score, Score]] = []
        for score in self._comparison.scores(algorithm):
            places = [(tuple(score.test_envs), trial) for trial in score.trials]
            alike = {id(other): other for place in places for other in of_reference[place]}
            pairs += [(score, other) for other in alike.values()]
        return pairs

    def _compute(self, algorithm: str, reference: str, metric: "Metric") -> PairedDifference | None:
        by_cell: defaultdict[Cell, list[tuple[Score, Score]]] = defaultdict(list)
        for one, other in self.pairs(algorithm, reference):
            trials = max(one.trials, other.trials, key=len)
            for env in self._comparison.tested(metric, one):
                by_cell[Cell(trials, tuple(one.test_envs), env)].append((one, other))
        cells = {
            cell: mean(
                [self._value(one, metric, cell.env) - self._value(other, metric, cell.env) for one, other in pairs]
            )
            for cell, pairs in by_cell.items()
        }
        by_trial = list(_means(cells, lambda cell: cell.trials).values())
        drawn = self._drawn(by_cell, metric) if len(by_trial) > 1 else None
        shared = 0.0 if drawn is None else 100 * shared_error(drawn)
        difference = difference_over_trials(by_trial, shared)
        return difference and PairedDifference(difference, cells, drawn is not None, shared)

    def _value(self, score: "Score", metric: "Metric", env: int | None) -> float:
        """A score's value, which many pairs ask for."""
        key = (id(score), metric, env)
        if key not in self._values:
            self._values[key] = score.value(metric, env)
        return self._values[key]

    def _drawn(self, by_cell: Mapping[Cell, Sequence[tuple["Score", "Score"]]], metric: "Metric") -> np.ndarray | None:
        """Each trial's mean difference in each draw of images [draws, trials]; None if some images are not known."""
        by_trial: defaultdict[tuple[int, ...], list[np.ndarray]] = defaultdict(list)
        for cell, pairs in by_cell.items():
            differences = []
            for one, other in pairs:
                values = [self._draws.value(score, metric, cell.env) for score in (one, other)]
                if values[0] is None or values[1] is None:
                    return None
                differences.append(values[0] - values[1])
            by_trial[cell.trials].append(np.mean(differences, axis=0))
        return np.stack([np.mean(values, axis=0) for values in by_trial.values()], axis=1)

    @cached_property
    def _draws(self) -> "_Draws":
        scores = [score for each in self._comparison.algorithms for score in self._comparison.scores(each)]
        return _Draws([score.record for score in scores], self._resampling)


class _Draws:
    """The metrics of records under draws of images.

    Args:
        records: Records whose images are drawn, where they are known.
        resampling: How images are drawn.
    """

    def __init__(self, records: Sequence[Record], resampling: Resampling) -> None:
        by_env: defaultdict[str, dict[tuple[str, int, str], Images]] = defaultdict(dict)
        for record in records:
            for name, images in (resampling.images_of(record) or {}).items():
                by_env[name.partition("_")[0]][record["run"], record["step"], name] = images
        self._accuracies: dict[tuple[str, int, str], np.ndarray] = {}
        for env, of_env in by_env.items():
            stream = (resampling.seed, int(env.removeprefix("env")))
            self._accuracies |= resample_accuracies(of_env, stream, resampling.resamples)
        self._values: dict[tuple[int, Metric, int | None], np.ndarray | None] = {}

    def value(self, score: "Score", metric: "Metric", env: int | None) -> np.ndarray | None:
        """A score's value in each draw; None if its images are not known.

        Args:
            score: Score of one of the records.
            metric: Accuracy or gap.
            env: Environment of the accuracy; None where it is not of one.
        """
        key = (id(score), metric, env)
        if key not in self._values:
            self._values[key] = self._compute(score, metric, env) if self._accuracies else None
        return self._values[key]

    def _compute(self, score: "Score", metric: "Metric", env: int | None) -> np.ndarray | None:
        total = None
        for name, weight in score.weights(metric, env).items():
            drawn = self._accuracies.get((score.record["run"], score.record["step"], name))
            if drawn is None:
                return None
            total = weight * drawn if total is None else total + weight * drawn
        return total


def _means(cells: Mapping[Cell, float], group: Callable[[Cell], object]) -> dict[object, float]:
    """The mean of the cells of each group."""
    groups: defaultdict[object, list[float]] = defaultdict(list)
    for cell, value in cells.items():
        groups[group(cell)].append(value)
    return {name: mean(values) for name, values in groups.items()}
