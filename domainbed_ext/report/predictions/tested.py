"""What the runs behind a table predict on the images of their test domains."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from domainbed_ext.model_selection import Record, mean, test_splits, training_environments
from domainbed_ext.report.figures import Comparison
from domainbed_ext.report.summary import Summary
from domainbed_ext.report.tables.columns import Column, narrow, origins
from domainbed_ext.report.tables.table import Origin


class ImageOutputs(NamedTuple):
    """The outputs of a run for the images of an environment.

    Attributes:
        names: Names of the images.
        labels: Labels [n].
        probabilities: Probabilities of the classes [n, classes]; NaN of a run that diverged.
        splits: Split that each image was in [n]: "in", "out" or "uda".
    """

    names: tuple[str, ...]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    splits: NDArray[np.str_]


class RunOutputs(NamedTuple):
    """The outputs of a run after a step: names of the classes, and the outputs by environment, in their order."""

    classes: tuple[str, ...]
    environments: list[ImageOutputs]


Load = Callable[[Record], RunOutputs | None]
"""Function that reads the outputs of a run after the step of a record; None if the run keeps none of that step."""


@dataclass(frozen=True)
class Decisions:
    """What was predicted for some images, and how surely.

    Attributes:
        labels: Labels [n].
        predicted: Predicted classes [n].
        confidence: Probability of the predicted class [n].
    """

    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float32]

    @property
    def is_right(self) -> NDArray[np.bool_]:
        """Whether each image is classified correctly [n]."""
        return self.predicted == self.labels

    def of(self, chosen: NDArray[np.bool_]) -> "Decisions":
        """The same of some images alone.

        Args:
            chosen: Whether an image is among them [n].
        """
        return Decisions(self.labels[chosen], self.predicted[chosen], self.confidence[chosen])

    @classmethod
    def pooled(cls, each: Sequence["Decisions"]) -> "Decisions":
        """Those of several runs or environments as one."""
        return cls(
            *(np.concatenate([getattr(one, name) for one in each]) for name in ("labels", "predicted", "confidence"))
        )


@dataclass(frozen=True, eq=False)
class Tested:
    """What the run of a method and a trial predicts on a test domain.

    Attributes:
        algorithm: Id of the method.
        trial: Seed of the trial.
        env: Index of the test domain.
        record: Record of the run's chosen step.
        names: Names of all images of the test domain.
        whole: Decisions on all images of the test domain, none of which the run was trained on.
        is_tested: Whether an image is among those that the tables' accuracies are of [n].
        in_domain: Decisions on the held-out images of the training domains.
        num_classes: Number of classes.
        read: Function that reads the probabilities of all images of the test domain [n, classes].
    """

    algorithm: str
    trial: int
    env: int
    record: Record
    names: tuple[str, ...]
    whole: Decisions
    is_tested: NDArray[np.bool_]
    in_domain: Decisions
    num_classes: int
    read: Callable[[], NDArray[np.float32]]

    @cached_property
    def out_of_domain(self) -> Decisions:
        """Decisions on the images that the tables' accuracies are of."""
        return self.whole.of(self.is_tested)

    @cached_property
    def confusions(self) -> NDArray[np.int64]:
        """Number of these images by label (rows) and predicted class (columns)."""
        from sklearn.metrics import confusion_matrix  # takes a second to import

        decisions, classes = self.out_of_domain, np.arange(self.num_classes)
        counts: NDArray[np.int64] = confusion_matrix(decisions.labels, decisions.predicted, labels=classes)
        return counts


