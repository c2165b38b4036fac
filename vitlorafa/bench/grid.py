"""The parts `step` and `memory` of the benchmark: time and memory of a few methods on a grid of cases."""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vitlorafa import AdapterConfig, AdapterError
from vitlorafa.bench import output
from vitlorafa.bench.case import PRECISIONS, Case, build_backbone
from vitlorafa.bench.command_line import (
    CommandLine,
    add_common_options,
    add_targets,
    check_positive,
    check_precisions,
    check_ranks,
    expand_path,
    find_device,
    leave_out,
    list_methods,
    run_part,
)
from vitlorafa.bench.formulas import Stack
from vitlorafa.bench.machine import collect_provenance, file_name
from vitlorafa.bench.measure import MIB, Memory, Peak, Times, measure_peak, measure_saved, time_steps
from vitlorafa.bench.methods import CORE, METHODS, build, count, find_method, why_unavailable
from vitlorafa.bench.progress import show_progress
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

other parts, each with its own --help:
  python -m vitlorafa.bench methods    # parameters, memory, time and largest batch of every method, in one table
  python -m vitlorafa.bench growth     # memory by rank, by number of adapted blocks and by resolution
  python -m vitlorafa.bench tune       # the fastest ways of this machine to compute a model
"""


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
        epilog=f"methods, and those of the part methods:{list_methods(CORE)}\n\n{EXAMPLES}",
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
    add_targets(parser)
    add("--precision", nargs="+", default=["bf16"], metavar="NAME", help=f"{', '.join(PRECISIONS)} (default: bf16)")
    add(
        "--dropout",
        type=float,
        nargs="+",
        default=[0.0],
        metavar="P",
        help="dropout on the adapter's input (default: 0)",
    )
    add("--methods", nargs="+", default=list(CORE), metavar="NAME", help="methods (default: those listed below)")
    add("--repeats", type=int, default=10, metavar="N", help="rounds that count (default: %(default)s)")
    add("--warmup", type=int, default=2, metavar="N", help="rounds before them (default: %(default)s)")
    add_common_options(parser)
    add("--dry_run", action="store_true", help="print the formulas' numbers; measure and write nothing")
    add(
        "--redraw",
        type=expand_path,
        metavar="DIR",
        help="regenerate tables and plots from the CSV files in DIR; measure nothing",
    )
    return parser


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
    for name in args.what:
        if name not in WHAT:
            raise unknown("measurement", name, WHAT)
    check_precisions(*args.precision)
    asked = [find_method(name) for name in args.methods]
    device = find_device(args.device)
    plans = []
    for model, size, resolution, precision, dropout, rank in itertools.product(
        args.models, args.batch_size, args.resolution, args.precision, args.dropout, args.ranks
    ):
        targets = AdapterConfig(rank=rank, targets=args.targets, dropout=dropout).targets
        case = Case(model, size, resolution, precision, rank, targets, dropout, device, args.depth)
        network = build_backbone(case)
        check_ranks("--ranks", [rank], model, network)
        reasons = {method: why_unavailable(method, case) for method in dict.fromkeys(asked)}
        methods = [method for method in METHODS if method in reasons and reasons[method] is None]
        skipped = {method: reason for method, reason in reasons.items() if reason is not None}
        if not methods:
            raise AdapterError(f"no method can run: {next(iter(skipped.values()))}")
        is_first = rank == args.ranks[0]  # one curve for all ranks
        ranks = [each for each in sorted(set(args.plot_ranks)) if each <= network.embed_dim] if is_first else []
        plans.append(Plan(case, methods, skipped, Stack.of(network, size, case.element), ranks))
    return plans


def main(argv: Sequence[str], prog: str) -> int:
    """Runs the command.

    Args:
        argv: Arguments.
        prog: Name of the command in messages.

    Returns:
        The exit code: 0, 1 if a measurement failed, 2 if an argument is invalid, 130 if interrupted.
    """
    return run_part(make_parser(prog), argv, _prepare, _run)


def _prepare(args: argparse.Namespace) -> list[Plan]:
    if args.redraw:
        print(f"written to {args.redraw}: {', '.join(output.redraw(Path(args.redraw)))}")
        return []
    plans = make_plans(args)
    for method, reason in {pair: None for plan in plans for pair in plan.skipped.items()}:
        leave_out(method, reason)
    if args.dry_run:
        print(markdown("formula", _formula_rows(plans)))
        return []
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    return plans


def _run(args: argparse.Namespace, argv: Sequence[str], plans: list[Plan]) -> None:
    if not plans:
        return
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
    with show_progress(units) as advance:
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
