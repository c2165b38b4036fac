"""How in-domain and out-of-domain accuracy change along the strength of a method's update, from the records."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from domainbed_ext.model_selection import FULL_STRENGTH, Record, mean
from domainbed_ext.report.differences import Difference, difference_over_trials
from domainbed_ext.report.summary import Estimate, estimate

if TYPE_CHECKING:
    from domainbed_ext.report.figures import Comparison
    from domainbed_ext.report.scores import Metric, Score


@dataclass(frozen=True)
class Curve:
    """A method along the strength of its update.

    Attributes:
        algorithm: Id of the method.
        scores: By strength, the score of each trial and test domain that was evaluated at the most strengths.
        lack: What is missing, as "3 of 4 results"; empty if nothing.
    """

    algorithm: str
    scores: list[dict[float, "Score"]]
    lack: str

    @cached_property
    def strengths(self) -> list[float]:
        """The strengths that all scores were evaluated at, ascending."""
        return sorted(set.intersection(*map(set, self.scores)))

    def records(self, strength: float) -> list[Record]:
        """The records behind the estimates at a strength."""
        return [along[strength].record for along in self.scores]

    def estimate(self, strength: float, metric: "Metric") -> Estimate | None:
        """Mean and 95 % interval over trials, of each trial the mean over test domains.

        Args:
            strength: One of `strengths`.
            metric: What to average.
        """
        return estimate(self._by_trial(lambda along: along[strength].value(metric)))

    def difference(self, strength: float, metric: "Metric") -> Difference | None:
        """The difference to the trained weights, paired by trial and test domain; None if these were not evaluated.

        Args:
            strength: One of `strengths`.
            metric: What is compared.
        """
        if FULL_STRENGTH not in self.strengths:
            return None
        return difference_over_trials(
            self._by_trial(lambda along: along[strength].value(metric) - along[FULL_STRENGTH].value(metric))
        )

    def _by_trial(self, value: Callable[[dict[float, "Score"]], float]) -> list[float]:
        by_trial: defaultdict[int, list[float]] = defaultdict(list)
        for along in self.scores:
            by_trial[next(iter(along.values())).trial_seed].append(value(along))
        return [mean(values) for values in by_trial.values()]


def curves(comparison: "Comparison") -> list[Curve]:
    """The curve of each method that was evaluated along the strength of its update, in the order of tables.

    Args:
        comparison: The methods under one selection method.
    """
    made = []
    for algorithm in comparison.algorithms:
        evaluated = [along for score in comparison.scores(algorithm) if (along := score.along_strength())]
        most = max(map(len, evaluated), default=0)
        complete = [along for along in evaluated if len(along) == most]
        if complete and set.intersection(*map(set, complete)):
            total = len(comparison.scores(algorithm))
            lack = f"{len(complete)} of {total} {comparison.unit}" if len(complete) < total else ""
            made.append(Curve(algorithm, complete, lack))
    return made
