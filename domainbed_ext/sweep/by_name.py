"""Names that people read for a sweep's runs: `by_name/` holds links to their folders, which are named by hashes.

Where links cannot be made, `by_name.csv` lists the same. Nothing else reads either: both may be deleted, and the next
launch makes them again.
"""

import csv
import io
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from domainbed_ext.errors import warn_once
from domainbed_ext.runs.run_name import name_run
from domainbed_ext.sweep.jobs import Job
from domainbed_ext.system.files import write_atomically

FOLDER = "by_name"
INDEX = "by_name.csv"
_LONGEST = 180  # bytes of a name, of the 255 that file systems take


def link_by_name(jobs: Sequence[Job], sweep_dir: Path) -> None:
    """Makes the links that are missing; several launches may do so at once.

    Args:
        jobs: All jobs of the sweep.
        sweep_dir: Folder of the sweep, which can be written to.
    """
    folder, own = sweep_dir / FOLDER, {job.name for job in jobs}
    try:
        folder.mkdir(exist_ok=True)
        for job in jobs:
            _link(folder, readable_name(job), job.name, own)
    except OSError:  # a file system without links
        try:
            _write_index(sweep_dir / INDEX, jobs)
        except OSError as error:
            warn_once(f"cannot write {sweep_dir / INDEX} ({error.strerror}): folders of runs have their hashes alone")


def readable_name(job: Job) -> str:
    """The name of a run that people read: data set, method, test environments, trial and hyperparameter seed.

    Args:
        job: Job of the run.

    Returns:
        A name that can be a file's, e.g. "PACS_BOnly@rank=16_test-sketch_trial0_hparams0".
    """
    environments = job.test_names or map(str, job.train_args["test_envs"])
    return name_run(job.train_args, environments, _LONGEST, instead=job.name[:8])


def _link(folder: Path, name: str, run: str, own: Collection[str]) -> None:
    """Makes the link of a run: with a part of its hash where a run of other arguments has its name."""
    target = os.path.join(os.pardir, run)
    for path in (folder / name, folder / f"{name}_{run[:8]}"):
        try:
            path.symlink_to(target)
        except FileExistsError:
            if not path.is_symlink():
                continue
            linked = os.readlink(path)
            if linked == target:
                return
            if os.path.basename(linked) in own or path.exists():
                continue
            _replace(path, target)  # it led to a run that was deleted
        return


def _replace(path: Path, target: str) -> None:
    temporary = path.with_name(f".{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(path)


def _write_index(path: Path, jobs: Sequence[Job]) -> None:
    rows = {job.name: readable_name(job) for job in jobs}
    if path.exists():
        with path.open(encoding="utf-8", newline="", errors="surrogateescape") as file:
            rows = {row["folder"]: row["name"] for row in csv.DictReader(file)} | rows
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("name", "folder"))
    writer.writerows((name, run) for run, name in rows.items())
    write_atomically(path, text.getvalue())
