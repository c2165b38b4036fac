"""The runs of a sweep: what each computes, and so what its folder is called."""

import argparse
import hashlib
import itertools
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domainbed_ext.algorithms import parse_name
from domainbed_ext.datasets import get_dataset_class
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.options import NUMBERS
from domainbed_ext.protocols import SINGLE_SOURCE, check_evaluate, left_out_environments, source_environments
from domainbed_ext.records import RunFolder
from domainbed_ext.run_setup import environment_names
from domainbed_ext.seeds import seed_hash


@dataclass(frozen=True)
class Job:
    """A run of a sweep.

    Attributes:
        train_args: arguments of `domainbed_ext.train` that say what is computed; DomainBed's names.
        sweep_dir: folder of the sweep.
        extra_args: arguments that change no number, e.g. the worker count, and so no identity.
    """

    train_args: dict[str, Any]
    sweep_dir: Path
    extra_args: dict[str, Any]

    @property
    def folder(self) -> RunFolder:
        """The run's folder, named by DomainBed's hash of the arguments."""
        text = json.dumps(self.train_args, sort_keys=True)
        return RunFolder(self.sweep_dir / hashlib.md5(text.encode("utf-8")).hexdigest())

    @property
    def argv(self) -> list[str]:
        """Arguments of `domainbed_ext.train`."""
        argv = []
        arguments = {**self.train_args, **self.extra_args, "output_dir": str(self.folder.path)}
        for name, value in sorted(arguments.items()):
            if value is None or value is False:
                continue
            values = value if isinstance(value, list) else [] if value is True else [value]
            argv += [f"--{name}", *map(str, values)]
        return argv

    @property
    def command(self) -> str:
        """The shell command that runs it."""
        return shlex.join([sys.executable, "-m", "domainbed_ext.train", *self.argv])

    def __str__(self) -> str:
        names = ("dataset", "algorithm", "test_envs", "hparams_seed", "trial_seed")
        return " ".join(f"{name}={self.train_args[name]}" for name in names)


def make_jobs(args: argparse.Namespace) -> list[Job]:
    """The runs of a sweep, in DomainBed's order.

    Args:
        args: of `sweep.make_parser`, complete.

    Returns:
        The jobs.

    Raises:
        BenchmarkError: unknown data set, algorithm or environment, or options that contradict each other.
    """
    for algorithm in args.algorithms:
        parse_name(algorithm)
    numbers = {name: getattr(args, name) for name in NUMBERS if getattr(args, name) is not None}
    extra = {
        "workers": args.workers,
        "verify_images": args.verify_images,
        "skip_model_save": args.skip_model_save,
    }
    combinations = _test_envs(args)
    jobs = []
    for trial_seed, dataset, algorithm in itertools.product(range(args.n_trials), args.datasets, args.algorithms):
        for test_envs in combinations[dataset]:
            for hparams_seed in range(args.n_hparams_from, args.n_hparams):
                train_args = {
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
                jobs.append(Job(train_args | numbers, Path(args.output_dir), extra))
    return jobs


def _test_envs(args: argparse.Namespace) -> dict[str, list[list[int]]]:
    """By data set, the test environments of every run."""
    names = {dataset: _environment_names(dataset, args.data_dir) for dataset in args.datasets}
    if args.protocol == SINGLE_SOURCE:
        return {
            dataset: [[i for i in range(len(names[dataset])) if i != source] for source in sources]
            for dataset, sources in source_environments(args.source_envs, names).items()
        }
    if args.source_envs is not None:
        raise BenchmarkError(f"--source_envs is of --protocol {SINGLE_SOURCE}: add that, or leave it out")
    check_evaluate(args.evaluate, pairs=not args.single_test_envs)
    return {
        dataset: list(left_out_environments(len(environments), args.single_test_envs))
        for dataset, environments in names.items()
    }


def _environment_names(dataset: str, data_dir: str | None) -> Sequence[Sequence[str]]:
    """What a data set's environments may be called; the images need be at hand only where the class does not say."""
    known = get_dataset_class(dataset)
    labels, folders = known.ENVIRONMENTS, getattr(known, "DOMAINS", ())
    if labels:
        return list(zip(labels, folders or labels, strict=True))
    return environment_names(known(data_dir, [], {}))
