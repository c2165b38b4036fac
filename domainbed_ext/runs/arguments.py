"""The arguments of a run, and its command line."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from domainbed_ext import hparams_registry, protocols
from domainbed_ext.algorithms.listing import NAME_HELP, format_short
from domainbed_ext.cache.entries import DEFAULT_GB
from domainbed_ext.datasets.registry import DATASETS
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.protocols import CHOICES
from domainbed_ext.runs.hparams_option import add_hparams_option
from domainbed_ext.runs.shared_options import (
    ALGORITHM,
    SAVE_MINUTES,
    add_image_options,
    add_number_options,
    add_print_option,
    add_resume_options,
    add_saving_options,
    add_speed_options,
    add_tracking_option,
    settle_evaluations,
)
from domainbed_ext.system import option_values, yaml12
from domainbed_ext.system.command_line import CommandLine
from domainbed_ext.system.commands import format_command
from domainbed_ext.system.option_file import format_options, read_options

# Options over DomainBed's that change a run's numbers. A sweep passes those that are given on to its runs and makes
# them part of a run's identity; `protocols.choices` fills in the others.
NUMBERS = (
    "protocol",
    *CHOICES,
    "checkpoint_freq",
    "evaluations",
    "early_stopping",
    "backbone",
    "weights",
    "precision",
    "train_eval_share",
    "threads",
)


# Arguments for where and how a run computes: they change no number, and so no identity. The file of `--weights` counts
# by its content.
PLACES = (
    *("imports", "data_dir", "output_dir", "weights", "cache_dir", "cache_gb", "workers", "verify_images", "profile"),
    *("save_steps", "save_minutes", "time_limit", "stop_on_nan", "duplicates", "skip_predictions"),
    *("track", "device"),
    "evaluate_first_step",  # counts by the `checkpoint_freq` that follows from it
)

# Arguments that a sweep passes on to its runs beside their identity.
EXTRA = (
    *("imports", "cache_dir", "cache_gb", "workers", "verify_images", "profile", "skip_model_save"),
    *("skip_predictions", "save_steps", "save_minutes", "time_limit", "stop_on_nan", "duplicates", "track"),
    "device",
)


@dataclass(frozen=True)
class SharedArguments:
    """The arguments that a run and a sweep share, with the values that they have where they are not given.

    None stands for an argument that was not given: the protocol, the data set or the machine decides it. The command
    line describes each argument.
    """

    imports: Sequence[str] | None = None

    protocol: str | None = None
    source_envs: Sequence[str | int] | None = None
    validation_images: str | None = None
    input_stats: str | None = None
    sampling: str | None = None
    training_images: str | None = None
    split_by: str | None = None
    test_on: str | None = None
    evaluate: str | None = None
    train_eval_share: float | None = None
    checkpoint_freq: int | None = None
    evaluations: int | None = None
    early_stopping: int | None = None
    backbone: str | None = None
    weights: str | None = None
    precision: str | None = None
    threads: int | None = None

    skip_predictions: bool = False
    track: Sequence[str] | None = None

    verify_images: bool = False
    duplicates: str = "warn"

    device: str | None = None
    cache_dir: str | None = None
    cache_gb: float = DEFAULT_GB
    workers: int | None = None
    profile: bool = False

    save_minutes: float = SAVE_MINUTES
    save_steps: int = 0
    time_limit: float | None = None
    stop_on_nan: bool = False


@dataclass(frozen=True)
class RunArguments(SharedArguments):
    """The arguments of a run as they were given; its records hold them completed."""

    data_dir: str | None = None
    dataset: str = "DigitsShift"
    algorithm: str = ALGORITHM
    task: str = "domain_generalization"
    hparams: str | None = None
    hparams_seed: int = 0
    trial_seed: int = 0
    seed: int = 0
    steps: int | None = None
    test_envs: Sequence[str | int] | None = None
    output_dir: str = "train_output"
    holdout_fraction: float = 0.2
    uda_holdout_fraction: float = 0.0
    skip_model_save: bool = False
    save_model_every_checkpoint: bool = False
    evaluate_first_step: bool = False

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "RunArguments":
        """The arguments of these names and values; other names, e.g. of another version's records, are left out.

        Args:
            values: Name to value.
        """
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})

    def complete(self, workers: int = 0) -> "CompleteArguments":
        """The same with the protocol's choices where none was given.

        Args:
            workers: Number of worker processes where none was given.
        """
        given = {name: value for name, value in asdict(self).items() if value is not None}
        chosen = protocols.choices(self.protocol, self.test_envs)
        return CompleteArguments(**{**asdict(self), "workers": workers, **chosen, **given})


Resolve = Callable[..., Mapping[str, Any]]
"""Function that resolves hyperparameters: `hparams_registry.resolve`, or one that remembers its results."""


@dataclass(frozen=True)
class CompleteArguments(RunArguments):
    """The arguments of a run with its protocol's choices filled in."""

    protocol: str = protocols.LEAVE_ONE_OUT
    validation_images: str = "plain"
    input_stats: str = "backbone"
    sampling: str = "replacement"
    training_images: str = "exact"
    split_by: str = protocols.IMAGES
    test_on: str = "in"
    evaluate: str = "lean"
    train_eval_share: float = 1.0
    threads: int = 1
    workers: int = 0

    def resolve_hparams(self, resolve: Resolve = hparams_registry.resolve) -> dict[str, Any]:
        """Resolves the hyperparameters that the run ends up with.

        Args:
            resolve: Function that resolves them; what it returns is not changed.
        """
        names = ("algorithm", "dataset", "hparams_seed", "trial_seed", "hparams", *hparams_registry.OPTIONS)
        return dict(resolve(**{name: getattr(self, name) for name in names}))


