"""The command line of `domainbed_ext.bench`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from domainbed_ext.bench import sweeps
from domainbed_ext.errors import CommandLine, exit_cleanly
from domainbed_ext.launchers import LAUNCHERS


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine(
        prog="python -m domainbed_ext.bench",
        description="Measures what a sweep of many short runs costs over the work of its runs, and whether it grows.",
        epilog="example:\n  python -m domainbed_ext.bench sweep --command_launcher local --runs 200",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=["sweep"])
    parser.add_argument("--runs", type=int, default=200, metavar="N", help="in steps of 20 (%(default)s)")
    parser.add_argument("--steps", type=int, default=120, metavar="N", help="of a run (%(default)s)")
    parser.add_argument(
        "--command_launcher", default="local", metavar="NAME", help=f"{', '.join(LAUNCHERS)} (%(default)s)"
    )
    parser.add_argument("--launcher_options", default="{}", metavar="JSON", help="of the launcher")
    parser.add_argument("--jobs", type=int, default=0, metavar="N", help="runs at once (one a core)")
    parser.add_argument("--output_dir", default="results/bench", metavar="DIR", help="of the table (%(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command: `python -m domainbed_ext.bench`."""
    args = make_parser().parse_args(argv)
    sweeps.measure(args, Path(args.output_dir))


if __name__ == "__main__":
    exit_cleanly(main)
