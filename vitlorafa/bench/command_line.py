"""What the commands of the benchmark share: their parser, checks of options, and exit codes."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn, TypeVar

import torch
from timm.models.vision_transformer import VisionTransformer

from vitlorafa import AdapterError
from vitlorafa.bench.case import PRECISIONS, Case
from vitlorafa.bench.methods import METHODS, find_method, why_unavailable
from vitlorafa.errors import unknown

T = TypeVar("T")


class CommandLine(argparse.ArgumentParser):
    """A parser that raises its errors as `AdapterError`."""

    def error(self, message: str) -> NoReturn:
        """Raises an `AdapterError`."""
        raise AdapterError(f"{message}; see {self.prog} --help")


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of all parts that measure methods: device, depth, threads and output folder.

    Args:
        parser: Parser with the options of one part.
    """
    add = parser.add_argument
    add("--device", metavar="NAME", help="cpu or cuda (default: a GPU if available)")
    add("--depth", type=int, metavar="N", help="number of blocks (default: the model's)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    add(
        "--output_dir",
        type=expand_path,
        default="runs/bench",
        metavar="DIR",
        help="folder for results (default: %(default)s)",
    )


def add_case_options(
    parser: argparse.ArgumentParser,
    batch_size: int,
    resolution: str = "image size in pixels",
    rank: str = "rank of the adapters",
) -> None:
    """Adds the options of the parts that measure one case: model, batch size, resolution and rank.

    Args:
        parser: Parser with the options of one part.
        batch_size: Default number of images in a step.
        resolution: What the resolution is.
        rank: What the rank is.
    """
    add = parser.add_argument
    add("--model", default="vit_small_patch16_224", metavar="NAME", help="timm model (default: ViT-S/16)")
    add("--batch_size", type=int, default=batch_size, metavar="N", help="images in a step (default: %(default)s)")
    add("--resolution", type=int, default=224, metavar="PX", help=f"{resolution} (default: %(default)s)")
    add("--rank", type=int, default=8, metavar="R", help=f"{rank} (default: %(default)s)")


def add_targets(parser: argparse.ArgumentParser) -> None:
    """Adds the option of the adapted projections.

    Args:
        parser: Parser with the options of one part.
    """
    parser.add_argument(
        "--targets",
        default="all",
        metavar="NAMES",
        help="projections, e.g. q,v, from q, k, v, proj, fc1, fc2 (default: all)",
    )


def list_methods(names: Iterable[str]) -> str:
    """Lines with the names and labels of methods, for the end of a help text.

    Args:
        names: Names in `METHODS`.
    """
    return "".join(f"\n  {name:22} {METHODS[name].label}" for name in names)


def expand_path(text: str) -> str:
    """A path with the user's folder and variables in it replaced, as a shell does."""
    return os.path.expanduser(os.path.expandvars(text))


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Refuses values below 1; options that were not given are not checked.

    Args:
        args: Arguments.
        names: Names of options with a number or a list of numbers.

    Raises:
        AdapterError: If a value is below 1.
    """
    for name in names:
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [1 if values is None else values]:
            if value < 1:
                raise AdapterError(f"--{name} must be at least 1, not {value}")


def check_precisions(*names: str) -> None:
    """Refuses unknown precisions.

    Args:
        names: Names that a user typed.

    Raises:
        AdapterError: If one is not in `PRECISIONS`.
    """
    for name in names:
        if name not in PRECISIONS:
            raise unknown("precision", name, PRECISIONS)


def check_ranks(option: str, ranks: Iterable[int], model: str, backbone: VisionTransformer) -> None:
    """Refuses ranks that a model is too small for.

    Args:
        option: Option that gave the ranks, such as "--rank".
        ranks: Ranks of adapters.
        model: Name of the timm model.
        backbone: The model.

    Raises:
        AdapterError: If a rank is larger than the model's width.
    """
    width = backbone.embed_dim
    for rank in ranks:
        if rank > width:
            raise AdapterError(f"{option} {rank} is larger than the width {width} of {model}: choose a smaller rank")


def choose_methods(names: Iterable[str], case: Case) -> list[str]:
    """The methods that can run in a case, in the order of `METHODS`; the others are named on stderr.

    Args:
        names: Names that a user typed.
        case: Case to run.

    Raises:
        AdapterError: If a name is unknown, or no method can run.
    """
    reasons = {method: why_unavailable(method, case) for method in map(find_method, names)}
    for method, reason in reasons.items():
        if reason is not None:
            leave_out(method, reason)
    methods = [method for method in METHODS if method in reasons and reasons[method] is None]
    if not methods:
        raise AdapterError("no method can run")
    return methods


def leave_out(method: str, reason: str) -> None:
    """Says on stderr why a method is not measured.

    Args:
        method: Name in `METHODS`.
        reason: Reason, as by `why_unavailable`.
    """
    print(f"{METHODS[method].label} is left out: {reason}", file=sys.stderr)


def find_device(name: str | None) -> str:
    """The device that a user named, or a GPU if there is one.

    Raises:
        AdapterError: If it does not exist or cannot be measured.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise unknown("device", name, ("cpu", "cuda")) from None
    if device.type not in ("cpu", "cuda"):
        raise AdapterError(f"--device {name} cannot be measured: choose cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise AdapterError(f"--device {name} does not exist on this machine: choose cpu")
    return name


def run_part(
    parser: argparse.ArgumentParser,
    argv: Sequence[str],
    prepare: Callable[[argparse.Namespace], T],
    measure: Callable[[argparse.Namespace, Sequence[str], T], None],
) -> int:
    """Checks options, then measures; an error is one sentence on stderr, and torch's number of threads is restored.

    Args:
        parser: Parser with the options `--threads` and `--output_dir`.
        argv: Arguments.
        prepare: Function that checks the options and returns what to measure.
        measure: Function of the options, the arguments and what `prepare` returned.

    Returns:
        The exit code: 0, 1 if a measurement failed, 2 if an argument is invalid, 130 if interrupted.
    """
    threads = torch.get_num_threads()
    try:
        args = parser.parse_args(argv)
        work = prepare(args)
    except BrokenPipeError:
        raise
    except (AdapterError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        if args.threads:
            torch.set_num_threads(args.threads)
        measure(args, argv, work)
    except BrokenPipeError:
        raise
    except (AdapterError, RuntimeError, OSError) as error:  # out of memory is a RuntimeError
        print(f"error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: finished measurements are in {args.output_dir}", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(threads)
    return 0
