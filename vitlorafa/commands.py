"""The commands of the package: `python -m vitlorafa`, `vitlorafa COMMAND`, and the refusal of any other module."""

import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {"bench": "measure time and memory of training steps"}
_MODULES = ("vitlorafa", "vitlorafa.__main__", "vitlorafa.bench", "vitlorafa.bench.__main__", "vitlorafa.bench.measure")


def list_commands() -> str:
    """The commands with one line each."""
    lines = [
        f"  vitlorafa {name:10} {purpose} (also: python -m vitlorafa.{name})" for name, purpose in COMMANDS.items()
    ]
    return "\n".join(
        [
            "vitlorafa adds LoRA adapters to timm vision transformers. It is a library: import vitlorafa.",
            "",
            "commands (--help lists the options of each):",
            *lines,
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command by its name, or lists the commands: `vitlorafa` and `python -m vitlorafa`.

    Args:
        argv: Name of the command and its arguments; if None, those of the process.

    Returns:
        The exit code; 2 without a command or with an unknown one.
    """
    from vitlorafa.errors import unknown

    words = sys.argv[1:] if argv is None else list(argv)
    name = words[0] if words else None
    if name in COMMANDS:
        return int(import_module(f"vitlorafa.{name}.__main__").run_command(words[1:], f"vitlorafa {name}"))
    if name == "--version":
        print(f"vitlorafa {import_module('vitlorafa').__version__}")
    elif name in (None, "-h", "--help"):
        print(list_commands())
    else:
        print(f"error: {unknown('command', name, COMMANDS)}; vitlorafa --help lists the commands", file=sys.stderr)
    return 0 if name in ("-h", "--help", "--version") else 2


def refusal(argv: list[str], original: list[str]) -> str | None:
    """The reason why the module that `python -m` is about to run is not a command.

    Args:
        argv: The process's `sys.argv`, which begins with "-m" while the packages above the module are imported.
        original: The process's `sys.orig_argv`.

    Returns:
        One sentence; None for a command, for a module of another package, and at any other time.
    """
    if argv[:1] != ["-m"] or len(argv) >= len(original):
        return None
    word = original[-len(argv)]
    name = word.partition("m")[2] if word.startswith("-") else word  # -mNAME
    if name.partition(".")[0] != "vitlorafa" or name in _MODULES:
        return None
    return f"{name} is not a command: python -m vitlorafa lists the commands"


def refuse_other_modules() -> None:
    """Ends the process with exit code 2 if `python -m` is about to run a module that is not a command."""
    if sentence := refusal(sys.argv, sys.orig_argv):
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)
