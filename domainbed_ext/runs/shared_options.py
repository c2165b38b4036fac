"""Options that runs and sweeps share, in the groups that their help shows."""

import argparse

from domainbed_ext import hparams_registry
from domainbed_ext.cache.entries import DEFAULT_GB, VARIABLE
from domainbed_ext.data import duplicates
from domainbed_ext.datasets.registry import DATASETS
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.protocols import CHOICES, PRECISIONS, PROTOCOLS
from domainbed_ext.runs import imports
from domainbed_ext.system import option_values
from domainbed_ext.trackers.registry import TRACKERS

ALGORITHM = "BOnly"
"""Method of a run where none is given."""
SAVE_MINUTES = 5.0
"""Minutes from one checkpoint of a run to the next where none are given."""


def add_number_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options in `arguments.NUMBERS`, and the one that adds methods, objectives, data sets and trackers."""
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
        "--evaluations",
        type=option_values.whole(1),
        metavar="N",
        help="evaluate N times, evenly spaced, the last time at the last step (in place of --checkpoint_freq)",
    )
    group.add_argument(
        "--early_stopping",
        type=option_values.whole(1),
        metavar="N",
        help="end the run after N evaluations without a better validation accuracy (never)",
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
        "--precision",
        choices=PRECISIONS,
        help="auto (default): bf16 if the processor supports it, else float32; fp16, with a scaled loss, is for GPUs "
        "without bf16",
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
        backbone = hparams_registry.default_hparams(ALGORITHM, dataset)["backbone"]
        datasets_of.setdefault(backbone, []).append(dataset)
    most, *others = sorted(datasets_of, key=lambda backbone: -len(datasets_of[backbone]))
    return "; ".join([most, *(f"of {', '.join(datasets_of[backbone])}: {backbone}" for backbone in others)])


def settle_evaluations(args: argparse.Namespace, typed: argparse.Namespace) -> None:
    """Keeps one of `--checkpoint_freq` and `--evaluations`: what the command line gives replaces what a file gives.

    Args:
        args: Values of all options, which this changes.
        typed: Values of those that the command line gives.

    Raises:
        BenchmarkError: Both are given in one place.
    """
    names = ("checkpoint_freq", "evaluations")
    given = [name for name in names if getattr(typed, name) is not None]
    if not given:
        given = [name for name in names if getattr(args, name) is not None]
    if len(given) == 2:
        raise BenchmarkError(
            f"--checkpoint_freq {args.checkpoint_freq} and --evaluations {args.evaluations} both say when to evaluate: "
            "leave one out"
        )
    for name in set(names) - set(given):
        setattr(args, name, None)


def add_image_options(parser: argparse._ActionsContainer) -> None:
    """Adds the options of runs and sweeps for checking images before they are used."""
    parser.add_argument("--verify_images", action="store_true", help="check every image file before training starts")
    duplicates.add_option(parser)


def add_print_option(parser: argparse._ActionsContainer) -> None:
    """Adds the option that prints the options."""
    parser.add_argument(
        "--print_config",
        action="store_true",
        help="print all options with their values, as YAML that can be given back, and do nothing else",
    )


def add_saving_options(parser: argparse._ActionsContainer) -> None:
    """Adds the options of runs and sweeps for what is not saved."""
    parser.add_argument("--skip_model_save", action="store_true", help="do not save the trained model")
    parser.add_argument(
        "--skip_predictions",
        action="store_true",
        help="do not keep the logits of every evaluated image at the selected and at the last step (of PACS 0.25 MB a "
        "step, of DomainNet 0.4 GB)",
    )


def add_tracking_option(parser: argparse._ActionsContainer) -> None:
    """Adds the option of runs and sweeps for sending records elsewhere."""
    parser.add_argument(
        "--track",
        nargs="+",
        metavar="NAME",
        help=f"send the records too: {', '.join(TRACKERS)}, or your own by --import (default: nowhere)",
    )


def add_speed_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of runs and sweeps for speed; they change no number."""
    group = parser.add_argument_group("speed", "decoded images are cached: see python -m domainbed_ext.cache list")
    group.add_argument(
        "--device",
        type=option_values.device,
        metavar="NAME",
        help="auto (default): a GPU if there is one; cpu, cuda, or cuda:N for one of several",
    )
    group.add_argument(
        "--cache_dir",
        type=option_values.tensors_path,
        metavar="DIR",
        help=f"folder of the cache ({VARIABLE}, else ~/.cache/domainbed_ext); 'none': decode images each time",
    )
    group.add_argument(
        "--cache_gb",
        type=option_values.number(least=0),
        default=DEFAULT_GB,
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
        default=SAVE_MINUTES,
        metavar="M",
        help="write a checkpoint every M minutes (%(default)g); 0: never",
    )
    group.add_argument(
        "--save_steps",
        type=option_values.whole(0),
        default=0,
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
