"""What the best B for a random A, and the best A for a random B, leave of a full fine-tuning's change.

Zhu et al. 2024, lemmas 4.1 and 4.2 and theorem 4.3: a layer has to give Δx for its inputs x, with second moments Σ.
Here Δ is what full fine-tuning changed, and x are the inputs of the layer in the pretrained model, on the training
images of the run. Losses are the mean of ‖Δx − BAx‖² over that of ‖Δx‖², the loss without an update. The noise
d_out σ², which all share, is left out. The lemmas are stated for inputs of mean zero. With other inputs and a bias that
does not train, they hold for the second moments in place of the covariance.

LoRA-FA, theorem 3.1: a trained BA is re-expressed as B'A' with another A'. Its residual is relative to BA.
"""

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from domainbed_ext.analyse.analysis import Analysis
from domainbed_ext.analyse.averages import mean_of, spread_of
from domainbed_ext.analyse.matrices import (
    Matrix,
    loss_of_best_A,
    loss_of_best_B,
    loss_of_update,
    losses_of_best_A,
    losses_of_best_B,
    losses_of_best_product,
    random_orthonormal,
    residual_in,
    singular_values,
)
from domainbed_ext.analyse.plots import add_legend, depth_axis, doubling_axis, grid_of
from domainbed_ext.analyse.runs import Adapter, Factors, Sweep, group_by
from domainbed_ext.analyse.tables import origins_of, ratio, start_breaks, with_spread
from domainbed_ext.analyse.weights import FullTuning, depths_of, layers_of, read_full, read_together
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.report.methods import algorithm_order, label_of, row_label_of
from domainbed_ext.report.plots.palette import Style, styles_of
from domainbed_ext.report.plots.style import GREY, bare
from domainbed_ext.report.tables.table import Table
from domainbed_ext.seeds import seed_hash
from domainbed_ext.system import option_values

RANKS = (1, 2, 4, 8, 16, 32, 64)
RANDOM, TRAINED = "random", "trained"
_TOP = 1.2  # of the plot: trained updates may be far above
_PANEL_INCHES = 3.3, 2.9
_ASIDE = 1.07  # factor between the places of methods, so that none is hidden


@dataclass(frozen=True)
class Row:
    """The losses at one rank of a layer, or what a trained update reaches there.

    Attributes:
        group: Data set, and protocol if it is not leave-one-out.
        kind: "random" for the best factor beside a random one, "trained" for an update that was trained.
        algorithm: Id of the method that was trained; empty if none.
        layer: Name of the projection's layer.
        projection: Name of the projection.
        depth: Place of the layer among those of the projection, from 0.
        rank: Rank.
        runs: The runs and their steps.
        best: Loss of the best BA of the rank: no update of the rank has less.
        best_B: Loss of the best B; for a random A the mean over draws, for a trained update with the run's frozen A.
        best_B_spread: Standard deviation of it over draws.
        best_A: Loss of the best A; for a random B the mean over draws, for a trained update with the run's frozen B.
        best_A_spread: Standard deviation of it over draws.
        holds: Share of the draws whose best A is not better than the best B, as theorem 4.3 says.
        reached: Loss of the trained update.
        scaled: Loss of the trained update times the best number.
        own_start: Residual of a trained BA in its own A before training.
        other_start: Residual in a random A, mean over draws.
        own_start_weighted: Residual of the layer's outputs in its own A before training.
        other_start_weighted: Residual of the layer's outputs in a random A, mean over draws.
        chance: Expected loss of the best A for a random B, 1 − r/d_out; of a trained update the expected residual in a
            random A, √(1 − r/d_in).
    """

    group: str
    kind: str
    algorithm: str
    layer: str
    projection: str
    depth: int
    rank: int
    runs: list[list[object]]
    best: float = math.nan
    best_B: float = math.nan  # noqa: N815
    best_B_spread: float = math.nan  # noqa: N815
    best_A: float = math.nan  # noqa: N815
    best_A_spread: float = math.nan  # noqa: N815
    holds: float = math.nan
    reached: float = math.nan
    scaled: float = math.nan
    own_start: float = math.nan
    other_start: float = math.nan
    own_start_weighted: float = math.nan
    other_start_weighted: float = math.nan
    chance: float = math.nan


