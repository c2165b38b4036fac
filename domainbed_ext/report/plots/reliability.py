"""Reliability diagrams: how often each method is right where it is how sure."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from domainbed_ext.report.methods import label_of
from domainbed_ext.report.plots.palette import styles_of
from domainbed_ext.report.plots.style import GREY, PANEL_INCHES, bare, figure_of, name_axes
from domainbed_ext.report.predictions.calibration import BINS, reliability
from domainbed_ext.report.predictions.tested import Predicted

LEAST = 10  # images of a bin that is drawn


def reliability_plot(gathered: Sequence[Predicted]) -> Figure | None:
    """Draws the accuracy of each method over its confidence on the test domains, over all its trials.

    Args:
        gathered: What the runs predict.

    Returns:
        A figure with a panel for each comparison; None if nothing is known.
    """
    if not gathered:
        return None
    styles = styles_of(list(dict.fromkeys(name for each in gathered for name in each.algorithms)))
    figure, axes = figure_of([each.title for each in gathered], (PANEL_INCHES[0] + 1.4, PANEL_INCHES[1]))
    for ax, predicted in zip(axes, gathered, strict=True):
        bare(ax)
        ax.plot([0, 100], [0, 100], color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        for algorithm in predicted.algorithms:
            bins, style = reliability(predicted, algorithm)["out_of_domain"], styles[algorithm]
            drawn = bins.images >= LEAST
            ax.plot(
                100 * bins.confidence[drawn],
                100 * bins.accuracy[drawn],
                color=style.colour,
                linestyle=style.dashes,
                linewidth=1.6,
                marker=style.marker,
                markersize=4,
                label=label_of(algorithm),
            )
        ax.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
    note = f"images of the test domains, in {BINS} bins, those of at least {LEAST}; dashed: perfect calibration"
    name_axes(figure, axes, "confidence (%)", "accuracy (%)", note)
    return figure
