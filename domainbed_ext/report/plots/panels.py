"""What the plots show: a panel for each data set of leave-one-out runs, and each source of single-source ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from domainbed_ext.model_selection import Record
from domainbed_ext.report.leave_one_out import Metric, Results, Score, SourceScore
from domainbed_ext.report.single_source import SingleSourceMetric
from domainbed_ext.report.summary import Summary, labelled, recorded
from domainbed_ext.report.trajectories import Moment, trajectory

Runs = dict[str, list[Record]]  # each run's records


@dataclass(frozen=True)
class Point:
    """An algorithm's figures in a panel, in percent and percentage points.

    Attributes:
        algorithm: its name.
        label: the name, with what its runs lack.
        inside: accuracy in domain.
        outside: accuracy out of domain.
        gap_inside: train accuracy minus `inside`.
        gap_outside: train accuracy minus `outside`.
        parameters: the mean number of trainable ones, if recorded.
    """

    algorithm: str
    label: str
    inside: Summary
    outside: Summary
    gap_inside: Summary
    gap_outside: Summary
    parameters: Summary | None


@dataclass(frozen=True)
class Panel:
    """One data set, or one source of it.

    Attributes:
        title: of the panel.
        selection: how steps and hyperparameters were chosen.
        error: what the error bars are.
        points: the algorithms that have figures.
        trajectories: of the chosen runs of each algorithm.
    """

    title: str
    selection: str
    error: str
    points: list[Point]
    trajectories: dict[str, list[list[Moment]]] = field(default_factory=dict)

    @property
    def algorithms(self) -> list[str]:
        """The names of those that have points."""
        return [point.algorithm for point in self.points]

    def having(self, wanted: Callable[[Point], bool]) -> "Panel":
        """The panel with some of its points alone."""
        return replace(self, points=[point for point in self.points if wanted(point)])


def panels(results: Results) -> list[Panel]:
    """The panels of a set of runs.

    Args:
        results: the figures; of runs that leave environments out, those of `results.main_method`.

    Returns:
        Leave-one-out first, single source after.
    """
    return [*_left_out(results), *_single_source(results)]


def _left_out(results: Results) -> list[Panel]:
    method, found = results.main_method, []
    metrics: list[Metric] = ["in_domain", "out_of_domain", "gap_source", "gap_target"]
    for dataset in results.environments:
        panel = Panel(dataset, method.title, "standard error over trials", [])
        for algorithm in results.algorithms:
            figures = [results.summary(method, dataset, algorithm, metric) for metric in metrics]
            scores = results.scores(method, dataset, algorithm)
            _add(panel, algorithm, results.incomplete(method, dataset, algorithm), figures, scores, results.runs)
        found.append(panel)
    return found


def _single_source(results: Results) -> list[Panel]:
    if (single := results.single) is None:
        return []
    found = []
    for dataset, sources in single.sources.items():
        for source in sources:
            title = f"{dataset}, from {single.environments[dataset][source]} alone"
            panel = Panel(title, "source-domain validation set", "standard deviation over trials", [])
            places: list[tuple[SingleSourceMetric, int | None]] = [
                ("accuracy", source),
                ("accuracy", None),
                ("gap", source),
                ("gap", None),
            ]
            for algorithm in single.algorithms:
                figures = [single.summary(dataset, algorithm, source, metric, env) for metric, env in places]
                scores = single.scores(dataset, algorithm, source)
                lack = single.incomplete(dataset, algorithm, source)
                drawable = [each and _drawable(each) for each in figures]
                _add(panel, algorithm, lack, drawable, scores, results.runs)
            found.append(panel)
    return found


def _add(
    panel: Panel,
    algorithm: str,
    lack: str,
    figures: Sequence[Summary | None],
    scores: Sequence[Score | SourceScore],
    runs: Runs,
) -> None:
    """Adds an algorithm to a panel, if it has all four figures: accuracies and gaps, in and out of domain each."""
    inside, outside, gap_inside, gap_outside = figures
    if not (inside and outside and gap_inside and gap_outside and _finite(inside, outside)):
        return
    size = _mean(recorded(scores, "trainable_parameters"))
    label = labelled(algorithm, lack)
    panel.points.append(Point(algorithm, label, inside, outside, gap_inside, gap_outside, size))
    panel.trajectories[algorithm] = _trajectories([score.selection.record for score in scores], runs)


def _trajectories(chosen: list[Record], runs: Runs) -> list[list[Moment]]:
    return [trajectory(runs[run]) for run in dict.fromkeys(record["run"] for record in chosen)]


def _drawable(found: Summary) -> Summary:
    """Without the NaN that stands for the spread of a single trial."""
    return found if np.isfinite(found.err) else found._replace(err=0.0)


def _finite(*found: Summary) -> bool:
    return bool(np.isfinite([summary.mean for summary in found]).all())


def _mean(counts: list[int]) -> Summary | None:
    return Summary(float(np.mean(counts)), 0.0, 1) if counts else None
