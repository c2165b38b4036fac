"""Runs in Slurm arrays: each job of an array takes some runs and works on them side by side (see `slurm_task`).

Slurm starts jobs, warns them when their time is nearly up, and starts them again. How far a run is, its own folder
says: `sacct` is never asked. What Slurm is given lies in the launch's folder, to be read, or sent again by hand:

slurm/job.sh       the script of all arrays; its argument is the number of the array's first job
slurm/jobs.json    the commands of each job, and how many of them at once
slurm/12_3.log     what job 3 of array 12 said, in all its starts

submitit is not used: it pickles what it sends and gets back, asks sacct how a job is, and sends an array whole that
Slurm finds too long, while here a job is but shell commands whose results lie in folders.
"""

import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.launchers.launches import Launch, said
from domainbed_ext.launchers.local import LocalOptions
from domainbed_ext.launchers.options import option, read
from domainbed_ext.launchers.stopping import PATIENCE
from domainbed_ext.system import strict_json
from domainbed_ext.system.files import write_atomically

FOLDER = "slurm"  # in the launch's
WARNING = int(PATIENCE) + 30  # seconds before a job's time is up, when its runs are stopped

_LONGEST = 1001  # array, of a Slurm that does not say
_REFUSED = ("-a", "--array", "-M", "--clusters")


@dataclass(frozen=True)
class SbatchOptions:
    """Options that are sbatch's."""

    partition: str | None = option(None, "where jobs wait")
    account: str | None = option(None, "who pays")
    qos: str | None = option(None, "quality of service")
    time: str | None = option(None, "of a job, in quotes: '4:00:00'; runs that need longer resume in its next start")
    gres: str | None = option(None, "what a job has beside cores, e.g. gpu:1")
    constraint: str | None = option(None, "features of a node")
    cpus_per_task: int | None = option(None, "cores of a job", above=0)
    mem: str | None = option(None, "memory of a job, e.g. 16G")
    exclude: str | None = option(None, "nodes to stay away from")


@dataclass(frozen=True)
class SlurmOptions(LocalOptions, SbatchOptions):
    """The options of launcher `slurm`; those of `local` hold inside each job."""

    sbatch: str | None = option(None, "any other of sbatch's, e.g. {mail-type: END, exclusive: true}, or its words")
    setup: str | None = option(None, "shell lines before the runs, e.g. module load cuda")
    runs_per_job: int = option(1, "runs that one job takes", above=0)
    slots: int | None = option(None, "of these, how many at once, where jobs_per_gpu or the cores do not say", above=0)


@dataclass(frozen=True)
class Array:
    """Jobs that are sent together.

    Attributes:
        first: number of the first of them.
        size: how many they are.
        at_once: how many may run at once; 0 for as many as Slurm likes.
        after: index of the array that has to end before this one begins.
    """

    first: int
    size: int
    at_once: int = 0
    after: int | None = None


