"""What the analysis `lemmas` computes of a layer: the lines of its results."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from domainbed_ext.analyse.averages import mean_of

RANDOM, TRAINED = "random", "trained"


@dataclass(frozen=True)
class Row:
    """The losses at one rank of a layer, or what a trained update reaches there.

    Attributes:
        group: Data set, and protocol if it is not leave-one-out.
        kind: "random" for the best factor beside a random one, "trained" for an update that was trained.
        algorithm: Id of the method that was trained, without `adapter_seed`; empty if none.
        layer: Name of the projection's layer.
        projection: Name of the projection.
        depth: Place of the layer among those of the projection, from 0.
        rank: Rank.
        runs: The runs and their steps.
        best: Loss of the best BA of the rank, or of the highest rank that a trained update can have: none has less.
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


def mean_over(rows: Sequence[Row], name: str) -> float:
    """Computes the mean of a value of rows.

    Args:
        rows: Rows.
        name: Name of the attribute.
    """
    return mean_of([getattr(row, name) for row in rows])
