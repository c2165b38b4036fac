"""The command line of `sweep`: its sub-commands, and the options that the help of each shows.

Every sub-command accepts the options of all, so that users can change the sub-command of a command and keep the rest,
and so that a definition may have any option. The help of a sub-command shows the options that it uses.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from domainbed_ext import launchers
from domainbed_ext.algorithms.listing import NAME_HELP, format_short
from domainbed_ext.datasets.registry import DATASETS
from domainbed_ext.errors import unknown
from domainbed_ext.runs import shared_options as run_options
from domainbed_ext.runs.hparams_option import add_hparams_option
from domainbed_ext.sweep.definition import QUICKSTART
from domainbed_ext.system import option_values
from domainbed_ext.system.command_line import CommandLine
from domainbed_ext.system.commands import format_command

PROGRAM = "python -m domainbed_ext.sweep"


def _add_runs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which runs")
    run_options.add_print_option(group)
    group.add_argument(
        "--sweep",
        type=option_values.path,
        metavar="FILE",
        help="YAML file of options, which the command line overrides; a bare name is looked up among the packaged "
        f"files ({QUICKSTART}, unless --datasets or --algorithms is given)",
    )
    group.add_argument("--datasets", nargs="+", metavar="NAME", help=", ".join(DATASETS))
    group.add_argument("--algorithms", nargs="+", metavar="NAME", help=NAME_HELP)
    group.add_argument(
        "--task",
        default="domain_generalization",
        metavar="NAME",
        help="accepted for DomainBed compatibility; recorded, and otherwise ignored (%(default)s)",
    )
    group.add_argument(
        "--n_hparams",
        type=option_values.whole(1),
        default=20,
        metavar="N",
        help="hyperparameter seeds per method, 0 to N-1: seed 0 is the defaults, the others are random draws "
        "(%(default)s)",
    )
    group.add_argument(
        "--n_hparams_from",
        type=option_values.seed,
        default=0,
        metavar="N",
        help="first hyperparameter seed (%(default)s)",
    )
    group.add_argument("--output_dir", type=option_values.tensors_path, metavar="DIR", help="folder of the sweep")
    group.add_argument("--data_dir", type=option_values.path, metavar="DIR", help="folder that holds the data sets")
    group.add_argument(
        "--seed",
        type=option_values.seed,
        default=0,
        metavar="N",
        help="accepted for DomainBed compatibility; ignored",
    )
    group.add_argument(
        "--n_trials",
        type=option_values.whole(1),
        default=3,
        metavar="N",
        help="trials, each with its own splits and seeds (%(default)s)",
    )
    group.add_argument(
        "--steps", type=option_values.whole(1), metavar="N", help="training steps (the data set's own number)"
    )
    add_hparams_option(group, "hyperparameters, for every method that has them")
    group.add_argument(
        "--holdout_fraction",
        type=option_values.share(),
        default=0.2,
        metavar="SHARE",
        help="share of each environment in its `out` split (%(default)s)",
    )
    group.add_argument("--single_test_envs", action="store_true", help="hold out one environment at a time, no pairs")
    group.add_argument(
        "--pairs",
        dest="single_test_envs",
        action="store_false",
        default=False,
        help="hold out every pair of environments too, as leave-one-domain-out cross-validation needs (default)",
    )
    run_options.add_number_options(parser)


def _add_launching(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how they are run")
    group.add_argument(
        "--command_launcher",
        default="local",
        metavar="NAME",
        help=f"{', '.join(launchers.LAUNCHERS)}, or one that a package registers as an entry point in "
        f"{launchers.GROUP} (%(default)s)",
    )
    group.add_argument(
        "--launcher_options",
        metavar="JSON",
        help="""options of the launcher, e.g. '{"partition": "gpu"}' (none)""",
    )
    group.add_argument(
        "--jobs",
        type=option_values.whole(0),
        default=0,
        metavar="N",
        help="number of parallel runs (0: the launcher decides)",
    )
    group.add_argument("--jobs_per_gpu", type=option_values.whole(1), metavar="N", help="runs that share a GPU (1)")
    run_options.add_image_options(group)
    group.add_argument(
        "--reference",
        metavar="NAME",
        help="method that the tables compare all others with, paired by trial, with 95 %% intervals (none)",
    )
    run_options.add_saving_options(group)
    run_options.add_tracking_option(group)
    run_options.add_speed_options(parser)
    run_options.add_resume_options(parser)


def _add_caution(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("confirmation")
    group.add_argument("--skip_confirmation", action="store_true", help="do not ask for confirmation")
    group.add_argument("--dry_run", action="store_true", help="print what would be done, and change nothing")


def _add_fresh_trials(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("fresh trials")
    group.add_argument(
        "--first_trial",
        type=option_values.seed,
        metavar="N",
        help="seed of the first of the --n_trials trials (the first that the sweep has not run); runs that the sweep "
        "has finished are copied",
    )


def _add_display(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--watch", action="store_true", help="refresh until all runs have finished (on a terminal)")
    group.add_argument("--json", action="store_true", help="print JSON, for scripts")


Part = Callable[[argparse.ArgumentParser], None]
_PARTS: tuple[Part, ...] = (_add_display, _add_caution, _add_fresh_trials, _add_runs, _add_launching)


@dataclass(frozen=True)
class SubCommand:
    """A sub-command as its help describes it.

    Attributes:
        summary: What it does, in one line.
        examples: Options of example commands, each with a remark.
        parts: Groups of options that it uses.
        has_lists: Whether its help lists methods, and the options of launchers.
    """

    summary: str
    examples: Sequence[tuple[str, str]]
    parts: Sequence[Part] = (_add_caution, _add_runs, _add_launching)
    has_lists: bool = False


_SUB_COMMANDS = {
    "launch": SubCommand(
        "run what is missing, and print the tables",
        (
            ("", "the quickstart"),
            ("--dry_run", "print the commands that it would run"),
            ("--sweep pacs_vit_tiny --data_dir data --weights vit_tiny.safetensors", ""),
            (
                "--datasets PACS VLCS --algorithms BA BOnly@rank=16 LP --n_hparams 1 \\\n    --single_test_envs "
                "--data_dir data --output_dir runs/mine",
                "",
            ),
            (
                "--protocol single_source --datasets PACS VLCS --source_envs cartoon LabelMe \\\n    --algorithms BA "
                "BOnly --n_hparams 1 --data_dir data --output_dir runs/single",
                "",
            ),
            (
                "--sweep mine.yaml --command_launcher slurm \\\n    "
                """--launcher_options '{"partition": "gpu"}' --jobs_per_gpu 2""",
                "",
            ),
        ),
        has_lists=True,
    ),
    "retry": SubCommand(
        "run only what failed or was interrupted",
        (("--sweep mine.yaml --data_dir data", "after fixing the cause of failures"),),
    ),
    "confirm": SubCommand(
        "run fresh trials of the hyperparameters that finished runs choose, into OUTPUT_DIR/confirmed",
        (("--sweep mine.yaml --data_dir data --n_trials 3", "each with its own splits and seeds"),),
        (_add_caution, _add_fresh_trials, _add_runs, _add_launching),
    ),
    "status": SubCommand(
        "show the progress of the runs, failures with their reasons, and the time left",
        (
            ("--sweep mine.yaml --watch", "refresh until all runs have finished"),
            ("--sweep mine.yaml --json", "for scripts"),
        ),
        (_add_display, _add_runs),
    ),
    "validate": SubCommand(
        "check the setup and estimate the cost; run nothing",
        (("--sweep mine.yaml --data_dir data", "before a launch"),),
        has_lists=True,
    ),
    "cancel": SubCommand(
        "stop launches in progress: running runs stop at a checkpoint, queued runs do not start",
        (("--sweep mine.yaml", "stop the sweep; launch resumes it later"),),
        (_add_caution, _add_runs),
    ),
    "delete_incomplete": SubCommand(
        "delete the folders of runs that failed or were interrupted",
        (("--sweep mine.yaml", "so that launch starts these runs from scratch"),),
        (_add_caution, _add_runs),
    ),
}
NAMES = tuple(_SUB_COMMANDS)
_SYNONYMS = {
    **dict.fromkeys(("run", "start", "resume", "continue"), "launch"),
    **dict.fromkeys(("stop", "kill", "abort"), "cancel"),
    **dict.fromkeys(("check", "cost", "estimate", "verify"), "validate"),
    **dict.fromkeys(("watch", "progress", "list", "show"), "status"),
    **dict.fromkeys(("delete", "clean", "remove"), "delete_incomplete"),
}


class SweepCommandLine(CommandLine):
    """Accepts the options of all sub-commands, and shows those of one.

    Args:
        command: Sub-command whose help and usage it shows; None shows a list of all.
    """

    def __init__(self, command: str | None = None) -> None:
        super().__init__(prog=f"{PROGRAM} {command}" if command else PROGRAM)
        self._command = command
        self.add_argument("command", type=_sub_command, metavar="command")
        for add in _PARTS:
            add(self)

    def format_help(self) -> str:
        """The help of the sub-command."""
        return _command_help(self._command) if self._command else _overview()


def make_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The command line: DomainBed's options, `--sweep`, and the options of runs.

    Args:
        command: Sub-command whose help it shows; None shows a list of all.

    Returns:
        Parser of the options of all sub-commands.
    """
    return SweepCommandLine(command)


