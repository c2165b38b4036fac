"""The command line: `python -m domainbed_ext.prepare NAME --data_dir D`."""

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from domainbed_ext.data import duplicates
from domainbed_ext.datasets.registry import DATASETS
from domainbed_ext.errors import BenchmarkError, unknown
from domainbed_ext.prepare.assemble import Destination, clean_up, expand_archives, lay_out, list_missing
from domainbed_ext.prepare.downloads import ALIASES, DOWNLOADS
from domainbed_ext.prepare.verify import MANIFEST, verify
from domainbed_ext.system import option_values
from domainbed_ext.system.command_line import CommandLine, as_command
from domainbed_ext.system.console import output
from domainbed_ext.system.locks import alone
from domainbed_ext.system.machine import count_available_cores
from domainbed_ext.system.sizes import format_size

_EXAMPLES = """examples:
  python -m domainbed_ext.prepare PACS --data_dir data                          # download, lay out, verify
  python -m domainbed_ext.prepare PACS --data_dir data --archive PACS.zip       # from your archives
  python -m domainbed_ext.prepare DomainNet --data_dir data --archive ~/domain_net_zips
  python -m domainbed_ext.prepare EmojiStyles --data_dir data                   # npm downloads it, resvg-py draws it
  python -m domainbed_ext.prepare EmojiStyles --data_dir data --archive tgz     # a folder of what `npm pack` made
  python -m domainbed_ext.prepare VLCS --data_dir data --verify --decode        # only verify it
  python -m domainbed_ext.prepare ImageFolderDomains --data_dir mine --verify   # a folder of domains of your own

Verification writes a manifest that can be used for training:
  python -m domainbed_ext.train --dataset Manifest --data_dir data/PACS/manifest.csv ...

If it is interrupted, run the same command again to resume. Images are hard links to the unpacked files, or copies.
Files given by --archive are not changed.
"""


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of the command line."""
    parser = CommandLine(
        prog="python -m domainbed_ext.prepare",
        description="Downloads a data set or unpacks your archives, arranges it in DomainBed's layout and verifies it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help=", ".join(_names()))
    parser.add_argument(
        "--data_dir",
        type=option_values.path,
        required=True,
        metavar="DIR",
        help="folder that holds the data sets",
    )
    parser.add_argument(
        "--archive",
        type=option_values.path,
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH",
        help="zip, tar, tar.gz or tgz files, or unpacked folders; a file named as a download is used instead of it, "
        "any other must hold the whole data set",
    )
    parser.add_argument("--verify", action="store_true", help="only verify the data set and write its manifest")
    parser.add_argument("--decode", action="store_true", help="decode every image too, and list those that fail")
    parser.add_argument(
        "--workers", type=option_values.whole(1), metavar="N", help="processes that read or draw images (one per core)"
    )
    duplicates.add_option(parser)
    parser.add_argument("--dry_run", action="store_true", help="print what would be done; change nothing")
    return parser


def _names() -> list[str]:
    return [*DOWNLOADS, *ALIASES, "ImageFolderDomains"]


@as_command()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command `python -m domainbed_ext.prepare`.

    Args:
        argv: Arguments of the command; None for the process's.

    Returns:
        Exit code 0.

    Raises:
        BenchmarkError: The command cannot continue, or the data set is not as it should be; the message says why, and
            what to do.
    """
    args = make_parser().parse_args(argv)
    name = _check(args)
    place = Destination(name, Path(args.data_dir))
    archives = expand_archives(name, args.archive) if name in DOWNLOADS else []
    workers = args.workers or count_available_cores()
    if args.dry_run:
        _print_plan(place, archives, args.verify)
        return 0
    if not args.verify:
        try:
            _make(place, archives, workers)
        except OSError as error:
            reason = error.strerror or str(error)
            raise BenchmarkError(
                f"cannot write to {place.data_dir} ({reason}): make room, or give another --data_dir"
            ) from error
    return _report(place, args.decode, workers, args.duplicates)


def _check(args: argparse.Namespace) -> str:
    name = ALIASES.get(args.name, args.name)
    if name not in DOWNLOADS and name != "ImageFolderDomains":
        if name == "Manifest" or name not in DATASETS:
            raise unknown("data set", name, _names())
        raise BenchmarkError(f"{name} needs no files: there is nothing to prepare")
    if name == "ImageFolderDomains" and not args.verify:
        raise BenchmarkError("ImageFolderDomains is your own folder, which can only be verified: add --verify")
    if args.verify and args.archive:
        raise BenchmarkError("--verify takes no archives: leave out --archive, or leave out --verify")
    return name


def _make(place: Destination, archives: Sequence[Path], workers: int) -> None:
    place.data_dir.mkdir(parents=True, exist_ok=True)
    with _alone(place):
        if place.is_ready():
            print(f"{place.target} is there already and is only verified; to make it again, move it away")
        elif place.target.exists() and (not place.target.is_dir() or any(place.target.iterdir())):
            raise BenchmarkError(
                f"{place.target} is there, but is not all of {place.name}: move it away, and give it by --archive if "
                f"it holds data"
            )
        else:
            lay_out(place, archives, workers)
        clean_up(place)


@contextlib.contextmanager
def _alone(place: Destination) -> Iterator[None]:
    """Refuses a second process that prepares the same data set."""

    def refuse() -> None:
        raise BenchmarkError(f"{place.name} is being prepared in {place.data_dir} already: wait for it")

    with alone(place.data_dir / f".prepare-{place.name}.lock", refuse):
        yield


def _report(place: Destination, decode: bool, workers: int, on_duplicates: str) -> int:
    verification = verify(place.name, place.data_dir, decode, workers)
    output().print(verification.make_table())
    for path, reason in verification.unreadable.items():
        print(f"does not decode: {path} ({reason})")
    duplicates.warn_or_refuse(place.name, verification.duplicates, on_duplicates)
    if verification.problems:
        raise BenchmarkError(f"{place.target} is not as it should be: {'; '.join(verification.problems)}")
    if place.name != "MNIST":
        print(f"manifest: {place.target / MANIFEST}")
    return 0


def _print_plan(place: Destination, archives: Sequence[Path], only_verify: bool) -> None:
    if only_verify or place.is_ready():
        print(f"would verify {place.target}")
        return
    for path in archives:
        print(f"would use {path}")
    for source in list_missing(place, archives):
        size = f", {format_size(source.size)}" if source.size else ""
        how = f"by npm pack {source.package}" if source.package else f"from {source.urls[0]}"
        print(f"would download {source.name} {how}{size}")
    print(f"would lay out {place.target} and verify it")
