"""Packs the finished runs of a sweep into small files that can be published, and unpacks them into runs' folders.

python -m domainbed_ext.pack --input_dir runs/pacs --output_dir packed/pacs
"""

import argparse
import contextlib
import io
import json
import lzma
import re
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from domainbed_ext.errors import BenchmarkError, not_writable
from domainbed_ext.runs import strengths
from domainbed_ext.runs.folder import DERIVED, DIVERGED, RECORDS, RunFolder, State, load_records
from domainbed_ext.runs.predictions import FILES, load_predictions, save_predictions
from domainbed_ext.system import option_values, strict_json
from domainbed_ext.system.command_line import START_AGAIN, CommandLine, as_command
from domainbed_ext.system.exit_codes import ExitCode
from domainbed_ext.system.files import write_atomically
from domainbed_ext.system.progress import bar

EXAMPLES = """\
examples:
  python -m domainbed_ext.pack --input_dir runs/pacs --output_dir packed/pacs
  python -m domainbed_ext.pack --unpack --input_dir packed/pacs --output_dir runs/pacs

Packed runs have their records, without the paths of your machine, and of each image the predicted class and its
probability in percent. They have no weights and no logits. There is a file for each data set and trial. Unpacked runs
are finished runs: collect_results and compare read them beside your own, and sweep launch runs what is missing.
"""

_PREDICTIONS = {selection: names[0] for selection, names in FILES.items()}
_COPIED = (RECORDS, strengths.FILE, DIVERGED)  # as they are, but for paths
_FILES = (*_COPIED, *_PREDICTIONS.values())
_PACKED = "*_trial_*.tar.xz"
_NAME = r"(?!derived(?:/|$))[^./\\:\x00-\x1f][^/\\:\x00-\x1f]{0,199}"  # of a run's folder, on any system
_MEMBER = re.compile(rf"({_NAME})/({'|'.join(map(re.escape, _FILES))})", re.DOTALL)
_LARGEST = 1 << 32  # bytes of a file before it is compressed: it is read into memory

Members = dict[str, dict[str, bytes]]
"""Content of the files of runs, by the names of the run's folder and of the file."""


@dataclass(frozen=True)
class Packed:
    """What `pack` wrote.

    Attributes:
        paths: Files.
        n_runs: Number of runs in them.
        n_without_predictions: Number of these that keep no predictions.
        n_derived: Number of runs that were derived from others, and are left out.
        size: Size of all files in bytes.
    """

    paths: list[Path]
    n_runs: int
    n_without_predictions: int
    n_derived: int
    size: int


@dataclass(frozen=True)
class Unpacked:
    """What `unpack` wrote.

    Attributes:
        n_new: Number of runs that were written.
        n_present: Number of runs that were finished there already.
        unfinished: Names of runs that have an unfinished folder there, which is left as it is.
    """

    n_new: int
    n_present: int
    unfinished: list[str]


def pack(input_dir: Path | str, output_dir: Path | str) -> Packed:
    """Packs the finished runs of a folder. The same runs give the same bytes on one machine.

    Runs that were derived from others, such as soups, are left out: they follow from weights, which are not packed.

    Args:
        input_dir: Folder that holds the runs' folders.
        output_dir: Folder of the files. Files of the same data set and trial are replaced.

    Raises:
        BenchmarkError: No finished runs; a file has runs or predictions that would be lost; a file would be too large;
            a run's folder has a name that other systems do not allow; a file cannot be written.
    """
    root, folder = Path(input_dir), Path(output_dir)
    runs: dict[Path, set[str]] = defaultdict(set)
    derived = set()
    for record in load_records(root):
        name, args = record["run"], record["args"]
        if name.startswith(f"{DERIVED}/"):
            derived.add(name)
            continue
        if not re.fullmatch(_NAME, name, re.DOTALL):
            raise BenchmarkError(f"{root / name} has a name that not all systems allow: rename the folder")
        if not re.fullmatch(_NAME, str(args["dataset"]), re.DOTALL):
            raise BenchmarkError(
                f"the records of {root / name} name a data set {args['dataset']!r}: it cannot name a file"
            )
        runs[folder / f"{args['dataset']}_trial_{args['trial_seed']}.tar.xz"].add(name)
    for path, names in runs.items():  # all of them before any is replaced
        _check_nothing_is_lost(path, root, names)
    counts: Counter[str] = Counter()
    with bar("runs", sum(map(len, runs.values())), "runs") as progress:
        for path, names in sorted(runs.items()):
            members: Members = {}
            for name in sorted(names):
                members[name] = _read_run(RunFolder(root / name))
                counts["without"] += not members[name].keys() & set(_PREDICTIONS.values())
                progress.advance(1)
            content = _compress(members, path)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(path, content)
            except OSError as error:
                raise not_writable(path, error) from error
            counts["size"] += len(content)
    return Packed(sorted(runs), sum(map(len, runs.values())), counts["without"], len(derived), counts["size"])


