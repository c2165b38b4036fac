"""Packs the finished runs of a sweep into small files that can be published, and unpacks them into runs' folders.

python -m domainbed_ext.archive pack --input_dir runs/pacs --output_dir runs_of_pacs
"""

import argparse
import io
import json
import lzma
import re
import tarfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domainbed_ext.errors import BenchmarkError, not_writable
from domainbed_ext.runs.folder import DERIVED, RunFolder, load_records
from domainbed_ext.runs.predictions import find_predictions, load_predictions, save_predictions
from domainbed_ext.system import option_values, strict_json
from domainbed_ext.system.command_line import START_AGAIN, CommandLine, as_command
from domainbed_ext.system.exit_codes import ExitCode
from domainbed_ext.system.files import replace_atomically, write_atomically
from domainbed_ext.system.progress import bar

EXAMPLES = """\
examples:
  python -m domainbed_ext.archive pack --input_dir runs/pacs --output_dir runs_of_pacs
  python -m domainbed_ext.archive unpack --input_dir runs_of_pacs --output_dir runs/pacs

An archive is a folder with a file for each trial. It has the records of the finished runs, without the paths of your
machine, and of each image the predicted class and its probability in percent; it has no weights and no logits. Unpacked
runs are finished runs: collect_results and compare read them beside your own, and sweep launch runs what is missing.
"""

_RECORDS, _PREDICTIONS = "results.jsonl", "predictions.safetensors"
_MEMBER = re.compile(rf"([0-9a-f]{{32}})/({re.escape(_RECORDS)}|{re.escape(_PREDICTIONS)})")
_FILES = "trial_*.tar.xz"
_PATHS = ("data_dir", "output_dir", "cache_dir", "weights")  # arguments of a run that are paths
_LARGEST = 1 << 32  # bytes of an unpacked file, which is read into memory

Members = dict[str, dict[str, bytes]]
"""Content of the files of each run, by the names of the run's folder and of the file."""


@dataclass(frozen=True)
class Packed:
    """What `pack` wrote.

    Attributes:
        paths: Files of the archive.
        n_runs: Number of runs in them.
        without_predictions: Number of these that keep no predictions.
        size: Size of all files in bytes.
    """

    paths: list[Path]
    n_runs: int
    without_predictions: int
    size: int


@dataclass(frozen=True)
class Unpacked:
    """What `unpack` wrote.

    Attributes:
        n_new: Number of runs that were written.
        n_kept: Number of runs of the archive whose folders were there and were left as they are.
    """

    n_new: int
    n_kept: int


def pack(input_dir: Path | str, output_dir: Path | str) -> Packed:
    """Packs the finished runs of a folder. The same runs give the same bytes on one machine.

    Runs that were derived from others, such as soups, are left out: they follow from weights, which are not packed.

    Args:
        input_dir: Folder that holds the runs' folders.
        output_dir: Folder of the archive. Its files are replaced.

    Raises:
        BenchmarkError: No finished runs; the archive has runs that would be lost; it cannot be written.
    """
    root, folder = Path(input_dir), Path(output_dir)
    trials: dict[int, set[str]] = defaultdict(set)
    for record in load_records(root):
        if not record["run"].startswith(f"{DERIVED}/"):
            trials[record["args"]["trial_seed"]].add(record["run"])
    paths, without = [], 0
    with bar("runs", sum(map(len, trials.values())), "runs") as progress:
        for trial, names in sorted(trials.items()):
            path = folder / _FILES.replace("*", str(trial))
            if path.exists() and (lost := sorted(_read(path).keys() - names)):
                raise BenchmarkError(
                    f"{path} has {len(lost)} runs that {root} has not ({lost[0]} first): unpack it into {root} first, "
                    "or give another --output_dir"
                )
            members: Members = {}
            for name in sorted(names):
                members[name] = _files_of(RunFolder(root / name))
                without += _PREDICTIONS not in members[name]
                progress.advance(1)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(path, _tar(members))
            except OSError as error:
                raise not_writable(path, error) from error
            paths.append(path)
    sizes = [path.stat().st_size for path in paths]
    return Packed(paths, sum(map(len, trials.values())), without, sum(sizes))


def unpack(input_dir: Path | str, output_dir: Path | str) -> Unpacked:
    """Writes the folders of an archive's runs. Runs whose folders are there already are left as they are.

    Args:
        input_dir: Folder of the archive.
        output_dir: Folder of a sweep.

    Raises:
        BenchmarkError: There is no archive, or it cannot be read; a folder cannot be written.
    """
    root, folder = Path(input_dir), Path(output_dir)
    paths = sorted(root.glob(_FILES))
    if not paths:
        raise BenchmarkError(f"no {_FILES} in {root}: give --input_dir the folder of an archive")
    n_new = n_kept = 0
    with bar("files", len(paths), "files") as progress:
        for path in paths:
            for name, files in _read(path).items():
                run = RunFolder(folder / name)
                if run.path.exists():
                    n_kept += 1
                    continue
                try:
                    _write(run, files, path)
                except OSError as error:
                    raise not_writable(run.path, error) from error
                n_new += 1
            progress.advance(1)
    return Unpacked(n_new, n_kept)


