"""The command line of `vitlorafa.bench`."""

import argparse
import io
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

import torch

from vitlorafa import AdapterConfig, AdapterError
from vitlorafa.bench import report
from vitlorafa.bench.floors import Stack
from vitlorafa.bench.measure import MIB, Memory, Peak, Times, peak, saved, time_steps
from vitlorafa.bench.methods import METHODS, PRECISIONS, Case, backbone, build, counted, unavailable
from vitlorafa.errors import unknown

WHAT = ("step", "memory")
RANK_METHODS = ("floor", "B-folded", "BA-folded", "peft_lora", "peft_lora_fa")  # lines of the plot over ranks
EXAMPLES = """examples:
  python -m vitlorafa.bench                                  # both, ViT-S/16, batch 16, bf16, rank 8
  python -m vitlorafa.bench step --ranks 8 64 --repeats 20
  python -m vitlorafa.bench step --models vit_tiny_patch16_224 vit_base_patch16_224 --precision float32 bf16
  python -m vitlorafa.bench memory --dropout 0 0.1 --methods floor B-folded B-separate lora_plain
  python -m vitlorafa.bench --targets q,v --dry_run          # operations and kept bytes by formula, runs nothing
"""


class _CommandLine(argparse.ArgumentParser):
    """A parser whose errors are sentences like all others."""

    def error(self, message: str) -> NoReturn:
        raise AdapterError(f"{message}; see {self.prog} --help")


@dataclass(frozen=True)
class Plan:
    """A case with what runs in it.

    Attributes:
        case: What is held fixed.
        methods: Names of `METHODS`.
        skipped: Method -> why it cannot run.
        stack: Sizes for the formulas, None if the model is not made of plain blocks.
        ranks: Of the plot over ranks.
    """

    case: Case
    methods: list[str]
    skipped: dict[str, str]
    stack: Stack | None
    ranks: list[int]


@dataclass
class Results:
    """All that was measured so far."""

    times: list[Times] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    curves: dict[tuple[str, str], dict[int, int]] = field(default_factory=dict)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = _CommandLine(
        prog="python -m vitlorafa.bench",
        description="Times training steps and weighs what they keep in memory, against the floor and against peers.\n"
        "Weights and images are random; several values of an option make a grid.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="*", metavar="step|memory", help="what to measure (both)")
    parser.add_argument("--models", nargs="+", default=["vit_small_patch16_224"], metavar="NAME", help="of timm")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[16], metavar="N", help="images (16)")
    parser.add_argument("--resolution", type=int, nargs="+", default=[224], metavar="PX", help="(224)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8], metavar="R", help="(8)")
    parser.add_argument(
        "--plot_ranks",
        type=int,
        nargs="*",
        default=[1, 2, 4, 8, 16, 32, 64, 128],
        metavar="R",
        help="ranks of the plot of memory against rank (1 2 4 ... 128)",
    )
    parser.add_argument("--targets", default="all", metavar="NAMES", help="as q,v; of q, k, v, proj, fc1, fc2 (all)")
    parser.add_argument(
        "--precision", nargs="+", default=["bf16"], metavar="NAME", help=f"{', '.join(PRECISIONS)} (bf16)"
    )
    parser.add_argument(
        "--dropout", type=float, nargs="+", default=[0.0], metavar="P", help="of an adapter's input (0)"
    )
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda (a GPU if there is one)")
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), metavar="NAME", help=f"{', '.join(METHODS)} (all)"
    )
    parser.add_argument("--depth", type=int, metavar="N", help="blocks (the model's)")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="rounds that count (%(default)s)")
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="rounds before them (%(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (torch's choice)")
    parser.add_argument("--output_dir", type=_path, default="runs/bench", metavar="DIR", help="(%(default)s)")
    parser.add_argument("--dry_run", action="store_true", help="print what would run, by formula; write nothing")
    return parser


def _path(text: str) -> str:
    return os.path.expanduser(os.path.expandvars(text))


