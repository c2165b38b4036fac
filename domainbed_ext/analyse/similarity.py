"""How similar the learned A's of different runs are, and the learned B's (Zhu et al. 2024, figure 1 and appendix D).

The similarity of two matrices is ‖U_YᵀU_X‖² / min(r₁, r₂), with orthonormal bases U of what BA keeps of them when B
becomes BC and A becomes C⁻¹A: of the rows of A, and of the columns of B.
"""

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from domainbed_ext.analyse.analysis import Analysis
from domainbed_ext.analyse.averages import mean_of, pair_intervals
from domainbed_ext.analyse.matrices import Matrix, cca_similarity, column_basis, row_basis
from domainbed_ext.analyse.plots import add_legend, depth_axis, grid_of, hide_others
from domainbed_ext.analyse.runs import Adapter, ChosenRun, Sweep, group_by, read_adapters
from domainbed_ext.analyse.tables import origins_of, ratio, start_breaks
from domainbed_ext.errors import BenchmarkError, warn_once
from domainbed_ext.report.methods import label_of, row_label_of
from domainbed_ext.report.plots.palette import DASHES, MARKERS
from domainbed_ext.report.plots.style import GREY, bare
from domainbed_ext.report.tables.table import NOT_RECORDED, Table

ALL = "all"
SAME_TASK, SAME_START, NEITHER, BOTH = (
    "same sources, different starts",
    "different sources, same start",
    "different sources, different starts",
    "same sources, same start",
)
PAIRINGS = (SAME_TASK, SAME_START, NEITHER, BOTH)
COLOURS = {"A": "#0072B2", "B": "#D55E00"}
_PANEL_INCHES = 3.6, 2.9


@dataclass(frozen=True)
class Row:
    """The similarity of one trained factor between runs of a method, in one pairing.

    Attributes:
        group: Data set, and protocol if it is not leave-one-out.
        algorithm: Id of the method, without `adapter_seed`.
        factor: "A" or "B".
        pairing: Which pairs of runs are compared: one of `PAIRINGS`.
        layer: Name of the projection's layer; "all" for the mean over layers.
        projection: Name of the projection; "all" for the mean over all.
        depth: Place of the layer among those of the projection, from 0; -1 for a mean.
        pairs: Number of pairs.
        similarity: Mean similarity over the pairs, in [0, 1].
        low: Lower end of its 95 % interval.
        high: Upper end.
        start: The same of the untrained factors; NaN if they are zero.
        chance: Expectation for random subspaces: the rank over the width.
        runs: The runs and their steps.
    """

    group: str
    algorithm: str
    factor: str
    pairing: str
    layer: str
    projection: str
    depth: int
    pairs: int
    similarity: float
    low: float
    high: float
    start: float
    chance: float
    runs: list[list[object]]


@dataclass(frozen=True)
class _Layer:
    """What a row says of a layer besides its similarity."""

    name: str
    projection: str
    trained: str
    chance: dict[str, float]


@dataclass(frozen=True)
class _Learned:
    """What pairs are made of: bases of a run's factors, after and before training, by factor and layer."""

    chosen: ChosenRun
    start: str
    layers: list[_Layer]
    trained: dict[str, list[Matrix]]
    untrained: dict[str, list[Matrix]]

    @classmethod
    def of(cls, adapter: Adapter) -> "_Learned":
        factors = list(adapter.layers.values())
        layers = [
            _Layer(
                each.name,
                each.projection,
                each.trained,
                {"A": each.rank / each.A.shape[1], "B": each.rank / len(each.B)},
            )
            for each in factors
        ]
        return cls(
            adapter.chosen,
            adapter.start,
            layers,
            {"A": [row_basis(each.A) for each in factors], "B": [column_basis(each.B) for each in factors]},
            {"A": [row_basis(each.start_A) for each in factors], "B": [column_basis(each.start_B) for each in factors]},
        )


