"""The command `python -m vitlorafa.bench`."""

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

import torch

from vitlorafa import AdapterConfig, AdapterError
from vitlorafa.bench import output, tune
from vitlorafa.bench.command_line import CommandLine, check_positive
from vitlorafa.bench.formulas import Stack
from vitlorafa.bench.machine import collect_provenance, file_name
from vitlorafa.bench.measure import MIB, Memory, Peak, Times, measure_peak, measure_saved, time_steps
from vitlorafa.bench.methods import (
    METHODS,
    PRECISIONS,
    Case,
    build,
    build_backbone,
    count,
    find_method,
    why_unavailable,
)
from vitlorafa.bench.tables import Curves, Row, markdown, memory_rows, rank_rows, step_rows
from vitlorafa.errors import unknown

WHAT = ("step", "memory")
RANK_METHODS: tuple[str, ...] = (
    "lower_bound",
    "lora_fa",
    "lora",
    "peft_lora",
    "peft_lora_fa",
)  # lines of the plot over ranks
EXAMPLES = """examples:
  python -m vitlorafa.bench                                  # step and memory: ViT-S/16, batch 16, bf16, rank 8
  python -m vitlorafa.bench step --ranks 8 64 --repeats 20
  python -m vitlorafa.bench step --models vit_tiny_patch16_224 vit_base_patch16_224 --precision float32 bf16
  python -m vitlorafa.bench memory --dropout 0 0.1 --methods lower_bound lora_fa lora_fa_separate lora_fa_plain
  python -m vitlorafa.bench --targets q,v --dry_run          # operations and kept bytes by formula; runs nothing
  python -m vitlorafa.bench --redraw runs/bench              # regenerate tables and plots from an earlier run's CSV
  python -m vitlorafa.bench tune --help                      # show the fastest ways of this machine to compute a model
"""
_METHOD_NAMES = "".join(f"\n  {name:18} {method.label}" for name, method in METHODS.items())


@dataclass(frozen=True)
class Plan:
    """A case with the methods that run in it.

    Attributes:
        case: What is the same for all methods.
        methods: Names in `METHODS`.
        skipped: Reason for each method that cannot run.
        stack: Sizes for the formulas; None if the model does not consist of plain blocks only.
        ranks: Ranks of the plot over ranks.
    """

    case: Case
    methods: list[str]
    skipped: dict[str, str]
    stack: Stack | None
    ranks: list[int]


@dataclass
class Results:
    """Everything that was measured so far."""

    times: list[Times] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    curves: Curves = field(default_factory=dict)


