"""The figure of the analysis `lemmas`."""

from collections import Counter
from collections.abc import Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from domainbed_ext.analyse.averages import mean_of
from domainbed_ext.analyse.lemma_rows import RANDOM, TRAINED, Row, mean_over
from domainbed_ext.analyse.plots import add_legend, depth_axis, doubling_axis, grid_of
from domainbed_ext.analyse.runs import group_by
from domainbed_ext.report.methods import algorithm_order, label_of
from domainbed_ext.report.plots.palette import Style, styles_of
from domainbed_ext.report.plots.style import GREY, bare

_TOP = 1.2  # of the plot: trained updates may be far above
_PANEL_INCHES = 3.3, 2.9
_ASIDE = 1.07  # factor between the places of methods, so that none is hidden


def figure(rows: Sequence[Row]) -> Figure | None:
    """Draws the losses over the rank, and over the blocks at the rank that was trained most: a column per projection.

    Args:
        rows: Rows of `compute`.
    """
    if not rows:
        return None
    groups, projections = ({getattr(row, name): None for row in rows} for name in ("group", "projection"))
    rank = _commonest([row.rank for row in rows if row.kind == TRAINED] or [row.rank for row in rows])
    views = {
        (f"{group}, " * (len(groups) > 1) + title): (group, view)
        for group in groups
        for title, view in (("by rank", _draw_ranks), (f"rank {rank}, by block", partial(_draw_blocks, rank=rank)))
    }
    drawn, axes = grid_of(list(views), list(projections), _PANEL_INCHES)
    for (name, projection), ax in axes.items():
        group, view = views[name]
        bare(ax)
        ax.axhline(1, color=GREY, linewidth=1)
        view(ax, [row for row in rows if (row.group, row.projection) == (group, projection)])
        ax.set_ylim(0, _TOP + 0.04)
    add_legend(drawn, list(axes.values()))
    drawn.supxlabel(
        "means over runs, and by rank also over layers; bands: standard deviation over draws\n"
        "marks: trained updates, hollow at their best scale; those at the upper edge are above it",
        fontsize=9,
    )
    drawn.supylabel("loss, relative to no update", fontsize=9)
    return drawn


def _commonest(ranks: Sequence[int]) -> int:
    return Counter(ranks).most_common(1)[0][0]


def _draw_ranks(axes: Axes, rows: Sequence[Row]) -> None:
    """Draws the losses over the rank, with a place aside for each trained method."""
    _draw_random(axes, rows, "rank")
    methods = _by_algorithm(rows)
    for number, (algorithm, (style, members)) in enumerate(methods.items()):
        aside = _ASIDE ** (number - (len(methods) - 1) / 2)
        place = [aside * mean_of([row.rank for row in members])]
        _mark(axes, place, [members], style, f"trained {label_of(algorithm)}")
    doubling_axis(axes)
    axes.set_xlabel("rank", fontsize=9)


def _draw_blocks(axes: Axes, rows: Sequence[Row], rank: int) -> None:
    """Draws the losses at a rank over the blocks."""
    at_rank = [row for row in rows if row.rank == rank]
    _draw_random(axes, at_rank, "depth")
    for style, members in _by_algorithm(at_rank).values():
        blocks = group_by(members, lambda row: row.depth)
        _mark(axes, list(blocks), list(blocks.values()), style, "")
    depth_axis(axes, max((row.depth for row in rows), default=0))
    axes.set_xlabel("block", fontsize=9)


def _draw_random(axes: Axes, rows: Sequence[Row], along: str) -> None:
    """Draws the losses of the best factors over the rank or the depth."""
    lines = group_by([row for row in rows if row.kind == RANDOM], lambda row: getattr(row, along))
    styles, places = styles_of(["BA", "BOnly", "AOnly"]), sorted(lines)
    for name, algorithm, label in (
        ("best_A", "AOnly", "best A, random B"),
        ("best_B", "BOnly", "best B, random A"),
        ("best", "BA", "best BA"),
    ):
        colour, means = styles[algorithm].colour, [mean_over(lines[place], name) for place in places]
        axes.plot(places, means, color=colour, linewidth=1.6, label=label)
        if name != "best":
            spreads = [mean_over(lines[place], f"{name}_spread") for place in places]
            low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
            axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)


def _by_algorithm(rows: Sequence[Row]) -> dict[str, tuple[Style, list[Row]]]:
    """The rows of each trained method, in the order of tables, with its style."""
    trained = sorted((row for row in rows if row.kind == TRAINED), key=lambda row: algorithm_order(row.algorithm))
    groups = group_by(trained, lambda row: row.algorithm)
    styles = styles_of(list(groups))
    return {algorithm: (styles[algorithm], members) for algorithm, members in groups.items()}


def _mark(axes: Axes, places: Sequence[float], groups: Sequence[Sequence[Row]], style: Style, label: str) -> None:
    """Marks the mean losses of trained updates; those above the panel at its upper edge."""
    for name, fill in (("reached", style.colour), ("scaled", "white")):
        losses = [min(mean_over(members, name), _TOP) for members in groups]
        named = label if label and name == "reached" else None
        axes.plot(
            places, losses, style.marker, markersize=5, color=style.colour, markerfacecolor=fill, label=named, zorder=3
        )
