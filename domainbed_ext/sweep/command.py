"""The command line's way to the sub-commands: each is a module of its name with a function `run`.

python -m domainbed_ext.sweep launch                       # the quickstart
python -m domainbed_ext.sweep launch --sweep FILE.yaml     # a definition, arguments overriding it
python -m domainbed_ext.sweep launch --datasets PACS --algorithms BA BOnly --data_dir D --output_dir O
python -m domainbed_ext.sweep status --sweep FILE.yaml     # also retry, confirm, validate, cancel, ...
"""

import importlib
from collections.abc import Sequence

from domainbed_ext.sweep.arguments import check, parse_words
from domainbed_ext.sweep.options import make_parser
from domainbed_ext.system import garbage
from domainbed_ext.system.command_line import as_command
from domainbed_ext.system.exit_codes import ExitCode
from domainbed_ext.system.option_file import format_options

__all__ = ["main"]


@as_command()
def main(argv: Sequence[str] | None = None) -> int:
    """The command: `python -m domainbed_ext.sweep`."""
    words = parse_words(argv)
    args = check(words)
    if words.print_config:
        print(format_options(make_parser(), vars(words)), end="")
        return ExitCode.DONE
    # Imported now, when the arguments are known to be right: with some sub-commands comes torch, which takes seconds.
    with garbage.loading():
        command = importlib.import_module(f"domainbed_ext.sweep.{args.command}")
    code: int = command.run(args)
    return code
