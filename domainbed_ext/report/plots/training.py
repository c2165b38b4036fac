"""The plot of training: loss and accuracies over the steps, the mean over a method's trials and the band of all."""

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from domainbed_ext.report.methods import adaptation_of, label_of
from domainbed_ext.report.plots.panels import Panel, Point
from domainbed_ext.report.plots.style import AXIS_SIZE, GRID, MANY, TICK_SIZE, bare, write_note
from domainbed_ext.report.trajectories import Moment, mean_trajectory

LINES = 10  # at most in a panel of one of several parts
FEW_EVALUATIONS = 4  # are not joined by lines
COLUMNS = (("loss", "loss"), ("inside", "in-domain accuracy (%)"), ("outside", "out-of-domain accuracy (%)"))
NOTE = "mean over trials and test domains; bands: from the lowest to the highest trial"
Drawn = tuple[Point, list[Moment]]
"""A method and its mean trajectory."""


def training_plot(shown: Sequence[Panel]) -> Figure | None:
    """Draws loss and accuracies over the steps.

    Args:
        shown: Panels.

    Returns:
        A figure of a row per data set (and source), or several of them where there are many methods; None if no run was
        evaluated more than once.
    """
    drawn = [(panel.title, lines, part) for panel in shown if (lines := _lines(panel)) for part in _parts(lines)]
    if not drawn:
        return None
    figure = Figure(figsize=(12.4, 3.6 * len(drawn)), dpi=160, layout="constrained")
    grid = figure.subplots(len(drawn), len(COLUMNS), squeeze=False, sharex="row")
    titled = len({title for title, _, _ in drawn}) > 1
    for axes, (title, lines, part) in zip(grid, drawn, strict=True):
        for ax, (attribute, quantity) in zip(axes, COLUMNS, strict=True):
            bare(ax)
            ax.tick_params(labelsize=TICK_SIZE)
            for _, moments in lines if len(part) < len(lines) else ():  # all others, pale, for comparison
                ax.plot(*_values(moments, attribute), color=GRID, linewidth=1, zorder=1)
            for point, moments in part:  # of many, markers tell them apart
                _draw(ax, point, moments, attribute, 4 if len(part) == len(lines) else 6)
            ax.set_xlabel("step", fontsize=AXIS_SIZE)
            ax.set_ylabel(quantity, fontsize=AXIS_SIZE)
        if titled:
            axes[0].set_title(title, fontweight="bold", fontsize=AXIS_SIZE + 1, loc="left")
        if len(drawn) > 1:
            axes[-1].legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
    if len(drawn) == 1:
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=6, frameon=False, fontsize=8.5)
    write_note(figure, NOTE)
    return figure


def _values(moments: Sequence[Moment], attribute: str) -> tuple[list[int], list[float]]:
    return [moment.step for moment in moments], [getattr(moment, attribute) for moment in moments]


def _draw(axes: Axes, point: Point, moments: Sequence[Moment], attribute: str, size: float) -> None:
    """Draws a method's mean and the band of its trials; of few evaluations, the markers alone."""
    steps, means = _values(moments, attribute)
    axes.plot(
        steps,
        means,
        color=point.style.colour,
        linestyle=point.style.dashes if len(moments) > FEW_EVALUATIONS else "none",
        marker=point.style.marker,
        markersize=size,
        markeredgecolor="white",
        markeredgewidth=0.5,
        linewidth=1.5,
        label=label_of(point.algorithm),
    )
    shared = set(steps)
    trials = [
        [getattr(moment, attribute) for moment in of_trial if moment.step in shared] for of_trial in point.trajectories
    ]
    if len(trials) > 1:
        low, high = np.min(trials, axis=0), np.max(trials, axis=0)
        axes.fill_between(steps, low, high, color=point.style.colour, alpha=0.13, linewidth=0)


def _lines(panel: Panel) -> list[Drawn]:
    """The mean over a method's trials at each step, of the methods that were evaluated more than once."""
    means = [(point, mean_trajectory(point.trajectories)) for point in panel.points]
    return [(point, moments) for point, moments in means if len(moments) > 1]


def _parts(lines: Sequence[Drawn]) -> list[Sequence[Drawn]]:
    """The lines in parts of few enough to tell apart: whole adaptations, as many as fit."""
    if len(lines) <= MANY:
        return [lines]
    parts: list[list[Drawn]] = [[]]
    for _, group in itertools.groupby(lines, lambda line: adaptation_of(line[0].algorithm)):
        of_adaptation = list(group)
        if parts[-1] and len(parts[-1]) + len(of_adaptation) > LINES:
            parts.append([])
        parts[-1] += of_adaptation
    return list(parts)
