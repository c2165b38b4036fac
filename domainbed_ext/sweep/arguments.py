"""What a sweep is: the command line, over a definition in YAML whose keys are the command line's arguments."""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from domainbed_ext import launchers
from domainbed_ext.algorithms.registry import ALGORITHMS
from domainbed_ext.datasets.registry import DATASETS
from domainbed_ext.errors import BenchmarkError, unknown
from domainbed_ext.runs import arguments as options
from domainbed_ext.system import option_values, resources, yaml12
from domainbed_ext.system.command_line import CommandLine

QUICKSTART = "quickstart.yaml"
_OBJECTS = ("hparams", "launcher_options")  # what a definition may give as a mapping
_OPPOSITE = {"pairs": ["--single_test_envs"]}  # what a flag that is false says, where that is not the default

COMMANDS = {
    "launch": "run all that is not done, and print the tables",
    "retry": "run what failed or was interrupted, and nothing else",
    "status": "show how far each run is, what failed and why, and the time left",
    "validate": "check everything and estimate the cost, and run nothing",
    "delete_incomplete": "delete the runs that failed or were interrupted",
    "cancel": "end the launches under way: what runs stops where it can go on, what waits does not start",
}

_EXAMPLES = """examples:
  python -m domainbed_ext.sweep launch                       the quickstart
  python -m domainbed_ext.sweep launch --dry_run             what it would run
  python -m domainbed_ext.sweep launch --sweep pacs_vit_tiny --data_dir data --weights vit_tiny.safetensors
  python -m domainbed_ext.sweep launch --datasets PACS VLCS --algorithms BA BOnly@rank=16 LP --n_hparams 1 \\
    --single_test_envs --data_dir data --output_dir runs/mine
  python -m domainbed_ext.sweep launch --protocol single_source --datasets PACS VLCS --source_envs cartoon LabelMe \\
    --algorithms BA BOnly --n_hparams 1 --data_dir data --output_dir runs/single
  python -m domainbed_ext.sweep launch --sweep mine.yaml --command_launcher slurm \\
    --launcher_options '{"partition": "gpu"}' --jobs_per_gpu 2
  python -m domainbed_ext.sweep validate --sweep mine.yaml --data_dir data     before: is all well, what will it cost
  python -m domainbed_ext.sweep status --sweep mine.yaml --watch               meanwhile; --json for scripts
  python -m domainbed_ext.sweep cancel --sweep mine.yaml                       stop the sweep; launch resumes it later
  python -m domainbed_ext.sweep retry --sweep mine.yaml --data_dir data        after fixing what made runs fail
  python -m domainbed_ext.sweep delete_incomplete --sweep mine.yaml            or start those from scratch

Every command takes the sweep's arguments, or its --sweep: the runs they name are those it is about."""


