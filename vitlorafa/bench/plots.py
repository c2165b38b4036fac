"""Plots of the benchmark. A method has the same name and colour in all of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitlorafa.bench.methods import METHODS
from vitlorafa.bench.tables import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_METHODS = {method.label: method for method in METHODS.values()}
_MARKERS = dict(zip(_METHODS, "osD^vPX*<>p", strict=True))
_GREY = "#7A7A7A"
_PALE = 0.3  # opacity of the peak's bar


def plot_memory(rows: Sequence[Row]) -> "Figure":
    """Bars of each method's peak memory and of the activations it keeps; one panel for each case, one common scale.

    Args:
        rows: Rows of `vitlorafa.bench.tables.memory_rows`.
    """
    from matplotlib.patches import Patch

    cases = list(dict.fromkeys(row["case"] for row in rows))
    height = 0.5 + sum(0.9 + 0.3 * sum(row["case"] == case for row in rows) for case in cases)
    figure, panels = _make_figure(len(cases), 7.5, height)
    top = max(row["peak_mib"] or row["kept_mib"] for row in rows)
    for axes, case in zip(panels, cases, strict=True):
        shown = [row for row in rows if row["case"] == case][::-1]
        names = [row["method"] for row in shown]
        colours = [_METHODS[name].colour for name in names]
        axes.barh(names, [row["peak_mib"] or 0 for row in shown], color=colours, alpha=_PALE)
        axes.barh(names, [row["kept_mib"] for row in shown], color=colours, height=0.45)
        for y, row in enumerate(shown):
            kept, peak = row["kept_mib"], row["peak_mib"]
            text = f" {kept:,.0f} of {peak:,.0f}" if peak else f" {kept:,.0f}"
            axes.text(max(kept, peak or 0), y, text, va="center", fontsize=8)
        axes.set_xlim(0, 1.2 * top)
        axes.set_title(case, fontsize=9, loc="left")
        axes.grid(axis="y", visible=False)
    panels[-1].set_xlabel("MiB", fontsize=9)
    handles = [
        Patch(color=_GREY, label="activations kept for backward"),
        Patch(color=_GREY, alpha=_PALE, label="peak: weights, gradients, optimizer state, activations"),
    ]
    figure.legend(handles=handles, loc="outside lower center", fontsize=8, frameon=False, ncols=2)
    return figure


def plot_ranks(rows: Sequence[Row]) -> "Figure":
    """Kept activations by rank: one line for each method, one panel for each setting.

    Args:
        rows: Rows of `vitlorafa.bench.tables.rank_rows`.
    """
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    figure, panels = _make_figure(len(settings), 6.0, 3.8 * len(settings))
    for axes, setting in zip(panels, settings, strict=True):
        top = 0.0
        for label, method in _METHODS.items():
            points = [(row["rank"], row[label]) for row in rows if row["setting"] == setting and row.get(label)]
            if not points:
                continue
            ranks, values = zip(*points, strict=True)
            is_bound = method is METHODS["lower_bound"]
            style: dict[str, Any] = {"linestyle": "--"} if is_bound else {"marker": _MARKERS[label]}
            axes.plot(ranks, values, label=label, color=method.colour, **style)
            top = max(top, *values)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_ylim(0, 1.08 * top)
        axes.set_title(setting, fontsize=9, loc="left")
        axes.set_ylabel("activations kept for backward (MiB)", fontsize=9)
        axes.legend(fontsize=8, frameon=False)
    panels[-1].set_xlabel("rank", fontsize=9)
    return figure


def save_figure(figure: "Figure", folder: Path, stem: str) -> None:
    """Writes a figure as SVG and PNG; the same figure gives the same bytes.

    Args:
        figure: Figure to write.
        folder: Folder to write to.
        stem: File name without suffix.
    """
    import matplotlib

    # Without a salt and with a date, an SVG would differ from one run to the next.
    with matplotlib.rc_context({"svg.hashsalt": "vitlorafa"}):
        figure.savefig(folder / f"{stem}.svg", metadata={"Date": None})
        figure.savefig(folder / f"{stem}.png", metadata={"Software": None})


def _make_figure(panels: int, width: float, height: float) -> tuple["Figure", list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = list(figure.subplots(panels, squeeze=False).flat)
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#E6E6E6", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
    return figure, all_axes
