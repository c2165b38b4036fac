"""`sweep confirm`: runs fresh trials of the hyperparameters that a sweep's finished runs choose.

The best of many hyperparameters owes something to luck on the validation images. So each method's choice, for each test
environment, is run again in trials that had no part in it, in a folder of its own.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from domainbed_ext import hparams_registry
from domainbed_ext.algorithms.names import parse_name, without_objective
from domainbed_ext.algorithms.registry import OBJECTIVE
from domainbed_ext.divergence import is_diverged
from domainbed_ext.errors import BenchmarkError, not_writable, warn_once
from domainbed_ext.model_selection import Record, best_step, mean, validation_accuracy
from domainbed_ext.protocols import SINGLE_SOURCE
from domainbed_ext.report.environments import environment_labels
from domainbed_ext.runs.folder import RunFolder, State, load_records
from domainbed_ext.sweep.arguments import SweepArguments
from domainbed_ext.sweep.jobs import Job, make_jobs
from domainbed_ext.sweep.launch import launch_runs
from domainbed_ext.sweep.states import is_missing
from domainbed_ext.system import strict_json
from domainbed_ext.system.console import output
from domainbed_ext.system.files import write_atomically

FOLDER = "confirmed"
CHOICES = "choices.json"
_SHARED = ("backbone", "precision", "steps", "holdout_fraction")  # the same in all runs that are compared


class Row(NamedTuple):
    """What hyperparameters are chosen for."""

    dataset: str
    algorithm: str
    test_envs: tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """The hyperparameters that are chosen for a row.

    Attributes:
        dataset: Name of the data set.
        algorithm: Name of the method.
        test_envs: Indices of the test environments.
        chosen_with: Name of the method whose runs chose: the same, or the one without its objective.
        hparams: Values that differ from the method's defaults, by name.
        candidates: Number of different hyperparameters that were compared.
        trials: Number of trials that each was compared on.
        val_acc: Mean accuracy on the held-out images of the training environments, over those trials, in [0, 1].
    """

    dataset: str
    algorithm: str
    test_envs: tuple[int, ...]
    chosen_with: str
    hparams: Mapping[str, Any]
    candidates: int
    trials: int
    val_acc: float


def run(args: SweepArguments) -> int:
    """The sub-command.

    Args:
        args: Arguments of the sweep; `n_trials` counts the trials to run.

    Returns:
        The exit code.

    Raises:
        BenchmarkError: The sweep has no finished runs of one of its methods.
    """
    records = load_records(args.output_dir)
    choices = choose(records, args)
    first = args.first_trial
    if first is None:
        first = max(record["args"]["trial_seed"] for record in records) + 1
    here = replace(args, output_dir=args.output_dir / FOLDER)
    jobs = [job for choice in choices for job in _jobs(choice, here, first)]
    if not args.dry_run:
        _print(choices, records)
        _write(choices, here.output_dir)
        _copy_finished(jobs, args.output_dir)
    return launch_runs(here, jobs, is_missing, "Nothing is left to launch.")


def choose(records: Sequence[Record], args: SweepArguments) -> list[Choice]:
    """Chooses the hyperparameters of each method, data set and choice of test environments.

    Args:
        records: Records of the sweep's finished runs.
        args: Arguments of the sweep, which say which methods and data sets.

    Returns:
        Choices by training-domain validation, in the order of `args`. Hyperparameters that lack trials which others
        have are left out, and so are those of which a run diverged.

    Raises:
        BenchmarkError: There are no finished runs of a method on a data set, or all its hyperparameters diverged.
    """
    chosen = defaultdict(list)
    wanted = {*args.algorithms, *map(without_objective, args.algorithms)}
    for choice in _choices(record for record in records if record["args"]["algorithm"] in wanted):
        chosen[choice.dataset, choice.algorithm].append(choice)
    choices = []
    for dataset, algorithm in product(args.datasets, args.algorithms):
        alone = without_objective(algorithm)
        own = {choice.test_envs: choice for choice in (*chosen[dataset, alone], *chosen[dataset, algorithm])}
        if not own:
            raise BenchmarkError(
                f"{args.output_dir} has no finished runs of {alone} on {dataset}: launch the sweep first"
            )
        if missing := sorted(_test_envs(args, dataset, algorithm) - own.keys()):
            listed = ", ".join(" and ".join(map(str, test_envs)) for test_envs in missing)
            warn_once(
                f"{args.output_dir} has no finished runs of {alone} on {dataset} with --test_envs {listed}: there it "
                "is not confirmed, and averages in tables lack it"
            )
        choices += [replace(own[test_envs], algorithm=algorithm) for test_envs in sorted(own)]
    return choices


def _test_envs(args: SweepArguments, dataset: str, algorithm: str) -> set[tuple[int, ...]]:
    """The test environments of the runs that a sweep has of a method, without pairs."""
    one = replace(args, datasets=(dataset,), algorithms=(algorithm,), n_trials=1, n_hparams=1, single_test_envs=True)
    return {tuple(job.train_args["test_envs"]) for job in make_jobs(one)}


def _choices(records: Iterable[Record]) -> Iterator[Choice]:
    """The choice of each method, data set and set of test environments that has records, in their order."""
    runs: dict[Row, dict[str, dict[int, list[Record]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    shared: dict[Row, set[tuple[object, ...]]] = defaultdict(set)
    for record in records:
        recorded = record["args"]
        row = Row(recorded["dataset"], recorded["algorithm"], tuple(recorded["test_envs"]))
        is_pair = recorded.get("protocol") != SINGLE_SOURCE and len(row.test_envs) > 1
        if not is_pair:
            hparams = strict_json.dumps(_own(record), sort_keys=True)
            runs[row][hparams][recorded["trial_seed"]].append(record)
            shared[row].add(tuple((recorded | record["hparams"]).get(name) for name in _SHARED))
    for row in sorted(runs):
        if differing := [name for name, *values in zip(_SHARED, *shared[row], strict=True) if len(set(values)) > 1]:
            warn_once(
                f"finished runs of {row.algorithm} on {row.dataset} differ in {', '.join(differing)}, but compete "
                "for the choice all the same: give each sweep its own --output_dir"
            )
        sets_of_trials = Counter(frozenset(trials) for trials in runs[row].values())
        # Hyperparameters are compared on the same splits only.
        compared = max(sorted(sets_of_trials, key=sorted), key=lambda trials: (len(trials), sets_of_trials[trials]))
        scores = {
            hparams: mean([_score(trial) for trial in trials.values()])
            for hparams, trials in sorted(runs[row].items())
            if trials.keys() == compared
        }
        converged = {hparams: score for hparams, score in scores.items() if not math.isnan(score)}
        if not converged:
            raise BenchmarkError(
                f"of {row.algorithm} on {row.dataset}, all hyperparameters have a run that diverged: "
                "launch the sweep with other hyperparameters"
            )
        best = max(converged, key=lambda hparams: converged[hparams])
        yield Choice(*row, row.algorithm, json.loads(best), len(scores), len(compared), scores[best])


def _score(trial: Sequence[Record]) -> float:
    """The mean validation accuracy of the runs of a trial; NaN if one diverged, even after its best step."""
    if any(map(is_diverged, trial)):
        return math.nan
    runs = defaultdict(list)
    for record in trial:
        runs[record["run"]].append(record)
    # Not the best of them: that many runs happen to have these hyperparameters is no merit.
    return mean([validation_accuracy(best_step(run)) for run in runs.values()])


def _own(record: Record) -> dict[str, Any]:
    """The hyperparameters of a run that differ from its method's defaults, without what its name and options give."""
    dataset, algorithm = record["args"]["dataset"], record["args"]["algorithm"]
    method, fixed = parse_name(algorithm)
    defaults = hparams_registry.default_hparams(method, dataset)
    given = {*hparams_registry.OPTIONS, OBJECTIVE, *fixed}
    return {
        name: value
        for name, value in record["hparams"].items()
        if name in defaults and name not in given and value != defaults[name]
    }


