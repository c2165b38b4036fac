"""The chosen record of a run, and the accuracies and gaps that it has."""

from dataclasses import dataclass
from typing import Literal

from domainbed_ext.model_selection import (
    Record,
    Selection,
    accuracy,
    along_strength,
    mean,
    target_accuracy,
    training_environments,
    trials_of,
    validation_accuracy,
)

Metric = Literal["out_of_domain", "in_domain", "train", "gap_source", "gap_target"]


@dataclass(frozen=True)
class Score:
    """The chosen record of one trial, on the test domains of its run."""

    selection: Selection

    @property
    def record(self) -> Record:
        """The chosen record."""
        return self.selection.record

    @property
    def trial_seed(self) -> int:
        """Seed of the trial."""
        return int(self.record["args"]["trial_seed"])

    @property
    def test_envs(self) -> list[int]:
        """Indices of the test domains."""
        return list(self.record["args"]["test_envs"])

    @property
    def trials(self) -> tuple[int, ...]:
        """Seeds of the trials that it stands for: several of a soup over trials."""
        return trials_of(self.record)

    def value(self, metric: Metric, env: int | None = None) -> float:
        """An accuracy, or a difference of two, in [0, 1].

        Args:
            metric: What to return. Gaps are train accuracy minus in-domain ("gap_source") or out-of-domain accuracy
                ("gap_target").
            env: Test domain of "out_of_domain" and "gap_target"; None for the mean over the run's.
        """
        if metric == "out_of_domain":
            return self.selection.test_acc if env is None else target_accuracy(self.record, env)
        if metric == "in_domain":
            return validation_accuracy(self.record)
        train = mean([accuracy(self.record, source, "in") for source in training_environments(self.record)])
        if metric == "train":
            return train
        return train - self.value("in_domain" if metric == "gap_source" else "out_of_domain", env)

    def along_strength(self) -> dict[float, "Score"]:
        """The same run at each strength of its update that was evaluated, ascending; empty if none was."""
        return {strength: self._of(record) for strength, record in along_strength(self.record).items()}

    def weights(self, metric: Metric, env: int | None = None) -> dict[str, float]:
        """The weights of recorded accuracies in a metric, which is a weighted sum of them.

        An accuracy's weight is what the metric would be if that accuracy were 1 and all others 0.

        Args:
            metric: Metric of `value`.
            env: Test domain, as in `value`.

        Returns:
            Weights by the names of the accuracies, such as "env0_in_acc"; those of weight 0 are left out.
        """
        none = {name: 0.0 for name in self.record if name.endswith("_acc")}
        values = {name: self._of({**self.record, **none, name: 1.0}).value(metric, env) for name in none}
        return {name: value for name, value in values.items() if value}

    def _of(self, record: Record) -> "Score":
        """The same run with other accuracies."""
        test_acc = mean([target_accuracy(record, env) for env in self.test_envs])
        return Score(Selection(validation_accuracy(record), test_acc, record))
