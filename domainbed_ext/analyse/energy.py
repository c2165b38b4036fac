"""Spectra of updates, and how much of a full fine-tuning's change lies in the span of a factor.

The energy of a matrix is its squared Frobenius norm. Its share in the span of a factor is LoRA-FA's update energy
(appendix E.3) over the whole energy, ‖ΔP_A‖²/‖Δ‖² with the projector P_A onto the rows of A, taken of the change Δ
instead of one gradient; for B it is ‖P_BΔ‖²/‖Δ‖² with the projector onto the columns of B. An update with the factor
can hold no more of Δ than its span does, and a random span holds rank/width in expectation.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from matplotlib.figure import Figure

from domainbed_ext.analyse.analysis import Analysis
from domainbed_ext.analyse.averages import mean_of, spread_of
from domainbed_ext.analyse.matrices import (
    Matrix,
    column_basis,
    energy_shares,
    singular_values,
    singular_values_of_product,
    update_energy,
)
from domainbed_ext.analyse.plots import add_legend, doubling_axis
from domainbed_ext.analyse.runs import ChosenRun, Factors, Sweep, group_by
from domainbed_ext.analyse.tables import origins_of, ratio, start_breaks, with_spread
from domainbed_ext.analyse.weights import depths_of, layers_of, read_full, read_together
from domainbed_ext.errors import warn_once
from domainbed_ext.report.methods import algorithm_order, label_of, row_label_of
from domainbed_ext.report.plots.palette import styles_of
from domainbed_ext.report.plots.style import PANEL_INCHES, bare, figure_of, name_axes
from domainbed_ext.report.tables.table import NOT_RECORDED, Table

COUNTS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
_MOST_IN_TABLE = 100  # singular directions
FROZEN, START, TRAINED = "frozen", "start", "trained"


@dataclass(frozen=True)
class Row:
    """The energies of a layer in a run.

    Attributes:
        group: Data set, and protocol if it is not leave-one-out.
        algorithm: Id of the method, without `adapter_seed`.
        layer: Name of the projection's layer.
        projection: Name of the projection.
        depth: Place of the layer among those of the projection, from 0.
        counts: Numbers k of singular directions, at most the smaller width.
        shares: Shares of the energy of what training changed that the first k singular directions hold.
        run: The run and its step.
        spans: What the next two are of, such as "A frozen" or "B trained".
        inside: Shares of the energy of a full fine-tuning's change within these spans; none without such a run.
        chance: Expectations for random spans: the rank over the width.
    """

    group: str
    algorithm: str
    layer: str
    projection: str
    depth: int
    counts: list[int]
    shares: list[float]
    run: list[object]
    spans: list[str] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)
    chance: list[float] = field(default_factory=list)


def compute(sweep: Sweep, args: argparse.Namespace) -> list[Row]:
    """Computes the energies of each run with adapters and, where there are such, of full fine-tuning.

    Args:
        sweep: Runs of the sweep.
        args: Options; this analysis has none of its own.

    Raises:
        BenchmarkError: There are no runs with adapters.
    """
    rows: list[Row] = []
    for full, adapters in read_together(sweep, sweep.adapted()):
        layers = layers_of(adapters)
        depths, changes = depths_of(layers), {}
        if full is None:
            warn_once("some runs have no run of FullFT beside them, so nothing is said of the change that it makes")
        else:
            changes = read_full(full, layers).changes
            rows += [
                _row(full, layers[name], depths[name], singular_values(change), change.shape)
                for name, change in changes.items()
            ]
        rows += [
            _row_of_adapter(adapter.chosen, layer, depths[name], changes.get(name))
            for adapter in adapters
            for name, layer in adapter.layers.items()
        ]
    return rows


def tables(rows: Sequence[Row]) -> list[Table]:
    """Makes a table of spectra, and one of what lies in the spans of factors.

    Args:
        rows: Rows of `compute`.
    """
    made = []
    for group, members in group_by(rows, lambda row: row.group).items():
        made.append(_spectra(group, members))
        if any(not math.isnan(inside) for row in members for inside in row.inside):
            made.append(_spans(group, members))
    return made


def figure(rows: Sequence[Row]) -> Figure | None:
    """Draws the spectra: a panel for each projection.

    Args:
        rows: Rows of `compute`.
    """
    panels = group_by(rows, lambda row: (row.group, row.projection))
    if not panels:
        return None
    groups = {row.group for row in rows}
    titles = [f"{group}, {projection}" if len(groups) > 1 else projection for group, projection in panels]
    drawn, axes = figure_of(titles, (PANEL_INCHES[0], 3.6))
    styles = styles_of(_algorithms(rows))
    for ax, members in zip(axes, panels.values(), strict=True):
        bare(ax)
        for algorithm, line in group_by(members, lambda row: row.algorithm).items():
            counts, means = _mean_shares(line)
            style = styles[algorithm]
            ax.plot(
                counts,
                [100 * mean for mean in means],
                color=style.colour,
                linestyle=style.dashes,
                marker=style.marker,
                markersize=4,
                label=label_of(algorithm),
            )
        doubling_axis(ax)
        ax.set_ylim(0, 102)
    add_legend(drawn, axes)
    name_axes(
        drawn,
        axes,
        "singular directions (number)",
        "energy of the change of the weight (%)",
        "mean over layers and runs",
    )
    return drawn


ANALYSIS = Analysis(
    "energy",
    "Spectra of updates",
    "What share of the updates' energy the first singular directions hold, and the spans of factors",
    Row,
    compute,
    tables,
    figure,
)


def _row(chosen: ChosenRun, layer: Factors, depth: int, values: Matrix, shape: Sequence[int]) -> Row:
    """The row of what training changed in a layer, by its singular values and its shape."""
    widest = min(shape)
    counts = [*(count for count in COUNTS if count < widest), widest]
    shares = energy_shares(values, counts)
    return Row(chosen.group, chosen.method, layer.name, layer.projection, depth, counts, shares, chosen.origin)


def _row_of_adapter(chosen: ChosenRun, layer: Factors, depth: int, full: Matrix | None) -> Row:
    """The row of an adapter's layer, with what of full fine-tuning's change `full` lies in the spans of its factors."""
    left, right = layer.left, layer.right
    values = singular_values_of_product(left, right)
    spans = list(_spans_of(layer))
    return replace(
        _row(chosen, layer, depth, values, (len(left), right.shape[1])),
        spans=[name for name, _, _ in spans],
        inside=[
            math.nan if full is None else update_energy(full.T if side == "B" else full, basis)
            for _, side, basis in spans
        ],
        chance=[basis.shape[1] / len(basis) for _, _, basis in spans],
    )


def _spans_of(layer: Factors) -> Iterator[tuple[str, str, Matrix]]:
    """The spans of a layer's factors that are not zero: name, side and basis."""
    for side, start, now in (("A", layer.start_A.T, layer.A.T), ("B", layer.start_B, layer.B)):
        named = {TRAINED: now, START: start} if side in layer.trained else {FROZEN: now}
        for name, factor in named.items():
            if (basis := column_basis(factor)).shape[1]:
                yield f"{side} {name}", side, basis


