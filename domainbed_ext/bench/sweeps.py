"""A sweep of many short runs: its overhead over the runs' own work, and whether memory or open files grow.

The lower bound is the runs' own work: the time from a run's first step to its last record, by its own clock, divided by
the number of parallel runs. The overhead:

  start      of the launcher and its workers: importing torch and timm, once per worker
  set-up     of each run: reading the data set, building the model
  the rest   claims, files, the time between two runs, waiting for the last run
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil

from domainbed_ext.bench.report import device
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs.folder import State
from domainbed_ext.sweep import arguments as definitions
from domainbed_ext.sweep import jobs, states
from domainbed_ext.system.attempts import read_latest
from domainbed_ext.system.files import write_atomically
from domainbed_ext.system.machine import count_available_cores
from vitlorafa.bench.machine import file_name

TICK = 2.0  # seconds between two samples
_MIB = 2**20


@dataclass(frozen=True)
class Sample:
    """A sample of the processes of a sweep.

    Attributes:
        done: Number of runs that are done.
        largest_mib: Resident memory of the largest process.
        all_mib: Resident memory of all processes.
        files: Number of open files of all processes.
    """

    done: int
    largest_mib: float
    all_mib: float
    files: int


def measure(args: Namespace, output_dir: Path) -> None:
    """Runs the sweep in a folder that is removed afterwards, prints a table and writes it.

    Args:
        args: Arguments of `python -m domainbed_ext.bench`.
        output_dir: Folder for the table.

    Raises:
        BenchmarkError: If a run is not done at the end.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = _words(args, folder)
        sweep = jobs.make_jobs(definitions.parse(["launch", *words]))
        start = time.monotonic()
        samples = _watch(["launch", *words], Path(folder), len(sweep))
        seconds = time.monotonic() - start
        statuses = states.read_statuses(sweep, Path(folder))
        missing = [status for status in statuses if status.state is not State.DONE]
        if missing:
            counts = states.describe_states(statuses)
            raise BenchmarkError(f"{len(missing)} of {len(statuses)} runs are not done: {counts}")
        found = [read_latest(status.job.folder.path) for status in statuses]
        inside = sum(attempt.seconds for attempt in found if attempt)
        setting_up = sum(attempt.set_up for attempt in found if attempt)
        tries = sum(attempt.number for attempt in found if attempt)
    slots = args.jobs or count_available_cores()
    half = [sample for sample in samples if sample.done >= len(statuses) / 2]
    row = {
        "launcher": args.command_launcher,
        "runs": len(statuses),
        "attempts": tries,
        "at once": slots,
        "seconds": round(seconds, 1),
        "runs a minute": round(60 * len(statuses) / seconds, 1),
        "work a run (s)": round((inside - setting_up) / len(statuses), 2),
        "set-up a run (s)": round(setting_up / len(statuses), 2),
        "over the work (%)": round(100 * (slots * seconds / (inside - setting_up) - 1), 1),
        "outside the runs (%)": round(100 * (slots * seconds / inside - 1), 1),
        **_growth("largest process MiB", [sample.largest_mib for sample in half]),
        **_growth("all processes MiB", [sample.all_mib for sample in half]),
        **_growth("open files", [sample.files for sample in half]),
    }
    table = pd.DataFrame([row])
    print(table.T.to_string(header=False))
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / f"sweep_{args.command_launcher}_{file_name(device())}.csv"
    write_atomically(path, table.to_csv(index=False))
    print(f"written: {path}")


def _growth(what: str, values: Sequence[float]) -> dict[str, float]:
    """The highest in the third and in the last quarter of a sweep, when caches are warm."""
    middle = len(values) // 2
    return {
        f"{what}, third quarter": round(max(values[:middle], default=float("nan"))),
        f"{what}, last quarter": round(max(values[middle:], default=float("nan"))),
    }


def _words(args: Namespace, folder: str) -> list[str]:
    trials = max(1, round(args.runs / 20))  # five methods, four environments
    return [
        *("--sweep", "quickstart", "--n_trials", str(trials), "--steps", str(args.steps)),
        *("--output_dir", folder, "--command_launcher", args.command_launcher),
        *("--launcher_options", args.launcher_options, "--jobs", str(args.jobs), "--skip_model_save"),
    ]


def _watch(words: Sequence[str], folder: Path, runs: int) -> list[Sample]:
    """Runs a sweep's command, sampling its processes until both it and the scheduler that has its runs are done."""
    samples: list[Sample] = []
    with subprocess.Popen([sys.executable, "-m", "domainbed_ext.sweep", *words], stdout=subprocess.DEVNULL) as process:
        try:
            while process.poll() is None or (not process.returncode and samples[-1].done < runs):
                time.sleep(TICK)
                with contextlib.suppress(psutil.Error):
                    samples.append(_sample(folder))
        except KeyboardInterrupt:  # the sweep stops too, and still writes to a folder that is about to be removed
            process.wait()
            raise
    return samples


def _sample(folder: Path) -> Sample:
    """Samples all processes that name the sweep's folder, and their children."""
    named = [
        each
        for each in psutil.process_iter(["cmdline"])
        if each.pid != os.getpid() and any(str(folder) in word for word in each.info["cmdline"] or ())
    ]
    family = list({each for root in named for each in (root, *root.children(recursive=True))})
    sizes = sorted(each.memory_info().rss / _MIB for each in family)
    files = sum(each.num_fds() for each in family)
    return Sample(sum(1 for _ in folder.glob("*/done")), sizes[-1] if sizes else 0.0, sum(sizes), files)
