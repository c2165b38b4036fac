"""Which step and which hyperparameters a sweep's figure comes from: DomainBed's three selection methods.

Source: Gulrajani and Lopez-Paz, In Search of Lost Domain Generalization (ICLR 2021), section 3.

Accuracies come in pairs: `env{i}_in_acc` on the 80 % of environment i that is trained on (or, of a test
environment, finally tested on), `env{i}_out_acc` on the 20 % held out for selection. A figure is always the
`env{t}_in_acc` of the record that was chosen, and the record is kept, so that it can be traced to its run.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from domainbed_ext.errors import BenchmarkError, unknown

Record = dict[str, Any]


class Group(NamedTuple):
    """What one figure is chosen for; hyperparameters and steps compete within it."""

    trial_seed: int
    dataset: str
    algorithm: str
    test_env: int


@dataclass(frozen=True)
class Selection:
    """A chosen record and what it was chosen by, accuracies in [0, 1]."""

    val_acc: float
    test_acc: float
    record: Record

    @property
    def hparams_seed(self) -> int:
        """The seed of the chosen hyperparameters."""
        return int(self.record["args"]["hparams_seed"])

    @property
    def step(self) -> int:
        """The chosen step."""
        return int(self.record["step"])


@dataclass(frozen=True)
class SelectionMethod:
    """How a figure is chosen.

    Attributes:
        name: its name on the command line.
        title: its name in DomainBed's tables.
        description: what it looks at, for captions.
        select_step: the choice within one set of hyperparameters, from their records (in order of step) and
            the test environment; None where runs that it needs are missing.
    """

    name: str
    title: str
    description: str
    select_step: Callable[[Sequence[Record], int], Selection | None]

    def select(self, records: Iterable[Record], test_env: int) -> Selection | None:
        """The record with the best hyperparameters and, within them, the best step.

        Of equals, DomainBed takes the last hparams_seed. The order of `records` does not matter.

        Args:
            records: every record of one group, all hyperparameters, runs and steps.
            test_env: the group's test environment.

        Returns:
            The choice, or None where no set of hyperparameters has the runs that the method needs.
        """
        by_seed: defaultdict[int, list[Record]] = defaultdict(list)
        for record in sorted(records, key=lambda record: (record["step"], record["run"])):
            by_seed[record["args"]["hparams_seed"]].append(record)
        chosen = [self.select_step(by_seed[seed], test_env) for seed in sorted(by_seed, reverse=True)]
        return _best(selection for selection in chosen if selection is not None)


def group_records(records: Iterable[Record]) -> dict[Group, list[Record]]:
    """Sorts records into groups; one with k test environments enters k of them.

    Args:
        records: the records of any number of runs, as `records.load_records` returns them.

    Returns:
        The records of each group, groups in ascending order.
    """
    groups: defaultdict[Group, list[Record]] = defaultdict(list)
    for record in records:
        try:
            args = record["args"]
            key = args["trial_seed"], args["dataset"], args["algorithm"]
            _ = args["hparams_seed"], record["step"]
            for test_env in args["test_envs"]:
                groups[Group(*key, test_env)].append(record)
        except (KeyError, TypeError) as error:
            raise BenchmarkError(f"a record of run {record.get('run')!r} has no usable {error}") from None
    return {group: groups[group] for group in sorted(groups)}


def method(name: str) -> SelectionMethod:
    """The selection method of a name, its own or DomainBed's.

    Args:
        name: a key of `SELECTION_METHODS`, or a title such as "training-domain validation set".

    Returns:
        The method.

    Raises:
        BenchmarkError: there is none of that name.
    """
    for known in SELECTION_METHODS.values():
        if name in (known.name, known.title):
            return known
    raise unknown("selection method", name, SELECTION_METHODS)


def accuracy(record: Record, env: int, split: Literal["in", "out"]) -> float:
    """One recorded accuracy, in [0, 1].

    Args:
        record: a record.
        env: the index of the environment.
        split: "in" for the 80 %, "out" for the 20 %.

    Returns:
        The accuracy; NaN if that was recorded.

    Raises:
        BenchmarkError: the record has no such number.
    """
    value = record.get(f"env{env}_{split}_acc")
    if not isinstance(value, int | float):
        raise BenchmarkError(
            f"run {record.get('run')!r} has no number env{env}_{split}_acc at step {record.get('step')}"
        )
    return float(value)


def num_environments(record: Record) -> int:
    """How many environments a record has accuracies of, trained on or not."""
    env = 0
    while f"env{env}_out_acc" in record:
        env += 1
    return env


def training_environments(record: Record) -> list[int]:
    """The indices of the environments that the record's run was trained on."""
    return [env for env in range(num_environments(record)) if env not in record["args"]["test_envs"]]


