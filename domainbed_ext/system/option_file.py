"""YAML files of a command's options: one line for each, checked as on the command line."""

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from domainbed_ext.errors import BenchmarkError, unknown
from domainbed_ext.system import yaml12

OBJECTS = ("hparams", "launcher_options")
"""Options whose JSON a file may give as a mapping."""
_OPPOSITE = {"pairs": ["--single_test_envs"]}  # what a flag that is false means, where that is not the default
_NOT_IN_FILES = {"sweep", "config", "print_config", "help", "h", "-h"}


def file_options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Returns the options that a file may have, by their names without dashes.

    Args:
        parser: Command line of the command.
    """
    named = {text.removeprefix("--"): action for action in parser._actions for text in action.option_strings}
    return {name: action for name, action in named.items() if name not in _NOT_IN_FILES}


def read_options(path: Path, parser: argparse.ArgumentParser, example: str) -> list[str]:
    """Reads a file as words of a command line, so that both are checked alike.

    Args:
        path: Path of the file.
        parser: Command line of the command.
        example: What to look at for a file that is right, for the error.

    Returns:
        The words.

    Raises:
        BenchmarkError: It is not YAML, or a line of it is not an option with its value.
    """
    try:
        entries = yaml12.read_mapping(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise BenchmarkError(f"{path}{where} is not YAML ({problem}): fix it") from error
    if entries is None:
        raise BenchmarkError(f"{path} is not a list of `option: value` lines: see {example}")
    options = file_options(parser)
    words = []
    for key, value, line in entries:
        if not isinstance(key, str) or key not in options:
            raise unknown(f"option in {path} line {line}:", str(key), options)
        try:
            words += _words(key, value, options[key])
        except ValueError as error:
            raise BenchmarkError(f"{path} line {line}: {key} {error}") from None
    return words


def format_options(parser: argparse.ArgumentParser, values: Mapping[str, Any]) -> str:
    """Writes options as a file that `read_options` reads.

    Args:
        parser: Command line of the command.
        values: Values by `dest` of the option; those that are None are left out.

    Returns:
        YAML.
    """
    return yaml12.write_mapping(dict(_file_values(parser, values)))


def _file_values(parser: argparse.ArgumentParser, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    written = set()
    for name, action in file_options(parser).items():
        value = values.get(action.dest)
        if value is None or action.dest in written:  # of two options for one value, the first
            continue
        written.add(action.dest)
        if name in OBJECTS:
            value = _as_mapping(value)
        yield name, list(value) if isinstance(value, tuple) else value


def _as_mapping(text: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value if isinstance(value, dict) else text


def _words(key: str, value: Any, action: argparse.Action) -> list[str]:
    """An option of a file as words of a command line; a `ValueError` says what is wrong with it."""
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
    if isinstance(value, dict) and key in OBJECTS:
        return [f"--{key}", json.dumps(value)]
    for each in values:
        if isinstance(each, (bool, dict, list)) or each is None:
            raise ValueError(f"takes text or a number, not {json.dumps(each, default=str)}; text goes in quotes")
    if action.nargs is None:
        return [f"--{key}={value}"]
    if option := next((each for each in map(str, values) if re.match(r"-[^\d.]|-$", each)), None):
        raise ValueError(f"takes values, not an option such as {option}")
    return [f"--{key}", *map(str, values)]
