"""The arguments of a run, and its command line; the part of both that sweeps share."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from domainbed_ext import hparams_registry, protocols
from domainbed_ext.algorithms.listing import NAME_HELP, format_short
from domainbed_ext.cache.entries import DEFAULT_GB, VARIABLE
from domainbed_ext.data import duplicates
from domainbed_ext.datasets.registry import DATASETS
from domainbed_ext.protocols import CHOICES, PRECISIONS, PROTOCOLS
from domainbed_ext.runs import imports
from domainbed_ext.system import option_values
from domainbed_ext.system.command_line import CommandLine

# Options over DomainBed's that change a run's numbers. A sweep passes those that are given on to its runs and makes
# them part of a run's identity; `protocols.choices` fills in the others.
NUMBERS = (
    "protocol",
    *CHOICES,
    "checkpoint_freq",
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
    "evaluate_first_step",  # counts by the `checkpoint_freq` that follows from it
)

# Arguments that a sweep passes on to its runs beside their identity.
EXTRA = (
    *("imports", "cache_dir", "cache_gb", "workers", "verify_images", "profile", "skip_model_save"),
    *("skip_predictions", "save_steps", "save_minutes", "time_limit", "stop_on_nan", "duplicates"),
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
    backbone: str | None = None
    weights: str | None = None
    precision: str | None = None
    threads: int | None = None

    skip_predictions: bool = False

    verify_images: bool = False
    duplicates: str = "warn"

    cache_dir: str | None = None
    cache_gb: float = DEFAULT_GB
    workers: int | None = None
    profile: bool = False

    save_minutes: float = 5.0
    save_steps: int = 0
    time_limit: float | None = None
    stop_on_nan: bool = False


@dataclass(frozen=True)
class RunArguments(SharedArguments):
    """The arguments of a run as they were given; its records hold them completed."""

    data_dir: str | None = None
    dataset: str = "DigitsShift"
    algorithm: str = "BOnly"
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


def add_number_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options in `NUMBERS`, which runs and sweeps share, and the one that adds methods and data sets."""
    imports.add_option(parser)
    group = parser.add_argument_group("protocol")
    group.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        help="leave_one_out (default): train on all environments but the test ones; single_source: train on one and "
        "test on the others; domainbed: leave_one_out with DomainBed's own choices for the options below",
    )
    group.add_argument(
        "--source_envs",
        nargs="+",
        metavar="NAME",
        help="with single_source: names, labels or indices of the environments to train on (default: those of Zhu et "
        "al. 2024: LabelMe, cartoon, Clipart, L38; other data sets: each in turn)",
    )
    group = parser.add_argument_group("options that change the numbers", "recorded in every record")
    group.add_argument(
        "--validation_images",
        choices=CHOICES["validation_images"],
        help="training environments are evaluated on plain images (default) or, as in DomainBed, on augmented ones",
    )
    group.add_argument(
        "--input_stats",
        choices=CHOICES["input_stats"],
        help="images are normalised by the backbone's own mean and std (default) or, as in DomainBed, by ImageNet's",
    )
    group.add_argument(
        "--sampling",
        choices=CHOICES["sampling"],
        help="training images are drawn with replacement, as in DomainBed (default), or in shuffled epochs",
    )
    group.add_argument(
        "--training_images",
        choices=CHOICES["training_images"],
        help="images before augmentation: exact (default) as they are; resized: larger ones scaled down to a shorter "
        "side of 8/7 of the backbone's input size, which takes less space in the cache",
    )
    group.add_argument(
        "--split_by",
        choices=CHOICES["split_by"],
        help="what `out` splits hold out: images of each environment, as in DomainBed (default), or concepts, each of "
        "them in every environment; for data sets whose images carry concepts, such as EmojiStyles",
    )
    group.add_argument(
        "--test_on",
        choices=CHOICES["test_on"],
        help="images of a test environment that are tested on: the 80 %% in its `in` split, as in DomainBed (default), "
        "or all",
    )
    group.add_argument(
        "--evaluate",
        choices=CHOICES["evaluate"],
        help="splits that are evaluated. lean (default unless pairs of environments are held out): those that model "
        "selection needs, and when the run ends all others at the selected and at the last step; all: every split "
        "each time, as in DomainBed. The tables are the same",
    )
    group.add_argument(
        "--train_eval_share",
        type=option_values.share(with_1=True),
        metavar="SHARE",
        help="share of each training environment's `in` split on which train accuracy is measured (1)",
    )
    group.add_argument(
        "--checkpoint_freq",
        type=option_values.whole(0),
        metavar="N",
        help="evaluate every N steps and at the last step (default: the data set's); 0: at the last step alone",
    )
    group.add_argument(
        "--backbone", metavar="NAME", help=f"any timm model, e.g. vit_tiny_patch16_224 ({_list_default_backbones()})"
    )
    group.add_argument(
        "--weights",
        type=option_values.tensors_path,
        metavar="FILE",
        help="weights of the backbone: a .safetensors file, 'pretrained' (downloaded by timm) or 'none'",
    )
    group.add_argument(
        "--precision", choices=PRECISIONS, help="auto (default): bf16 if the processor supports it, else float32"
    )
    group.add_argument(
        "--threads",
        type=option_values.whole(1),
        metavar="N",
        help="CPU threads of a run (1, since runs are parallel); another number rounds differently",
    )


