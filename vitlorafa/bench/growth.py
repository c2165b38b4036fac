"""The part `growth` of the benchmark: memory by rank, by number of adapted blocks and by resolution."""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from vitlorafa import AdapterError
from vitlorafa.bench import output
from vitlorafa.bench.case import PRECISIONS, Case, build_backbone
from vitlorafa.bench.command_line import (
    CommandLine,
    add_case_options,
    add_common_options,
    check_positive,
    check_precisions,
    check_ranks,
    choose_methods,
    find_device,
    list_methods,
    run_part,
)
from vitlorafa.bench.costs import Cost, measure_cost, scale_cost
from vitlorafa.bench.machine import collect_provenance, file_name
from vitlorafa.bench.methods import METHODS, build
from vitlorafa.bench.progress import show_progress
from vitlorafa.bench.tables import Row, growth_markdown, growth_rows
from vitlorafa.config import TARGETS

_RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
_RESOLUTIONS = (128, 224, 320, 384, 448, 512)
_DEFAULT = ("lower_bound", "full", "lora_fa", "lora", "peft_lora", "peft_lora_fa")
EXAMPLES = """examples:
  python -m vitlorafa.bench growth                          # ViT-S/16, batch 16, bf16
  python -m vitlorafa.bench growth --ranks 8 64 --resolutions 224 384 512 --methods lora_fa lora full
"""


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        panel: "rank", "first blocks", "last blocks" or "resolution".
        value: Rank, number of blocks, or pixels.
        method: Name in `METHODS`.
        case: Case to count in, with one or two images.
        batch_size: Number of images that the plot shows.
    """

    panel: str
    value: int
    method: str
    case: Case
    batch_size: int

    def measure(self) -> tuple[str, int, Cost]:
        """Panel, value and cost."""
        cost = measure_cost(self.method, self.case, build(self.method, self.case))
        return self.panel, self.value, scale_cost(cost, self.batch_size)


def make_parser(prog: str = "python -m vitlorafa.bench growth") -> argparse.ArgumentParser:
    """The command line.

    Args:
        prog: Name of the command in messages.
    """
    parser = CommandLine(
        prog=prog,
        description="Count the memory of a training step by rank, by number of adapted blocks and by resolution, and\n"
        "plot it in three panels. What one image keeps is measured; it is the same for every image of a batch.",
        epilog=f"methods:{list_methods(METHODS)}\n\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_case_options(parser, 16, "pixels in the other panels", "rank in the other panels")
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", metavar="R", help="ranks (default: 1 2 4 ... 128)")
    add("--blocks", type=int, nargs="+", metavar="N", help="numbers of adapted blocks (default: every other one)")
    add(
        "--resolutions",
        type=int,
        nargs="+",
        metavar="PX",
        help="image sizes (default: the multiples of the patch size next to 128, 224, 320, 384, 448 and 512)",
    )
    add("--precision", default="bf16", metavar="NAME", help=f"{', '.join(PRECISIONS)} (default: %(default)s)")
    add("--methods", nargs="+", default=list(_DEFAULT), metavar="NAME", help=f"default: {' '.join(_DEFAULT)}")
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


def _prepare(args: argparse.Namespace) -> list[Point]:
    check_positive(args, "batch_size", "rank", "ranks", "blocks", "resolution", "resolutions", "depth", "threads")
    check_precisions(args.precision)
    device = find_device(args.device)
    case = Case(args.model, 2, args.resolution, args.precision, args.rank, TARGETS, 0.0, device, args.depth, head=True)
    backbone = build_backbone(case)
    width, depth = backbone.embed_dim, len(backbone.blocks)
    args.ranks = args.ranks or [rank for rank in _RANKS if rank <= width]
    check_ranks("--rank", [args.rank], args.model, backbone)
    check_ranks("--ranks", args.ranks, args.model, backbone)
    args.blocks = args.blocks or sorted({*range(2, depth + 1, 2), 1, depth})
    if max(args.blocks) > depth:
        raise AdapterError(f"--blocks {max(args.blocks)} is more than the {depth} blocks of {args.model}")
    patch = max(backbone.patch_embed.patch_size)
    args.resolutions = args.resolutions or [patch * round(pixels / patch) for pixels in _RESOLUTIONS]
    for resolution in args.resolutions:
        build_backbone(replace(case, resolution=resolution))
    methods = choose_methods(args.methods, case)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    return [
        Point(panel, value, method, each, args.batch_size)
        for panel, value, each in _cases(case, args, depth)
        for method in methods
        if each.blocks is None or METHODS[method].is_adapter
    ]


def _cases(case: Case, args: argparse.Namespace, depth: int) -> Iterator[tuple[str, int, Case]]:
    for rank in args.ranks:
        yield "rank", rank, replace(case, rank=rank)
    for number in args.blocks:
        yield "first blocks", number, replace(case, blocks=tuple(range(number)))
    for number in args.blocks:
        yield "last blocks", number, replace(case, blocks=tuple(range(depth - number, depth)))
    for resolution in args.resolutions:
        yield "resolution", resolution, replace(case, resolution=resolution)


def _run(args: argparse.Namespace, argv: Sequence[str], points: list[Point]) -> None:
    start, device = time.monotonic(), points[0].case.device
    rows: list[Row] = []
    with show_progress(len(points)) as advance:
        for _, panel in groupby(points, key=lambda point: point.panel):
            for point in panel:
                rows += growth_rows([point.measure()])
                advance()
            provenance = collect_provenance(["growth", *argv], device) | {"seconds": round(time.monotonic() - start)}
            output.write(Path(args.output_dir), "growth", file_name(device), provenance, rows)
    print(growth_markdown(rows))
    print(f"written to {args.output_dir}")
