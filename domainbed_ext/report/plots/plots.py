"""The plots of a sweep, with a panel for each comparison, and their files."""

import io
from typing import Literal, get_args

import matplotlib
from matplotlib.figure import Figure

from domainbed_ext.report.plots.differences import difference_plot
from domainbed_ext.report.plots.frontier import frontier_plot
from domainbed_ext.report.plots.gaps import gap_plot
from domainbed_ext.report.plots.panels import make_panels
from domainbed_ext.report.plots.scatter import generalisation_plot, parameters_plot
from domainbed_ext.report.plots.training import training_plot
from domainbed_ext.report.results import Results

Kind = Literal["png", "svg"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def draw_plots(results: Results, reference: str | None = None) -> dict[str, Figure]:
    """Draws every plot that the runs allow.

    Args:
        results: Figures of the runs; of leave-one-out runs, those of the main selection method are shown.
        reference: Id of the method that all others are compared with; None for no such plot.

    Returns:
        Plots by the name of their file.
    """
    shown = make_panels(results)
    drawn = {
        "plot": generalisation_plot(shown),
        "frontier": frontier_plot(results),
        "differences": None if reference is None else difference_plot(results, reference),
        "gaps": gap_plot(shown),
        "parameters": parameters_plot(shown),
        "training": training_plot(shown),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def render(figure: Figure, kind: Kind) -> bytes:
    """Renders a figure, to the same bytes for the same figure. The text of an SVG is text, which editors can change.

    Args:
        figure: Figure to draw.
        kind: Format of the file.

    Returns:
        Content of the file.
    """
    buffer = io.BytesIO()
    # Without a salt and with a date, an SVG would differ from one run to the next.
    with matplotlib.rc_context({"svg.hashsalt": "domainbed_ext", "svg.fonttype": "none"}):
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return buffer.getvalue()
