"""The JSON Schemas of YAML files of options, by which editors check and complete them.

They are generated from the declarations of the options.

python -m domainbed_ext.schema sweep > sweep.schema.json   # of --sweep FILE.yaml
python -m domainbed_ext.schema run > run.schema.json       # of train --config FILE.yaml
"""

import argparse
from collections.abc import Callable, Collection, Sequence
from typing import Any

from domainbed_ext import launchers
from domainbed_ext.algorithms.registry import METHODS
from domainbed_ext.datasets.registry import DATASETS
from domainbed_ext.errors import unknown
from domainbed_ext.runs import arguments as run_options
from domainbed_ext.sweep import options as sweep_options
from domainbed_ext.system import option_values, strict_json
from domainbed_ext.system.command_line import START_AGAIN, CommandLine, as_command
from domainbed_ext.system.option_file import OBJECTS, file_options
from domainbed_ext.trackers.registry import TRACKERS

SCHEMAS: dict[str, tuple[str, Callable[[], argparse.ArgumentParser]]] = {
    "run": ("the options of a run: train --config FILE.yaml", run_options.make_parser),
    "sweep": ("the definition of a sweep: sweep launch --sweep FILE.yaml", sweep_options.make_parser),
}
"""What each schema is of, and the command line whose options it has."""

_TEXT = {"type": ["string", "number"]}  # YAML reads some names as numbers
_NAMES: dict[str, Callable[[], Collection[str]]] = {
    **dict.fromkeys(("algorithm", "algorithms"), METHODS.registered),
    **dict.fromkeys(("dataset", "datasets"), DATASETS.registered),
    "track": TRACKERS.registered,
    "command_launcher": lambda: launchers.LAUNCHERS,
}  # names that an editor completes; others are valid too


def make_schema(name: str) -> dict[str, Any]:
    """Makes a schema.

    Args:
        name: Key of `SCHEMAS`.

    Returns:
        JSON Schema, draft 7.
    """
    title, make_parser = SCHEMAS[name]
    parser = make_parser()
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": f"domainbed_ext: {title}",
        "type": "object",
        "properties": {key: _describe(key, action, parser) for key, action in file_options(parser).items()},
        "additionalProperties": False,
    }


def format_schema(name: str) -> str:
    """Formats a schema as the text of its file.

    Args:
        name: Key of `SCHEMAS`.
    """
    return strict_json.dumps(make_schema(name), indent=2, ensure_ascii=False) + "\n"


def _describe(key: str, action: argparse.Action, parser: argparse.ArgumentParser) -> dict[str, Any]:
    description = parser._get_formatter()._expand_help(action) if action.help else ""
    return {"description": description, **_value(key, action)}


def _value(key: str, action: argparse.Action) -> dict[str, Any]:
    """What the value of an option may be in a file."""
    if action.nargs == 0:
        return {"type": "boolean"}
    one = _one(key, action)
    if key in OBJECTS:
        return {"anyOf": [{"type": "object"}, *([one] if action.nargs is None else _one_or_several(one))]}
    return one if action.nargs is None else {"anyOf": _one_or_several(one)}


def _one_or_several(one: dict[str, Any]) -> list[dict[str, Any]]:
    return [one, {"type": "array", "items": one, "minItems": 1}]


def _one(key: str, action: argparse.Action) -> dict[str, Any]:
    if action.choices is not None:
        return {"enum": list(action.choices)}
    if isinstance(action.type, option_values.Checked):
        return dict(action.type.schema)
    return {"anyOf": [{"enum": sorted(_NAMES[key]())}, _TEXT]} if key in _NAMES else dict(_TEXT)


def make_parser() -> argparse.ArgumentParser:
    """Makes the command line."""
    parser = CommandLine(
        prog="python -m domainbed_ext.schema",
        description="Prints the JSON Schema of a run's or a sweep's YAML, by which editors check and complete it.",
    )
    parser.add_argument("name", metavar="NAME", help=" or ".join(SCHEMAS))
    return parser


@as_command(START_AGAIN)
def main(argv: Sequence[str] | None = None) -> int:
    """The command: `python -m domainbed_ext.schema`."""
    name = make_parser().parse_args(argv).name
    if name not in SCHEMAS:
        raise unknown("schema", name, SCHEMAS)
    print(format_schema(name), end="")
    return 0


if __name__ == "__main__":
    main()