def _best(candidates: Iterable[Selection]) -> Selection | None:
    """The first of the highest val_acc; NaN counts as lower than any number."""
    return max(candidates, key=lambda s: -math.inf if math.isnan(s.val_acc) else s.val_acc, default=None)


def _single(records: Iterable[Record]) -> list[Record]:
    """The records of runs with one test environment: the only ones whose test accuracy is reported."""
    return [record for record in records if len(record["args"]["test_envs"]) == 1]


def _training_domain(records: Sequence[Record], test_env: int) -> Selection | None:
    """The earliest step with the best mean accuracy on the training environments' holdouts."""
    return _best(
        Selection(
            float(np.mean([accuracy(record, env, "out") for env in training_environments(record)])),
            accuracy(record, test_env, "in"),
            record,
        )
        for record in _single(records)
    )


def _leave_one_domain_out(records: Sequence[Record], test_env: int) -> Selection | None:
    """The earliest step with the best mean, over pair runs, of accuracy on the other environment."""
    by_step: defaultdict[int, list[Record]] = defaultdict(list)
    for record in records:
        by_step[record["step"]].append(record)
    return _best(
        selection
        for step_records in by_step.values()
        if (selection := _leave_one_domain_out_at(step_records, test_env)) is not None
    )


def _leave_one_domain_out_at(records: Sequence[Record], test_env: int) -> Selection | None:
    """The candidate of one step; None unless it has one single run and a pair for every other environment."""
    single = _single(records)
    if len(single) != 1:
        return None
    held_out: dict[int, float] = {}
    for record in records:
        if len(record["args"]["test_envs"]) == 2:
            for val_env in set(record["args"]["test_envs"]) - {test_env}:
                held_out[val_env] = accuracy(record, val_env, "in")
    others = training_environments(single[0])
    if not held_out.keys() >= set(others):
        return None
    val_acc = float(np.mean([held_out[env] for env in others]))
    return Selection(val_acc, accuracy(single[0], test_env, "in"), single[0])


def _oracle(records: Sequence[Record], test_env: int) -> Selection | None:
    """The last step, without early stopping: the test domain is looked at once per set of hyperparameters."""
    single = _single(records)
    if not single:
        return None
    last = single[-1]
    return Selection(accuracy(last, test_env, "out"), accuracy(last, test_env, "in"), last)


TRAINING_DOMAIN = SelectionMethod(
    "training-domain",
    "training-domain validation set",
    "step and hyperparameters by the mean accuracy on the held-out 20 % of the training environments",
    _training_domain,
)
LEAVE_ONE_DOMAIN_OUT = SelectionMethod(
    "leave-one-domain-out",
    "leave-one-domain-out cross-validation",
    "step and hyperparameters by the accuracy on each training environment in turn, when it too was left out "
    "(needs a run for every pair of test environments)",
    _leave_one_domain_out,
)
ORACLE = SelectionMethod(
    "oracle",
    "test-domain validation set (oracle)",
    "last step; hyperparameters by the accuracy on the held-out 20 % of the test environment",
    _oracle,
)
SELECTION_METHODS = {each.name: each for each in (TRAINING_DOMAIN, LEAVE_ONE_DOMAIN_OUT, ORACLE)}
