"""The launcher `slurm`: arrays of jobs, each of which executes some runs side by side (see `slurm_task`).

Slurm starts jobs, warns them when their time is nearly up, and starts them again. The progress of a run is read from
its folder: `sacct` is never asked. What Slurm is given lies in the launch's folder, to be read or resubmitted manually:

slurm/job.sh       the script of all arrays; its argument is the number of the array's first job
slurm/jobs.json    the commands of each job, and how many of them at once
slurm/12_3.log     output of job 3 of array 12, in all its starts

submitit is not used: it pickles what it submits and gets back, asks sacct for the state of a job, and submits arrays
that are longer than Slurm allows as one. Here a job is a list of shell commands whose results lie in folders.
"""

import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.launchers.command import Command
from domainbed_ext.launchers.launch import Launch, read_launch
from domainbed_ext.launchers.launcher import Launcher
from domainbed_ext.launchers.local import LocalOptions
from domainbed_ext.launchers.options import option, read
from domainbed_ext.launchers.registry import register_launcher
from domainbed_ext.launchers.stopping import PATIENCE
from domainbed_ext.system import strict_json
from domainbed_ext.system.files import write_atomically

FOLDER = "slurm"  # in the launch's folder
WARNING = int(PATIENCE) + 30  # seconds before a job's time is up, when its runs are stopped

_LONGEST_ARRAY = 1001  # where Slurm does not tell
_REFUSED = ("-a", "--array", "-M", "--clusters")

# What Slurm's commands print when the controller is down or cannot be reached, whatever they were asked.
_UNREACHABLE = re.compile(
    "Unable to contact slurm controller|Socket timed out|Zero Bytes were transmitted|Communication connection failure|"
    "in standby mode|establish a configuration source|authentication|[Mm]unge"
)


@dataclass(frozen=True)
class SbatchOptions:
    """Options that are passed on to sbatch."""

    partition: str | None = option(None, "partition of the jobs")
    account: str | None = option(None, "account that is charged")
    qos: str | None = option(None, "quality of service")
    time: str | None = option(
        None, "time limit of a job, in quotes: '4:00:00'; runs that need longer resume when it is requeued"
    )
    gres: str | None = option(None, "generic resources of a job, e.g. gpu:1")
    constraint: str | None = option(None, "features that a node must have")
    cpus_per_task: int | None = option(None, "cores per job", above=0)
    mem: str | None = option(None, "memory per job, e.g. 16G")
    exclude: str | None = option(None, "nodes not to use")


@dataclass(frozen=True)
class SlurmOptions(LocalOptions, SbatchOptions):
    """Options of launcher `slurm`; those of `local` apply inside each job."""

    sbatch: str | None = option(None, "any other options of sbatch, e.g. {mail-type: END, exclusive: true}, or as text")
    setup: str | None = option(None, "shell commands before the runs, e.g. module load cuda")
    runs_per_job: int = option(1, "runs per job", above=0)
    slots: int | None = option(
        None, "parallel runs in a job (default: from its GPUs and jobs_per_gpu, or its cores)", above=0
    )


@dataclass(frozen=True)
class Array:
    """Jobs that are submitted together.

    Attributes:
        first: Number of the first job.
        size: Number of jobs.
        at_once: Number of jobs that may run at once; 0 for as many as Slurm likes.
        after: Index of the array that has to end before this one begins; None for none.
    """

    first: int
    size: int
    at_once: int = 0
    after: int | None = None


