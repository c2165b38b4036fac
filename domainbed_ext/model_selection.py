"""Model selection: which step and hyperparameters a figure comes from, by DomainBed's three methods, and by one for
runs trained on a single source.

Source: Gulrajani and Lopez-Paz, In Search of Lost Domain Generalization (ICLR 2021), section 3.

Accuracies come in pairs: `env{i}_in_acc` on the 80 % of environment i that is trained on (or, of a test
environment, finally tested on), `env{i}_out_acc` on the 20 % held out for selection. A figure is always the
`env{t}_in_acc` of the chosen record (with `--test_on all`, the accuracy on all of environment t), and the record is
kept, so that the figure can be traced to its run.

A run with `--evaluate lean` evaluates test environments and training images only at its best step by validation
accuracy, and at its last, both when it ends. Selection reads validation accuracies alone, and the rest from the chosen
record, so its numbers are the same.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from domainbed_ext.errors import BenchmarkError, unknown

Record = dict[str, Any]
Split = Literal["in", "out", "uda"]
SPLITS: tuple[Split, ...] = get_args(Split)
FULL_STRENGTH = 1.0  # of the update as it was trained
STRENGTHS = "strengths"  # of a record: what was evaluated at strengths of the update after the run


class Group(NamedTuple):
    """The key of a figure; hyperparameters and steps compete within a group."""

    trial_seed: int
    dataset: str
    algorithm: str
    test_env: int


@dataclass(frozen=True)
class Selection:
    """A chosen record, the accuracy it was chosen by, and the one that is reported, in [0, 1]."""

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


class Candidate(NamedTuple):
    """A record that may be chosen, and the accuracy it is chosen by."""

    val_acc: float
    record: Record


def accuracy(record: Record, env: int, split: Split) -> float:
    """One recorded accuracy, in [0, 1].

    Args:
        record: Record of a run.
        env: Index of the environment.
        split: "in" for the 80 %, "out" for the 20 %, "uda" for what DomainBed keeps from a test environment's "in".

    Returns:
        Accuracy; NaN if that was recorded.

    Raises:
        BenchmarkError: The record has no such number.
    """
    name = f"env{env}_{split}_acc"
    value = record.get(name)
    if value is None and name in record:  # what is not finite is null in JSON
        return math.nan
    if not isinstance(value, int | float):
        raise BenchmarkError(
            f"run {record.get('run')!r} has no number env{env}_{split}_acc at step {record.get('step')}"
        )
    return float(value)


def target_accuracy(record: Record, env: int) -> float:
    """The accuracy on a test environment, in [0, 1]: on its "in" split, or with `--test_on all` on all its images.

    Args:
        record: Record of a run.
        env: Index of an environment that was not trained on.

    Returns:
        Accuracy.

    Raises:
        BenchmarkError: The record lacks a number that this needs.
    """
    splits = test_splits(record, env)
    if len(splits) == 1:
        return accuracy(record, env, splits[0])
    sizes = [record["split_sizes"][f"env{env}_{split}"] for split in splits]
    accuracies = [accuracy(record, env, split) for split in splits]
    return sum(size * value for size, value in zip(sizes, accuracies, strict=True)) / sum(sizes)


def out_of_domain(record: Record, source: int) -> float:
    """The mean accuracy of a single-source run on the other environments, in [0, 1]."""
    return mean([target_accuracy(record, env) for env in range(num_environments(record)) if env != source])


@dataclass(frozen=True)
class SelectionMethod:
    """A method of model selection.

    Attributes:
        name: Name on the command line.
        title: Name in DomainBed's tables.
        description: What it selects by, for captions.
        select_step: Function that selects within one set of hyperparameters, from their records (in order of step) and
            the test environment (or the single source); None where runs that it needs are missing.
        figure: Function that returns the accuracy of the chosen record that is reported.
    """

    name: str
    title: str
    description: str
    select_step: Callable[[Sequence[Record], int], Candidate | None]
    figure: Callable[[Record, int], float] = target_accuracy

    def select(self, records: Iterable[Record], env: int) -> Selection | None:
        """Selects the record with the best hyperparameters and, within them, the best step.

        Of equals, DomainBed takes the last hparams_seed. The order of `records` does not matter.

        Args:
            records: All records of one group: every set of hyperparameters, run and step.
            env: Test environment of the group; of single-source runs, the source.

        Returns:
            Selection; None where no set of hyperparameters has the runs that the method needs, or where a lean run did
            not evaluate the figure at the chosen step.
        """
        by_seed: defaultdict[int, list[Record]] = defaultdict(list)
        for record in sorted(records, key=lambda record: (record["step"], record["run"])):
            by_seed[record["args"]["hparams_seed"]].append(record)
        chosen = [self.select_step(by_seed[seed], env) for seed in sorted(by_seed, reverse=True)]
        best = _best(candidate for candidate in chosen if candidate is not None)
        if best is None:
            return None
        try:
            return Selection(best.val_acc, self.figure(best.record, env), best.record)
        except BenchmarkError:
            if _is_lean(best.record):
                return None
            raise


def group_records(records: Iterable[Record]) -> dict[Group, list[Record]]:
    """Sorts records into groups; one with k test environments enters k of them.

    Args:
        records: Records of any number of runs, as `runs.folder.load_records` returns them.

    Returns:
        Records by group, groups in ascending order.
    """
    groups: defaultdict[Group, list[Record]] = defaultdict(list)
    for record in records:
        try:
            args = record["args"]
            key = args["trial_seed"], args["dataset"], args["algorithm"]
            _ = args["hparams_seed"], record["step"]
            for test_env in args["test_envs"]:
                group = Group(*key, test_env)
                if not all(map(isinstance, group, (int, str, str, int))):
                    raise TypeError
                groups[group].append(record)
        except (KeyError, TypeError) as error:
            name = str(error) if isinstance(error, KeyError) else "args"
            raise BenchmarkError(f"a record of run {record.get('run')!r} has no usable {name}") from None
    return {group: groups[group] for group in sorted(groups)}


def get_selection_method(name: str) -> SelectionMethod:
    """The selection method of a name, ours or DomainBed's.

    Args:
        name: Key of `SELECTION_METHODS`, or a title such as "training-domain validation set".

    Returns:
        Selection method.

    Raises:
        BenchmarkError: There is no method of that name.
    """
    for method in SELECTION_METHODS.values():
        if name in (method.name, method.title):
            return method
    raise unknown("selection method", name, SELECTION_METHODS)


def num_environments(record: Record) -> int:
    """How many environments a record's run had, trained on or not."""
    sizes = record.get("split_sizes", ())  # where not every accuracy was evaluated, as in a lean run
    env = 0
    while f"env{env}_out_acc" in record or f"env{env}_out" in sizes:
        env += 1
    return env


