"""A sweep's definition: a YAML file whose keys are options of the command line."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import yaml

from domainbed_ext.errors import BenchmarkError, unknown
from domainbed_ext.system import resources, yaml12

QUICKSTART = "quickstart.yaml"
_OBJECTS = ("hparams", "launcher_options")  # options that a definition may give as a mapping
_OPPOSITE = {"pairs": ["--single_test_envs"]}  # what a flag that is false means, where that is not the default
_NOT_OPTIONS = {"sweep", "help", "h", "-h"}


def definition_words(name: str, parser: argparse.ArgumentParser) -> list[str]:
    """Reads a definition as words of a command line, so that both are checked alike.

    Args:
        name: File, or name of a packaged definition.
        parser: Command line of the sweep.

    Returns:
        The words.

    Raises:
        BenchmarkError: There is no such file, it is not YAML, or a line of it is not an option with its value.
    """
    path = _find(name)
    try:
        entries = yaml12.read_mapping(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise BenchmarkError(f"{path}{where} is not YAML ({problem}): fix it") from error
    if entries is None:
        raise BenchmarkError(f"{path} is not a list of `option: value` lines: see {resources.sweeps() / QUICKSTART}")
    actions = {text.removeprefix("--"): action for action in parser._actions for text in action.option_strings}
    keys = actions.keys() - _NOT_OPTIONS
    words = []
    for key, value, line in entries:
        if not isinstance(key, str) or key not in keys:
            raise unknown(f"option in {path} line {line}:", str(key), keys)
        try:
            words += _words(key, value, actions[key])
        except ValueError as error:
            raise BenchmarkError(f"{path} line {line}: {key} {error}") from None
    return words


def _find(name: str) -> Path:
    packaged = resources.sweeps() / name
    for path in (Path(name), packaged, packaged.with_suffix(".yaml")):
        if path.is_file():
            return path
    names = ", ".join(sorted(path.name for path in resources.sweeps().glob("*.yaml")))
    raise BenchmarkError(f"no sweep definition {name}: give --sweep a YAML file, or one of {names}")


def _words(key: str, value: Any, action: argparse.Action) -> list[str]:
    """An option of a definition as words of a command line; a `ValueError` says what is wrong with it."""
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