def _list_default_backbones() -> str:
    """The defaults, and the data sets of those that are not the default of most: "a; of X and Y b"."""
    datasets_of: dict[str, list[str]] = {}
    for dataset in DATASETS:
        backbone = hparams_registry.default_hparams(RunArguments.algorithm, dataset)["backbone"]
        datasets_of.setdefault(backbone, []).append(dataset)
    most, *others = sorted(datasets_of, key=lambda backbone: -len(datasets_of[backbone]))
    return "; ".join([most, *(f"of {', '.join(datasets_of[backbone])}: {backbone}" for backbone in others)])


def add_image_options(parser: argparse._ActionsContainer) -> None:
    """Adds the options of runs and sweeps for checking images before they are used."""
    parser.add_argument("--verify_images", action="store_true", help="check every image file before training starts")
    duplicates.add_option(parser)


def add_saving_options(parser: argparse._ActionsContainer) -> None:
    """Adds the options of runs and sweeps for what is not saved."""
    parser.add_argument("--skip_model_save", action="store_true", help="do not save the trained model")
    parser.add_argument(
        "--skip_predictions",
        action="store_true",
        help="do not keep the logits of every evaluated image at the selected and at the last step (of PACS 0.25 MB a "
        "step, of DomainNet 0.4 GB)",
    )


def add_speed_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of runs and sweeps for speed; they change no number."""
    group = parser.add_argument_group("speed", "decoded images are cached: see python -m domainbed_ext.cache list")
    group.add_argument(
        "--cache_dir",
        type=option_values.tensors_path,
        metavar="DIR",
        help=f"folder of the cache ({VARIABLE}, else ~/.cache/domainbed_ext); 'none': decode images each time",
    )
    group.add_argument(
        "--cache_gb",
        type=option_values.number(least=0),
        default=SharedArguments.cache_gb,
        metavar="GB",
        help="largest size of the cache in GB (%(default)g)",
    )
    group.add_argument(
        "--workers",
        type=option_values.whole(0),
        metavar="N",
        help="processes that prepare a run's images (4 with a GPU, else 0); 0: the run itself prepares them",
    )
    group.add_argument(
        "--profile", action="store_true", help="time each stage and compare it with its matmul lower bound"
    )


def add_resume_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of runs and sweeps for stopping and resuming."""
    group = parser.add_argument_group("resuming", "a run that was stopped or killed resumes from its last checkpoint")
    group.add_argument(
        "--save_minutes",
        type=option_values.number(least=0),
        default=SharedArguments.save_minutes,
        metavar="M",
        help="write a checkpoint every M minutes (%(default)g); 0: never",
    )
    group.add_argument(
        "--save_steps",
        type=option_values.whole(0),
        default=SharedArguments.save_steps,
        metavar="N",
        help="write a checkpoint every N steps too (0: never)",
    )
    group.add_argument(
        "--time_limit",
        type=option_values.number(above=0),
        metavar="M",
        help="minutes after which an attempt fails (no limit)",
    )
    group.add_argument(
        "--stop_on_nan",
        action="store_true",
        help="fail at the first step whose loss or outputs are not finite; without it the run continues and is counted "
        "as diverged",
    )


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
    parser.add_argument("--data_dir", type=option_values.path, metavar="DIR", help="folder that holds the data sets")
    parser.add_argument("--dataset", metavar="NAME", help=f"{', '.join(DATASETS)} (%(default)s)")
    parser.add_argument("--algorithm", metavar="NAME", help=f"{NAME_HELP} (%(default)s)")
    parser.add_argument("--task", metavar="NAME", help="%(default)s")
    parser.add_argument(
        "--hparams", metavar="JSON", help="hyperparameters that override the defaults or the random draw"
    )
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
    add_number_options(parser)
    add_image_options(parser)
    add_speed_options(parser)
    add_resume_options(parser)
    parser.set_defaults(**asdict(RunArguments()))
    return parser


def parse(argv: Sequence[str] | None = None) -> RunArguments:
    """Reads a run's command line.

    Args:
        argv: Arguments; None for those of the process.

    Raises:
        BenchmarkError: An option is unknown, or its value cannot be right.
    """
    return RunArguments(**vars(make_parser().parse_args(argv)))
