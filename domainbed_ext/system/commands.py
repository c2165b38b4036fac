"""The commands: how they are started, and the explain_refusal of `python -m` for any other module of the package."""

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = "domainbed_ext"
SCRIPT = "domainbed-ext"
_MODULE_PREFIX = f"python -m {PACKAGE}."


class CommandEntry(NamedTuple):
    """A command.

    Attributes:
        module: Module below the package that has its `main`.
        summary: What it does, in a line.
    """

    module: str
    summary: str


COMMANDS = {
    "sweep": CommandEntry("sweep.command", "launch many runs, show their progress, estimate their cost"),
    "train": CommandEntry("train", "train one run"),
    "collect_results": CommandEntry("collect_results", "make tables, plots and a page from a folder of runs"),
    "compare": CommandEntry("compare", "compare methods pair by pair, with intervals, tests and power"),
    "evaluate": CommandEntry("evaluate", "recompute a run's recorded accuracies from what it saved"),
    "predict": CommandEntry("predict", "classify image files with the trained model of a run"),
    "pack": CommandEntry("pack", "pack finished runs into small files to publish, and unpack them"),
    "push": CommandEntry("push", "upload the trained adapter of a run to the Hugging Face hub"),
    "soup": CommandEntry("soup", "average the weights of finished runs, and evaluate the means"),
    "frontier": CommandEntry("frontier", "evaluate a sweep's selected runs along the strength of their update"),
    "analyse": CommandEntry("analyse.command", "analyse learned A and B as Zhu et al. 2024 and LoRA-FA do"),
    "methods": CommandEntry("methods", "list methods and objectives, with hyperparameters and papers"),
    "schema": CommandEntry("schema", "print the JSON Schema of a run's or a sweep's YAML, for editors"),
    "prepare": CommandEntry("prepare.command", "download, unpack and check data sets"),
    "cache": CommandEntry("cache.command", "list, build and remove decoded images"),
    "bench": CommandEntry("bench.__main__", "measure how fast runs and sweeps are on this machine"),
    "pretrain": CommandEntry("pretrain", "regenerate the embedded backbone"),
    "upstream": CommandEntry("upstream", "run the scripts of a DomainBed checkout with these methods"),
}
_STARTED_BY_OTHERS = ("launchers.slurm_task", "bench.plain")  # by a job of Slurm's, and by `bench`
_INSTEAD = {
    **{
        name: f"sweep {name}"
        for name in ("launch", "retry", "confirm", "status", "validate", "cancel", "delete_incomplete")
    },
    **dict.fromkeys(("states", "progress"), "sweep status"),
    **dict.fromkeys(("check", "cost"), "sweep validate"),
    **dict.fromkeys(("launchers", "jobs"), "sweep launch"),
    **dict.fromkeys(("tables", "plots", "page", "paper", "report"), "collect_results"),
    **dict.fromkeys(("algorithms", "objectives", "list_methods", "hyperparameters"), "methods"),
    **dict.fromkeys(("differences", "pairs", "significance", "power"), "compare"),
    **dict.fromkeys(("strength", "strengths", "along_strength"), "frontier"),
    **dict.fromkeys(("unpack", "archive", "publish", "export"), "pack"),
    **dict.fromkeys(("classify", "inference", "classifier"), "predict"),
    **{name: f"analyse {name}" for name in ("similarity", "lemmas", "inits", "energy")},
    **dict.fromkeys(("analyze", "analysis", "analyses"), "analyse"),
    "profile": "train --profile",
}  # commands that people mean by other names


def format_command(command: str) -> str:
    """Formats a command as it is typed: with the console script if that started this process, else with `python -m`.

    Args:
        command: Name of the command, perhaps with its arguments.
    """
    return f"{SCRIPT} {command}" if is_started_by_script(sys.argv) else f"{_MODULE_PREFIX}{command}"


def rename_program(program: str) -> str:
    """The name of a program as `typed` has it.

    Args:
        program: Name of a program; that of a command of this package as `python -m` takes it.
    """
    return format_command(program.removeprefix(_MODULE_PREFIX)) if program.startswith(_MODULE_PREFIX) else program


def is_started_by_script(argv: Sequence[str]) -> bool:
    """Whether the console script started this process.

    Args:
        argv: The process's `sys.argv`.
    """
    return bool(argv) and Path(argv[0]).stem == SCRIPT


def load_main(name: str) -> Any:
    """Imports the `main` of a command.

    Args:
        name: Name of the command.
    """
    return import_module(f"{PACKAGE}.{COMMANDS[name].module}").main


def list_commands() -> str:
    """Lists all commands, one per line."""
    width = max(map(len, COMMANDS))
    lines = [f"  {format_command(f'{name:{width}}')}  {entry.summary}" for name, entry in COMMANDS.items()]
    return "\n".join(["commands (--help lists the options of each):", *lines])


def suggest(name: str) -> str | None:
    """Suggests the command that is meant by another name.

    Args:
        name: Name that is no command.

    Returns:
        The command, perhaps with an argument; None if no other name is known.
    """
    return _INSTEAD.get(name)


def explain_refusal(name: str) -> str | None:
    """Explains why a module does nothing as a command.

    Args:
        name: Name that `python -m` was given.

    Returns:
        A sentence; None for a command, and for a module of another package.
    """
    package, _, module = name.partition(".")
    if package != PACKAGE or module in ("", "__main__", *COMMANDS, *_STARTED_BY_OTHERS):
        return None
    first, last = module.partition(".")[0], module.rpartition(".")[2]
    near = difflib.get_close_matches(first, COMMANDS, n=1)  # the very name, where it is a command
    meant = suggest(last) or suggest(first) or (near[0] if near else None)
    hint = f"run {_MODULE_PREFIX}{meant}" if meant else f"python -m {PACKAGE} lists the commands"
    return f"{name} is not a command: {hint}"


def find_module_to_run(argv: Sequence[str], original: Sequence[str]) -> str | None:
    """Finds the module that `python -m` is about to run, while the packages above it are imported.

    Args:
        argv: The process's `sys.argv`, which begins with "-m" that long.
        original: The process's `sys.orig_argv`.

    Returns:
        Its name; None at any other time.
    """
    if list(argv[:1]) != ["-m"] or len(argv) >= len(original):
        return None
    word = original[-len(argv)]
    return word.partition("m")[2] if word.startswith("-") else word  # -mNAME


def refuse_other_modules() -> None:
    """Ends the process with exit code 2 if `python -m` is about to run a module that is not a command."""
    name = find_module_to_run(sys.argv, sys.orig_argv)
    if name is not None and (sentence := explain_refusal(name)):
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)
