"""A run's loss and accuracies over its steps."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.model_selection import Record, accuracy, mean, target_accuracy, training_environments


class Moment(NamedTuple):
    """One evaluation of a run. Accuracies in %; NaN where it was not measured.

    Attributes:
        step: Training step.
        loss: Mean since the evaluation before.
        train: Accuracy on the images trained on.
        inside: In-domain accuracy, on the held-out images of the training domains.
        outside: Out-of-domain accuracy, on the test domains.
    """

    step: int
    loss: float
    train: float
    inside: float
    outside: float


def trajectory(records: Iterable[Record]) -> list[Moment]:
    """Returns a run's evaluations by step.

    Args:
        records: All records of one run.

    Returns:
        One evaluation for each record.
    """
    moments = []
    for record in sorted(records, key=lambda record: record["step"]):
        sources, targets = training_environments(record), record["args"]["test_envs"]
        loss = record.get("loss")
        moments.append(
            Moment(
                int(record["step"]),
                float(loss) if isinstance(loss, int | float) else math.nan,
                _mean(partial(accuracy, record, split="in"), sources),
                _mean(partial(accuracy, record, split="out"), sources),
                _mean(partial(target_accuracy, record), targets),
            )
        )
    return moments


def mean_trajectory(trajectories: Iterable[list[Moment]]) -> list[Moment]:
    """The mean over runs, at the steps that all of them were evaluated at."""
    at: defaultdict[int, list[Moment]] = defaultdict(list)
    runs = list(trajectories)
    for moments in runs:
        for moment in moments:
            at[moment.step].append(moment)
    return [
        Moment(step, *(mean(column) for column in list(zip(*at[step], strict=True))[1:]))
        for step in sorted(at)
        if len(at[step]) == len(runs)
    ]


def _mean(measured: Callable[[int], float], environments: list[int]) -> float:
    """In percent; NaN if one is missing, as in a run with `--evaluate lean`."""
    try:
        return 100 * mean([measured(env) for env in environments])
    except (BenchmarkError, KeyError):
        return math.nan
