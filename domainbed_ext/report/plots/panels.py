"""What the plots show: a panel for each comparison, which is a data set and, of single-source runs, a source.

Errors of plots are standard errors over trials, whatever those of the tables are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from domainbed_ext.model_selection import Record
from domainbed_ext.report.figures import Comparison
from domainbed_ext.report.methods import label_of
from domainbed_ext.report.plots.palette import Style, styles_of
from domainbed_ext.report.results import Results
from domainbed_ext.report.scores import Metric
from domainbed_ext.report.summary import Summary, summarise
from domainbed_ext.report.trajectories import Moment, mean_trajectory, trajectory

Runs = dict[str, list[Record]]  # each run's records


class Trial(NamedTuple):
    """A method's figures in one trial, in percent and percentage points."""

    inside: float
    outside: float
    gap_inside: float
    gap_outside: float


@dataclass(frozen=True)
class Point:
    """A method's figures in a panel, in percent and percentage points.

    Attributes:
        algorithm: Id of the method.
        label: Label of the method, with what its runs lack.
        style: How the method is drawn.
        inside: In-domain accuracy.
        outside: Out-of-domain accuracy.
        gap_inside: Train accuracy minus `inside`.
        gap_outside: Train accuracy minus `outside`.
        parameters: Mean number of trainable parameters, if recorded.
        trials: Figures of each trial.
        trajectories: Evaluations of each trial, the mean over its chosen runs.
    """

    algorithm: str
    label: str
    style: Style
    inside: Summary
    outside: Summary
    gap_inside: Summary
    gap_outside: Summary
    parameters: Summary | None
    trials: list[Trial]
    trajectories: list[list[Moment]]


@dataclass(frozen=True)
class Panel:
    """One data set, or one source of it.

    Attributes:
        title: Title of the panel.
        selection: How steps and hyperparameters were selected.
        points: Figures of the methods that have all of them.
        unmeasured: Labels of methods without a point, for their in-domain accuracy cannot be measured.
    """

    title: str
    selection: str
    points: list[Point]
    unmeasured: list[str] = field(default_factory=list)

    def having(self, wanted: Callable[[Point], bool]) -> "Panel":
        """The panel with some of its points alone."""
        return replace(self, points=[point for point in self.points if wanted(point)])


def make_panels(results: Results) -> list[Panel]:
    """Makes the panels of a set of runs, with a point for each method that has all four figures.

    Args:
        results: Figures of the runs; of leave-one-out runs, those of the main selection method are shown.
    """
    styles = styles_of(results.algorithms)
    return [_panel(comparison, results.runs, styles) for comparison in results.panels]


def _panel(comparison: Comparison, runs: Runs, styles: Mapping[str, Style]) -> Panel:
    without = [label_of(algorithm) for algorithm in comparison.algorithms if comparison.unmeasured(algorithm)]
    panel = Panel(comparison.title, comparison.selection.title, [], without)
    for algorithm in comparison.algorithms:
        if comparison.unmeasured(algorithm):
            continue
        trials = _trials(comparison, algorithm)
        present = [summary for values in zip(*trials, strict=True) if (summary := summarise(values)) is not None]
        if not present or not _finite(present[:2]):
            continue
        lack = comparison.incomplete(algorithm)
        name = f"{label_of(algorithm)} ({lack})" if lack else label_of(algorithm)
        size = _mean(comparison.recorded(algorithm, "trainable_parameters"))
        inside, outside, gap_inside, gap_outside = present
        panel.points.append(
            Point(
                algorithm,
                name,
                styles[algorithm],
                inside,
                outside,
                gap_inside,
                gap_outside,
                size,
                [Trial(*(100 * value for value in trial)) for trial in trials],
                _trajectories(comparison.records(algorithm), runs),
            )
        )
    return panel


def _trials(comparison: Comparison, algorithm: str) -> list[tuple[float, ...]]:
    """In-domain and out-of-domain accuracy and both gaps of each trial, in [0, 1]."""
    metrics: list[Metric] = ["in_domain", "out_of_domain", "gap_source", "gap_target"]
    by_trial = [comparison.trial_means(algorithm, metric) for metric in metrics]
    return [tuple(values[trial] for values in by_trial) for trial in by_trial[0]]


def _trajectories(records: list[Record], runs: Runs) -> list[list[Moment]]:
    """The mean over the runs of each trial."""
    by_trial: dict[int, dict[str, None]] = {}
    for record in records:
        by_trial.setdefault(record["args"]["trial_seed"], {})[record["run"]] = None
    return [mean_trajectory(trajectory(runs[run]) for run in of_trial) for of_trial in by_trial.values()]


def _finite(summaries: Sequence[Summary]) -> bool:
    return bool(np.isfinite([summary.mean for summary in summaries]).all())


def _mean(counts: list[int]) -> Summary | None:
    return Summary(float(np.mean(counts)), 0.0, 1) if counts else None
