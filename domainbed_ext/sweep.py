"""A sweep: which runs there are, how far each is, and launching what is missing.

python -m domainbed_ext.sweep launch                       # the quickstart
python -m domainbed_ext.sweep launch --sweep FILE.yaml     # a definition, arguments overriding it
python -m domainbed_ext.sweep launch --datasets PACS --algorithms BA BOnly --data_dir D --output_dir O
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from domainbed_ext import options, resources
from domainbed_ext.algorithms import ALGORITHMS
from domainbed_ext.collect_results import collect
from domainbed_ext.datasets import DATASETS
from domainbed_ext.errors import BenchmarkError, CommandLine, exit_cleanly, unknown
from domainbed_ext.jobs import Job, make_jobs
from domainbed_ext.launchers import LAUNCHERS, get_launcher
from domainbed_ext.provenance import provenance
from domainbed_ext.records import State, not_writable, write_atomically
from domainbed_ext.run_setup import set_up

QUICKSTART = "quickstart.yaml"


def check(jobs: Sequence[Job]) -> None:
    """Sets up one run of every kind, so that a mistake is told before anything runs.

    Args:
        jobs: of a sweep.

    Raises:
        BenchmarkError: what would stop a run, in one sentence.
    """
    kinds = {(job.train_args["dataset"], job.train_args["algorithm"]): job for job in reversed(jobs)}
    for job in reversed(kinds.values()):
        set_up(options.make_parser().parse_args(job.argv)).make_algorithm()


def launch(jobs: Sequence[Job], launcher: str, parallel: int, console: Console) -> list[tuple[Job, str]]:
    """Runs the jobs and marks those that died without a word as failed.

    Args:
        jobs: what is missing.
        launcher: a name in `LAUNCHERS`.
        parallel: how many at once; 0 leaves it to the launcher.
        console: for the progress bar, which a pipe does not get.

    Returns:
        The jobs that failed, each with the reason in one sentence.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("runs, {task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("gone,"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, speed_estimate_period=600) as bar:
        task = bar.add_task("sweep", total=len(jobs), rate="starting")
        shares = [0.0] * len(jobs)

        def progress(index: int, share: float) -> None:
            shares[index] = share
            elapsed = bar.tasks[task].elapsed or 0.0
            rate = 60 * sum(shares) / elapsed if elapsed else 0.0
            bar.update(task, completed=round(sum(shares), 2), rate=f"{rate:.1f} a minute")

        codes = get_launcher(launcher)([job.command for job in jobs], parallel, progress)
    failed = []
    for job, code in zip(jobs, codes, strict=True):
        if code:
            if job.folder.state is not State.FAILED:  # it died without a word
                how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                job.folder.fail(f"the run {how}", code)
            failed.append((job, job.folder.failure()))
    return failed


def make_parser() -> argparse.ArgumentParser:
    """The command line: DomainBed's arguments, `--sweep`, and the runs' options."""
    parser = CommandLine(
        prog="python -m domainbed_ext.sweep",
        description="Launches every run of a sweep that is not done yet, and prints the tables.",
        epilog="""examples:
  python -m domainbed_ext.sweep launch                       the quickstart
  python -m domainbed_ext.sweep launch --dry_run             what it would run
  python -m domainbed_ext.sweep launch --sweep pacs_vit_tiny --data_dir data --weights vit_tiny.safetensors
  python -m domainbed_ext.sweep launch --datasets PACS VLCS --algorithms BA BOnly@rank=16 LP --n_hparams 1 \\
    --single_test_envs --data_dir data --output_dir runs/mine
  python -m domainbed_ext.sweep launch --protocol single_source --datasets PACS VLCS --source_envs cartoon LabelMe \\
    --algorithms BA BOnly --n_hparams 1 --data_dir data --output_dir runs/single""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=["launch", "delete_incomplete"])
    parser.add_argument(
        "--sweep",
        metavar="FILE",
        help="YAML of the arguments below, which override it; a bare name is looked up among the packaged ones "
        f"({QUICKSTART}, unless --datasets or --algorithms is given)",
    )
    parser.add_argument("--datasets", nargs="+", metavar="NAME", help=", ".join(DATASETS))
    parser.add_argument("--algorithms", nargs="+", metavar="NAME", help=f"{', '.join(ALGORITHMS)}, or NAME@rank=16")
    parser.add_argument("--task", default="domain_generalization", metavar="NAME", help="%(default)s")
    parser.add_argument("--n_hparams_from", type=int, default=0, metavar="N", help="first hparams seed (%(default)s)")
    parser.add_argument(
        "--n_hparams",
        type=int,
        default=20,
        metavar="N",
        help="hparams seeds end before this; 1: the defaults alone (20)",
    )
    parser.add_argument("--output_dir", metavar="DIR", help="the sweep's folder")
    parser.add_argument("--data_dir", metavar="DIR", help="folder that holds the data sets")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="taken for DomainBed's sake, and unused as there"
    )
    parser.add_argument("--n_trials", type=int, default=3, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--command_launcher", default="local", metavar="NAME", help=f"{', '.join(LAUNCHERS)} (%(default)s)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="training steps (the data set's)")
    parser.add_argument("--hparams", metavar="JSON", help="hyperparameters, for every algorithm that has them")
    parser.add_argument("--holdout_fraction", type=float, default=0.2, metavar="SHARE", help="(%(default)s)")
    parser.add_argument("--single_test_envs", action="store_true", help="hold out one environment at a time, no pairs")
    parser.add_argument(
        "--pairs",
        dest="single_test_envs",
        action="store_false",
        default=False,
        help="every pair of environments too, which leave-one-domain-out cross-validation needs; so unless "
        "--single_test_envs is given, by the sweep's definition or here",
    )
    parser.add_argument("--skip_confirmation", action="store_true", help="never ask")
    parser.add_argument("--skip_model_save", action="store_true", help="do not save what was trained")
    parser.add_argument("--jobs", type=int, default=0, metavar="N", help="runs at once (one a core; one on a GPU)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that prepare a run's images")
    parser.add_argument("--verify_images", action="store_true", help="check every image file before the start")
    parser.add_argument("--dry_run", action="store_true", help="print the commands that would run, and touch nothing")
    options.add_number_options(parser)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line over the sweep's definition.

    Args:
        argv: of the command; None for the process's.

    Returns:
        Complete arguments.

    Raises:
        BenchmarkError: a definition that cannot be read, or an argument that is missing.
    """
    parser = make_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    given = parser.parse_args(words)
    name = given.sweep or (None if given.datasets or given.algorithms else QUICKSTART)
    # The definition's arguments first, so that those of the command line override them.
    if name:
        words.remove(given.command)
        known = {*vars(given), "pairs"} - {"command", "sweep"}
        args = parser.parse_args([given.command, *_definition(name, known), *words])
    else:
        args = given
    for needed in ("datasets", "algorithms", "output_dir"):
        if not getattr(args, needed):
            raise BenchmarkError(f"--{needed} is missing: give it, or a --sweep FILE.yaml that does")
    if args.n_hparams <= args.n_hparams_from or args.n_trials < 1:
        raise BenchmarkError(
            "this sweep has no run: --n_hparams should be above --n_hparams_from, --n_trials at least 1"
        )
    # A name given twice is one row, and must not be run twice in one folder.
    args.datasets, args.algorithms = list(dict.fromkeys(args.datasets)), list(dict.fromkeys(args.algorithms))
    return args


def _find_definition(name: str) -> Path:
    packaged = resources.sweeps() / name
    for path in (Path(name).expanduser(), packaged, packaged.with_suffix(".yaml")):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.name for path in resources.sweeps().glob("*.yaml")))
    raise BenchmarkError(f"no sweep definition {name}: give --sweep a YAML file, or one of {known}")