def compute(sweep: Sweep, args: argparse.Namespace) -> list[Row]:
    """Compares all runs of each method with each other.

    Args:
        sweep: Runs of the sweep.
        args: Options; this analysis has none of its own.

    Raises:
        BenchmarkError: There are no runs with adapters, or no two of one method that can be compared.
    """
    methods = group_by(sweep.adapted(), _key).values()
    if not any(map(_comparable, methods)):
        raise BenchmarkError(
            f"similarity compares two runs of one method, and {sweep.input_dir} has one of each: launch the sweep with "
            "--n_trials 2 or more"
        )
    # One method after the other, so that no more than the factors of one are in memory.
    in_order = [each for members in methods for each in members]
    rows = [
        row
        for (group, method), members in itertools.groupby(read_adapters(in_order), lambda each: _key(each.chosen))
        for row in _compare(group, method, list(map(_Learned.of, members)))
    ]
    there = {row.pairing for row in rows}
    if SAME_START not in there:
        warn_once(
            "no two runs on different sources have the same start: add e.g. BA@adapter_seed=0 to the sweep's "
            f"--algorithms for the pairing {SAME_START!r}"
        )
    return rows


def tables(rows: Sequence[Row]) -> list[Table]:
    """Makes a table of means over layers, with a column for each projection.

    Args:
        rows: Rows of `compute`.
    """
    made = []
    for group, members in group_by(rows, lambda row: row.group).items():
        projections = list(dict.fromkeys(row.projection for row in members if row.projection != ALL))
        lines = list(group_by(members, lambda row: (row.algorithm, row.factor, row.pairing)).items())
        grid = [_cells(key, each, projections) for key, each in lines]
        table = Table(
            f"{group}, similarity of learned factors",
            ["Algorithm", "Factor", "Pairs", "Number", *projections, "All", "Untrained", "Chance"],
            grid,
            "Goodness of fit of canonical correlation analysis, ‖U_YᵀU_X‖² / min(r₁, r₂), between the row spaces of "
            "A or the column spaces of B of two runs (Zhu et al. 2024, appendix D): 1 for the same subspace. Mean "
            "over layers and pairs, with a 95 % interval by a bootstrap that draws runs, since pairs share them; of "
            "fewer than three runs there is none. Untrained: the same of the factors before training, - where they "
            "are zero. Chance: random subspaces, rank over width. Only factors that train. Sources: the training "
            "environments; those of leave-one-out runs differ in one each.",
            texts=3,
            algorithms=[algorithm for (algorithm, _, _), _ in lines],
            breaks=start_breaks([key[:2] for key, _ in lines]),
        )
        table.origins = {
            (number, column): origins_of(each[0].runs)
            for number, (_, each) in enumerate(lines)
            for column in range(3, 6 + len(projections))
        }
        made.append(table)
    return made


def figure(rows: Sequence[Row]) -> Figure | None:
    """Draws the similarity by layer: a row of panels for each method, a column for each pairing.

    Args:
        rows: Rows of `compute`.
    """
    layers = [row for row in rows if row.layer != ALL]
    if not layers:
        return None
    several = len({row.group for row in layers}) > 1
    panels = group_by(layers, lambda row: (f"{row.group}, " * several + label_of(row.algorithm), row.pairing))
    pairings = [pairing for pairing in PAIRINGS if any(pairing == each for _, each in panels)]
    drawn, axes = grid_of(list(dict.fromkeys(name for name, _ in panels)), pairings, _PANEL_INCHES)
    projections = list(dict.fromkeys(row.projection for row in layers))
    for place, members in panels.items():
        _draw(axes[place], members, projections)
    hide_others(axes, list(panels))
    add_legend(drawn, list(axes.values()))
    drawn.supxlabel("block\nbands: 95 % intervals over runs; dotted: untrained; grey: random subspaces", fontsize=9)
    drawn.supylabel("similarity (CCA goodness of fit)", fontsize=9)
    return drawn


ANALYSIS = Analysis(
    "similarity",
    "Similarity of learned factors",
    "How similar the learned A's and B's of different runs are",
    Row,
    compute,
    tables,
    figure,
)


def _key(chosen: ChosenRun) -> tuple[str, str]:
    return chosen.group, chosen.method


def _pairing(one: _Learned, other: _Learned) -> str:
    same_task, same_start = one.chosen.sources == other.chosen.sources, one.start == other.start
    if same_task:
        return BOTH if same_start else SAME_TASK
    return SAME_START if same_start else NEITHER


def _comparable(runs: Sequence[ChosenRun]) -> list[tuple[int, int]]:
    """The pairs of a method's runs, without those that share their minibatches and differ in `adapter_seed` alone."""
    return [
        (i, j)
        for (i, one), (j, other) in itertools.combinations(enumerate(runs), 2)
        if (one.place, one.seed) != (other.place, other.seed)
    ]


