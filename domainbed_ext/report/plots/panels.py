"""What the plots show: a panel for each comparison, which is a data set and, of single-source runs, a source."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from domainbed_ext.model_selection import Record
from domainbed_ext.report.figures import Comparison, Metric
from domainbed_ext.report.methods import label_of
from domainbed_ext.report.plots.palette import Style, styles_of
from domainbed_ext.report.results import Results
from domainbed_ext.report.summary import Summary
from domainbed_ext.report.trajectories import Moment, trajectory

Runs = dict[str, list[Record]]  # each run's records


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
        trajectories: Evaluations of each chosen run.
    """

    algorithm: str
    label: str
    style: Style
    inside: Summary
    outside: Summary
    gap_inside: Summary
    gap_outside: Summary
    parameters: Summary | None
    trajectories: list[list[Moment]]


@dataclass(frozen=True)
class Panel:
    """One data set, or one source of it.

    Attributes:
        title: Title of the panel.
        selection: How steps and hyperparameters were selected.
        error: What the error bars are.
        points: Figures of the methods that have all of them.
        unmeasured: Labels of methods without a point, for their in-domain accuracy cannot be measured.
    """

    title: str
    selection: str
    error: str
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
    panel = Panel(comparison.title, comparison.selection.title, comparison.error, [], without)
    metrics: list[Metric] = ["in_domain", "out_of_domain", "gap_source", "gap_target"]
    for algorithm in comparison.algorithms:
        figures = [comparison.summary(algorithm, metric) for metric in metrics]
        present = [_drawable(figure) for figure in figures if figure is not None]
        if len(present) < len(metrics) or not _finite(present[:2]):
            continue
        lack = comparison.incomplete(algorithm)
        name = f"{label_of(algorithm)} ({lack})" if lack else label_of(algorithm)
        size = _mean(comparison.recorded(algorithm, "trainable_parameters"))
        inside, outside, gap_inside, gap_outside = present
        chosen = dict.fromkeys(record["run"] for record in comparison.records(algorithm))
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
                [trajectory(runs[run]) for run in chosen],
            )
        )
    return panel


def _drawable(summary: Summary) -> Summary:
    """Without the NaN that stands for the spread of a single trial."""
    return summary if np.isfinite(summary.err) else summary._replace(err=0.0)


def _finite(summaries: Sequence[Summary]) -> bool:
    return bool(np.isfinite([summary.mean for summary in summaries]).all())


def _mean(counts: list[int]) -> Summary | None:
    return Summary(float(np.mean(counts)), 0.0, 1) if counts else None
