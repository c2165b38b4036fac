"""What happened in a run: its loss and accuracies over its steps."""

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
        step: of training.
        loss: the mean since the evaluation before.
        train: accuracy on the images trained on.
        inside: on the held-out images of the training environments.
        outside: on the environments not trained on.
    """

    step: int
    loss: float
    train: float
    inside: float
    outside: float


def trajectory(records: Iterable[Record]) -> list[Moment]:
    """A run's evaluations, by step.

    Args:
        records: all of one run.

    Returns:
        One for each record.
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
    """In percent; NaN if one is not there, as where a run was told to evaluate less often."""
    try:
        return 100 * mean([measured(env) for env in environments])
    except (BenchmarkError, KeyError):
        return math.nan