def make_plans(args: argparse.Namespace) -> list[Plan]:
    """The cases of a grid, checked before anything is measured.

    Args:
        args: Of `make_parser`.

    Raises:
        AdapterError: On any value that cannot be.
    """
    for name in ("batch_size", "resolution", "ranks", "plot_ranks", "depth", "repeats", "threads"):
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [1 if values is None else values]:
            if value < 1:
                raise AdapterError(f"--{name} must be at least 1, not {value}")
    if args.warmup < 0:
        raise AdapterError(f"--warmup must be at least 0, not {args.warmup}")
    for kind, names, known in (
        ("measurement", args.what, WHAT),
        ("method", args.methods, METHODS),
        ("precision", args.precision, PRECISIONS),
    ):
        for name in names:
            if name not in known:
                raise unknown(kind, name, known)
    device = _device(args.device)
    plans = []
    for model, size, resolution, precision, dropout, rank in itertools.product(
        args.models, args.batch_size, args.resolution, args.precision, args.dropout, args.ranks
    ):
        targets = AdapterConfig(rank=rank, targets=args.targets, dropout=dropout).targets
        case = Case(model, size, resolution, precision, rank, targets, dropout, device, args.depth)
        network = backbone(case)
        width = network.embed_dim
        if rank > width:
            raise AdapterError(f"rank {rank} is over the width {width} of {model}")
        reasons = {method: unavailable(method, case) for method in dict.fromkeys(args.methods)}
        methods = [method for method in METHODS if method in reasons and reasons[method] is None]
        skipped = {method: reason for method, reason in reasons.items() if reason is not None}
        if not methods:
            raise AdapterError(f"no method can run: {next(iter(skipped.values()))}")
        first = rank == args.ranks[0]  # one curve for all ranks
        ranks = [other for other in sorted(set(args.plot_ranks)) if other <= width] if first else []
        plans.append(Plan(case, methods, skipped, Stack.of(network, size, case.element), ranks))
    return plans


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Its arguments; the process's if None.

    Returns:
        The exit code: 0, 1 if a measurement failed, 2 if the arguments cannot be, 130 if interrupted.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args = make_parser().parse_args(argv)
        plans = make_plans(args)
        if not args.dry_run:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    except (AdapterError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for method, reason in {pair: None for plan in plans for pair in plan.skipped.items()}:
        print(f"{method} is left out: {reason}", file=sys.stderr)
    if args.dry_run:
        print(report.markdown("formula", _formulas(plans)))
        return 0
    threads = torch.get_num_threads()
    try:
        if args.threads:
            torch.set_num_threads(args.threads)
        _run(args, argv, plans)
    except BrokenPipeError:
        raise
    except (RuntimeError, OSError) as error:  # out of memory is a RuntimeError
        print(f"error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: what was finished is in {args.output_dir}", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(threads)
    return 0


def _run(args: argparse.Namespace, argv: Sequence[str], plans: list[Plan]) -> None:
    what = [name for name in WHAT if name in args.what] or list(WHAT)
    results = Results()
    start = time.monotonic()
    units = 0
    for plan in plans:
        units += len(plan.methods) * (args.warmup + args.repeats) * ("step" in what)
        units += (len(plan.methods) + len(plan.ranks) * len(_curve_methods(plan))) * ("memory" in what)

    def write(name: str) -> None:
        seconds = round(time.monotonic() - start)
        source = report.provenance(argv, plans[0].case.device) | {"seconds": seconds}
        report.write(Path(args.output_dir), name, source, results.times, results.memory, results.curves)

    # What is measured is written after every case: a run cut short loses one.
    with _progress(units) as advance:
        for plan in plans if "step" in what else []:
            results.times += time_steps(
                {method: build(method, plan.case) for method in plan.methods},
                plan.case,
                args.repeats,
                args.warmup,
                advance,
                plan.stack,
            )
            write("step")
        for plan in plans if "memory" in what else []:
            _weigh(plan, results, advance)
            write("memory")
    print(report.text(results.times, results.memory))
    print(f"written to {args.output_dir}")


def _weigh(plan: Plan, results: Results, advance: Callable[[], None]) -> None:
    for method in plan.methods:
        kept = saved(build(method, plan.case), plan.case)
        try:
            most = peak(method, plan.case)
        except RuntimeError as error:  # one method that does not fit is no reason to lose the others
            print(str(error).strip().splitlines()[0], file=sys.stderr)
            most = Peak(None, None)
        results.memory.append(Memory(plan.case, method, kept, counted(method, plan.case, plan.stack)[1], most))
        advance()
    for method, rank in itertools.product(_curve_methods(plan), plan.ranks):
        case = replace(plan.case, rank=rank)
        curve = results.curves.setdefault((case.setting, method), {})
        curve[rank] = saved(build(method, case), case).activations
        advance()


def _curve_methods(plan: Plan) -> list[str]:
    wanted = [name.replace("folded", "separate") if plan.case.dropout else name for name in RANK_METHODS]
    return [method for method in plan.methods if method in wanted]


def _formulas(plans: list[Plan]) -> list[report.Row]:
    rows = []
    for plan in plans:
        floor_flops, floor_kept = counted("floor", plan.case, plan.stack)
        for method in plan.methods:
            flops, kept = counted(method, plan.case, plan.stack)
            rows.append(
                {
                    "case": str(plan.case),
                    "method": method,
                    "gflop": flops and flops / 1e9,
                    "flop_ratio": flops and floor_flops and flops / floor_flops,
                    "formula_mib": kept and kept / MIB,
                    "kept_ratio": kept and floor_kept and kept / floor_kept,
                }
            )
    return rows


def _device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise unknown("device", name, ("cpu", "cuda")) from None
    if device.type not in ("cpu", "cuda"):
        raise AdapterError(f"cannot measure on {name}: choose cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise AdapterError(f"there is no {name} here: choose cpu")
    return name


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar with rate and time left on a terminal's stderr; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    is_terminal = sys.stderr.isatty()  # a variable that asks for colour makes none of a pipe
    console = Console(file=sys.stderr, force_terminal=is_terminal)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not is_terminal, speed_estimate_period=120) as bar:
        task = bar.add_task("bench", total=total, rate="")

        def advance() -> None:
            bar.advance(task)
            speed = bar.tasks[task].speed
            if speed:
                bar.update(task, rate=f"{speed:.1f} a second" if speed >= 1 else f"{1 / speed:.1f} s each")

        yield advance


def _print_safely() -> None:
    """Has a console that lacks a character show a question mark: what was measured takes long."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _leave_pipe() -> int:
    """Ends in silence where nobody reads on (`| head`): results are files."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    _print_safely()
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        code = _leave_pipe()
    sys.exit(code)