def _files_of(run: RunFolder) -> dict[str, bytes]:
    """The files of a run in an archive."""
    lines = [strict_json.dumps(_without_paths(json.loads(line)), sort_keys=True) for line in run.lines()]
    files = {_RECORDS: "".join(f"{line}\n" for line in lines).encode("ascii")}
    if find_predictions(run) is not None:
        from domainbed_ext.runs.archived_predictions import encode

        files[_PREDICTIONS] = encode(load_predictions(run))
    return files


def _without_paths(record: dict[str, Any]) -> dict[str, Any]:
    """A record in which paths have only their last part, which names the file or the folder."""

    def shorten(values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: Path(value).name if name in _PATHS and isinstance(value, str) else value
            for name, value in values.items()
        }

    return {
        name: shorten(value) if name in ("args", "hparams") and isinstance(value, dict) else value
        for name, value in record.items()
    }


def _tar(members: Members) -> bytes:
    """The content of a file of the archive; nothing in it tells the time or the user."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for file in (_RECORDS, _PREDICTIONS):  # like beside like, which compresses better
            for name, files in members.items():
                if file in files:
                    info = tarfile.TarInfo(f"{name}/{file}")
                    info.size = len(files[file])
                    tar.addfile(info, io.BytesIO(files[file]))
    return lzma.compress(buffer.getvalue(), preset=9)


def _read(path: Path) -> Members:
    """The runs in a file of an archive. Nothing is extracted but files that a run has."""
    members: Members = defaultdict(dict)
    try:
        with lzma.open(path) as file:
            content = file.read(_LARGEST + 1)  # to the end, so that a file that was cut short is an error
        if len(content) > _LARGEST:
            raise ValueError(f"more than {_LARGEST >> 20} MiB when unpacked")
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for info in tar:
                match = _MEMBER.fullmatch(info.name)
                if match is None or not info.isreg():
                    raise ValueError(f"{info.name!r} is no file of a run")
                member = tar.extractfile(info)
                assert member is not None  # as for all regular files
                members[match[1]][match[2]] = member.read()
        if missing := [name for name, files in members.items() if _RECORDS not in files]:
            raise ValueError(f"{missing[0]} has no records")
    except (OSError, EOFError, ValueError, tarfile.TarError, lzma.LZMAError) as error:
        raise _damaged(path, error) from error
    return members


def _write(run: RunFolder, files: Mapping[str, bytes], path: Path) -> None:
    """Writes the folder of a run, whole or not at all."""
    from safetensors import SafetensorError

    from domainbed_ext.runs.archived_predictions import decode

    try:
        predictions = decode(files[_PREDICTIONS]) if _PREDICTIONS in files else None
    except (SafetensorError, ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
        raise _damaged(path, error) from error

    def fill(partial: Path) -> None:
        partial.mkdir()
        write_atomically(partial / _RECORDS, files[_RECORDS])
        if predictions is not None:
            save_predictions(partial, predictions)
        RunFolder(partial).finish()

    run.path.parent.mkdir(parents=True, exist_ok=True)
    replace_atomically(run.path, fill)


def _damaged(path: Path, error: Exception) -> BenchmarkError:
    return BenchmarkError(f"{path} cannot be read ({error}): get it again")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine(
        prog="python -m domainbed_ext.archive",
        description="Packs the finished runs of a sweep into small files to publish, and unpacks them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="pack|unpack")
    for action, summary, source, target in (
        ("pack", "pack the finished runs of a sweep", "folder that holds the runs' folders", "folder of the archive"),
        ("unpack", "write the runs of an archive", "folder of the archive", "folder of a sweep, which gets the runs"),
    ):
        options = actions.add_parser(action, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        options.add_argument("--input_dir", type=option_values.path, required=True, metavar="DIR", help=source)
        options.add_argument("--output_dir", type=option_values.path, required=True, metavar="DIR", help=target)
    return parser


@as_command(START_AGAIN)
def main(argv: Sequence[str] | None = None) -> int:
    """The command: `python -m domainbed_ext.archive`."""
    args = make_parser().parse_args(argv)
    if args.action == "pack":
        packed = pack(args.input_dir, args.output_dir)
        size = f"{packed.size / 2**10:,.0f} KiB"
        print(f"packed {packed.n_runs} runs in {len(packed.paths)} files of {args.output_dir}, {size}")
        if packed.without_predictions:
            print(f"{packed.without_predictions} of them keep no predictions: their records alone are packed")
    else:
        unpacked = unpack(args.input_dir, args.output_dir)
        kept = f"; {unpacked.n_kept} were there and are left as they are" if unpacked.n_kept else ""
        print(f"unpacked {unpacked.n_new} runs into {args.output_dir}{kept}")
    return ExitCode.DONE


if __name__ == "__main__":
    main()
