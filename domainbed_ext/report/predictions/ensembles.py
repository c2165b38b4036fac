"""Ensembles over trials: the mean of the probabilities that the runs of a method predict."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from domainbed_ext.report.predictions.analysis import Analysis
from domainbed_ext.report.predictions.tested import Predicted, Tested, records_behind
from domainbed_ext.report.summary import Summary
from domainbed_ext.report.tables.columns import Column, make_table
from domainbed_ext.report.tables.table import MISSING, Origin, Table, signed


class Ensemble(NamedTuple):
    """The runs of a method on a test domain, alone and together.

    Attributes:
        env: Index of the test domain.
        runs: Number of runs.
        single: Mean accuracy of the runs on all images of the test domain, in [0, 1].
        together: Accuracy of their ensemble on the same images.
    """

    env: int
    runs: int
    single: float
    together: float


def make_ensemble(env: int, each: list[Tested]) -> Ensemble:
    """Averages the probabilities of runs.

    Args:
        env: Index of the test domain.
        each: What the runs predict on it, on the same images.
    """
    probabilities = np.mean([tested.read() for tested in each], axis=0, dtype=np.float64)
    single = float(np.mean([tested.whole.is_right.mean() for tested in each]))
    return Ensemble(env, len(each), single, float((probabilities.argmax(1) == each[0].whole.labels).mean()))


def make_ensembles(predicted: Predicted) -> dict[str, list[Ensemble]]:
    """Makes the ensembles of each method that has several trials, by test domain.

    Args:
        predicted: What the runs predict.
    """
    ensembles: dict[str, list[Ensemble]] = {}
    for env, on_env in predicted.by_environment():
        for algorithm, each in on_env.items():
            if len(each) > 1:
                ensembles.setdefault(algorithm, []).append(make_ensemble(env, each))
    return {algorithm: ensembles[algorithm] for algorithm in predicted.algorithms if algorithm in ensembles}


@dataclass(frozen=True)
class _Mean(Column):
    """The mean over test domains of what is measured of ensembles."""

    header: str
    predicted: Predicted
    ensembles: dict[str, list[Ensemble]]
    value: Callable[[Ensemble], float]
    form: Callable[[float], str]
    is_ranked: bool = False

    def _mean(self, algorithm: str) -> float:
        return float(np.mean([self.value(each) for each in self.ensembles.get(algorithm, [])]))

    def text(self, algorithm: str) -> str:
        """The mean."""
        return self.form(self._mean(algorithm)) if algorithm in self.ensembles else MISSING

    def origins(self, algorithm: str) -> list[Origin]:
        """The records of all runs that keep predictions."""
        return records_behind(self.predicted.by_algorithm[algorithm])

    def ranked_value(self, algorithm: str) -> Summary | None:
        """The mean, which has no error."""
        return (
            Summary(self._mean(algorithm), float("nan"), 1) if self.is_ranked and algorithm in self.ensembles else None
        )


def ensembles_table(predicted: Predicted) -> Table | None:
    """Makes the table of single runs beside their ensembles, with a row per method.

    Args:
        predicted: What the runs predict.
    """
    ensembles = make_ensembles(predicted)
    if not ensembles:
        return None
    columns: list[tuple[str, Callable[[Ensemble], float], Callable[[float], str], bool]] = [
        ("Runs", lambda each: each.runs, lambda value: f"{value:g}", False),
        ("One run", lambda each: 100 * each.single, lambda value: f"{value:.1f}", True),
        ("Ensemble", lambda each: 100 * each.together, lambda value: f"{value:.1f}", True),
        ("Gain", lambda each: 100 * (each.together - each.single), signed, False),
    ]
    return make_table(
        f"{predicted.title}, ensembles over trials",
        predicted.algorithms,
        [_Mean(header, predicted, ensembles, value, form, is_ranked) for header, value, form, is_ranked in columns],
        "Accuracy in % on all images of each test domain, mean over test domains. One run: mean over trials. Ensemble: "
        "of the mean of the trials' probabilities. Gain: in percentage points. There is one ensemble a test domain, so "
        f"its error is not known.{predicted.caveat}",
    )


def ensembles_rows(predicted: Predicted) -> Iterator[dict[str, Any]]:
    """Makes the rows of ensembles.csv, by test domain.

    Args:
        predicted: What the runs predict.
    """
    for algorithm, ensembles in make_ensembles(predicted).items():
        for each in ensembles:
            yield {
                **predicted.comparison.key(algorithm),
                "environment": predicted.comparison.environments[each.env],
                "runs": each.runs,
                "one_run": 100 * each.single,
                "ensemble": 100 * each.together,
            }


ENSEMBLES = Analysis("ensembles", ensembles_table, ensembles_rows)
