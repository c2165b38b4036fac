"""A sweep of many short runs: what it costs over its runs' own work, and whether memory or open files grow.

The floor is the runs' own work and nothing else: the time from a run's first step to its last record, by its own
clock, divided by the number of runs at once. What comes on top:

  starting   of the launcher and its workers: importing torch and timm, once a worker
  setting up of a run: reading the data set, building the model (within the run)
  the rest   claiming, writing, handing over from one run to the next, waiting for the last
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
from domainbed_ext.system.machine import available_cores
from vitlorafa.bench.machine import file_name

TICK = 2.0  # seconds from one look at the processes to the next
_MIB = 2**20


@dataclass(frozen=True)
class Look:
    """At the processes of a sweep.

    Attributes:
        done: runs that are.
        largest_mib: resident memory of the largest.
        all_mib: of all.
        files: open in all of them.
    """

    done: int
    largest_mib: float
    all_mib: float
    files: int


def measure(args: Namespace, output_dir: Path) -> None:
    """Runs the sweep in a folder that is removed afterwards, prints a table and writes it.

    Args:
        args: of `python -m domainbed_ext.bench`.
        output_dir: of the table.

    Raises:
        BenchmarkError: a run is not done at the end.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = _words(args, folder)
        sweep = jobs.make_jobs(definitions.parse(["launch", *words]))
        start = time.monotonic()
        looks = _watch(["launch", *words], Path(folder), len(sweep))
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
    slots = args.jobs or available_cores()
    half = [look for look in looks if look.done >= len(statuses) / 2]
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
        **_growth("largest process MiB", [look.largest_mib for look in half]),
        **_growth("all processes MiB", [look.all_mib for look in half]),
        **_growth("open files", [look.files for look in half]),
    }
    table = pd.DataFrame([row])
    print(table.T.to_string(header=False))
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / f"sweep_{args.command_launcher}_{file_name(device())}.csv"
    write_atomically(path, table.to_csv(index=False))
    print(f"written: {path}")


def _growth(what: str, values: Sequence[float]) -> dict[str, float]:
    """The highest in the third and in the last quarter of a sweep, when everything is warm."""
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


def _watch(words: Sequence[str], folder: Path, runs: int) -> list[Look]:
    """Runs a sweep's command, looking at its processes until it has ended, and an engine that it hands runs to too."""
    looks: list[Look] = []
    with subprocess.Popen([sys.executable, "-m", "domainbed_ext.sweep", *words], stdout=subprocess.DEVNULL) as process:
        try:
            while process.poll() is None or (not process.returncode and looks[-1].done < runs):
                time.sleep(TICK)
                with contextlib.suppress(psutil.Error):
                    looks.append(_look(folder))
        except KeyboardInterrupt:  # the sweep has heard it too, and writes to a folder that is about to go
            process.wait()
            raise
    return looks


def _look(folder: Path) -> Look:
    """At all processes that name the sweep's folder, and those that they started."""
    named = [
        each
        for each in psutil.process_iter(["cmdline"])
        if each.pid != os.getpid() and any(str(folder) in word for word in each.info["cmdline"] or ())
    ]
    family = list({each for root in named for each in (root, *root.children(recursive=True))})
    sizes = sorted(each.memory_info().rss / _MIB for each in family)
    files = sum(each.num_fds() for each in family)
    return Look(sum(1 for _ in folder.glob("*/done")), sizes[-1] if sizes else 0.0, sum(sizes), files)
