"""The runs of a sweep: what each computes, which names its folder."""

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from domainbed_ext.datasets.environment_names import list_environments
from domainbed_ext.errors import BenchmarkError, warn_once
from domainbed_ext.launchers.command import Command
from domainbed_ext.protocols import (
    LEAVE_ONE_OUT,
    SINGLE_SOURCE,
    Names,
    check_evaluate,
    left_out_environments,
    source_environments,
)
from domainbed_ext.runs import arguments, identity
from domainbed_ext.runs.arguments import EXTRA, NUMBERS, RunArguments
from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.runs.identity import Computation, Computations
from domainbed_ext.seeds import seed_hash
from domainbed_ext.sweep.arguments import SweepArguments
from domainbed_ext.system import strict_json

_SPELLED = {"imports": "import"}  # arguments whose option has another name


@dataclass(frozen=True)
class Job:
    """A run of a sweep.

    Attributes:
        train_args: Arguments of `domainbed_ext.train` by DomainBed's names, `data_dir` among them.
        sweep_dir: Folder of the sweep.
        extra_args: Arguments that change no number, e.g. the worker count.
        computation: What the run computes, wherever its files are: its identity.
        test_names: Names of the test environments, as their folders have them.
        adopted: Name of a folder that holds this run under DomainBed's name; None if there is none.
    """

    train_args: dict[str, Any]
    sweep_dir: Path
    extra_args: dict[str, Any]
    computation: Computation
    test_names: tuple[str, ...] = ()
    adopted: str | None = None

    @cached_property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.adopted or identity.name(self.computation)

    @property
    def folder(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(self.sweep_dir / self.name)

    @property
    def domainbed_hash(self) -> str:
        """DomainBed's name of the folder, and that of early versions: a hash of the arguments as they were typed."""
        typed = {name: value for name, value in self.train_args.items() if name != "evaluate"}  # the protocol's
        text = strict_json.dumps(typed, sort_keys=True)
        return hashlib.md5(text.encode("utf-8")).hexdigest()

    @property
    def argv(self) -> list[str]:
        """The command line of `domainbed_ext.train`."""
        argv = []
        values_of = {**self.train_args, **self.extra_args, "output_dir": str(self.folder.path)}
        if "steps" in self.train_args and not {"checkpoint_freq", "evaluations"} & self.train_args.keys():
            values_of["evaluate_first_step"] = True  # which a short run by itself leaves out
        for name, value in sorted(values_of.items()):
            if value is None or value is False:
                continue
            if isinstance(value, str) and value.startswith("-"):
                argv.append(f"--{name}={value}")
                continue
            values = value if isinstance(value, list) else [] if value is True else [value]
            argv += [f"--{_SPELLED.get(name, name)}", *map(str, values)]
        return argv

    @property
    def args(self) -> RunArguments:
        """The run's arguments as `domainbed_ext.train` reads them."""
        return arguments.parse(self.argv)

    @property
    def command(self) -> Command:
        """The command that runs it."""
        threads, minutes = self.train_args.get("threads", 1), self.extra_args["time_limit"]
        return Command.for_run(self.argv, self.folder.path, threads, minutes)

    @property
    def kind(self) -> tuple[str, str]:
        """Data set and algorithm."""
        return self.train_args["dataset"], self.train_args["algorithm"]

    def __str__(self) -> str:
        names = ("dataset", "algorithm", "test_envs", "hparams_seed", "trial_seed")
        return " ".join(f"{name}={self.train_args[name]}" for name in names)


def make_jobs(args: SweepArguments) -> list[Job]:
    """The runs of a sweep, in DomainBed's order.

    Args:
        args: Arguments of the sweep.

    Returns:
        The jobs.

    Raises:
        BenchmarkError: A data set, algorithm or environment is unknown, options contradict each other, or weights are
            missing.
    """
    numbers = {name: value for name in NUMBERS if (value := getattr(args, name)) is not None}
    if args.protocol in (None, LEAVE_ONE_OUT) and not args.single_test_envs:
        numbers["evaluate"] = "all"  # the runs that leave one environment out are chosen by those that leave out two
    extra = {name: getattr(args, name) for name in EXTRA}
    environments = {dataset: list_environments(dataset, args.data_dir) for dataset in args.datasets}
    combinations = _choose_test_envs(args, environments)
    computations = Computations()
    jobs = []
    for trial_seed, dataset, algorithm in itertools.product(range(args.n_trials), args.datasets, args.algorithms):
        for test_envs in combinations[dataset]:
            for hparams_seed in range(args.n_hparams_from, args.n_hparams):
                train_args: dict[str, Any] = {
                    "dataset": dataset,
                    "algorithm": algorithm,
                    "test_envs": test_envs,
                    "holdout_fraction": args.holdout_fraction,
                    "hparams_seed": hparams_seed,
                    "data_dir": args.data_dir,
                    "task": args.task,
                    "trial_seed": trial_seed,
                    "seed": seed_hash(dataset, algorithm, test_envs, hparams_seed, trial_seed),
                }
                optional = {"steps": args.steps, "hparams": args.hparams}
                train_args |= {name: value for name, value in optional.items() if value is not None}
                train_args |= numbers
                computation = computations.of(RunArguments(**train_args))
                test_names = tuple(environments[dataset][i][-1] for i in test_envs)
                jobs.append(Job(train_args, args.output_dir, extra, computation, test_names))
    return _adopt(jobs, list_names(args.output_dir))


def list_names(sweep_dir: Path) -> set[str]:
    """Lists the names of all that is in a sweep's folder, in one call.

    Raises:
        BenchmarkError: It cannot be read.
    """
    try:
        return set(os.listdir(sweep_dir))
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        raise BenchmarkError(
            f"cannot read {sweep_dir} ({error.strerror}): ask its owner for access, or give another --output_dir"
        ) from error


def _adopt(jobs: Iterable[Job], names: set[str]) -> list[Job]:
    """Gives each job without a folder the one of DomainBed's name, if that holds this run."""
    return [
        dataclasses.replace(job, adopted=old)
        if names and job.name not in names and (old := job.domainbed_hash) in names and _holds_run(job, old)
        else job
        for job in jobs
    ]


def _holds_run(job: Job, name: str) -> bool:
    """Whether the records in a folder of DomainBed's name, which does not tell all arguments, are a job's."""
    try:
        record = RunFolder(job.sweep_dir / name).first_record()
    except BenchmarkError:  # not a folder of this package
        return False
    return record is None or not identity.contradicts(job.computation, record)  # it may have stopped before its first


def _choose_test_envs(args: SweepArguments, names: Mapping[str, Names]) -> dict[str, list[list[int]]]:
    """By data set, the test environments of every run."""
    if args.protocol == SINGLE_SOURCE:
        source_envs = None if args.source_envs is None else [str(name) for name in args.source_envs]
        return {
            dataset: [[i for i in range(len(names[dataset])) if i != source] for source in sources]
            for dataset, sources in source_environments(source_envs, names).items()
        }
    if args.source_envs is not None:
        raise BenchmarkError(f"--source_envs is an option of --protocol {SINGLE_SOURCE}: add that, or leave it out")
    check_evaluate(args.evaluate, pairs=not args.single_test_envs)
    for dataset, environments in names.items():
        if len(environments) < 2:
            raise BenchmarkError(
                f"{dataset} has {len(environments)} environment(s): leaving one out takes at least two, so that one is "
                "left to train on"
            )
        if len(environments) == 2 and not args.single_test_envs:
            warn_once(
                f"{dataset} has two environments: a pair of test environments would leave none to train on, so each "
                "is left out alone, as with --single_test_envs, and there is no leave-one-domain-out cross-validation"
            )
    return {
        dataset: list(left_out_environments(len(environments), args.single_test_envs))
        for dataset, environments in names.items()
    }