def make_parser() -> argparse.ArgumentParser:
    """Makes the command line of a run: DomainBed's options, and those of this package."""
    parser = CommandLine(
        prog="python -m domainbed_ext.train",
        description="Trains one algorithm and tests it on environments that were held out, as DomainBed does.",
        epilog="examples:\n  python -m domainbed_ext.train --dataset PACS --data_dir data --algorithm BOnly@rank=16 "
        "--test_envs 3 \\\n    --steps 300 --output_dir runs/sketch\n  python -m domainbed_ext.train --dataset PACS "
        "--data_dir data --protocol single_source --source_envs cartoon \\\n    --output_dir runs/cartoon\n\n"
        + format_short(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        type=option_values.path,
        metavar="FILE",
        help="YAML file of options, which the command line overrides",
    )
    add_print_option(parser)
    parser.add_argument("--data_dir", type=option_values.path, metavar="DIR", help="folder that holds the data sets")
    parser.add_argument("--dataset", metavar="NAME", help=f"{', '.join(DATASETS)} (%(default)s)")
    parser.add_argument("--algorithm", metavar="NAME", help=f"{NAME_HELP} (%(default)s)")
    parser.add_argument("--task", metavar="NAME", help="%(default)s")
    add_hparams_option(parser, "hyperparameters that override the defaults or the random draw")
    for name, meaning in (
        ("hparams_seed", "seed of random hyperparameters; 0: the defaults (%(default)s)"),
        ("trial_seed", "seed of splits and random hyperparameters (%(default)s)"),
        ("seed", "seed of everything else (%(default)s)"),
    ):
        parser.add_argument(f"--{name}", type=option_values.seed, metavar="N", help=meaning)
    parser.add_argument(
        "--steps", type=option_values.whole(1), metavar="N", help="training steps (default: the data set's)"
    )
    parser.add_argument(
        "--test_envs",
        type=option_values.name_or_index,
        nargs="+",
        metavar="NAME",
        help="test environments: names, labels or indices (0; with single_source, all but the source)",
    )
    parser.add_argument(
        "--output_dir",
        type=option_values.tensors_path,
        metavar="DIR",
        help="folder of the run (%(default)s)",
    )
    parser.add_argument(
        "--holdout_fraction",
        type=option_values.share(),
        metavar="SHARE",
        help="share of each environment in its `out` split (%(default)s)",
    )
    parser.add_argument(
        "--uda_holdout_fraction",
        type=option_values.share(with_0=True),
        metavar="SHARE",
        help="share of a test environment that is kept from its `in` split (%(default)s)",
    )
    parser.add_argument(
        "--evaluate_first_step",
        action="store_true",
        help="evaluate after the first step too, as DomainBed does; a run whose --steps is at most the default of "
        "--checkpoint_freq is otherwise evaluated at the last step alone (sweeps and --protocol domainbed always do)",
    )
    add_saving_options(parser)
    parser.add_argument(
        "--save_model_every_checkpoint", action="store_true", help="save the model at every evaluation too"
    )
    add_tracking_option(parser)
    add_number_options(parser)
    add_image_options(parser)
    add_speed_options(parser)
    add_resume_options(parser)
    parser.set_defaults(**asdict(RunArguments()))
    return parser


def format_config(args: RunArguments) -> str:
    """Writes a run's arguments, with the protocol's choices, as YAML that `--config` reads.

    Args:
        args: Arguments of the run.

    Returns:
        YAML; the final hyperparameters are comments in it.
    """
    complete = args.complete()
    values = {**asdict(complete), "workers": args.workers}  # their number depends on the machine
    hparams = yaml12.write_mapping(complete.resolve_hparams())
    comments = "".join(f"#   {line}\n" for line in hparams.splitlines())
    return f"{format_options(make_parser(), values)}# The hyperparameters that follow from these:\n{comments}"


def parse_words(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads a run's command line over the file of its `--config`.

    Args:
        argv: Arguments; None for those of the process.

    Returns:
        Values of all options.

    Raises:
        BenchmarkError: An option is unknown, or its value cannot be right.
    """
    parser = make_parser()
    args = typed = parser.parse_args(argv)
    if args.config is not None:
        parser.set_defaults(**vars(parser.parse_args(_file_words(Path(args.config), parser))))
        args = parser.parse_args(argv)  # which overrides the file
    settle_evaluations(args, typed)
    return args


def _file_words(path: Path, parser: argparse.ArgumentParser) -> list[str]:
    if not path.is_file():
        raise BenchmarkError(f"no file {path}: give --config a YAML file of options")
    return read_options(path, parser, f"{format_command('train')} --print_config")


def parse(argv: Sequence[str] | None = None) -> RunArguments:
    """Reads a run's command line.

    Args:
        argv: Arguments; None for those of the process.

    Raises:
        BenchmarkError: An option is unknown, or its value cannot be right.
    """
    return RunArguments.from_mapping(vars(parse_words(argv)))
