"""The folders of sweep definitions and reference tables: in a checkout, or inside the installed package."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def _folder(name: str) -> Path:
    """`name` inside the package (as a wheel installs it), else beside it (as a checkout has it)."""
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


def sweeps() -> Path:
    """The folder of the sweep definitions, `*.yaml`."""
    return _folder("sweeps")


def results() -> Path:
    """The folder whose `paper/` holds the papers' tables."""
    return _folder("results")