@dataclass(frozen=True, eq=False)
class Predicted:
    """What the runs behind a comparison predict.

    Attributes:
        comparison: The methods under one selection method.
        classes: Names of the classes.
        by_algorithm: What the runs of each method predict, by trial and test domain, in the order of tables.
        left_out: Number of runs that keep no predictions of the chosen step, or diverged.
    """

    comparison: Comparison
    classes: tuple[str, ...]
    by_algorithm: dict[str, list[Tested]]
    left_out: int

    @property
    def algorithms(self) -> list[str]:
        """Ids of the methods that have predictions, in the order of tables."""
        return list(self.by_algorithm)

    @property
    def title(self) -> str:
        """What the methods were run on."""
        return self.comparison.title

    @property
    def caveat(self) -> str:
        """What the tables leave out, as a sentence to append to a caption."""
        trials = {tested.trial for each in self.by_algorithm.values() for tested in each}
        alone = " One trial only: its error is not known." if len(trials) == 1 else ""
        count = self.left_out
        return alone + (f" Left out: {count} run(s) without predictions of the chosen step." if count else "")

    def summary(self, algorithm: str, value: Callable[[Tested], float]) -> Summary | None:
        """Mean over trials, of each trial the mean over test domains, with its error, in percent.

        Args:
            algorithm: Id of the method.
            value: Function of what a run predicts on a test domain, in [0, 1]; NaN where it has no value.
        """
        by_trial: defaultdict[int, list[float]] = defaultdict(list)
        for tested in self.by_algorithm[algorithm]:
            if not np.isnan(measured := value(tested)):
                by_trial[tested.trial].append(measured)
        return self.comparison.summarise([mean(values) for values in by_trial.values()])

    def by_environment(self) -> Iterator[tuple[int, dict[str, list[Tested]]]]:
        """Each test domain, with what the runs of each method predict on it; the images are the same for all."""
        for env in range(len(self.comparison.environments)):
            on_env = {
                algorithm: [tested for tested in each if tested.env == env]
                for algorithm, each in self.by_algorithm.items()
            }
            first = next((each[0].names for each in on_env.values() if each), ())
            same = {
                algorithm: [tested for tested in each if tested.names == first] for algorithm, each in on_env.items()
            }
            if kept := {algorithm: each for algorithm, each in same.items() if each}:
                yield env, kept


def gather(comparison: Comparison, load: Load) -> Predicted | None:
    """Reads what the runs behind a comparison predict.

    Args:
        comparison: The methods under one selection method.
        load: Function that reads the outputs of a run.

    Returns:
        What they predict; None if no run keeps its predictions.
    """
    classes: tuple[str, ...] = ()
    by_algorithm: dict[str, list[Tested]] = {}
    left_out = 0
    shared: dict[tuple[str, ...], tuple[str, ...]] = {}  # the names of an environment's images are kept once
    for algorithm in comparison.algorithms:
        for score in comparison.scores(algorithm):
            record = score.record
            if "derived" in record:
                continue
            outputs = load(record)
            if outputs is None or not all(np.isfinite(each.probabilities).all() for each in outputs.environments):
                left_out += 1
                continue
            classes = outputs.classes
            for tested in _tested(algorithm, score.trial_seed, record, outputs, load):
                names = shared.setdefault(tested.names, tested.names)
                by_algorithm.setdefault(algorithm, []).append(replace(tested, names=names))
    return Predicted(comparison, classes, by_algorithm, left_out) if by_algorithm else None


def _tested(algorithm: str, trial: int, record: Record, outputs: RunOutputs, load: Load) -> Iterator[Tested]:
    """What a run predicts on each of its test domains."""
    classes = len(outputs.classes)
    held_out = [outputs.environments[env] for env in training_environments(record)]
    in_domain = Decisions.pooled([_decide(each).of(each.splits == "out") for each in held_out])
    for env in record["args"]["test_envs"]:
        on_env = outputs.environments[env]

        def read(env: int = env) -> NDArray[np.float32]:
            again = load(record)
            assert again is not None
            return again.environments[env].probabilities

        is_tested = np.isin(on_env.splits, test_splits(record, env))
        yield Tested(algorithm, trial, env, record, on_env.names, _decide(on_env), is_tested, in_domain, classes, read)


def _decide(outputs: ImageOutputs) -> Decisions:
    return Decisions(outputs.labels, outputs.probabilities.argmax(1), outputs.probabilities.max(1, initial=0.0))


@dataclass(frozen=True)
class Measured(Column):
    """The mean over trials and test domains of what is measured of a run's predictions, with its error.

    Attributes:
        header: Head of the column.
        predicted: What the runs predict.
        value: Function of what a run predicts on a test domain, in [0, 1].
        best: 1 if the highest is best, -1 if the lowest is, 0 if none is.
    """

    header: str
    predicted: Predicted
    value: Callable[[Tested], float]
    best: int = 0

    def text(self, algorithm: str) -> str:
        """The mean, with its error."""
        return narrow(self.predicted.summary(algorithm, self.value))

    def origins(self, algorithm: str) -> list[Origin]:
        """The records of all runs that keep predictions."""
        return records_behind(self.predicted.by_algorithm[algorithm])

    def ranked_value(self, algorithm: str) -> Summary | None:
        """The summary, turned around where the lowest is best."""
        summary = self.predicted.summary(algorithm, self.value)
        return summary._replace(mean=self.best * summary.mean) if summary and self.best else None


def records_behind(each: Iterable[Tested]) -> list[Origin]:
    """Where numbers come from, each record once."""
    return origins(tested.record for tested in each)