def slurm(commands: Sequence[str], launch: Launch) -> list[int | None]:
    """Sends commands to Slurm, where they wait; see `domainbed_ext.launchers.Launcher`. Its options: `SlurmOptions`.

    Raises:
        BenchmarkError: options that are wrong, no Slurm here, or one that refuses; nothing is left in it then.
    """
    options = read_options(launch.options)
    packs = [commands[i : i + options.runs_per_job] for i in range(0, len(commands), options.runs_per_job)]
    in_job = min(each for each in (options.runs_per_job, options.slots, launch.parallel) if each)  # runs at once
    arrays = in_arrays(len(packs), _longest_array(), launch.parallel // in_job)
    script = _write_job(packs, launch, options)
    sent: list[str] = []
    try:
        for array in arrays:
            sent.append(_send(script, array, sent))
        launch.detach(slurm=sent)
    except BaseException:
        _scancel(sent)
        raise
    return [None] * len(commands)


def cancel(path: Path) -> None:
    """Ends the jobs of a launch: those that run stop at a checkpoint, and none starts again.

    Args:
        path: of the launch's folder, which says what was sent. Its `cancel` file is the caller's to write.

    Raises:
        BenchmarkError: no Slurm here, or it refuses.
    """
    _scancel(_sent(path))


def waits(path: Path) -> bool:
    """Whether Slurm still has a job of a launch.

    Args:
        path: of the launch's folder.

    Raises:
        BenchmarkError: no Slurm here, or it does not answer.
    """
    listed = _ask("squeue", "--noheader", f"--user={os.getuid()}", "--format=%F").split()
    return not set(_sent(path)).isdisjoint(listed)


def read_options(given: Mapping[str, Any]) -> SlurmOptions:
    """Checks options, in which a list or a mapping may stand for words.

    Raises:
        BenchmarkError: unknown, or not what they should be.
    """
    texts = {name: _as_text(name, each) for name, each in given.items() if each is not None}
    options = read(SlurmOptions, "slurm", texts)
    if options.time and options.time.isdigit():  # as which YAML reads 4:00:00, and Slurm takes it for minutes
        raise BenchmarkError(f"option time of launcher slurm is {options.time}: give it in quotes, as '4:00:00'")
    for word in _other_words(options):
        if word.partition("=")[0] in _REFUSED:
            raise BenchmarkError(f"option sbatch of launcher slurm has {word}, which is the launcher's to say: drop it")
    return options


def _as_text(name: str, value: Any) -> Any:
    if name == "sbatch" and isinstance(value, dict):
        named = {str(key).replace("_", "-"): each for key, each in value.items() if each not in (None, False)}
        value = [f"--{key}" if each is True else f"--{key}={each}" for key, each in named.items()]
    if isinstance(value, list):
        words = [str(each) for each in value]
        return shlex.join(words) if name == "sbatch" else ("\n" if name == "setup" else ",").join(words)
    if isinstance(value, dict):
        raise BenchmarkError(f"option {name} of launcher slurm is {value!r}: give a text")
    return value


def _other_words(options: SlurmOptions) -> list[str]:
    try:
        return shlex.split(options.sbatch or "")
    except ValueError as error:
        raise BenchmarkError(f"option sbatch of launcher slurm is {options.sbatch!r}: {error}; mend that") from error


def in_arrays(jobs: int, longest: int, at_once: int = 0) -> Iterator[Array]:
    """Cuts jobs into arrays of about the same length.

    Slurm limits the jobs at once of one array. So the arrays share the limit; where there are more of them than it
    allows jobs, the others each wait for an earlier one.

    Args:
        jobs: number of all.
        longest: array that there may be.
        at_once: jobs at once, of all arrays; 0 for as many as Slurm likes.

    Yields:
        The arrays, as few as can be.
    """
    count = math.ceil(jobs / longest)
    abreast = min(count, at_once or count)
    first = 0
    for index in range(count):
        size = jobs // count + (index < jobs % count)
        share = at_once // abreast + (index % abreast < at_once % abreast)
        yield Array(first, size, share, index - abreast if index >= abreast else None)
        first += size


def _longest_array() -> int:
    config = _ask("scontrol", "show", "config")
    indices = re.search(r"^MaxArraySize\s*=\s*(\d+)", config, re.MULTILINE)  # those below this number
    jobs = re.search(r"\bmax_array_tasks=(\d+)", config)
    longest = min((int(found[1]) for found in (indices, jobs) if found), default=_LONGEST)
    if longest < 1:
        raise BenchmarkError("this Slurm takes no arrays (its MaxArraySize is 0): ask its administrator for them")
    return longest


def _write_job(packs: Sequence[Sequence[str]], launch: Launch, options: SlurmOptions) -> Path:
    path = launch.path.resolve()
    folder = path / FOLDER
    folder.mkdir()
    local = {each.name: getattr(options, each.name) for each in fields(LocalOptions)}
    content = {
        "slots": options.slots or 0,
        "most": launch.parallel,
        "local": {name: value for name, value in local.items() if value is not None},
        "jobs": packs,
    }
    write_atomically(folder / "jobs.json", strict_json.dumps(content, indent=1) + "\n")
    given = {each.name: getattr(options, each.name) for each in fields(SbatchOptions)}
    words = [
        f"--job-name={path.parents[1].name}",
        "--nodes=1",
        "--ntasks=1",
        f"--chdir={Path.cwd()}",  # commands may name files from here
        f"--output={str(folder).replace('%', '%%')}/%A_%a.log",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR2@{WARNING}",
        *(f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None),
    ]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {_quote(word)}" for word in words),
        *([f"#SBATCH {' '.join(map(_quote, _other_words(options)))}"] if options.sbatch else []),
        "",
        *([options.setup.strip("\n"), ""] if options.setup else []),
        "# exec: Slurm warns this process alone (B:).",
        f"exec {shlex.join([sys.executable, '-u', '-m', 'domainbed_ext.launchers.slurm_task', str(path)])} "
        '"$(($1 + SLURM_ARRAY_TASK_ID))"',
    ]
    write_atomically(folder / "job.sh", "\n".join(lines) + "\n")
    return folder / "job.sh"


def _quote(word: str) -> str:
    """A word in a line that sbatch reads, whose quotes are not a shell's."""
    if re.fullmatch(r"[\w@%+=:,./-]+", word, re.ASCII):
        return word
    return '"' + re.sub(r'(["\\])', r"\\\1", word) + '"'


def _send(script: Path, array: Array, sent: Sequence[str]) -> str:
    """Sends an array; returns the number that Slurm gives it."""
    words = [f"--array=0-{array.size - 1}" + (f"%{array.at_once}" if array.at_once else "")]
    if array.after is not None:
        words.append(f"--dependency=afterany:{sent[array.after]}")
    return _ask("sbatch", "--parsable", *words, str(script), str(array.first)).strip().partition(";")[0]


def _sent(path: Path) -> list[str]:
    return [str(number) for number in said(path).get("engine", {}).get("slurm", ())]


def _scancel(numbers: Sequence[str]) -> None:
    if numbers:
        _ask("scancel", "--quiet", *numbers)  # quiet about those that have ended


def _ask(*words: str) -> str:
    """What a command of Slurm's prints."""
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout
    except FileNotFoundError as error:
        raise BenchmarkError(
            f"there is no {words[0]} here: launch where Slurm's commands are, or with another --command_launcher"
        ) from error
    except subprocess.CalledProcessError as error:
        lines = [re.sub(rf"^{words[0]}: (error: )?", "", line) for line in error.stderr.splitlines()]
        quoted = "; ".join(line for line in lines if not line.startswith("Try ")) or f"exit code {error.returncode}"
        raise BenchmarkError(f"Slurm's {words[0]} says '{quoted}': mend --launcher_options") from error