def compute(sweep: Sweep, args: argparse.Namespace) -> list[Row]:
    """Computes the losses for every fully fine-tuned run and the adapters that were trained on the same images.

    Args:
        sweep: Runs of the sweep.
        args: Options: `ranks`, `draws` and `images`.

    Raises:
        BenchmarkError: There are no runs with adapters, or none of full fine-tuning beside them.
    """
    runs, full = sweep.adapted(), sweep.fully_tuned()
    wanted = [each for each in runs if each.place in full]
    if not wanted:
        lack = "none of its runs is on the same images as those with adapters" if full else "there is none"
        raise BenchmarkError(
            f"lemmas takes the change of a weight from a run of FullFT in {sweep.input_dir}, and {lack}: launch the "
            "sweep with FullFT among its --algorithms"
        )
    return [
        row
        for tuned, adapters in read_together(sweep, wanted)
        if tuned is not None
        for row in _at_place(read_full(tuned, layers_of(adapters), args.images), adapters, args.ranks, args.draws)
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the analysis."""
    parser.add_argument(
        "--ranks",
        type=option_values.whole(1),
        nargs="+",
        metavar="R",
        help=f"ranks of the random factors; those wider than a layer are left out ({' '.join(map(str, RANKS))}, and "
        "those of the sweep's methods)",
    )
    parser.add_argument(
        "--draws", type=option_values.whole(2), default=10, metavar="N", help="random factors of a layer (%(default)s)"
    )
    parser.add_argument(
        "--images",
        type=option_values.whole(1),
        default=1024,
        metavar="N",
        help="training images of a run that the inputs of layers are taken from (%(default)s)",
    )


def tables(rows: Sequence[Row]) -> list[Table]:
    """Makes the tables of losses, of trained updates and of residuals.

    Args:
        rows: Rows of `compute`.
    """
    made = []
    for group, members in group_by(rows, lambda row: row.group).items():
        random, trained = ([row for row in members if row.kind == kind] for kind in (RANDOM, TRAINED))
        made.append(_random_table(group, random))
        if trained:
            made.append(_trained_table(group, trained))
        if both := [row for row in trained if not math.isnan(row.own_start)]:
            made.append(_residual_table(group, both))
    return made


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


ANALYSIS = Analysis(
    "lemmas",
    "Losses of the best B for a random A, and of the best A for a random B",
    "What the best B for a random A, and the best A for a random B, leave of a full fine-tuning's change",
    Row,
    compute,
    tables,
    figure,
    add_options,
    ("ranks", "draws", "images"),
)


@dataclass(frozen=True)
class _Layer:
    """A layer of a fully fine-tuned run.

    Attributes:
        group: Data set, and protocol if it is not leave-one-out.
        factors: Any factors of the layer, for its names and widths.
        depth: Place of the layer.
        change: Δ, [d_out, d_in].
        root: Square root of Σ, [d_in, d_in].
        tuned: The fully fine-tuned run and its step.
        draws: Number of random factors.
    """

    group: str
    factors: Factors
    depth: int
    change: Matrix
    root: Matrix
    tuned: list[object]
    draws: int

    @cached_property
    def target(self) -> Matrix:
        """Δ root, whose squared norm is the loss without an update."""
        return self.change @ self.root

    @cached_property
    def values(self) -> Matrix:
        """The singular values of `target`, descending."""
        return singular_values(self.target)

    @property
    def make_row(self) -> Callable[..., Row]:
        """The row of the layer, as a function of all that belongs to no layer."""
        factors = self.factors
        return partial(Row, group=self.group, layer=factors.name, projection=factors.projection, depth=self.depth)

    def generators(self, side: str) -> Iterator[np.random.Generator]:
        """Yields a generator for each draw; the same layer and side have the same.

        Args:
            side: "A" or "B".
        """
        for draw in range(self.draws):
            yield np.random.default_rng(seed_hash(self.factors.name, side, draw))

    def random_A(self, rank: int) -> Iterator[Matrix]:
        """Yields random A's, [rank, d_in], of Gaussian rows: their span is uniform, as that of orthonormal ones is."""
        for generator in self.generators("A"):
            yield generator.standard_normal((rank, self.change.shape[1]))

    def random_B(self, rank: int) -> Iterator[Matrix]:
        """Yields random orthonormal B's, [d_out, rank]."""
        for generator in self.generators("B"):
            yield random_orthonormal(rank, len(self.change), generator).T


def _at_place(full: FullTuning, adapters: Sequence[Adapter], ranks: Sequence[int] | None, draws: int) -> Iterator[Row]:
    layers = layers_of(adapters)
    depths = depths_of(layers)
    wanted = sorted(set(ranks or {*RANKS, *(layer.rank for each in adapters for layer in each.layers.values())}))
    for name, factors in layers.items():
        layer = _Layer(
            full.chosen.group,
            factors,
            depths[name],
            full.changes[name],
            full.roots[factors.module],
            full.chosen.origin,
            draws,
        )
        yield from _random_rows(layer, [rank for rank in wanted if rank <= min(layer.change.shape)])
        for adapter in adapters:
            if name in adapter.layers:
                yield _trained_row(layer, adapter, adapter.layers[name])


def _random_rows(layer: _Layer, ranks: list[int]) -> Iterator[Row]:
    target, d_out = layer.target, len(layer.change)
    largest = max(ranks, default=0)
    of_B = [losses_of_best_B(target, A, layer.root, ranks) for A in layer.random_A(largest)]
    of_A = [losses_of_best_A(target, U, ranks) for U in layer.random_B(largest)]
    of_both = losses_of_best_product(layer.values, ranks)
    for number, rank in enumerate(ranks):
        best_B, best_A = ([draw[number] for draw in each] for each in (of_B, of_A))
        holds = [float(a >= b) for a, b in zip(best_A, best_B, strict=True)]
        yield layer.make_row(
            kind=RANDOM,
            algorithm="",
            rank=rank,
            runs=[layer.tuned],
            best=of_both[number],
            best_B=mean_of(best_B),
            best_B_spread=spread_of(best_B),
            best_A=mean_of(best_A),
            best_A_spread=spread_of(best_A),
            holds=mean_of(holds),
            chance=1 - rank / d_out,
        )


def _trained_row(layer: _Layer, adapter: Adapter, factors: Factors) -> Row:
    target, root, d_in = layer.target, layer.root, layer.change.shape[1]
    reached, scaled = loss_of_update(target, factors.update, root)
    values = {"reached": reached, "scaled": scaled}
    if "A" not in factors.trained:
        values["best_B"] = loss_of_best_B(target, factors.A, root)
    if "B" not in factors.trained:
        values["best_A"] = loss_of_best_A(target, factors.B)
    if factors.trained == "AB":
        other = list(layer.random_A(factors.rank))
        for ending, norm in (("", None), ("_weighted", root)):
            residual = partial(residual_in, factors.B, factors.A, root=norm)
            values[f"own_start{ending}"] = residual(factors.start_A)
            values[f"other_start{ending}"] = mean_of([residual(A) for A in other])
    return layer.make_row(
        kind=TRAINED,
        algorithm=adapter.chosen.algorithm,
        rank=factors.rank,
        runs=[adapter.chosen.origin, layer.tuned],
        best=losses_of_best_product(layer.values, [factors.rank])[0],
        chance=math.sqrt(1 - factors.rank / d_in),
        **values,
    )


def _mean(rows: Sequence[Row], name: str) -> float:
    return mean_of([getattr(row, name) for row in rows])


def _runs(rows: Sequence[Row]) -> list[list[object]]:
    return [run for row in rows for run in row.runs]


def _random_table(group: str, rows: Sequence[Row]) -> Table:
    lines = group_by(rows, lambda row: (row.projection, row.rank))
    return Table(
        f"{group}, losses of the best factor beside a random one",
        ["Projection", "Rank", "Best BA", "Best B, random A", "Best A, random B", "1 − r/d_out", "Theorem holds"],
        [
            [
                projection,
                str(rank),
                ratio(_mean(members, "best")),
                with_spread(_mean(members, "best_B"), _mean(members, "best_B_spread")),
                with_spread(_mean(members, "best_A"), _mean(members, "best_A_spread")),
                ratio(_mean(members, "chance")),
                f"{100 * _mean(members, 'holds'):.0f} %",
            ]
            for (projection, rank), members in lines.items()
        ],
        "The mean of ‖Δx − BAx‖² over that of ‖Δx‖²: Δ is what full fine-tuning changed, x are the layer's inputs in "
        "the pretrained model on training images. Best B for a random A: LoRA-FA, lemma 4.1 of Zhu et al. 2024; best A "
        "for a random B: LoRA-FB, lemma 4.2, whose expectation is 1 − r/d_out; best BA: no update of the rank has "
        "less. Random factors are uniform orthonormal. Mean over layers and runs ± standard deviation over draws of a "
        "layer. Theorem holds: layers and draws in which the best B is no worse (theorem 4.3).",
        best={
            (number, 3)
            for number, members in enumerate(lines.values())
            if _mean(members, "best_B") < _mean(members, "best_A")
        }
        | {
            (number, 4)
            for number, members in enumerate(lines.values())
            if _mean(members, "best_B") > _mean(members, "best_A")
        },
        origins={
            (number, column): origins_of(_runs(members))
            for number, members in enumerate(lines.values())
            for column in (2, 3, 4, 6)
        },
        breaks=start_breaks([projection for projection, _ in lines]),
    )


def _by_method(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    in_order = sorted(rows, key=lambda row: algorithm_order(row.algorithm))
    return group_by(in_order, lambda row: (row.algorithm, row.projection))


def _over_runs(rows: Sequence[Row], name: str) -> str:
    """The mean over layers and runs, and the standard deviation over runs."""
    of_runs = [_mean(members, name) for members in group_by(rows, lambda row: tuple(row.runs[0])).values()]
    return with_spread(mean_of(of_runs), spread_of(of_runs))


def _method_table(
    title: str, rows: Sequence[Row], columns: Mapping[str, Callable[[Sequence[Row]], str]], caption: str
) -> Table:
    """A table of trained methods, with a row for each projection."""
    lines = _by_method(rows)
    return Table(
        title,
        ["Algorithm", "Projection", "Runs", *columns],
        [
            [
                row_label_of(algorithm),
                projection,
                str(len({tuple(row.runs[0]) for row in members})),
                *(column(members) for column in columns.values()),
            ]
            for (algorithm, projection), members in lines.items()
        ],
        caption,
        texts=2,
        algorithms=[algorithm for algorithm, _ in lines],
        breaks=start_breaks([algorithm for algorithm, _ in lines]),
        origins={
            (number, column): origins_of(_runs(members))
            for number, members in enumerate(lines.values())
            for column in range(2, 3 + len(columns))
        },
    )


def _trained_table(group: str, rows: Sequence[Row]) -> Table:
    return _method_table(
        f"{group}, losses that trained updates reach",
        rows,
        {
            "Best BA": lambda members: ratio(_mean(members, "best")),
            "Best for its A": lambda members: _over_runs(members, "best_B"),
            "Best for its B": lambda members: _over_runs(members, "best_A"),
            "Reached": lambda members: _over_runs(members, "reached"),
            "At the best scale": lambda members: _over_runs(members, "scaled"),
        },
        "The same loss of updates that were trained on the same images as the full fine-tuning. Best for its A: of the "
        "best B for the run's frozen A; best for its B: of the best A for its frozen B. Reached: of the trained "
        "update, above 1 where no update is nearer to Δ: training minimises the loss of the network, not this one. At "
        "the best scale: of the update times the best number, 1 − cos² of its angle with Δ. Mean over layers and runs "
        "± standard deviation over runs.",
    )


def _residual_table(group: str, rows: Sequence[Row]) -> Table:
    return _method_table(
        f"{group}, residuals of trained updates in another A",
        rows,
        {
            "Own start": lambda members: _over_runs(members, "own_start"),
            "Random A": lambda members: _over_runs(members, "other_start"),
            "Chance": lambda members: ratio(_mean(members, "chance")),
            "Own start, outputs": lambda members: _over_runs(members, "own_start_weighted"),
            "Random A, outputs": lambda members: _over_runs(members, "other_start_weighted"),
        },
        "LoRA-FA, theorem 3.1: the trained BA as B'A' with another A', and the B' that is nearest. ‖BA − B'A'‖ over "
        "‖BA‖: 0 if the rows of A' span those of A. Own start: A' is the run's A before training; random A: uniform "
        "orthonormal, of which the chance √(1 − r/d_in) is the expectation. Outputs: the same of the layer's outputs, "
        "‖(BA − B'A')x‖ over ‖BAx‖ in the root mean square over its inputs x. Mean over layers and runs ± standard "
        "deviation over runs.",
    )


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
        colour, means = styles[algorithm].colour, [_mean(lines[place], name) for place in places]
        axes.plot(places, means, color=colour, linewidth=1.6, label=label)
        if name != "best":
            spreads = [_mean(lines[place], f"{name}_spread") for place in places]
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
        losses = [min(_mean(members, name), _TOP) for members in groups]
        named = label if label and name == "reached" else None
        axes.plot(
            places, losses, style.marker, markersize=5, color=style.colour, markerfacecolor=fill, label=named, zorder=3
        )