def training_environments(record: Record) -> list[int]:
    """The indices of the environments that the record's run was trained on."""
    return [env for env in range(num_environments(record)) if env not in record["args"]["test_envs"]]


def validation_accuracy(record: Record) -> float:
    """The mean accuracy on the held-out 20 % of the training environments, in [0, 1]; NaN if it is `unmeasured`."""
    if unmeasured(record):
        return math.nan
    return mean([accuracy(record, env, "out") for env in training_environments(record)])


def unmeasured(record: Record) -> str:
    """Why a derived run has no in-domain accuracy, in a sentence; empty if it has one, as every trained run."""
    return str((record.get("derived") or {}).get("unmeasured", ""))


def trials_of(record: Record) -> tuple[int, ...]:
    """The seeds of the trials that a record stands for: several of a soup over trials."""
    return tuple((record.get("derived") or {}).get("trials") or [record["args"]["trial_seed"]])


def mean(values: Sequence[float]) -> float:
    """The mean of some numbers, to the last bit that of `np.mean`; NaN of none.

    A sweep has hundreds of thousands of records with a mean or more each, and of a few numbers `np.mean` spends most
    of its time on what they might be.
    """
    return float(np.add.reduce(values)) / len(values) if values else math.nan


def better(val_acc: float, than: float | None) -> bool:
    """Whether a validation accuracy beats the best before it; NaN is below any number, and the first beats None."""
    return than is None or _rank(val_acc) > _rank(than)


def best_step(records: Iterable[Record]) -> Record:
    """The record of one run with the best validation accuracy, the earliest of equals: the step that a run saves.

    Args:
        records: Records of one run, at least one.

    Returns:
        Record of the best step.
    """
    in_order = sorted(records, key=lambda record: record["step"])
    return max(in_order, key=lambda record: _rank(validation_accuracy(record)))


def along_strength(record: Record) -> dict[float, Record]:
    """The record at each strength of its update that was evaluated after the run (see `runs.strengths`), ascending.

    Args:
        record: Record of a run.

    Returns:
        Records by strength, with the accuracies that were evaluated there and no others; empty if none were.
    """
    rest = {name: value for name, value in record.items() if not name.endswith("_acc") and name != STRENGTHS}
    evaluated = {float(each["strength"]): each for each in record.get(STRENGTHS, ())}
    return {strength: {**rest, **evaluated[strength]} for strength in sorted(evaluated)}