def unpack(input_dir: Path | str, output_dir: Path | str) -> Unpacked:
    """Writes the folders of packed runs. Folders of the same names are left as they are.

    Args:
        input_dir: Folder that `pack` wrote to.
        output_dir: Folder of a sweep.

    Raises:
        BenchmarkError: There are no packed runs, or a file cannot be read; a folder cannot be written.
    """
    root, folder = Path(input_dir), Path(output_dir)
    paths = sorted(root.glob(_PACKED))
    if not paths:
        raise BenchmarkError(f"no {_PACKED} in {root}: give --input_dir a folder of packed runs")
    n_new, present = 0, []
    with bar("files", len(paths), "files") as progress:
        for path in paths:
            for name, files in _decompress(path).items():
                if _write_run(folder / name, files, path):
                    n_new += 1
                else:
                    present.append(name)
            progress.advance(1)
    unfinished = [name for name in present if RunFolder(folder / name).state is not State.DONE]
    return Unpacked(n_new, len(present) - len(unfinished), unfinished)


def _check_nothing_is_lost(path: Path, root: Path, names: set[str]) -> None:
    """Refuses to replace a file that has what the runs' folders have not."""
    if not path.exists():
        return
    needed = {f"{name}/{file}" for name, files in _decompress(path).items() for file in files}
    found = {f"{name}/{file}" for name in names for file in _find_files(RunFolder(root / name))}
    if missing := sorted(needed - found):
        raise BenchmarkError(
            f"{path} would lose {missing[0]}, which {root} has not (or not of a finished run): unpack it into {root} "
            "first, or give another --output_dir"
        )


def _find_files(run: RunFolder) -> set[str]:
    """The names of a run's files that are packed."""
    return {name for name in _FILES if (run.path / name).exists()}


def _read_run(run: RunFolder) -> dict[str, bytes]:
    """The packed files of a run."""
    from domainbed_ext.runs.packed_predictions import encode

    files, present = {}, _find_files(run)
    for name in present & set(_COPIED):
        lines = (run.path / name).read_text(encoding="utf-8").splitlines()
        without_paths = [strict_json.dumps(_shorten_paths(json.loads(line)), sort_keys=True) for line in lines]
        files[name] = "".join(f"{line}\n" for line in without_paths).encode("ascii")
    for selection, name in _PREDICTIONS.items():
        if name in present:
            files[name] = encode(load_predictions(run, selection))
    return files


