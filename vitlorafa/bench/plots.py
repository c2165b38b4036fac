"""Plots of the benchmark. A method has the same name and colour in all of them."""

from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitlorafa.bench.methods import CORE, METHODS, find_method
from vitlorafa.bench.tables import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = dict(zip(CORE, "osD^vPX*<>p", strict=True))
_GREY = "#7A7A7A"
_PALE = 0.3  # opacity of the peak's bar
# Label and colour of each part of the memory in the plot of all methods, and the columns that it sums.
_PARTS = (
    ("frozen weights", "#BBBBBB", ("frozen_mib",)),
    ("trained weights, gradients, optimizer state", "#CC79A7", ("trained_mib", "gradients_mib", "optimizer_mib")),
    ("weights kept for backward", "#E69F00", ("kept_weights_mib",)),
    ("activations kept for backward, images", "#0072B2", ("kept_mib", "images_mib")),
)


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
        colours = [METHODS[find_method(name)].colour for name in names]
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
        labels = [key for key in rows[0] if key not in ("setting", "rank")]
        for label in sorted(labels, key=lambda label: list(METHODS).index(find_method(label))):
            name = find_method(label)
            points = [(row["rank"], row[label]) for row in rows if row["setting"] == setting and row.get(label)]
            if not points:
                continue
            ranks, values = zip(*points, strict=True)
            axes.plot(ranks, values, label=METHODS[name].label, **_line(name))
            top = max(top, *values)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_ylim(0, 1.08 * top)
        axes.set_title(setting, fontsize=9, loc="left")
        axes.set_ylabel("activations kept for backward (MiB)", fontsize=9)
        axes.legend(fontsize=8, frameon=False)
    panels[-1].set_xlabel("rank", fontsize=9)
    return figure


def plot_methods(rows: Sequence[Row]) -> "Figure":
    """Two panels with one bar for each method: the parts of its memory, and the utilisation of the machine.

    Args:
        rows: Rows of `vitlorafa.bench.tables.method_rows`, of one case.
    """
    from matplotlib.ticker import PercentFormatter

    shown = list(rows)[::-1]
    figure, (memory, speed) = _make_figure(2, 10.0, 1.6 + 0.2 * len(shown), beside=True)
    places = range(len(shown))
    left = [0.0] * len(shown)
    for label, colour, keys in _PARTS:
        widths = [sum(row[key] for key in keys) for row in shown]
        memory.barh(places, widths, left=left, color=colour, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, total in zip(places, left, strict=True):
        memory.text(total, place, f" {total:,.0f}", va="center", fontsize=7)
    memory.set_xlim(0, 1.12 * max(left))
    memory.set_xlabel("memory, counted (MiB)", fontsize=9)
    speed.barh(places, [row["mfu"] or 0 for row in shown], color=[_colour(row) for row in shown])
    for place, row in zip(places, shown, strict=True):
        text = f" {row['step_ms']:,.0f} ms" if row["step_ms"] else " not timed"
        speed.text(row["mfu"] or 0, place, text, va="center", fontsize=7)
    speed.set_xlim(0, 1.2 * max(row["mfu"] or 0 for row in shown) or 1)
    speed.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    speed.set_xlabel("model FLOPs utilisation; time of a step", fontsize=9)
    memory.set_yticks(places, [row["method"] for row in shown])
    speed.set_yticks(places, [""] * len(shown))
    for axes in (memory, speed):
        axes.set_ylim(-0.7, len(shown) - 0.3)
        axes.grid(axis="y", visible=False)
        for place, (row, following) in enumerate(pairwise(shown)):
            if row["group"] != following["group"]:
                axes.axhline(place + 0.5, color=_GREY, linewidth=0.5)
    memory.set_title(rows[0]["case"], fontsize=9, loc="left")
    figure.legend(loc="outside lower center", fontsize=8, frameon=False, ncols=len(_PARTS))
    return figure


def plot_growth(rows: Sequence[Row]) -> "Figure":
    """Counted memory by rank, by number of adapted blocks and by resolution: one line for each method.

    Args:
        rows: Rows of `vitlorafa.bench.tables.growth_rows`.
    """
    from matplotlib.lines import Line2D

    panels = {"rank": ["rank"], "adapted blocks": ["last blocks", "first blocks"], "resolution (px)": ["resolution"]}
    names = sorted({find_method(row["method"]) for row in rows}, key=list(METHODS).index)
    figure, all_axes = _make_figure(len(panels), 11.0, 4.2, beside=True)
    for axes, (title, series) in zip(all_axes, panels.items(), strict=True):
        for which, name in product(series, names):
            points = [
                (row["value"], row["total_mib"])
                for row in rows
                if row["panel"] == which and find_method(row["method"]) == name
            ]
            if points:
                more = {"linestyle": ":", "fillstyle": "none"} if which == "first blocks" else {}
                axes.plot(*zip(*points, strict=True), **_line(name) | more)
        axes.set_xlabel(title, fontsize=9)
        axes.set_ylim(bottom=0)
    all_axes[0].set_xscale("log", base=2)
    all_axes[0].xaxis.set_major_formatter("{x:g}")
    all_axes[0].set_ylabel("memory, counted (MiB)", fontsize=9)
    all_axes[0].set_title(rows[0]["case"], fontsize=9, loc="left")
    handles = [Line2D([], [], label=METHODS[name].label, **_line(name)) for name in names]
    handles += [
        Line2D([], [], color=_GREY, label="the last blocks are adapted"),
        Line2D([], [], color=_GREY, linestyle=":", label="the first blocks are adapted"),
    ]
    figure.legend(handles=handles, loc="outside lower center", fontsize=8, frameon=False, ncols=4)
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


def _colour(row: Row) -> str:
    return METHODS[find_method(row["method"])].colour


def _line(name: str) -> dict[str, Any]:
    """Colour and marker of a method's line; the lower bound's is dashed."""
    is_bound = name == "lower_bound"
    style: dict[str, Any] = {"linestyle": "--"} if is_bound else {"marker": _MARKERS.get(name, ".")}
    return {"color": METHODS[name].colour, **style}


def _make_figure(panels: int, width: float, height: float, beside: bool = False) -> tuple["Figure", list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    rows, columns = (1, panels) if beside else (panels, 1)
    all_axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#E6E6E6", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
    return figure, all_axes