def select_strength(along: Mapping[float, Record]) -> float:
    """The strength with the best validation accuracy; of equals the largest, which is nearest to what was trained.

    Args:
        along: Records by strength, at least one.
    """
    return max(along, key=lambda strength: (_rank(validation_accuracy(along[strength])), strength))


def _rank(val_acc: float) -> float:
    return -math.inf if math.isnan(val_acc) else val_acc


def _best(candidates: Iterable[Candidate]) -> Candidate | None:
    """The first of the highest val_acc; NaN counts as lower than any number."""
    return max(candidates, key=lambda candidate: _rank(candidate.val_acc), default=None)


def _is_lean(record: Record) -> bool:
    return record["args"].get("evaluate") == "lean"


def test_splits(record: Record, env: int) -> list[Split]:
    """The splits that make up what a test environment is tested on."""
    if record["args"].get("test_on", "in") == "in":
        return ["in"]
    sizes = record.get("split_sizes", {})
    splits = [split for split in SPLITS if f"env{env}_{split}" in sizes]
    if not {"in", "out"} <= set(splits):
        raise BenchmarkError(
            f"run {record.get('run')!r} tests on all of an environment (--test_on all) but records no split_sizes"
        )
    return splits


def _single(records: Iterable[Record]) -> list[Record]:
    """The records of runs with one test environment: the only ones whose test accuracy is reported."""
    return [record for record in records if len(record["args"]["test_envs"]) == 1]


def _training_domain(records: Sequence[Record], test_env: int) -> Candidate | None:
    """The earliest step with the best mean accuracy on the training environments' holdouts."""
    return _best(Candidate(validation_accuracy(record), record) for record in _single(records))


def _leave_one_domain_out(records: Sequence[Record], test_env: int) -> Candidate | None:
    """The earliest step with the best mean, over pair runs, of accuracy on the other environment."""
    by_step: defaultdict[int, list[Record]] = defaultdict(list)
    for record in records:
        by_step[record["step"]].append(record)
    return _best(
        candidate
        for step_records in by_step.values()
        if (candidate := _leave_one_domain_out_at(step_records, test_env)) is not None
    )


def _leave_one_domain_out_at(records: Sequence[Record], test_env: int) -> Candidate | None:
    """The candidate of one step; None unless it has one single run and a pair for every other environment."""
    single = _single(records)
    if len(single) != 1:
        return None
    held_out: dict[int, float] = {}
    for record in records:
        if len(record["args"]["test_envs"]) == 2:
            for val_env in set(record["args"]["test_envs"]) - {test_env}:
                held_out[val_env] = accuracy(record, val_env, "in")
    train_envs = training_environments(single[0])
    if not held_out.keys() >= set(train_envs):
        return None
    return Candidate(mean([held_out[env] for env in train_envs]), single[0])


def _oracle(records: Sequence[Record], test_env: int) -> Candidate | None:
    """The last step, without early stopping: the test domain is looked at once per set of hyperparameters."""
    single = _single(records)
    if not single:
        return None
    last = single[-1]
    if _is_lean(last) and f"env{test_env}_out_acc" not in last:  # a run that has not come to its last step
        return None
    return Candidate(accuracy(last, test_env, "out"), last)


def _source_holdout(records: Sequence[Record], source: int) -> Candidate | None:
    """The earliest step with the best accuracy on the source's holdout."""
    return _best(Candidate(validation_accuracy(record), record) for record in records)


TRAINING_DOMAIN = SelectionMethod(
    "training-domain",
    "training-domain validation set",
    "step and hyperparameters by the mean accuracy on the held-out 20 % of the training domains",
    _training_domain,
)
LEAVE_ONE_DOMAIN_OUT = SelectionMethod(
    "leave-one-domain-out",
    "leave-one-domain-out cross-validation",
    "step and hyperparameters by the accuracy on each training domain in turn, when it too was left out "
    "(needs a run for every pair of test environments)",
    _leave_one_domain_out,
)
ORACLE = SelectionMethod(
    "oracle",
    "test-domain validation set (oracle)",
    "last step; hyperparameters by the accuracy on the held-out 20 % of the test domain",
    _oracle,
)
SELECTION_METHODS = {each.name: each for each in (TRAINING_DOMAIN, LEAVE_ONE_DOMAIN_OUT, ORACLE)}
# Single-source runs have no other: it is no choice on the command line.
SOURCE_HOLDOUT = SelectionMethod(
    "source-holdout",
    "source-domain validation set",
    "step and hyperparameters by the accuracy on the held-out 20 % of the source",
    _source_holdout,
    out_of_domain,
)
