"""What `python -m` answers where a module of the package is not a command."""

import sys

LISTING = """\
vitlorafa is a library: import vitlorafa. Its one command (--help says more):
  python -m vitlorafa.bench  time training steps and measure their memory"""
_COMMANDS = (
    "vitlorafa",
    "vitlorafa.__main__",
    "vitlorafa.bench",
    "vitlorafa.bench.__main__",
    "vitlorafa.bench.measure",
)


def refusal(argv: list[str], original: list[str]) -> str | None:
    """Why the module that `python -m` is about to run does nothing as a command.

    Args:
        argv: The process's `sys.argv`, which begins with "-m" while the packages above the module are imported.
        original: The process's `sys.orig_argv`.

    Returns:
        A sentence; None for a command, for a module of another package, and at any other time.
    """
    if argv[:1] != ["-m"] or len(argv) >= len(original):
        return None
    word = original[-len(argv)]
    name = word.partition("m")[2] if word.startswith("-") else word  # -mNAME
    if name.partition(".")[0] != "vitlorafa" or name in _COMMANDS:
        return None
    return f"{name} is not a command: python -m vitlorafa says what is"


def refuse_what_is_none() -> None:
    """Ends the process with exit code 2 if `python -m` is about to run a module that is not a command."""
    if sentence := refusal(sys.argv, sys.orig_argv):
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)
