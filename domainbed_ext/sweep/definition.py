"""A sweep's definition: a YAML file whose keys are options of the command line."""

import argparse
from pathlib import Path

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.system import resources
from domainbed_ext.system.option_file import read_options

QUICKSTART = "quickstart.yaml"


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
    return read_options(_find(name), parser, str(resources.sweeps() / QUICKSTART))


def _find(name: str) -> Path:
    packaged = resources.sweeps() / name
    for path in (Path(name), packaged, packaged.with_suffix(".yaml")):
        if path.is_file():
            return path
    names = ", ".join(sorted(path.name for path in resources.sweeps().glob("*.yaml")))
    raise BenchmarkError(f"no sweep definition {name}: give --sweep a YAML file, or one of {names}")