def _shorten_paths(value: Any) -> Any:
    """A value of a record in which absolute paths have only their last part."""
    if isinstance(value, dict):
        return {_shorten_paths(name): _shorten_paths(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_shorten_paths(each) for each in value]
    if not isinstance(value, str):
        return value
    with contextlib.suppress(ValueError):  # hyperparameters are JSON within JSON
        if isinstance(inner := json.loads(value), dict):
            return strict_json.dumps(_shorten_paths(inner))
    prefix, path = ("local-dir:", value[10:]) if value.startswith("local-dir:") else ("", value)
    is_absolute = PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()
    return prefix + PureWindowsPath(path).name if is_absolute else value  # Windows' knows both kinds of slashes


def _compress(members: Mapping[str, Mapping[str, bytes]], path: Path) -> bytes:
    """The content of a file; nothing in it tells the time or the user."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for file in _FILES:  # like beside like, which compresses better
            for name, files in members.items():
                if file in files:
                    info = tarfile.TarInfo(f"{name}/{file}")
                    info.size = len(files[file])
                    tar.addfile(info, io.BytesIO(files[file]))
    if buffer.tell() > _LARGEST:
        raise BenchmarkError(
            f"{path} would have more than {_LARGEST >> 30} GiB before compression: pack fewer runs, in folders of "
            "their own"
        )
    return lzma.compress(buffer.getbuffer(), preset=9)


def _decompress(path: Path) -> Members:
    """The runs in a file. Nothing is extracted but files that `pack` writes."""
    members: Members = defaultdict(dict)
    try:
        with lzma.open(path) as file:
            content = file.read(_LARGEST + 1)  # to the end, so that a file that was cut short is an error
        if len(content) > _LARGEST:
            raise ValueError(f"more than {_LARGEST >> 30} GiB when unpacked")
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for info in tar:
                match = _MEMBER.fullmatch(info.name)
                is_plain = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not info.issparse()
                if match is None or not is_plain:
                    raise ValueError(f"{info.name!r} is not a file of a run")
                member = tar.extractfile(info)
                assert member is not None  # as for all plain files
                members[match[1]][match[2]] = member.read()
        for name, files in members.items():
            if not files.get(RECORDS):
                raise ValueError(f"{name} has no records")
    except (OSError, EOFError, ValueError, tarfile.TarError, lzma.LZMAError) as error:
        raise _damaged(path, error) from error
    return members


def _write_run(target: Path, files: Mapping[str, bytes], path: Path) -> bool:
    """Writes the folder of a run, whole or not at all. Returns whether there was none."""
    from safetensors import SafetensorError

    from domainbed_ext.runs.packed_predictions import decode

    try:
        if target.exists():
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        # Two folders deep, where no command looks for runs.
        with tempfile.TemporaryDirectory(prefix=".unpacking.", dir=target.parent) as partial:
            run = RunFolder(Path(partial, target.name))
            run.path.mkdir()
            for name in _COPIED:
                if name in files:
                    write_atomically(run.path / name, files[name])
            run.records()
            for name in _PREDICTIONS.values():
                if name in files:
                    save_predictions(run, decode(files[name]))
            run.finish()
            run.path.rename(target)
    except (BenchmarkError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if target.exists():  # by now: a launch has started it
            return False
        raise not_writable(target, error) from error
    return True


def _damaged(path: Path, error: Exception) -> BenchmarkError:
    return BenchmarkError(f"{path} cannot be read ({error}): download it, or pack its runs, again")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine(
        prog="python -m domainbed_ext.pack",
        description="Packs the finished runs of a sweep into small files to publish, and unpacks them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--input_dir", type=option_values.path, required=True, metavar="DIR", help="folder that holds the runs' folders"
    )
    add("--output_dir", type=option_values.path, required=True, metavar="DIR", help="folder of the packed runs")
    add(
        "--unpack", action="store_true", help="unpack: INPUT_DIR has packed runs, and OUTPUT_DIR gets the runs' folders"
    )
    return parser


@as_command(START_AGAIN)
def main(argv: Sequence[str] | None = None) -> int:
    """The command: `python -m domainbed_ext.pack`."""
    args = make_parser().parse_args(argv)
    if args.unpack:
        unpacked = unpack(args.input_dir, args.output_dir)
        present = f"; {unpacked.n_present} were there already" if unpacked.n_present else ""
        print(f"unpacked {unpacked.n_new} runs into {args.output_dir}{present}")
        if unpacked.unfinished:
            raise BenchmarkError(
                f"{len(unpacked.unfinished)} runs are unfinished in {args.output_dir} and were left as they are "
                f"({unpacked.unfinished[0]} first): delete their folders, and unpack again"
            )
        return ExitCode.DONE
    packed = pack(args.input_dir, args.output_dir)
    size = f"{packed.size / 2**10:,.0f} KiB"
    print(f"packed {packed.n_runs} runs into {len(packed.paths)} files in {args.output_dir}, {size}")
    if packed.n_without_predictions:
        print(f"{packed.n_without_predictions} of them keep no predictions: only their records are packed")
    if packed.n_derived:
        print(f"left out: {packed.n_derived} runs that were derived from others")
    return ExitCode.DONE


if __name__ == "__main__":
    main()
