"""The part `methods` of the benchmark: parameters, memory, time and largest batch of every method, in one table."""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vitlorafa import AdapterConfig, AdapterError
from vitlorafa.bench import output
from vitlorafa.bench.case import PRECISIONS, Case, build_backbone, stack_of
from vitlorafa.bench.command_line import (
    CommandLine,
    add_case_options,
    add_common_options,
    add_targets,
    check_positive,
    check_precisions,
    check_ranks,
    choose_methods,
    find_device,
    leave_out,
    list_methods,
    run_part,
)
from vitlorafa.bench.costs import Cost, measure_cost, parse_memory, share_weights
from vitlorafa.bench.machine import collect_provenance, file_name, matmul_rate
from vitlorafa.bench.measure import Times, measure_peak, time_steps
from vitlorafa.bench.methods import METHODS, Setup, build
from vitlorafa.bench.progress import show_progress
from vitlorafa.bench.tables import Row, markdown, method_rows

EXAMPLES = """examples:
  python -m vitlorafa.bench methods                                     # ViT-S/16, batch 16, bf16, rank 8
  python -m vitlorafa.bench methods --model vit_base_patch16_224 --batch_size 8 --memory 8GiB 24GiB
  python -m vitlorafa.bench methods --methods lower_bound full lora_fa lora peft_lora peft_dora
"""


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        case: What is the same for all methods.
        methods: Names in `METHODS`.
        memory: Sizes in bytes, by the text that the user typed, for which the largest batch is computed.
    """

    case: Case
    methods: list[str]
    memory: dict[str, int]


def make_parser(prog: str = "python -m vitlorafa.bench methods") -> argparse.ArgumentParser:
    """The command line.

    Args:
        prog: Name of the command in messages.
    """
    parser = CommandLine(
        prog=prog,
        description="Measure every method in one table and one figure: trained parameters, memory part by part, step\n"
        "time relative to the lower bound, model FLOPs utilisation, and the largest batch in a given memory.\n"
        "Weights and images are random. The head trains in all rows but the lower bound.",
        epilog=f"methods:{list_methods(METHODS)}\n\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_case_options(parser, 16)
    add = parser.add_argument
    add_targets(parser)
    add("--precision", default="bf16", metavar="NAME", help=f"{', '.join(PRECISIONS)} (default: %(default)s)")
    add("--methods", nargs="+", default=list(METHODS), metavar="NAME", help="methods, listed below (default: all)")
    add(
        "--memory",
        nargs="+",
        type=str,
        default=["8GiB", "24GiB"],
        metavar="SIZE",
        help="memory for the column of the largest batch (default: 8GiB 24GiB)",
    )
    add("--repeats", type=int, default=5, metavar="N", help="rounds that count; 0 times nothing (default: 5)")
    add("--warmup", type=int, default=1, metavar="N", help="rounds before them (default: %(default)s)")
    add_common_options(parser)
    return parser


def main(argv: Sequence[str], prog: str) -> int:
    """Runs the command.

    Args:
        argv: Arguments.
        prog: Name of the command in messages.

    Returns:
        The exit code: 0, 1 if a measurement failed, 2 if an argument is invalid, 130 if interrupted.
    """
    return run_part(make_parser(prog), argv, _prepare, _run)


def _prepare(args: argparse.Namespace) -> Plan:
    check_positive(args, "batch_size", "resolution", "rank", "depth", "threads")
    for name in ("repeats", "warmup"):
        if getattr(args, name) < 0:
            raise AdapterError(f"--{name} must be at least 0, not {getattr(args, name)}")
    check_precisions(args.precision)
    memory = {text: parse_memory(text) for text in args.memory}
    targets = AdapterConfig(rank=args.rank, targets=args.targets).targets
    device = find_device(args.device)
    case = Case(
        args.model, args.batch_size, args.resolution, args.precision, args.rank, targets, 0.0, device, args.depth, True
    )
    check_ranks("--rank", [args.rank], args.model, build_backbone(case))
    methods = choose_methods(args.methods, case)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    return Plan(case, methods, memory)


def _run(args: argparse.Namespace, argv: Sequence[str], plan: Plan) -> None:
    start, case = time.monotonic(), plan.case

    def write(costs: list[Cost], times: Sequence[Times] = (), rate: float | None = None) -> list[Row]:
        rows = method_rows(costs, times, rate, plan.memory)
        provenance = collect_provenance(["methods", *argv], case.device) | {"seconds": round(time.monotonic() - start)}
        output.write(Path(args.output_dir), "methods", file_name(case.device), provenance, rows)
        return rows

    with show_progress(len(plan.methods) * (1 + args.repeats + (args.warmup if args.repeats else 0))) as advance:
        setups, costs = _count(plan, advance)
        rows = write(costs)  # an interruption loses no more than the times
        if args.repeats:
            dtype = PRECISIONS[case.precision] or torch.float32
            rate = matmul_rate(dtype, case.device)
            times = time_steps(setups, case, args.repeats, args.warmup, advance, stack_of(case))
            rate = max(rate, matmul_rate(dtype, case.device))  # a machine's speed varies; its peak is the faster one
            rows = write(costs, times, rate)
    print(markdown("methods", rows))
    print(f"written to {args.output_dir}")


def _count(plan: Plan, advance: Callable[[], None]) -> tuple[dict[str, Setup], list[Cost]]:
    """The models of all methods, which share their frozen weights, and their costs."""
    case = plan.case
    backbone = build_backbone(case).to(case.device)
    setups: dict[str, Setup] = {}
    costs: list[Cost] = []
    for method in plan.methods:
        try:
            peak = measure_peak(method, case) if torch.device(case.device).type == "cuda" else None
            setup = build(method, case)
            costs.append(replace(measure_cost(method, case, setup), peak=peak))
        except (AdapterError, RuntimeError) as error:  # one method that fails must not stop the others
            leave_out(method, str(error).strip().splitlines()[0])
            continue
        finally:
            advance()
        share_weights(setup.model, backbone)
        setups[method] = setup
    if not setups:
        raise AdapterError("no method could be measured")
    return setups, costs
