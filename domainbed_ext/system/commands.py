"""The commands, and what `python -m` answers where a module of the package is none."""

import difflib
import sys
from collections.abc import Sequence

PACKAGE = "domainbed_ext"
COMMANDS = {
    "sweep": "launch many runs, watch them, retry and cancel them, estimate their cost",
    "train": "one run",
    "collect_results": "tables, plots and a page from a folder of runs",
    "evaluate": "recompute a run's recorded accuracies from what it saved",
    "prepare": "download, unpack and check data sets",
    "cache": "list, build and remove decoded images",
    "bench": "measure how fast runs and sweeps are on this machine",
    "pretrain": "regenerate the embedded backbone",
    "upstream": "run the scripts of a DomainBed checkout with these methods",
}
_STARTED_BY_OTHERS = ("launchers.slurm_task", "bench.plain")  # by a job of Slurm's, and by `bench`
_INSTEAD = {
    **dict.fromkeys(("status", "states", "estimate"), "sweep status"),
    **dict.fromkeys(("validate", "cost"), "sweep validate"),
    **dict.fromkeys(("launch", "launching", "launches", "launchers", "jobs"), "sweep launch"),
    **dict.fromkeys(("retry", "cancel", "delete_incomplete"), "sweep"),
    **dict.fromkeys(("tables", "plots", "page", "paper"), "collect_results"),
    "profile": "train --profile",
}  # what people mean by the names of other modules


def listing() -> str:
    """All commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  python -m {PACKAGE}.{name:{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(["commands (--help says more of each):", *lines])


def refusal(name: str) -> str | None:
    """Why a module does nothing as a command.

    Args:
        name: Name that `python -m` was given.

    Returns:
        A sentence; None for a command, and for a module of another package.
    """
    package, _, module = name.partition(".")
    if package != PACKAGE or module in ("", "__main__", *COMMANDS, *_STARTED_BY_OTHERS):
        return None
    first = module.partition(".")[0]
    meant = _INSTEAD.get(module) or (first if first in COMMANDS else None)
    if meant is None:
        near = difflib.get_close_matches(first, COMMANDS, n=1)
        meant = near[0] if near else None
    hint = f"run python -m {PACKAGE}.{meant}" if meant else f"python -m {PACKAGE} lists the commands"
    return f"{name} is not a command: {hint}"


def module_that_is_run(argv: Sequence[str], original: Sequence[str]) -> str | None:
    """The module that `python -m` is about to run, while the packages above it are imported.

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


def refuse_what_is_none() -> None:
    """Ends the process with exit code 2 if `python -m` is about to run a module that is not a command."""
    name = module_that_is_run(sys.argv, sys.orig_argv)
    if name is not None and (sentence := refusal(name)):
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)
