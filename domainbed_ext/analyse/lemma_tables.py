"""The tables of the analysis `lemmas`."""

import math
from collections.abc import Callable, Mapping, Sequence

from domainbed_ext.analyse.averages import mean_of, spread_of
from domainbed_ext.analyse.lemma_rows import RANDOM, TRAINED, Row, mean_over
from domainbed_ext.analyse.runs import group_by
from domainbed_ext.analyse.tables import origins_of, ratio, start_breaks, with_spread
from domainbed_ext.report.methods import algorithm_order, row_label_of
from domainbed_ext.report.tables.table import Table


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
                ratio(mean_over(members, "best")),
                with_spread(mean_over(members, "best_B"), mean_over(members, "best_B_spread")),
                with_spread(mean_over(members, "best_A"), mean_over(members, "best_A_spread")),
                ratio(mean_over(members, "chance")),
                f"{100 * mean_over(members, 'holds'):.0f} %",
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
            if mean_over(members, "best_B") < mean_over(members, "best_A")
        }
        | {
            (number, 4)
            for number, members in enumerate(lines.values())
            if mean_over(members, "best_B") > mean_over(members, "best_A")
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
    of_runs = [mean_over(members, name) for members in group_by(rows, lambda row: tuple(row.runs[0])).values()]
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
            "Best BA": lambda members: ratio(mean_over(members, "best")),
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
            "Chance": lambda members: ratio(mean_over(members, "chance")),
            "Own start, outputs": lambda members: _over_runs(members, "own_start_weighted"),
            "Random A, outputs": lambda members: _over_runs(members, "other_start_weighted"),
        },
        "LoRA-FA, theorem 3.1: the trained BA as B'A' with another A', and the B' that is nearest. ‖BA − B'A'‖ over "
        "‖BA‖: 0 if the rows of A' span those of A. Own start: A' is the run's A before training; random A: uniform "
        "orthonormal, of which the chance √(1 − r/d_in) is the expectation. Outputs: the same of the layer's outputs, "
        "‖(BA − B'A')x‖ over ‖BAx‖ in the root mean square over its inputs x. Mean over layers and runs ± standard "
        "deviation over runs.",
    )
