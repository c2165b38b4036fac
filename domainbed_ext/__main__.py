"""Runs a command, or lists commands and methods: `python -m domainbed_ext` and the console script `domainbed-ext`."""

import sys
from collections.abc import Sequence

from domainbed_ext.errors import BenchmarkError, unknown
from domainbed_ext.system.command_line import as_command
from domainbed_ext.system.commands import COMMANDS, format_command, list_commands, load_main, suggest
from domainbed_ext.system.exit_codes import ExitCode


def main(argv: Sequence[str] | None = None) -> int:
    """The command: `python -m domainbed_ext` and `domainbed-ext`.

    Args:
        argv: Name of a command and its arguments; None for those of the process, which then ends.

    Returns:
        The exit code: that of the command, or 2 without one.

    Raises:
        BenchmarkError: There is no such command, or what the command raises.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] not in COMMANDS:
        return _show_commands(argv)
    if argv is None:
        sys.argv.pop(1)  # what is left are the command's arguments
    code: int = load_main(words[0])(None if argv is None else words[1:])
    return code


@as_command()
def _show_commands(argv: Sequence[str] | None) -> int:
    word = next(iter(sys.argv[1:] if argv is None else argv), None)
    if word == "--version":
        from domainbed_ext import __version__

        print(f"domainbed_ext {__version__}")
    elif word in (None, "-h", "--help"):
        from domainbed_ext.algorithms.listing import format_short

        print(f"{list_commands()}\n\n{format_short()}")
    elif meant := suggest(word):
        raise BenchmarkError(f"unknown command {word!r}: did you mean {format_command(meant)}?")
    else:
        raise unknown("command", word, COMMANDS)
    return ExitCode.DONE if word else ExitCode.BAD_INPUT


if __name__ == "__main__":
    main()
