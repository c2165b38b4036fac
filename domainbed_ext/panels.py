"""What the plots show: a panel for each data set of leave-one-out runs, and each source of single-source ones."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from domainbed_ext.curves import Moment, trajectory
from domainbed_ext.model_selection import Record
from domainbed_ext.scores import Results, Summary, recorded


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
    by_run: dict[str, list[Record]] = {}
    for record in results.records:
        by_run.setdefault(record["run"], []).append(record)
    return [*_left_out(results, by_run), *_single_source(results, by_run)]


def _left_out(results: Results, by_run: dict[str, list[Record]]) -> list[Panel]:
    method, found = results.main_method, []
    for dataset in results.environments:
        points, trajectories = [], {}
        for algorithm in results.algorithms:
            inside = results.summary(method, dataset, algorithm, "in_domain")
            outside = results.summary(method, dataset, algorithm, "out_of_domain")
            gap_inside = results.summary(method, dataset, algorithm, "gap_source")
            gap_outside = results.summary(method, dataset, algorithm, "gap_target")
            if not (inside and outside and gap_inside and gap_outside and _finite(inside, outside)):
                continue
            scores = results.scores(method, dataset, algorithm)
            label = _label(algorithm, results.incomplete(method, dataset, algorithm))
            size = _mean(recorded(scores, "trainable_parameters"))
            points.append(Point(algorithm, label, inside, outside, gap_inside, gap_outside, size))
            trajectories[algorithm] = _trajectories([score.selection.record for score in scores], by_run)
        found.append(Panel(dataset, method.title, "standard error over trials", points, trajectories))
    return found


def _single_source(results: Results, by_run: dict[str, list[Record]]) -> list[Panel]:
    if (single := results.single) is None:
        return []
    found = []
    for dataset, sources in single.sources.items():
        for source in sources:
            points, trajectories = [], {}
            for algorithm in single.algorithms:
                inside = single.summary(dataset, algorithm, source, "accuracy", source)
                outside = single.summary(dataset, algorithm, source, "accuracy")
                gap_inside = single.summary(dataset, algorithm, source, "gap", source)
                gap_outside = single.summary(dataset, algorithm, source, "gap")
                if not (inside and outside and gap_inside and gap_outside and _finite(inside, outside)):
                    continue
                scores = single.scores(dataset, algorithm, source)
                label = _label(algorithm, single.incomplete(dataset, algorithm, source))
                size = _mean(recorded(scores, "trainable_parameters"))
                inside, outside, gap_inside, gap_outside = map(_drawable, (inside, outside, gap_inside, gap_outside))
                points.append(Point(algorithm, label, inside, outside, gap_inside, gap_outside, size))
                trajectories[algorithm] = _trajectories([score.record for score in scores], by_run)
            title = f"{dataset}, from {single.environments[dataset][source]} alone"
            found.append(
                Panel(title, "source-domain validation set", "standard deviation over trials", points, trajectories)
            )
    return found


def _trajectories(chosen: list[Record], by_run: dict[str, list[Record]]) -> list[list[Moment]]:
    runs = dict.fromkeys(record["run"] for record in chosen)
    return [trajectory(by_run[run]) for run in runs]


def _drawable(found: Summary) -> Summary:
    """Without the NaN that stands for the spread of a single trial."""
    return found if np.isfinite(found.err) else found._replace(err=0.0)


def _finite(*found: Summary) -> bool:
    return bool(np.isfinite([summary.mean for summary in found]).all())


def _label(algorithm: str, lack: str) -> str:
    return f"{algorithm} ({lack})" if lack else algorithm


def _mean(counts: list[int]) -> Summary | None:
    return Summary(float(np.mean(counts)), 0.0, 1) if counts else None