def make_parser() -> argparse.ArgumentParser:
    """The command line: DomainBed's arguments, `--sweep`, and the runs' options."""
    listed = "\n".join(f"  {command:18} {what}" for command, what in COMMANDS.items())
    parser = CommandLine(
        prog="python -m domainbed_ext.sweep",
        description=f"The runs of a sweep:\n{listed}",
        epilog=f"{_EXAMPLES}\n\nwhat --launcher_options may hold, and for which launchers:\n{_launcher_table()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="command", help=", ".join(COMMANDS))
    _add_runs(parser.add_argument_group("which runs"))
    _add_launching(parser.add_argument_group("how they are run"))
    shown = parser.add_argument_group("status")
    shown.add_argument("--watch", action="store_true", help="refresh it until all is done, or Ctrl-C (on a terminal)")
    shown.add_argument("--json", action="store_true", help="print it as JSON")
    options.add_speed_options(parser)
    options.add_resume_options(parser)
    options.add_number_options(parser)
    return parser


def _launcher_table() -> str:
    """The options of all launchers: several may have the same."""
    of: dict[tuple[str, str], list[str]] = {}
    for name_of_launcher, launcher in launchers.LAUNCHERS.items():
        for name, default, meaning in launcher.list_options():
            of.setdefault((name, f"{meaning} ({default})" if default else meaning), []).append(name_of_launcher)
    return "\n".join(f"  {name:16} {meaning} [{', '.join(names)}]" for (name, meaning), names in of.items())


def _add_runs(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--sweep",
        type=option_values.path,
        metavar="FILE",
        help="YAML of the arguments below, which override it; a bare name is looked up among the packaged ones "
        f"({QUICKSTART}, unless --datasets or --algorithms is given)",
    )
    group.add_argument("--datasets", nargs="+", metavar="NAME", help=", ".join(DATASETS))
    group.add_argument("--algorithms", nargs="+", metavar="NAME", help=f"{', '.join(ALGORITHMS)}, or NAME@rank=16")
    group.add_argument("--task", default="domain_generalization", metavar="NAME", help="%(default)s")
    group.add_argument(
        "--n_hparams_from",
        type=option_values.seed,
        default=0,
        metavar="N",
        help="first hparams seed (%(default)s)",
    )
    group.add_argument(
        "--n_hparams",
        type=option_values.whole(1),
        default=20,
        metavar="N",
        help="hparams seeds end before this; 1: the defaults alone (20)",
    )
    group.add_argument("--output_dir", type=option_values.tensors_path, metavar="DIR", help="the sweep's folder")
    group.add_argument("--data_dir", type=option_values.path, metavar="DIR", help="folder that holds the data sets")
    group.add_argument(
        "--seed",
        type=option_values.seed,
        default=0,
        metavar="N",
        help="taken for DomainBed's sake, and unused as there",
    )
    group.add_argument("--n_trials", type=option_values.whole(1), default=3, metavar="N", help="(%(default)s)")
    group.add_argument("--steps", type=option_values.whole(1), metavar="N", help="training steps (the data set's)")
    group.add_argument("--hparams", metavar="JSON", help="hyperparameters, for every algorithm that has them")
    group.add_argument(
        "--holdout_fraction", type=option_values.share(), default=0.2, metavar="SHARE", help="(%(default)s)"
    )
    group.add_argument("--single_test_envs", action="store_true", help="hold out one environment at a time, no pairs")
    group.add_argument(
        "--pairs",
        dest="single_test_envs",
        action="store_false",
        default=False,
        help="every pair of environments too, which leave-one-domain-out cross-validation needs; so unless "
        "--single_test_envs is given, by the sweep's definition or here",
    )


def _add_launching(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--command_launcher",
        default="local",
        metavar="NAME",
        help=f"{', '.join(launchers.LAUNCHERS)} (%(default)s), or a package's of the entry point group "
        f"{launchers.GROUP}",
    )
    group.add_argument(
        "--launcher_options", metavar="JSON", help="""of the launcher, e.g. '{"partition": "gpu"}' (none)"""
    )
    group.add_argument(
        "--jobs",
        type=option_values.whole(0),
        default=0,
        metavar="N",
        help="runs at once (0: as the launcher sees fit)",
    )
    group.add_argument("--jobs_per_gpu", type=option_values.whole(1), metavar="N", help="runs that share a GPU (1)")
    options.add_image_options(group)
    group.add_argument("--skip_model_save", action="store_true", help="do not save what was trained")
    group.add_argument("--skip_confirmation", action="store_true", help="never ask")
    group.add_argument("--dry_run", action="store_true", help="say what would be done, and touch nothing")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line over the sweep's definition.

    Args:
        argv: of the command; None for the process's.

    Returns:
        Complete arguments, `launcher_options` as a dict.

    Raises:
        BenchmarkError: a definition that cannot be read, or an argument that is missing or makes no sense.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    name = args.sweep or (None if args.datasets or args.algorithms else QUICKSTART)
    if name:
        defined = vars(parser.parse_args([args.command, *_definition(name, parser)]))
        parser.set_defaults(**defined)  # which the command line overrides
        args = parser.parse_args(argv)
    for needed in ("datasets", "algorithms", "output_dir"):
        if not getattr(args, needed):
            raise BenchmarkError(f"--{needed} is missing: give it, or a --sweep FILE.yaml that does")
    if args.n_hparams <= args.n_hparams_from:
        raise BenchmarkError(
            f"this sweep has no run: --n_hparams {args.n_hparams} should be above --n_hparams_from "
            f"{args.n_hparams_from}"
        )
    # A name given twice is one row, and must not be run twice in one folder.
    args.datasets, args.algorithms = list(dict.fromkeys(args.datasets)), list(dict.fromkeys(args.algorithms))
    args.launcher_options = _launcher_options(args)
    return args


def _launcher_options(args: argparse.Namespace) -> dict[str, Any]:
    try:
        given = json.loads(args.launcher_options or "{}")
    except json.JSONDecodeError as error:
        raise BenchmarkError(
            f"""--launcher_options is not JSON ({error}): write it like '{{"partition": "gpu"}}'"""
        ) from error
    if not isinstance(given, dict):
        raise BenchmarkError(
            f"""--launcher_options is not a JSON object but {args.launcher_options}: write it like """
            """'{"partition": "gpu"}'"""
        )
    return given if args.jobs_per_gpu is None else given | {"jobs_per_gpu": args.jobs_per_gpu}


def _find_definition(name: str) -> Path:
    packaged = resources.sweeps() / name
    for path in (Path(name), packaged, packaged.with_suffix(".yaml")):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.name for path in resources.sweeps().glob("*.yaml")))
    raise BenchmarkError(f"no sweep definition {name}: give --sweep a YAML file, or one of {known}")


