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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from domainbed_ext.analyse.analysis import Analysis
from domainbed_ext.analyse.averages import mean_of, spread_of
from domainbed_ext.analyse.lemma_figure import figure
from domainbed_ext.analyse.lemma_rows import RANDOM, TRAINED, Row
from domainbed_ext.analyse.lemma_tables import tables
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
from domainbed_ext.analyse.runs import Adapter, Factors, Sweep
from domainbed_ext.analyse.weights import FullTuning, depths_of, layers_of, read_full, read_together
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.seeds import seed_hash
from domainbed_ext.system import option_values

RANKS = (1, 2, 4, 8, 16, 32, 64)
_ROUNDING = 1e-9  # of a loss relative to that without an update


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
        # Both are 0 but for rounding where the rank is the width, and NaN where the weight did not change.
        pairs = [(a, b) for a, b in zip(best_A, best_B, strict=True) if not math.isnan(a + b)]
        holds = [float(a >= b - _ROUNDING) for a, b in pairs]
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
        algorithm=adapter.chosen.method,
        rank=factors.rank,
        runs=[adapter.chosen.origin, layer.tuned],
        best=losses_of_best_product(layer.values, [factors.update_rank])[0],
        chance=math.sqrt(1 - factors.rank / d_in),
        **values,
    )