@register_launcher("slurm")
class Slurm(Launcher):
    """Submits commands to Slurm, where they wait."""

    OPTIONS = SlurmOptions

    def run(self, commands: Sequence[Command], launch: Launch) -> list[int | None]:
        """Submits commands; see `Launcher.run`.

        Raises:
            BenchmarkError: The options are wrong, there is no Slurm here, or it refuses; nothing is left in it then.
        """
        options = self.read_options(launch.options)
        size = options.runs_per_job
        packs = [commands[i : i + size] for i in range(0, len(commands), size)]
        in_job = min(each for each in (size, options.slots, launch.parallel) if each)  # runs at once
        arrays = split_into_arrays(len(packs), _find_longest_array(), launch.parallel // in_job)
        script = _write_job(packs, launch, options)
        submitted: list[str] = []
        try:
            for array in arrays:
                submitted.append(_submit(script, array, submitted))
            launch.detach(slurm=submitted)
        except BaseException:
            _scancel(submitted)
            raise
        return [None] * len(commands)

    def read_options(self, values: Mapping[str, Any]) -> SlurmOptions:
        """Checks options, in which a list or a mapping may stand for text."""
        texts = {name: _as_text(name, each) for name, each in values.items() if each is not None}
        options = read(SlurmOptions, self.name, texts)
        if options.time and options.time.isdigit():  # YAML reads 4:00:00 as a number, and Slurm takes it for minutes
            raise BenchmarkError(f"option time of launcher slurm is {options.time}: give it in quotes, as '4:00:00'")
        for word in _split_words(options):
            if word.partition("=")[0] in _REFUSED:
                raise BenchmarkError(
                    f"option sbatch of launcher slurm has {word}, which the launcher sets itself: leave it out"
                )
        return options

    def cancel(self, path: Path) -> str:
        """Ends the jobs of a launch: runs stop at a checkpoint, and no job starts again."""
        cancel(path)
        return "its runs stop where they can resume, and no other starts"


def cancel(path: Path) -> None:
    """Ends the jobs of a launch: those that run stop at a checkpoint, and none starts again.

    Args:
        path: Folder of the launch. Its `cancel` file is the caller's to write.

    Raises:
        BenchmarkError: There is no Slurm here, or it refuses.
    """
    _scancel(_read_submitted(path))


def is_waiting(path: Path) -> bool:
    """Whether Slurm still has a job of a launch.

    Args:
        path: Folder of the launch.

    Raises:
        BenchmarkError: There is no Slurm here, or it does not answer.
    """
    listed = _ask("squeue", "--noheader", f"--user={os.getuid()}", "--format=%F").split()
    return not set(_read_submitted(path)).isdisjoint(listed)


def _as_text(name: str, value: Any) -> Any:
    if name == "sbatch" and isinstance(value, dict):
        flags = {str(key).replace("_", "-"): each for key, each in value.items() if each not in (None, False)}
        value = [f"--{key}" if each is True else f"--{key}={each}" for key, each in flags.items()]
    if isinstance(value, list):
        words = [str(each) for each in value]
        return shlex.join(words) if name == "sbatch" else ("\n" if name == "setup" else ",").join(words)
    if isinstance(value, dict):
        raise BenchmarkError(f"option {name} of launcher slurm is {value!r}: give a text")
    return value


def _split_words(options: SlurmOptions) -> list[str]:
    try:
        return shlex.split(options.sbatch or "")
    except ValueError as error:
        raise BenchmarkError(
            f"option sbatch of launcher slurm is {options.sbatch!r} ({error}): fix its quotes"
        ) from error


def split_into_arrays(jobs: int, longest: int, at_once: int = 0) -> Iterator[Array]:
    """Splits jobs into arrays of about the same length, as few as possible.

    Slurm limits the jobs at once of one array. So the arrays share the limit; where there are more arrays than it
    allows jobs, each of the others waits for an earlier one.

    Args:
        jobs: Number of all jobs.
        longest: Length of the longest array that Slurm allows.
        at_once: Jobs at once, of all arrays; 0 for as many as Slurm likes.

    Yields:
        The arrays.
    """
    count = math.ceil(jobs / longest)
    abreast = min(count, at_once or count)
    first = 0
    for index in range(count):
        size = jobs // count + (index < jobs % count)
        share = at_once // abreast + (index % abreast < at_once % abreast)
        yield Array(first, size, share, index - abreast if index >= abreast else None)
        first += size


def _find_longest_array() -> int:
    config = _ask("scontrol", "show", "config")
    indices = re.search(r"^MaxArraySize\s*=\s*(\d+)", config, re.MULTILINE)  # those below this number
    jobs = re.search(r"\bmax_array_tasks=(\d+)", config)
    longest = min((int(match[1]) for match in (indices, jobs) if match), default=_LONGEST_ARRAY)
    if longest < 1:
        raise BenchmarkError("this Slurm allows no arrays (its MaxArraySize is 0): ask its administrator to")
    return longest


def _write_job(packs: Sequence[Sequence[Command]], launch: Launch, options: SlurmOptions) -> Path:
    path = launch.path.resolve()
    folder = path / FOLDER
    folder.mkdir()
    local = {each.name: getattr(options, each.name) for each in fields(LocalOptions)}
    content = {
        "slots": options.slots or 0,
        "most": launch.parallel,
        "local": {name: value for name, value in local.items() if value is not None},
        "jobs": [[asdict(command) for command in pack] for pack in packs],
    }
    write_atomically(folder / "jobs.json", strict_json.dumps(content, indent=1) + "\n")
    flags = {each.name: getattr(options, each.name) for each in fields(SbatchOptions)}
    words = [
        f"--job-name={path.parents[1].name}",
        "--nodes=1",
        "--ntasks=1",
        f"--chdir={Path.cwd()}",  # commands may name files from here
        f"--output={str(folder).replace('%', '%%')}/%A_%a.log",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR2@{WARNING}",
        *(f"--{name.replace('_', '-')}={value}" for name, value in flags.items() if value is not None),
    ]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {_quote(word)}" for word in words),
        *([f"#SBATCH {' '.join(map(_quote, _split_words(options)))}"] if options.sbatch else []),
        "",
        *([options.setup.strip("\n"), ""] if options.setup else []),
        "# exec: Slurm warns this process alone (B:).",
        f"exec {shlex.join([sys.executable, '-u', '-m', 'domainbed_ext.launchers.slurm_task', str(path)])} "
        '"$(($1 + SLURM_ARRAY_TASK_ID))"',
    ]
    write_atomically(folder / "job.sh", "\n".join(lines) + "\n")
    return folder / "job.sh"