def _definition(name: str, parser: argparse.ArgumentParser) -> list[str]:
    """A sweep definition as words of a command line, so that both are checked alike."""
    path = _find_definition(name)
    try:
        entries = yaml12.read_mapping(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise BenchmarkError(f"{path}{where} is not YAML ({problem}): fix it") from error
    if entries is None:
        raise BenchmarkError(f"{path} is not a list of `argument: value` lines: see {resources.sweeps() / QUICKSTART}")
    actions = {text.removeprefix("--"): action for action in parser._actions for text in action.option_strings}
    known = actions.keys() - {"sweep", "help", "h", "-h"}
    words = []
    for key, value, line in entries:
        if not isinstance(key, str) or key not in known:
            raise unknown(f"argument in {path} line {line}:", str(key), known)
        try:
            words += _words(key, value, actions[key])
        except ValueError as error:
            raise BenchmarkError(f"{path} line {line}: {key} {error}") from None
    return words


def _words(key: str, value: Any, action: argparse.Action) -> list[str]:
    """An argument of a definition as words of a command line; a `ValueError` says what is wrong with it."""
    if value is None:
        return []
    if action.nargs == 0:  # a flag
        if not isinstance(value, bool):
            raise ValueError(f"is true or false, not {value}")
        return [f"--{key}"] if value else _OPPOSITE.get(key, [])
    if isinstance(value, list) and action.nargs is None:
        raise ValueError(f"takes one value, not a list of {len(value)}")
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError("is an empty list: give it a value, or leave it out")
    if isinstance(value, dict) and key in _OBJECTS:
        return [f"--{key}", json.dumps(value)]
    for each in values:
        if isinstance(each, (bool, dict, list)) or each is None:
            raise ValueError(f"takes text or a number, not {json.dumps(each, default=str)}; text goes in quotes")
    if action.nargs is None:
        return [f"--{key}={value}"]
    if option := next((each for each in map(str, values) if re.match(r"-[^\d.]|-$", each)), None):
        raise ValueError(f"takes values, not an option such as {option}")
    return [f"--{key}", *map(str, values)]
