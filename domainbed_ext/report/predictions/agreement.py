"""How often two methods predict the same class for an image of a test domain."""

from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations, product
from typing import Any, NamedTuple

import numpy as np

from domainbed_ext.report.methods import row_label_of
from domainbed_ext.report.predictions.analysis import Analysis
from domainbed_ext.report.predictions.tested import Predicted, Tested, records_behind
from domainbed_ext.report.tables.table import MISSING, Table


class Pair(NamedTuple):
    """Two runs on the images of a test domain; shares of the images, in [0, 1].

    Attributes:
        agreement: Both predict the same class.
        both_right: Both are right.
        first_right: The first alone is right.
        second_right: The second alone is right.
        kappa: Cohen's kappa: 0 for the agreement that chance would give, 1 where all predictions are the same.
    """

    agreement: float
    both_right: float
    first_right: float
    second_right: float
    kappa: float


def compare_runs(first: Tested, second: Tested) -> Pair:
    """Compares what two runs predict on all images of a test domain.

    Args:
        first: What a run predicts.
        second: What another predicts on the same images.
    """
    one, other = first.whole, second.whole
    right = one.is_right, other.is_right
    agreement = float((one.predicted == other.predicted).mean())
    counts = [np.bincount(each.predicted, minlength=first.num_classes) for each in (one, other)]
    by_chance = float(counts[0] @ counts[1]) / len(one.labels) ** 2
    return Pair(
        agreement,
        float((right[0] & right[1]).mean()),
        float((right[0] & ~right[1]).mean()),
        float((right[1] & ~right[0]).mean()),
        1.0 if by_chance == 1 else (agreement - by_chance) / (1 - by_chance),
    )


def compare_methods(predicted: Predicted, first: str, second: str) -> Pair | None:
    """Compares two methods trial by trial, or of one method every two trials.

    Args:
        predicted: What the runs predict.
        first: Id of a method.
        second: Id of a method, maybe the same.

    Returns:
        Means over test domains of the means over pairs of runs; None if there is no pair.
    """
    pairs: defaultdict[int, list[Pair]] = defaultdict(list)
    for env, on_env in predicted.by_environment():
        one, other = on_env.get(first, []), on_env.get(second, [])
        couples = combinations(one, 2) if first == second else product(one, other)
        pairs[env] += [
            compare_runs(*couple) for couple in couples if first == second or couple[0].trial == couple[1].trial
        ]
    means = [np.mean(of_env, axis=0) for of_env in pairs.values() if of_env]
    return Pair(*np.mean(means, axis=0).tolist()) if means else None


def agreement_table(predicted: Predicted) -> Table | None:
    """Makes the table of agreements, with a row and a column per method.

    Args:
        predicted: What the runs predict.
    """
    algorithms = predicted.algorithms
    pairs = _all_pairs(predicted)
    if not any(pairs.values()):
        return None
    names = [row_label_of(algorithm) for algorithm in algorithms]

    def cell(first: str, second: str) -> str:
        pair = pairs.get((first, second)) or pairs.get((second, first))
        return MISSING if pair is None else f"{100 * pair.agreement:.1f}"

    return Table(
        f"{predicted.title}, agreement of predictions",
        ["Algorithm", *names],
        [
            [name, *(cell(algorithm, other) for other in algorithms)]
            for name, algorithm in zip(names, algorithms, strict=True)
        ],
        "Images of the test domains for which both predict the same class, in %: mean over test domains and trials. In "
        f"a method's own column: two of its trials. {MISSING}: no two such runs.{predicted.caveat}",
        origins={
            (row, column): records_behind([*predicted.by_algorithm[algorithm], *predicted.by_algorithm[other]])
            for row, algorithm in enumerate(algorithms)
            for column, other in enumerate(algorithms, 1)
        },
        algorithms=algorithms,
    )


def agreement_rows(predicted: Predicted) -> Iterator[dict[str, Any]]:
    """Makes the rows of agreement.csv.

    Args:
        predicted: What the runs predict.
    """
    for (first, second), pair in _all_pairs(predicted).items():
        if pair is not None:
            shares = {name: 100 * value for name, value in pair._asdict().items() if name != "kappa"}
            yield {**predicted.comparison.key(first), "second": second, **shares, "kappa": pair.kappa}


@lru_cache(maxsize=8)  # for the table and the file
def _all_pairs(predicted: Predicted) -> dict[tuple[str, str], Pair | None]:
    """Each two methods, and each method with itself."""
    algorithms = predicted.algorithms
    couples = [(first, second) for number, first in enumerate(algorithms) for second in algorithms[number:]]
    return {couple: compare_methods(predicted, *couple) for couple in couples}


AGREEMENT = Analysis("agreement", agreement_table, agreement_rows)