def make_parser(prog: str = "python -m vitlorafa.bench") -> argparse.ArgumentParser:
    """The command line.

    Args:
        prog: Name of the command in messages.
    """
    parser = CommandLine(
        prog=prog,
        description="Measure time and memory of training steps: LoRA, LoRA-FA and LoRA-FB of vitlorafa, LoRA-FA in\n"
        "plain PyTorch, PEFT, full fine-tuning, and a lower bound (the frozen model's forward pass and the\n"
        "gradients of its activations). Weights and images are random. Several values of an option make\n"
        "a grid.",
        epilog=f"methods:{_METHOD_NAMES}\n\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("what", nargs="*", metavar="step|memory", help="what to measure (default: both)")
    add(
        "--models", nargs="+", default=["vit_small_patch16_224"], metavar="NAME", help="timm models (default: ViT-S/16)"
    )
    add("--batch_size", type=int, nargs="+", default=[16], metavar="N", help="images in a step (default: 16)")
    add("--resolution", type=int, nargs="+", default=[224], metavar="PX", help="image size in pixels (default: 224)")
    add("--ranks", type=int, nargs="+", default=[8], metavar="R", help="ranks of the adapters (default: 8)")
    add(
        "--plot_ranks",
        type=int,
        nargs="*",
        default=[1, 2, 4, 8, 16, 32, 64, 128],
        metavar="R",
        help="ranks in the plot of memory by rank (default: 1 2 4 ... 128)",
    )
    add(
        "--targets",
        default="all",
        metavar="NAMES",
        help="projections, e.g. q,v, from q, k, v, proj, fc1, fc2 (default: all)",
    )
    add("--precision", nargs="+", default=["bf16"], metavar="NAME", help=f"{', '.join(PRECISIONS)} (default: bf16)")
    add(
        "--dropout",
        type=float,
        nargs="+",
        default=[0.0],
        metavar="P",
        help="dropout on the adapter's input (default: 0)",
    )
    add("--device", metavar="NAME", help="cpu or cuda (default: a GPU if available)")
    add("--methods", nargs="+", default=list(METHODS), metavar="NAME", help="methods, listed below (default: all)")
    add("--depth", type=int, metavar="N", help="number of blocks (default: the model's)")
    add("--repeats", type=int, default=10, metavar="N", help="rounds that count (default: %(default)s)")
    add("--warmup", type=int, default=2, metavar="N", help="rounds before them (default: %(default)s)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    add(
        "--output_dir",
        type=_path,
        default="runs/bench",
        metavar="DIR",
        help="folder for results (default: %(default)s)",
    )
    add("--dry_run", action="store_true", help="print the formulas' numbers; measure and write nothing")
    add(
        "--redraw",
        type=_path,
        metavar="DIR",
        help="regenerate tables and plots from the CSV files in DIR; measure nothing",
    )
    return parser


def _path(text: str) -> str:
    return os.path.expanduser(os.path.expandvars(text))


def make_plans(args: argparse.Namespace) -> list[Plan]:
    """The cases of a grid, checked before anything is measured.

    Args:
        args: Arguments of `make_parser`.

    Raises:
        AdapterError: If a value is invalid.
    """
    check_positive(args, "batch_size", "resolution", "ranks", "plot_ranks", "depth", "repeats", "threads")
    if args.warmup < 0:
        raise AdapterError(f"--warmup must be at least 0, not {args.warmup}")
    for kind, names, choices in (("measurement", args.what, WHAT), ("precision", args.precision, PRECISIONS)):
        for name in names:
            if name not in choices:
                raise unknown(kind, name, choices)
    asked = [find_method(name) for name in args.methods]
    device = _device(args.device)
    plans = []
    for model, size, resolution, precision, dropout, rank in itertools.product(
        args.models, args.batch_size, args.resolution, args.precision, args.dropout, args.ranks
    ):
        targets = AdapterConfig(rank=rank, targets=args.targets, dropout=dropout).targets
        case = Case(model, size, resolution, precision, rank, targets, dropout, device, args.depth)
        network = build_backbone(case)
        width = network.embed_dim
        if rank > width:
            raise AdapterError(f"--ranks {rank} is larger than the width {width} of {model}: choose a smaller rank")
        reasons = {method: why_unavailable(method, case) for method in dict.fromkeys(asked)}
        methods = [method for method in METHODS if method in reasons and reasons[method] is None]
        skipped = {method: reason for method, reason in reasons.items() if reason is not None}
        if not methods:
            raise AdapterError(f"no method can run: {next(iter(skipped.values()))}")
        is_first = rank == args.ranks[0]  # one curve for all ranks
        ranks = [each for each in sorted(set(args.plot_ranks)) if each <= width] if is_first else []
        plans.append(Plan(case, methods, skipped, Stack.of(network, size, case.element), ranks))
    return plans


def main(argv: Sequence[str] | None = None, prog: str = "python -m vitlorafa.bench") -> int:
    """Runs the command.

    Args:
        argv: Arguments; if None, those of the process.
        prog: Name of the command in messages.

    Returns:
        The exit code: 0, 1 if a measurement failed, 2 if an argument is invalid, 130 if interrupted.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["tune"]:
        return tune.main(argv[1:], f"{prog} tune")
    try:
        args = make_parser(prog).parse_args(argv)
        if args.redraw:
            print(f"written to {args.redraw}: {', '.join(output.redraw(Path(args.redraw)))}")
            return 0
        plans = make_plans(args)
        if not args.dry_run:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    except (AdapterError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for method, reason in {pair: None for plan in plans for pair in plan.skipped.items()}:
        print(f"{METHODS[method].label} is left out: {reason}", file=sys.stderr)
    if args.dry_run:
        print(markdown("formula", _formula_rows(plans)))
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
        print(f"interrupted: finished measurements are in {args.output_dir}", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(threads)
    return 0


def run_command(argv: Sequence[str] | None = None, prog: str = "python -m vitlorafa.bench") -> int:
    """`main` for a console: no traceback for a closed pipe or for a character that the console lacks.

    Args:
        argv: Arguments; if None, those of the process.
        prog: Name of the command in messages.

    Returns:
        The exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a question mark, rather than a lost measurement
    try:
        code = main(argv, prog)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe (`| head`); results are in files
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    return code


def _run(args: argparse.Namespace, argv: Sequence[str], plans: list[Plan]) -> None:
    what = [name for name in WHAT if name in args.what] or list(WHAT)
    results = Results()
    start = time.monotonic()
    device = plans[0].case.device
    units = 0
    for plan in plans:
        units += len(plan.methods) * (args.warmup + args.repeats) * ("step" in what)
        units += (len(plan.methods) + len(plan.ranks) * len(_curve_methods(plan))) * ("memory" in what)

    def write(name: str, rows: list[Row], ranks: Sequence[Row] = ()) -> None:
        provenance = collect_provenance(argv, device) | {"seconds": round(time.monotonic() - start)}
        output.write(Path(args.output_dir), name, file_name(device), provenance, rows, ranks)

    # Results are written after every case, so that an interrupted run loses one case only.
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
            write("step", step_rows(results.times))
        for plan in plans if "memory" in what else []:
            _measure_memory(plan, results, advance)
            write("memory", memory_rows(results.memory), rank_rows(results.curves))
    if results.times:
        print(markdown("step", step_rows(results.times)))
    if results.memory:
        print(markdown("memory", memory_rows(results.memory)))
    print(f"written to {args.output_dir}")


def _measure_memory(plan: Plan, results: Results, advance: Callable[[], None]) -> None:
    for method in plan.methods:
        kept = measure_saved(build(method, plan.case), plan.case)
        try:
            peak = measure_peak(method, plan.case)
        except RuntimeError as error:  # one method that does not fit must not stop the others
            print(str(error).strip().splitlines()[0], file=sys.stderr)
            peak = Peak(None, None)
        results.memory.append(Memory(plan.case, method, kept, count(method, plan.case, plan.stack)[1], peak))
        advance()
    for method, rank in itertools.product(_curve_methods(plan), plan.ranks):
        case = replace(plan.case, rank=rank)
        curve = results.curves.setdefault((case.setting, method), {})
        curve[rank] = measure_saved(build(method, case), case).activations
        advance()


def _curve_methods(plan: Plan) -> list[str]:
    names = RANK_METHODS
    if plan.case.dropout:  # with which our adapters compute the separate way
        names = tuple(f"{name}_separate" if METHODS[name].is_ours else name for name in names)
    return [method for method in plan.methods if method in names]


def _formula_rows(plans: list[Plan]) -> list[Row]:
    rows = []
    for plan in plans:
        bound_flops, bound_kept = count("lower_bound", plan.case, plan.stack)
        for method in plan.methods:
            flops, kept = count(method, plan.case, plan.stack)
            rows.append(
                {
                    "case": str(plan.case),
                    "method": METHODS[method].label,
                    "gflop": flops and flops / 1e9,
                    "flop_ratio": flops and bound_flops and flops / bound_flops,
                    "formula_mib": kept and kept / MIB,
                    "kept_ratio": kept and bound_kept and kept / bound_kept,
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
        raise AdapterError(f"--device {name} cannot be measured: choose cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise AdapterError(f"--device {name} does not exist on this machine: choose cpu")
    return name


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A progress bar with rate and time left if stderr is a terminal; nothing otherwise."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not sys.stderr.isatty():  # rich before 15 writes an empty line even for a disabled bar
        yield lambda: None
        return
    console = Console(file=sys.stderr, force_terminal=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, speed_estimate_period=120) as bar:
        task = bar.add_task("bench", total=total, rate="")

        def advance() -> None:
            bar.advance(task)
            speed = bar.tasks[task].speed
            if speed:
                bar.update(task, rate=f"{speed:.1f} a second" if speed >= 1 else f"{1 / speed:.1f} s each")

        yield advance


if __name__ == "__main__":
    sys.exit(run_command())
