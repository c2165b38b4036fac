"""The command `python -m vitlorafa.bench tune`: the fastest ways of this machine to compute a model."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from vitlorafa import AdapterConfig, AdapterError, cast_frozen, inject, speed_up, tuning
from vitlorafa.bench.case import CLASSES, PRECISIONS, SCALE, Case, build_backbone
from vitlorafa.bench.command_line import CommandLine, add_case_options, check_positive
from vitlorafa.bench.tables import Row, table
from vitlorafa.config import TARGETS, TRAIN
from vitlorafa.errors import unknown
from vitlorafa.evaluation_batch import fastest_evaluation_batch
from vitlorafa.kept_ways import Answer, machine_file
from vitlorafa.ops.processor import fastest_precision

_STEPS = 3  # that are timed with each number of threads
_QUESTIONS = "\n".join(f"  {kind:17} {purpose}" for kind, purpose in tuning.KINDS.items())
_EPILOG = f"""questions:
{_QUESTIONS}

To set a way yourself: VITLORAFA_WAYS='{{"attention": "torch"}}', or vitlorafa.use_ways. VITLORAFA_TUNE=off takes
torch's own way everywhere.

examples:
  python -m vitlorafa.bench tune --model vit_tiny_patch16_224 --batch_size 24
  python -m vitlorafa.bench tune --again                     # forgets all answers of this machine first
"""


def make_parser(prog: str = "python -m vitlorafa.bench tune") -> argparse.ArgumentParser:
    """The command line.

    Args:
        prog: Name of the command in messages.
    """
    parser = CommandLine(
        prog=prog,
        description="Show the fastest of several exact ways to compute a model's training step and its evaluation.\n"
        "Each is timed once on this machine, for each shape; what was timed before is read from a file.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_case_options(parser, 24)
    add = parser.add_argument
    add("--precision", default="auto", metavar="NAME", help="auto, bf16 or float32 (default: the faster one)")
    add("--train", default="B", metavar="NAME", help=f"trained factors: {', '.join(TRAIN)} (default: %(default)s)")
    add("--depth", type=int, metavar="N", help="number of blocks (default: the model's)")
    add(
        "--threads",
        type=int,
        nargs="+",
        metavar="N",
        help="CPU threads of a run (default: 1, as runs use, and 2, 4, ... up to the cores)",
    )
    add("--again", action="store_true", help="forget all answers of this machine, so that everything is timed again")
    return parser


def main(argv: Sequence[str], prog: str) -> int:
    """Runs the command.

    Args:
        argv: Arguments.
        prog: Name of the command in messages.

    Returns:
        The exit code: 0, 2 if an argument is invalid or nothing can be timed, 130 if interrupted.
    """
    threads = torch.get_num_threads()
    try:
        args = make_parser(prog).parse_args(argv)
        check_positive(args, "batch_size", "resolution", "rank", "depth", "threads")
        if not tuning.is_on():
            raise AdapterError("VITLORAFA_TUNE is off, so nothing is timed: unset it")
        if args.again:
            tuning.forget()
        _run(args)
    except BrokenPipeError:
        raise
    except (AdapterError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what was timed is kept", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(threads)
    return 0


def _run(args: argparse.Namespace) -> None:
    numbers = args.threads or [1 << power for power in range(max(1, os.cpu_count() or 1).bit_length())]
    speeds = [_measure_speed(args, number) for number in numbers]
    kept, used = machine_file().read(), tuning.answers()
    rows: list[Row] = [_describe(name, way, kept.get(name)) for name, way in used.items()]
    if rows:
        print(table(rows))
    else:
        print("Nothing of this model is large enough to be timed.")
    print(f"\n{table(speeds)}\n\nAnswers of this machine are in {machine_file().path}")


def _describe(question: str, way: str, answer: Answer | None) -> Row:
    seconds = answer.seconds if answer else {}
    default = next(iter(seconds.values()), 0.0)
    ratios = ", ".join(f"{name} {value / default:.2f}" for name, value in seconds.items())
    return {"question": question, "way": way, "time relative to the default": ratios or None}


def _measure_speed(args: argparse.Namespace, threads: int) -> Row:
    """Times training steps and an evaluation, which asks all questions of the model first."""
    torch.set_num_threads(threads)
    precision = _precision(args.precision)
    dtype = PRECISIONS[precision]
    case = Case(args.model, args.batch_size, args.resolution, precision, args.rank, TARGETS, depth=args.depth)
    options: dict[str, Any] = {"alpha": SCALE * args.rank, "seed": 0}
    model = inject(build_backbone(case), AdapterConfig(rank=args.rank, train=args.train, **options), train_head=True)
    speed_up(model)
    if dtype is not None:
        cast_frozen(model)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    images = torch.randn(args.batch_size, 3, args.resolution, args.resolution)
    labels = torch.arange(args.batch_size) % CLASSES

    def step() -> None:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def evaluate() -> None:
        with torch.inference_mode(), torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            model(evaluated)

    seconds = _shortest(step)
    model.eval()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        size = fastest_evaluation_batch(model)
    evaluated = torch.randn(size, 3, args.resolution, args.resolution)
    return {
        "threads": threads,
        "precision": precision,
        "step, s": f"{seconds:.3f}",
        "evaluated images/s": f"{size / _shortest(evaluate):.0f}",
    }


def _precision(name: str) -> str:
    if name == "auto":
        return fastest_precision()
    if name not in ("bf16", "float32"):
        raise unknown("precision", name, ("auto", "bf16", "float32"))
    return name


def _shortest(function: Callable[[], None]) -> float:
    """Seconds of the shortest of some calls, after one that asks its questions."""
    function()
    times = []
    for _ in range(_STEPS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)
