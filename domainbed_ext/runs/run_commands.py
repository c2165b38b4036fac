"""The commands that train a recorded run again and that evaluate what it saved."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from domainbed_ext.runs.arguments import RunArguments
from domainbed_ext.system.commands import format_command

_FIRST = ("dataset", "algorithm", "test_envs")
_OPTIONS = {"imports": "import"}  # arguments whose option has another name
_ELSEWHERE = ("output_dir", "profile", "time_limit")  # of no consequence for what is computed


def run_commands(sweep_dir: Path | str, record: dict[str, Any]) -> dict[str, str]:
    """The commands of a run by what they do.

    Args:
        sweep_dir: Folder that holds the run's folder.
        record: One of the run's records.

    Returns:
        "Evaluate again" and, unless the run was derived from others, "Train again".
    """
    folder = Path(sweep_dir) / record["run"]
    commands = {"Evaluate again": f"{format_command('evaluate')} --run {shlex.quote(str(folder))}"}
    if "derived" not in record:
        commands["Train again"] = shlex.join([*format_command("train").split(), *_options(record["args"])])
    return commands


def _options(args: dict[str, Any]) -> list[str]:
    """The options whose value is not the one that the run has without them."""
    protocol = {name: args.get(name) for name in ("protocol", "test_envs")}
    default = asdict(RunArguments.from_mapping(protocol).complete())
    names = [name for name in (*_FIRST, *sorted(args)) if name in default and name not in _ELSEWHERE]
    options: list[str] = []
    for name in dict.fromkeys(names):
        value = args.get(name)
        if value is None or value is False or (name not in _FIRST and value == default[name] and name != "protocol"):
            continue
        values = value if isinstance(value, list | tuple) else [] if value is True else [value]
        options += [f"--{_OPTIONS.get(name, name)}", *map(str, values)]
    return options