@dataclass(frozen=True)
class _Part:
    """Layers whose mean is a row: a single one, those of a projection, or all."""

    columns: list[int]
    layer: str
    projection: str
    depth: int


def _parts(layers: Sequence[_Layer]) -> list[_Part]:
    names = list(dict.fromkeys(layer.projection for layer in layers))
    of = {name: [n for n, layer in enumerate(layers) if layer.projection == name] for name in names}
    single = [_Part([n], layer.name, layer.projection, of[layer.projection].index(n)) for n, layer in enumerate(layers)]
    means = [_Part(columns, ALL, name, -1) for name, columns in of.items()]
    return [*single, *means, _Part(list(range(len(layers))), ALL, ALL, -1)]


def _compare(group: str, method: str, runs: Sequence[_Learned]) -> list[Row]:
    """The rows of a method: of each factor, pairing and layer, and of their means."""
    layers = runs[0].layers
    pairs = group_by(
        _comparable([each.chosen for each in runs]), lambda pair: _pairing(*(runs[number] for number in pair))
    )
    return [
        row
        for factor in layers[0].trained
        for pairing in PAIRINGS
        if pairing in pairs
        for row in _rows((group, method, factor, pairing), layers, runs, pairs[pairing])
    ]


def _rows(
    key: tuple[str, str, str, str],
    layers: Sequence[_Layer],
    runs: Sequence[_Learned],
    pairs: Sequence[tuple[int, int]],
) -> list[Row]:
    """The rows of a factor in a pairing."""
    factor, parts = key[2], _parts(layers)
    learned = _similarities([each.trained[factor] for each in runs], pairs)
    untrained = _similarities([each.untrained[factor] for each in runs], pairs)
    chances = [layer.chance[factor] for layer in layers]
    means, lows, highs = pair_intervals(np.stack([learned[:, part.columns].mean(1) for part in parts], axis=1), pairs)
    origins = [runs[number].chosen.origin for number in sorted({number for pair in pairs for number in pair})]
    return [
        Row(
            *key,
            part.layer,
            part.projection,
            part.depth,
            len(pairs),
            mean,
            low,
            high,
            mean_of(untrained[:, part.columns].ravel().tolist()),
            mean_of([chances[column] for column in part.columns]),
            origins,
        )
        for part, mean, low, high in zip(parts, means.tolist(), lows.tolist(), highs.tolist(), strict=True)
    ]


def _similarities(bases: Sequence[Sequence[Matrix]], pairs: Sequence[tuple[int, int]]) -> Matrix:
    """[pairs, layers]."""
    return np.array([[cca_similarity(X, Y) for X, Y in zip(bases[i], bases[j], strict=True)] for i, j in pairs])


def _cells(key: tuple[str, str, str], rows: Sequence[Row], projections: Sequence[str]) -> list[str]:
    algorithm, factor, pairing = key
    means = {row.projection: row for row in rows if row.layer == ALL}
    whole = means[ALL]
    return [
        row_label_of(algorithm),
        factor,
        pairing,
        str(whole.pairs),
        *(ratio(means[name].similarity) if name in means else NOT_RECORDED for name in projections),
        ratio(whole.similarity, (whole.low, whole.high)),
        ratio(whole.start),
        ratio(whole.chance),
    ]


def _draw(axes: Axes, rows: Sequence[Row], projections: Sequence[str]) -> None:
    bare(axes)
    axes.axhline(mean_of([row.chance for row in rows]), color=GREY, linewidth=1)
    for (factor, projection), line in group_by(rows, lambda row: (row.factor, row.projection)).items():
        colour, number = COLOURS[factor], projections.index(projection)
        x, y = [row.depth for row in line], [row.similarity for row in line]
        axes.plot(
            x,
            y,
            color=colour,
            linestyle=DASHES[number % len(DASHES)],
            linewidth=1.2,
            marker=MARKERS[number % len(MARKERS)],
            markersize=3.5,
            label=f"{factor}, {projection}",
        )
        axes.fill_between(
            x, [row.low for row in line], [row.high for row in line], color=colour, alpha=0.1, linewidth=0
        )
        if not math.isnan(line[0].start):
            axes.plot(x, [row.start for row in line], color=colour, linestyle=(0, (1, 2)), linewidth=1)
    depth_axis(axes, max(row.depth for row in rows))
    axes.set_ylim(-0.03, 1.03)