def _jobs(choice: Choice, args: SweepArguments, first: int) -> list[Job]:
    """The fresh trials of a choice."""
    own = replace(
        args,
        datasets=(choice.dataset,),
        algorithms=(choice.algorithm,),
        hparams=strict_json.dumps(choice.hparams, sort_keys=True) if choice.hparams else None,
        n_hparams_from=0,
        n_hparams=1,
        n_trials=first + args.n_trials,
    )
    wanted = list(choice.test_envs)
    return [
        job for job in make_jobs(own) if job.train_args["test_envs"] == wanted and job.train_args["trial_seed"] >= first
    ]


def _copy_finished(jobs: Iterable[Job], sweep_dir: Path) -> None:
    """Copies the runs that the sweep has finished: a run's folder has the same name in both folders."""
    for job in jobs:
        run = RunFolder(sweep_dir / job.name)
        if run.state is State.DONE and not job.folder.path.exists():
            run.copy_finished(job.folder.path)


def _print(choices: Sequence[Choice], records: Sequence[Record]) -> None:
    labels = environment_labels(records)
    common = {
        name: value
        for name, value in choices[0].hparams.items()
        if all(name in choice.hparams and choice.hparams[name] == value for choice in choices)
    }
    table = Table("method", "test domains", "chosen", "of", "validation", box=box.SIMPLE_HEAD, pad_edge=False)
    table.caption = f"All with {_listed(common)}." if common else None
    for choice in choices:
        test_envs = ", ".join(labels[choice.dataset][env] for env in choice.test_envs)
        own = {name: value for name, value in choice.hparams.items() if name not in common}
        values = _listed(own) or "defaults"
        if choice.chosen_with != choice.algorithm:
            values += f", with {choice.chosen_with}"
        row = f"{choice.dataset} {choice.algorithm}", test_envs, values, str(choice.candidates), f"{choice.val_acc:.1%}"
        table.add_row(*row)
    output().print(table)


def _listed(hparams: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in hparams.items())


def _write(choices: Sequence[Choice], folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CHOICES, strict_json.dumps([asdict(each) for each in choices], indent=2) + "\n")
    except OSError as error:
        raise not_writable(folder, error) from error