def _sub_command(word: str) -> str:
    """The type of the sub-command."""
    if word not in _SUB_COMMANDS:
        raise unknown("sub-command", word, _SUB_COMMANDS, _SYNONYMS)
    return word


def _overview() -> str:
    width = max(map(len, _SUB_COMMANDS))
    commands = [f"  {name:{width}}  {command.summary}" for name, command in _SUB_COMMANDS.items()]
    examples = [_example(name, *command.examples[0]) for name, command in _SUB_COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {format_command('sweep')} COMMAND [options]",
            "\nLaunches many runs, shows their progress and prints their tables.",
            "\ncommands (COMMAND --help lists the options of each):",
            *commands,
            "\nexamples:",
            *examples,
            "\nGive every command the same options for the choice of runs, or the same --sweep file. A command",
            "accepts the options of the other commands too, and ignores them.\n",
        ]
    )


def _command_help(name: str) -> str:
    command = _SUB_COMMANDS[name]
    examples = "\n".join(["examples:", *(_example(name, *example) for example in command.examples)])
    lists = f"\n\noptions of launchers, for --launcher_options:\n{_launcher_table()}\n\n{format_short()}"
    shown = CommandLine(
        prog=f"{PROGRAM} {name}",
        usage="%(prog)s [options]",
        description=f"{command.summary[0].upper()}{command.summary[1:]}.",
        epilog=examples + (lists if command.has_lists else ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for add in command.parts:
        add(shown)
    return shown.format_help()


def _example(name: str, options: str, remark: str) -> str:
    line = f"  {format_command('sweep')} {name} {options}".rstrip()
    return f"{line:<72}  # {remark}" if remark else line


def _launcher_table() -> str:
    """The options of all launchers: several may have the same."""
    launchers_of: dict[tuple[str, str], list[str]] = {}
    for launcher_name, launcher in launchers.LAUNCHERS.items():
        for name, default, meaning in launcher.list_options():
            key = name, f"{meaning} ({default})" if default else meaning
            launchers_of.setdefault(key, []).append(launcher_name)
    return "\n".join(f"  {name:16} {meaning} [{', '.join(names)}]" for (name, meaning), names in launchers_of.items())
