"""The bounds on the generalisation gap of lemma 4.5 of Zhu et al. (2024), for the runs that there are.

Zhu et al., Asymmetry in Low-Rank Adapters of Foundation Models (2024), definition 4.4 and lemma 4.5 (B.4 and B.5 in
its anonymous review version). Let layers i with weights of d_out(i) × d_in(i) be adapted at rank r, each trained
parameter be quantised to q bits, n training examples be drawn independently, and the loss be σ-sub-Gaussian under
the product of its arguments' distributions. Then the expected difference of population and training risk is, in
absolute value, at most

    √(2 r q σ² ln 2 / n · Σ (d_in + d_out))   where both factors train (BA),
    √(2 r q σ² ln 2 / n · Σ d_out)            where B alone does,
    √(2 r q σ² ln 2 / n · Σ d_in)             where A alone does.

The proof bounds the information between what is trained and the training set (Xu and Raginsky, 2017) by the number
of trained bits, so the sum is under the root, and r Σ is the number of trained parameters.

Here the loss is one minus accuracy: in [0, 1], hence sub-Gaussian with σ = 1/2 (Hoeffding's lemma), and its gap is
train accuracy minus accuracy on new images of the same environments. Of other environments the lemma says nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from domainbed_ext.algorithms.names import describe
from domainbed_ext.model_selection import Record, training_environments
from domainbed_ext.report.tables.columns import Column, Figure, make_table, origins
from domainbed_ext.report.tables.table import NOT_RECORDED, Origin, Table

if TYPE_CHECKING:
    from domainbed_ext.report.figures import Comparison

AdaptedShapes = Callable[[str, str, str | None], Sequence[tuple[int, int]]]
"""Function of a backbone's name and an adapter's targets: (d_in, d_out) of each adapted projection, none if unknown."""

SIGMA = 0.5
BITS = 32  # factors and heads are trained in float32, whatever the precision of the matmuls
CAPTION = (
    "Lemma 4.5: the bound of Zhu et al. (2024) on the expected in-domain gap, in percentage points, from the trained "
    "adapter parameters at 32 bits each, the number of training images, and 0-1 loss (sub-Gaussian, σ = 1/2). All "
    "trained: the same argument over every trained parameter, head included, which lemma 4.5 leaves out. A bound of "
    "100 or more says nothing, as no gap is larger: only the order of the bounds can be compared with that of the gaps."
)


class Bounds(NamedTuple):
    """Bounds on one run's expected gap, in [0, ∞) where accuracies are in [0, 1]; None where not known.

    Attributes:
        lemma: Bound over the trained factors alone, as lemma 4.5 has it.
        trained: Bound over all trained parameters.
    """

    lemma: float | None
    trained: float | None


@dataclass(frozen=True)
class BoundColumn(Column):
    """The mean over runs of one bound, in percentage points.

    Attributes:
        header: Head of the column.
        comparison: The methods under one selection method.
        bound: Function of a run's record that returns its bound.
    """

    header: str
    comparison: "Comparison"
    bound: Callable[[Record], float | None]

    def text(self, algorithm: str) -> str:
        """The mean; "-" where a bound is not known."""
        bounds = [self.bound(record) for record in self.comparison.records(algorithm)]
        numbers = [100 * value for value in bounds if value is not None]
        if not numbers or len(numbers) < len(bounds):  # not the mean of some
            return NOT_RECORDED
        mean = sum(numbers) / len(numbers)
        return f"{mean:,.0f}" if mean >= 100 else f"{mean:.1f}"

    def origins(self, algorithm: str) -> list[Origin]:
        """All chosen records."""
        return origins(self.comparison.records(algorithm))


def columns(comparison: "Comparison", adapted_shapes: AdaptedShapes) -> list[Column]:
    """The columns of both bounds; none where no run recorded how many images it had.

    Args:
        comparison: The methods under one selection method.
        adapted_shapes: Shapes of the layers that an adapter adapts.
    """
    pair: list[Column] = [
        BoundColumn("Lemma 4.5", comparison, lambda record: of_record(record, adapted_shapes).lemma),
        BoundColumn("All trained", comparison, lambda record: of_record(record, adapted_shapes).trained),
    ]
    texts = (column.text(algorithm) for column in pair for algorithm in comparison.algorithms)
    return pair if any(text != NOT_RECORDED for text in texts) else []


def bounds_tables(comparison: "Comparison", title: str, adapted_shapes: AdaptedShapes) -> list[Table]:
    """The bounds beside the measured gap; no table where no run recorded how many images it had.

    Args:
        comparison: The methods under one selection method.
        title: What they were run on.
        adapted_shapes: Shapes of the layers that an adapter adapts.
    """
    if not (pair := columns(comparison, adapted_shapes)):
        return []
    table = make_table(
        f"{title}, bounds on the gap",
        comparison.algorithms,
        [Figure("Gap source", comparison, "gap_source"), *pair],
        f"Gap source: train − in-domain accuracy in percentage points, mean ± {comparison.error}. {CAPTION}",
    )
    table.shown = "folded"
    return [table]


def no_shapes(backbone: str, targets: str, blocks: str | None = None) -> Sequence[tuple[int, int]]:
    """Knows no backbone: lemma 4.5 is left out."""
    return ()


def bound(parameters: int, samples: int, bits: int = BITS, sigma: float = SIGMA) -> float:
    """√(2 σ² · parameters · bits · ln 2 / samples), by which every bound here is formed.

    Args:
        parameters: Number of trained parameters.
        samples: Number n of training examples.
        bits: Number q of bits of a parameter.
        sigma: Sub-Gaussian parameter σ of the loss.

    Returns:
        Bound on the gap.
    """
    return math.sqrt(2 * sigma**2 * parameters * bits * math.log(2) / samples)


def lemma_4_5(
    train: Literal["BA", "B", "A"],
    rank: int,
    shapes: Sequence[tuple[int, int]],
    samples: int,
    bits: int = BITS,
    sigma: float = SIGMA,
) -> float:
    """The bound of lemma 4.5.

    Args:
        train: Factors that train.
        rank: Rank r of the adapters.
        shapes: (d_in, d_out) of each adapted projection.
        samples: Number n of training examples.
        bits: Number q of bits of a parameter.
        sigma: Sub-Gaussian parameter σ of the loss.

    Returns:
        Bound on the gap.
    """
    widths = {"BA": [d_in + d_out for d_in, d_out in shapes], "B": [d for _, d in shapes], "A": [d for d, _ in shapes]}
    return bound(rank * sum(widths[train]), samples, bits, sigma)


def of_record(record: Record, adapted_shapes: AdaptedShapes = no_shapes) -> Bounds:
    """The bounds for one run.

    Args:
        record: One of its records; without `split_sizes` (upstream's have none) nothing is known.
        adapted_shapes: Shapes of the layers that an adapter adapts.

    Returns:
        Both bounds; none of a derived run, which was not trained.
    """
    if "derived" in record:
        return Bounds(None, None)
    sizes = record.get("split_sizes") or {}
    wanted = [f"env{env}_in" for env in training_environments(record)]
    if not all(sizes.get(name) for name in wanted):
        return Bounds(None, None)
    samples = sum(sizes[name] for name in wanted)
    trainable = record.get("trainable_parameters")
    return Bounds(_lemma(record, samples, adapted_shapes), bound(trainable, samples) if trainable else None)


def _lemma(record: Record, samples: int, adapted_shapes: AdaptedShapes) -> float | None:
    hparams: Mapping[str, Any] = record.get("hparams") or {}
    train = describe(record["args"]["algorithm"]).trains
    if train is None or not {"backbone", "targets", "rank"} <= hparams.keys():
        return None
    shapes = adapted_shapes(hparams["backbone"], hparams["targets"], hparams.get("blocks"))
    return lemma_4_5(train, hparams["rank"], shapes, samples) if shapes else None
