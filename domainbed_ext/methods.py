"""Lists methods and objectives, with hyperparameters and papers: `python -m domainbed_ext.methods`."""

import argparse
from collections.abc import Sequence

from domainbed_ext.algorithms import listing
from domainbed_ext.datasets.registry import DATASETS
from domainbed_ext.runs import imports
from domainbed_ext.system import strict_json
from domainbed_ext.system.command_line import START_AGAIN, CommandLine, as_command

EXAMPLES = """\
examples:
  python -m domainbed_ext.methods                        # all
  python -m domainbed_ext.methods LoRA-FA CORAL          # these
  python -m domainbed_ext.methods BOnly+CORAL --dataset PACS --json
  python -m domainbed_ext.methods --import mine.py       # yours too
"""


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine(
        prog="python -m domainbed_ext.methods",
        description="Lists methods and objectives: what each is, its hyperparameters with their defaults, its paper.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="methods and objectives, in any spelling (all)")
    parser.add_argument("--dataset", metavar="NAME", help="data set whose defaults are shown (one of large images)")
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    imports.add_option(parser)
    return parser


@as_command(START_AGAIN)
def main(argv: Sequence[str] | None = None) -> int:
    """The command: `python -m domainbed_ext.methods`."""
    args = make_parser().parse_args(argv)
    imports.load(args.imports)
    dataset = DATASETS.canonical(args.dataset) if args.dataset else ""
    entries = (
        [entry for name in args.names for entry in listing.find_entries(name)] if args.names else listing.list_entries()
    )
    if args.json:
        print(strict_json.dumps(listing.as_json(entries, dataset), indent=2, ensure_ascii=False))
    else:
        print(listing.format_full(entries, dataset))
    return 0


if __name__ == "__main__":
    main()
