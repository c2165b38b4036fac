"""Lists the commands: `python -m domainbed_ext`."""

from collections.abc import Sequence

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.system.command_line import CommandLine, as_command
from domainbed_ext.system.commands import COMMANDS, PACKAGE, listing
from domainbed_ext.system.exit_codes import ExitCode


@as_command()
def main(argv: Sequence[str] | None = None) -> int:
    """The command: `python -m domainbed_ext`, which does nothing but say what does."""
    parser = CommandLine(prog=f"python -m {PACKAGE}", usage=f"python -m {PACKAGE}.COMMAND", add_help=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("words", nargs="*")
    args, _ = parser.parse_known_args(argv)
    if args.words and args.words[0] in COMMANDS:
        raise BenchmarkError(f"a command is a module: write python -m {PACKAGE}.{args.words[0]}")
    print(listing())
    return ExitCode.DONE if args.help else ExitCode.BAD_INPUT


if __name__ == "__main__":
    main()
