"""The arguments of a sweep: its definition, with the command line over it."""

import json
import shlex
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from domainbed_ext.algorithms.names import canonical_name, find_among
from domainbed_ext.datasets.registry import DATASETS
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs import imports
from domainbed_ext.runs.arguments import SharedArguments
from domainbed_ext.runs.shared_options import settle_evaluations
from domainbed_ext.sweep.definition import QUICKSTART, definition_words
from domainbed_ext.sweep.options import NAMES, PROGRAM, make_parser


@dataclass(frozen=True, kw_only=True)
class SweepArguments(SharedArguments):
    """What a sweep is, and what to do with it.

    Attributes:
        command: Name of the sub-command.
        words: Command line as it was typed.
        output_dir: Folder of the sweep.
        data_dir: Folder that holds the data sets.
        datasets: Names of data sets, each once.
        algorithms: Names of methods, each once.
        task: DomainBed's task.
        n_hparams_from: First hyperparameter seed.
        n_hparams: End of the hyperparameter seeds.
        n_trials: Number of trials.
        first_trial: Seed of the first trial of `confirm`; None for the first that the sweep has not run.
        steps: Training steps; None for each data set's own number.
        hparams: JSON of hyperparameters; None if there is none.
        holdout_fraction: Share of each environment in its `out` split.
        single_test_envs: Whether no pair of environments is held out.
        command_launcher: Name of the launcher.
        launcher_options: Options of the launcher.
        jobs: Number of runs at once; 0 leaves it to the launcher.
        reference: Name of the method that the tables compare all others with; None for no such table.
        skip_model_save: Whether not to save the trained parameters.
        skip_confirmation: Whether not to ask.
        dry_run: Whether to change nothing.
        watch: Whether `status` stays and refreshes.
        json: Whether `status` prints JSON.
    """

    command: str
    words: tuple[str, ...]
    output_dir: Path
    data_dir: str | None
    datasets: tuple[str, ...]
    algorithms: tuple[str, ...]
    task: str
    n_hparams_from: int
    n_hparams: int
    n_trials: int
    first_trial: int | None
    steps: int | None
    hparams: str | None
    holdout_fraction: float
    single_test_envs: bool
    command_launcher: str
    launcher_options: Mapping[str, Any]
    jobs: int
    reference: str | None
    skip_model_save: bool
    skip_confirmation: bool
    dry_run: bool
    watch: bool
    json: bool

    @property
    def command_line(self) -> str:
        """The command as it was typed."""
        return shlex.join([*PROGRAM.split(), *self.words])


def parse_words(argv: Sequence[str] | None = None) -> Namespace:
    """Reads the command line over the sweep's definition.

    Args:
        argv: Words of the command line; None for the process's.

    Returns:
        Values of all options, and `words`, the command line.

    Raises:
        BenchmarkError: A definition cannot be read, or the value of an option cannot be right.
    """
    words = tuple(sys.argv[1:] if argv is None else argv)
    parser = make_parser(next((word for word in words if word in NAMES), None))
    args = typed = parser.parse_args(words)
    name = args.sweep or (None if args.datasets or args.algorithms else QUICKSTART)
    if name:
        defined = vars(parser.parse_args([args.command, *definition_words(name, parser)]))
        parser.set_defaults(**defined)  # which the command line overrides
        args = parser.parse_args(words)
    settle_evaluations(args, typed)
    args.words = words
    return args


def parse(argv: Sequence[str] | None = None) -> SweepArguments:
    """Reads the command line over the sweep's definition, as `parse_words` does, and checks what it says.

    Args:
        argv: Words of the command line; None for the process's.

    Returns:
        The arguments.

    Raises:
        BenchmarkError: A definition cannot be read, or an argument is missing or makes no sense.
    """
    return check(parse_words(argv))


def check(args: Namespace) -> SweepArguments:
    """Checks what the options of a sweep say together.

    Args:
        args: Values of all options.

    Returns:
        The arguments.

    Raises:
        BenchmarkError: An argument is missing or makes no sense.
    """
    for needed in ("datasets", "algorithms", "output_dir"):
        if not getattr(args, needed):
            raise BenchmarkError(f"--{needed} is missing: give it, or a --sweep FILE.yaml that does")
    for name in ("watch", "json"):
        if getattr(args, name) and args.command != "status":
            raise BenchmarkError(f"--{name} is an option of `status`, not of `{args.command}`: leave it out")
    if args.first_trial is not None and args.command != "confirm":
        raise BenchmarkError(f"--first_trial is an option of `confirm`, not of `{args.command}`: leave it out")
    if args.device and ":" in args.device:
        raise BenchmarkError(
            f"--device {args.device}: the launcher gives each run of a sweep its GPU: give cuda, cpu or auto; choose "
            "GPUs by CUDA_VISIBLE_DEVICES"
        )
    if args.n_hparams <= args.n_hparams_from:
        raise BenchmarkError(
            f"this sweep has no run: --n_hparams {args.n_hparams} should be above --n_hparams_from "
            f"{args.n_hparams_from}"
        )
    datasets, algorithms = _names(args)
    values = {
        **vars(args),
        "output_dir": Path(args.output_dir),
        "datasets": datasets,
        "algorithms": algorithms,
        "reference": _reference(args, algorithms),
        "launcher_options": _launcher_options(args),
    }
    return SweepArguments(**{field.name: values[field.name] for field in fields(SweepArguments)})


def _names(args: Namespace) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The data sets and the methods. A name given twice is one row, and must not be run twice in one folder."""
    if args.command == "cancel":  # which needs neither, and works where an import fails
        return tuple(args.datasets), tuple(args.algorithms)
    imports.load(args.imports)
    datasets, algorithms = map(DATASETS.canonical, args.datasets), map(canonical_name, args.algorithms)
    return tuple(dict.fromkeys(datasets)), tuple(dict.fromkeys(algorithms))


def _reference(args: Namespace, algorithms: Sequence[str]) -> str | None:
    """The method that the tables compare all others with; checked now, for tables are made when all runs are done."""
    if args.reference is None or args.command == "cancel":
        return None
    found = find_among(args.reference, algorithms)
    if found is None:
        raise BenchmarkError(
            f"--reference {args.reference} is not among the methods: choose one of {', '.join(algorithms)}"
        )
    return found


def _launcher_options(args: Namespace) -> dict[str, Any]:
    try:
        options = json.loads(args.launcher_options or "{}")
    except json.JSONDecodeError as error:
        raise BenchmarkError(
            f"""--launcher_options is not JSON ({error}): write it like '{{"partition": "gpu"}}'"""
        ) from error
    if not isinstance(options, dict):
        raise BenchmarkError(
            f"""--launcher_options is not a JSON object but {args.launcher_options}: write it like """
            """'{"partition": "gpu"}'"""
        )
    return options if args.jobs_per_gpu is None else options | {"jobs_per_gpu": args.jobs_per_gpu}
