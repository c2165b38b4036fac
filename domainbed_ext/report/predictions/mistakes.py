"""The images of test domains that all methods get wrong, and those on which one method differs from all others."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from domainbed_ext.report.methods import label_of, row_label_of
from domainbed_ext.report.predictions.analysis import Analysis
from domainbed_ext.report.predictions.tested import Predicted, Tested, records_behind
from domainbed_ext.report.tables.table import Table


@dataclass(frozen=True)
class Mistaken:
    """An image of a test domain that a method gets wrong.

    Attributes:
        env: Index of the test domain.
        name: Name of the image.
        label: Name of its class.
        predicted: Class that most runs take it for, of those that get it wrong.
        wrong: Ids of the methods that get it wrong in most of their trials.
        right: Ids of the others.
    """

    env: int
    name: str
    label: str
    predicted: str
    wrong: tuple[str, ...]
    right: tuple[str, ...]


@lru_cache(maxsize=8)  # for the table, the file and the page
def find_mistakes(predicted: Predicted) -> list[Mistaken]:
    """Finds the images that at least one method gets wrong in most of its trials.

    Args:
        predicted: What the runs predict.

    Returns:
        Images by test domain, in the order of the data set.
    """
    mistakes = []
    for env, on_env in predicted.by_environment():
        first = next(iter(on_env.values()))[0]
        wrong = {algorithm: _is_mostly_wrong(each) for algorithm, each in on_env.items()}
        runs = [tested.whole for each in on_env.values() for tested in each]
        for image in np.flatnonzero(np.any(list(wrong.values()), axis=0)).tolist():
            label = int(first.whole.labels[image])
            others = Counter(int(run.predicted[image]) for run in runs if run.predicted[image] != label)
            mistakes.append(
                Mistaken(
                    env,
                    first.names[image],
                    predicted.classes[label],
                    predicted.classes[others.most_common(1)[0][0]],
                    tuple(algorithm for algorithm, each in wrong.items() if each[image]),
                    tuple(algorithm for algorithm, each in wrong.items() if not each[image]),
                )
            )
    return mistakes


def _is_mostly_wrong(each: Sequence[Tested]) -> Any:
    """Whether most runs get an image wrong [n]."""
    return np.mean([~tested.whole.is_right for tested in each], axis=0) > 0.5


@dataclass(frozen=True)
class MistakeGroup:
    """Images that the same methods get wrong.

    Attributes:
        title: Which methods get them wrong.
        images: The images.
    """

    title: str
    images: list[Mistaken]


def group_mistakes(predicted: Predicted) -> list[MistakeGroup]:
    """Groups the images that all methods get wrong, that one method alone gets wrong, and that it alone gets right.

    Args:
        predicted: What the runs predict.

    Returns:
        Groups that have images.
    """
    mistakes = find_mistakes(predicted)
    groups = [MistakeGroup("All methods get them wrong", [each for each in mistakes if not each.right])]
    count = len(predicted.algorithms)
    verdicts = ("wrong", "right") if count > 2 else ("wrong",)  # of two, the other alone gets these right
    if count > 1:
        for algorithm in predicted.algorithms:
            for verdict in verdicts:
                alone = [each for each in mistakes if getattr(each, verdict) == (algorithm,)]
                groups.append(MistakeGroup(f"{label_of(algorithm)} alone gets them {verdict}", alone))
    return [group for group in groups if group.images]


def mistakes_table(predicted: Predicted) -> Table | None:
    """Makes the table of numbers of images that one method alone gets wrong or right.

    Args:
        predicted: What the runs predict.
    """
    algorithms = predicted.algorithms
    if len(algorithms) < 2:
        return None
    mistakes = find_mistakes(predicted)
    total = sum(len(next(iter(on_env.values()))[0].names) for _, on_env in predicted.by_environment())
    all_wrong = sum(not each.right for each in mistakes)
    return Table(
        f"{predicted.title}, images that only some methods get wrong",
        ["Algorithm", "Wrong", "It alone wrong", "It alone right"],
        [
            [
                row_label_of(algorithm),
                f"{sum(algorithm in each.wrong for each in mistakes):,}",
                f"{sum(each.wrong == (algorithm,) for each in mistakes):,}",
                f"{sum(each.right == (algorithm,) for each in mistakes):,}",
            ]
            for algorithm in algorithms
        ],
        f"Images of the test domains, {total:,} in all; a method gets an image wrong if most of its trials do. All "
        f"methods get {all_wrong:,} images wrong, and none gets {total - len(mistakes):,} wrong; mistakes.csv lists "
        f"all others.{predicted.caveat}",
        origins={
            (row, column): records_behind(predicted.by_algorithm[algorithm])
            for row, algorithm in enumerate(algorithms)
            for column in range(1, 4)
        },
        algorithms=algorithms,
    )


def mistakes_rows(predicted: Predicted) -> Iterator[dict[str, Any]]:
    """Makes the rows of mistakes.csv.

    Args:
        predicted: What the runs predict.
    """
    for each in find_mistakes(predicted):
        yield {
            "dataset": predicted.comparison.dataset,
            "environment": predicted.comparison.environments[each.env],
            "image": each.name,
            "class": each.label,
            "predicted": each.predicted,
            "methods_wrong": len(each.wrong),
            "wrong": "; ".join(each.wrong),
            "right": "; ".join(each.right),
        }


MISTAKES = Analysis("mistakes", mistakes_table, mistakes_rows)