def _definition(name: str, known: set[str]) -> list[str]:
    """A sweep definition as words of a command line, so that both are checked alike."""
    path = _find_definition(name)
    try:
        definition = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise BenchmarkError(f"{path}{where} is not YAML ({getattr(error, 'problem', error)}): mend it") from error
    if not isinstance(definition, dict):
        raise BenchmarkError(f"{path} is not a list of `argument: value` lines: see {resources.sweeps() / QUICKSTART}")
    words = []
    for key, value in definition.items():
        if key not in known:
            raise unknown(f"argument in {path}:", str(key), known)
        if value is None or value is False:
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f"--{key}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return words


def _confirm(question: str, args: argparse.Namespace) -> bool:
    """Asks, where there is somebody to answer."""
    if args.skip_confirmation or not sys.stdin.isatty():
        return True
    return input(f"{question} (y/n) ").strip().lower().startswith("y")


def _check_writable(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise not_writable(path, error) from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command: `python -m domainbed_ext.sweep`."""
    start = time.monotonic()
    args = parse(argv)
    jobs = make_jobs(args)
    states = [job.folder.state for job in jobs]
    counts = Counter(states)
    summary = ", ".join(f"{counts[state]} {state.value}" for state in State if counts[state])
    print(f"{len(jobs)} runs in {args.output_dir}: {summary}")
    if args.command == "delete_incomplete":
        return _delete([job for job, state in zip(jobs, states, strict=True) if state is State.INCOMPLETE], args)

    get_launcher(args.command_launcher)
    missing = [job for job, state in zip(jobs, states, strict=True) if state is not State.DONE]
    check(missing)
    if args.dry_run:
        LAUNCHERS["dummy"]([job.command for job in missing], 0, lambda index, share: None)
        return 0
    _check_writable(Path(args.output_dir))
    if missing and not _confirm(f"Launch {len(missing)} runs?", args):
        print("Nothing launched.")
        return 0
    failed = launch(missing, args.command_launcher, args.jobs, Console(stderr=True)) if missing else []
    if any(job.folder.state is State.DONE for job in jobs):
        collect(args.output_dir)
    if missing:
        words = sys.argv[1:] if argv is None else argv
        _write_provenance(Path(args.output_dir) / "tables" / "provenance.json", words, time.monotonic() - start)
    for job, reason in failed:
        print(f"failed: {job}: {reason} (log: {job.folder.path / 'err.txt'})", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(jobs)} runs failed; the same command runs them again", file=sys.stderr)
    return 1 if failed else 0


def _write_provenance(path: Path, argv: Sequence[str], seconds: float) -> None:
    """Appends this launch to the list of those that the tables come from."""
    path.parent.mkdir(exist_ok=True)  # there are no tables where every run failed
    launches = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    launches.append({**provenance("domainbed_ext.sweep", argv), "seconds": round(seconds)})
    write_atomically(path, json.dumps(launches, indent=2) + "\n")


def _delete(jobs: Sequence[Job], args: argparse.Namespace) -> int:
    if args.dry_run or not jobs:
        for job in jobs:
            print(f"would delete {job.folder.path}")
        return 0
    if _confirm(f"Delete {len(jobs)} incomplete runs?", args):
        for job in jobs:
            shutil.rmtree(job.folder.path)
        print(f"Deleted {len(jobs)} runs.")
    return 0


if __name__ == "__main__":
    exit_cleanly(main)
