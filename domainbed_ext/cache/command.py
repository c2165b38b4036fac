"""The command line: `python -m domainbed_ext.cache list|build|remove`."""

import argparse
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from domainbed_ext.cache.entries import DEFAULT_GB, VARIABLE, Entries, default_folder
from domainbed_ext.cache.fingerprint import forget
from domainbed_ext.cache.images import cached_all
from domainbed_ext.cache.variants import Decoded, Resized, Shorter, cropped_from
from domainbed_ext.errors import BenchmarkError, unknown
from domainbed_ext.system import option_values
from domainbed_ext.system.command_line import CommandLine, as_command
from domainbed_ext.system.console import output
from domainbed_ext.system.machine import available_cores
from domainbed_ext.system.sizes import GB, format_size

_EXAMPLES = """examples:
  python -m domainbed_ext.cache build --dataset PACS --data_dir data   # before a sweep; its runs then decode nothing
  python -m domainbed_ext.cache build --dataset DomainNet --data_dir data --training_images resized
  python -m domainbed_ext.cache list
  python -m domainbed_ext.cache remove PACS                            # or PACS/sketch, or an entry as list names it
  python -m domainbed_ext.cache remove --all

Entries are told apart by the images' content: copies of a data set share them, and a changed image makes a new one.
"""


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    place = CommandLine(add_help=False)
    place.add_argument(
        "--cache_dir",
        type=option_values.tensors_path,
        metavar="DIR",
        help=f"where entries lie (${VARIABLE}, else domainbed_ext among your caches)",
    )
    place.add_argument(
        "--cache_gb",
        type=option_values.number(above=0),
        default=DEFAULT_GB,
        metavar="GB",
        help="it may take (%(default)g)",
    )
    parser = CommandLine(
        prog="python -m domainbed_ext.cache",
        description="Images that are decoded once, for all runs after.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|build|remove")
    commands.add_parser("list", parents=[place], help="what there is")
    build = commands.add_parser("build", parents=[place], help="decode a data set's images now")
    build.add_argument("--dataset", required=True, metavar="NAME", help="a data set of image files")
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
        help="that runs feed (%(default)s)",
    )
    build.add_argument(
        "--training_images",
        choices=("exact", "resized"),
        default="exact",
        help="kept at their own size, or their shorter side at 8/7 of the image size (%(default)s)",
    )
    build.add_argument("--workers", type=option_values.whole(1), metavar="N", help="processes that decode (one a core)")
    remove = commands.add_parser("remove", parents=[place], help="make room")
    remove.add_argument(
        "names", nargs="*", metavar="NAME", help="entries, or the environments or data sets of which all go"
    )
    remove.add_argument("--all", action="store_true", help="everything")
    return parser


@as_command()
def main(argv: Sequence[str] | None = None) -> int:
    """The command: `python -m domainbed_ext.cache`.

    Args:
        argv: its arguments; the process's if None.

    Returns:
        Exit code 0.

    Raises:
        BenchmarkError: what went wrong, in one sentence with what to do.
    """
    args = make_parser().parse_args(argv)
    folder = Path(args.cache_dir) if args.cache_dir else default_folder()
    entries = Entries(folder, int(args.cache_gb * GB))
    {"list": _list, "build": _build, "remove": _remove}[args.command](entries, args)
    return 0


def _list(entries: Entries, args: argparse.Namespace) -> None:
    found = entries.list()
    total = f"{format_size(sum(entry.bytes for entry in found))} of {format_size(entries.limit)}"
    table = Table(title=escape(str(entries.folder)), caption=f"{len(found)} entries, {total}")
    for column in ("Entry", "What"):
        table.add_column(column, overflow="fold")
    table.add_column("Size", justify="right", no_wrap=True)
    table.add_column("Last used", no_wrap=True)
    for entry in found:
        used = datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
        table.add_row(entry.key, escape(entry.what), format_size(entry.bytes), used)
    output().print(table)


def _build(entries: Entries, args: argparse.Namespace) -> None:
    # Imported here: they bring torch with them, which takes seconds.
    from domainbed_ext.datasets.folders import FileEnvironment
    from domainbed_ext.datasets.registry import get_dataset_class

    dataset = get_dataset_class(args.dataset)(args.data_dir, [], {})
    environments = [environment for environment in dataset.datasets if isinstance(environment, FileEnvironment)]
    if not environments:
        raise BenchmarkError(f"{args.dataset} has no image files to decode: train on it as it is")
    size = args.image_size
    training = Decoded() if args.training_images == "exact" else Shorter(cropped_from(size))
    for variant in (Resized(size, size), training):
        cached_all(args.dataset, environments, variant, entries, args.workers or available_cores())


def _remove(entries: Entries, args: argparse.Namespace) -> None:
    if args.all == bool(args.names):
        raise BenchmarkError("remove takes names of entries (see python -m domainbed_ext.cache list), or --all")
    keys = [entry.key for entry in entries.list()]
    chosen = keys if args.all else [key for name in args.names for key in _named(name.rstrip("/"), keys)]
    try:
        for key in chosen:
            entries.remove(key)
        if args.all:
            forget(entries.folder)
    except OSError as error:
        raise BenchmarkError(
            f"cannot remove from {entries.folder} ({error.strerror or error}): do it as the user whose it is"
        ) from error


def _named(name: str, keys: Sequence[str]) -> list[str]:
    if not keys:
        raise BenchmarkError(f"no entry {name!r}: the cache is empty")
    # By its whole key, its environment (what stands before digest and variant) or its data set.
    names = {key: {key, key.rsplit("-", 2)[0], key.partition("/")[0]} for key in keys}
    if found := [key for key in keys if name in names[key]]:
        return found
    raise unknown("entry", name, set().union(*names.values()))