def _algorithms(rows: Sequence[Row]) -> list[str]:
    return sorted({row.algorithm for row in rows}, key=algorithm_order)


def _mean_shares(rows: Sequence[Row]) -> tuple[list[int], list[float]]:
    """The numbers of directions that all layers have, and the mean shares."""
    counts = [count for count in rows[0].counts if all(count in row.counts for row in rows)]
    return counts, [mean_of([row.shares[row.counts.index(count)] for row in rows]) for count in counts]


def _over_runs(rows: Sequence[Row], value: Callable[[Row], float]) -> tuple[float, float]:
    """The mean over layers and runs, and the standard deviation over runs."""
    of_runs = [
        mean_of([value(row) for row in of_run]) for of_run in group_by(rows, lambda row: tuple(row.run)).values()
    ]
    return mean_of(of_runs), spread_of(of_runs)


def _spectra(group: str, rows: Sequence[Row]) -> Table:
    narrowest = min(row.counts[-1] for row in rows)
    counts = [count for count in COUNTS if count < min(narrowest, _MOST_IN_TABLE)]
    by_algorithm = {name: [row for row in rows if row.algorithm == name] for name in _algorithms(rows)}
    return Table(
        f"{group}, energy of the updates",
        ["Algorithm", "Runs", *(f"first {count}" for count in counts)],
        [
            [
                row_label_of(name),
                str(len({tuple(row.run) for row in members})),
                *(with_spread(*_over_runs(members, partial(_share, count=count))) for count in counts),
            ]
            for name, members in by_algorithm.items()
        ],
        "Share of the squared norm of what training changed in a weight that its first k singular directions hold: "
        "of s·B·A for adapters, of the difference of the weights for full fine-tuning. Mean over layers and runs ± "
        "standard deviation over runs.",
        origins={
            (number, column): origins_of([row.run for row in members])
            for number, members in enumerate(by_algorithm.values())
            for column in range(1, 2 + len(counts))
        },
        algorithms=list(by_algorithm),
    )


def _share(row: Row, count: int) -> float:
    return row.shares[row.counts.index(count)]


def _spans(group: str, rows: Sequence[Row]) -> Table:
    lines = {
        (name, span): [row for row in rows if row.algorithm == name and span in row.spans]
        for name in _algorithms(rows)
        for span in dict.fromkeys(span for row in rows if row.algorithm == name for span in row.spans)
    }
    projections = list(dict.fromkeys(row.projection for row in rows))
    return Table(
        f"{group}, full fine-tuning's change in the span of a factor",
        ["Algorithm", "Span of", *projections, "All", "Chance", "Ratio"],
        [_span_cells(name, span, members, projections) for (name, span), members in lines.items()],
        "Share of the squared norm of the change Δ of full fine-tuning on the same images within the row space of A, "
        "‖ΔP‖²/‖Δ‖², or the column space of B, ‖PΔ‖²/‖Δ‖²: LoRA-FA's update energy (appendix E.3) of Δ, relative. "
        "Chance: random spans, rank over width. Ratio: all over chance; above 1, the factor points where full "
        "fine-tuning goes. Mean over layers and runs ± standard deviation over runs.",
        texts=2,
        algorithms=[name for name, _ in lines],
        breaks=start_breaks([name for name, _ in lines]),
        origins={
            (number, column): origins_of([row.run for row in members])
            for number, members in enumerate(lines.values())
            for column in range(2, 3 + len(projections))
        },
    )


def _span_cells(algorithm: str, span: str, rows: Sequence[Row], projections: Sequence[str]) -> list[str]:
    def inside(row: Row) -> float:
        return row.inside[row.spans.index(span)]

    whole = mean_of([inside(row) for row in rows])
    chance = mean_of([row.chance[row.spans.index(span)] for row in rows])
    return [
        row_label_of(algorithm),
        span,
        *(ratio(mean_of([inside(row) for row in rows if row.projection == name])) for name in projections),
        with_spread(*_over_runs(rows, inside)),
        ratio(chance),
        NOT_RECORDED if math.isnan(whole) else f"{whole / chance:.2f}",
    ]
