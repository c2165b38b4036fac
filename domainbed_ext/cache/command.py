"""The command line: `python -m domainbed_ext.cache list|build|remove`."""

import argparse
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from domainbed_ext.cache.entries import DEFAULT_GB, VARIABLE, Entries, find_default_folder
from domainbed_ext.cache.fingerprint import remove_memos
from domainbed_ext.cache.images import open_cached
from domainbed_ext.cache.variants import Decoded, Resized, Shorter, find_side_for_crops
from domainbed_ext.errors import BenchmarkError, unknown
from domainbed_ext.system import option_values
from domainbed_ext.system.command_line import CommandLine, as_command
from domainbed_ext.system.console import output
from domainbed_ext.system.machine import count_available_cores
from domainbed_ext.system.sizes import GB, format_size

_EXAMPLES = """examples:
  python -m domainbed_ext.cache build --dataset PACS --data_dir data   # before a sweep: its runs then decode nothing
  python -m domainbed_ext.cache build --dataset DomainNet --data_dir data --training_images resized
  python -m domainbed_ext.cache list
  python -m domainbed_ext.cache remove PACS                            # or PACS/sketch, or an entry shown by list
  python -m domainbed_ext.cache remove --all

Entries are identified by the content of the images: copies of a data set share one, a changed image creates a new one.
"""


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of the command line."""
    place = CommandLine(add_help=False)
    place.add_argument(
        "--cache_dir",
        type=option_values.tensors_path,
        metavar="DIR",
        help=f"folder of the cache (${VARIABLE}, else domainbed_ext in the user's cache folder)",
    )
    place.add_argument(
        "--cache_gb",
        type=option_values.number(above=0),
        default=DEFAULT_GB,
        metavar="GB",
        help="largest size of the cache in GB (%(default)g)",
    )
    parser = CommandLine(
        prog="python -m domainbed_ext.cache",
        description="Manages the image cache: images are decoded once, and all later runs use them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|build|remove")
    commands.add_parser("list", parents=[place], help="list the entries")
    build = commands.add_parser("build", parents=[place], help="decode a data set's images now")
    build.add_argument("--dataset", required=True, metavar="NAME", help="name of a data set of image files")
    build.add_argument(
        "--data_dir",
        type=option_values.path,
        required=True,
        metavar="DIR",
        help="folder that holds the data sets",
    )
    build.add_argument(
        "--image_size",
        type=option_values.whole(1),
        default=224,
        metavar="PIXELS",
        help="input size of the backbone (%(default)s)",
    )
    build.add_argument(
        "--training_images",
        choices=("exact", "resized"),
        default="exact",
        help="exact: cached at their own size; resized: shorter side 8/7 of the image size (%(default)s)",
    )
    build.add_argument(
        "--workers", type=option_values.whole(1), metavar="N", help="processes that decode (one per core)"
    )
    remove = commands.add_parser("remove", parents=[place], help="remove entries")
    remove.add_argument(
        "names", nargs="*", metavar="NAME", help="entries, or environments or data sets whose entries are all removed"
    )
    remove.add_argument("--all", action="store_true", help="remove all entries")
    return parser


@as_command()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command `python -m domainbed_ext.cache`.

    Args:
        argv: Arguments of the command; None for the process's.

    Returns:
        Exit code 0.

    Raises:
        BenchmarkError: The command cannot continue; the message says why, and what to do.
    """
    args = make_parser().parse_args(argv)
    folder = Path(args.cache_dir) if args.cache_dir else find_default_folder()
    entries = Entries(folder, int(args.cache_gb * GB))
    {"list": _list, "build": _build, "remove": _remove}[args.command](entries, args)
    return 0


def _list(entries: Entries, args: argparse.Namespace) -> None:
    listed = entries.list()
    total = f"{format_size(sum(entry.bytes for entry in listed))} of {format_size(entries.limit)}"
    table = Table(title=escape(str(entries.folder)), caption=f"{len(listed)} entries, {total}")
    for column in ("Entry", "Content"):
        table.add_column(column, overflow="fold")
    table.add_column("Size", justify="right", no_wrap=True)
    table.add_column("Last used", no_wrap=True)
    for entry in listed:
        used = datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
        table.add_row(entry.key, escape(entry.what), format_size(entry.bytes), used)
    output().print(table)


def _build(entries: Entries, args: argparse.Namespace) -> None:
    # Imported here because they import torch, which takes seconds.
    from domainbed_ext.datasets.folders import FileEnvironment
    from domainbed_ext.datasets.registry import get_dataset_class

    dataset = get_dataset_class(args.dataset)(args.data_dir, [], {})
    environments = [environment for environment in dataset.datasets if isinstance(environment, FileEnvironment)]
    if not environments:
        raise BenchmarkError(f"{args.dataset} has no image files to decode: it needs no cache")
    size = args.image_size
    training = Decoded() if args.training_images == "exact" else Shorter(find_side_for_crops(size))
    for variant in (Resized(size, size), training):
        open_cached(args.dataset, environments, variant, entries, args.workers or count_available_cores())


def _remove(entries: Entries, args: argparse.Namespace) -> None:
    if args.all == bool(args.names):
        raise BenchmarkError("give remove the names of entries (see python -m domainbed_ext.cache list), or --all")
    keys = [entry.key for entry in entries.list()]
    chosen = keys if args.all else [key for name in args.names for key in _find_named(name.rstrip("/"), keys)]
    try:
        for key in chosen:
            entries.remove(key)
        if args.all:
            remove_memos(entries.folder)
    except OSError as error:
        raise BenchmarkError(
            f"cannot remove from {entries.folder} ({error.strerror or error}): run this as the user who owns it"
        ) from error


def _find_named(name: str, keys: Sequence[str]) -> list[str]:
    if not keys:
        raise BenchmarkError(f"no entry {name!r}: the cache is empty")
    # A name may be a whole key, an environment (the part before digest and variant) or a data set.
    names = {key: {key, key.rsplit("-", 2)[0], key.partition("/")[0]} for key in keys}
    if matching := [key for key in keys if name in names[key]]:
        return matching
    raise unknown("entry", name, set().union(*names.values()))