def _quote(word: str) -> str:
    """Quotes a word for a line that sbatch reads, whose rules are not those of a shell."""
    if re.fullmatch(r"[\w@%+=:,./-]+", word, re.ASCII):
        return word
    return '"' + re.sub(r'(["\\])', r"\\\1", word) + '"'


def _submit(script: Path, array: Array, submitted: Sequence[str]) -> str:
    """Submits an array; returns the number that Slurm gives it."""
    words = [f"--array=0-{array.size - 1}" + (f"%{array.at_once}" if array.at_once else "")]
    if array.after is not None:
        words.append(f"--dependency=afterany:{submitted[array.after]}")
    return _ask("sbatch", "--parsable", *words, str(script), str(array.first)).strip().partition(";")[0]


def _read_submitted(path: Path) -> list[str]:
    return [str(number) for number in read_launch(path).get("engine", {}).get("slurm", ())]


def _scancel(numbers: Sequence[str]) -> None:
    if numbers:
        _ask("scancel", "--quiet", *numbers)  # quiet about those that have ended


def _ask(*words: str) -> str:
    """Runs a command of Slurm; returns what it prints.

    Args:
        *words: The command.

    Raises:
        BenchmarkError: There is no such command, or it fails.
    """
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout
    except FileNotFoundError as error:
        raise BenchmarkError(
            f"there is no {words[0]} here: launch where Slurm's commands are, or with another --command_launcher"
        ) from error
    except subprocess.CalledProcessError as error:
        raise BenchmarkError(_describe(words[0], error)) from error


def _describe(command: str, error: subprocess.CalledProcessError) -> str:
    """What went wrong, in Slurm's words, and what to do: options are to blame for nothing but what sbatch refuses."""
    lines = [re.sub(rf"^{command}: (error: )?", "", line) for line in error.stderr.splitlines()]
    reason = "; ".join(line for line in lines if not line.startswith("Try ")) or f"exit code {error.returncode}"
    if _UNREACHABLE.search(reason):
        return (
            f"Slurm's controller does not answer ({command}: {reason}): run the same command again when "
            "`scontrol ping` finds it up"
        )
    if command == "sbatch":
        return f"Slurm's sbatch refuses the jobs ({reason}): fix --launcher_options"
    return f"Slurm's {command} fails ({reason}): run the same command again, or ask the cluster's administrator"
