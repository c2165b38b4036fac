"""`--import`: users' files and modules that register methods, objectives, data sets and trackers.

A run, like every command, calls `load` before it looks up names. So the workers of all launchers import the same.
Records hold the digest of what was imported.
"""

import argparse
import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import CodeType
from typing import Any

from domainbed_ext.algorithms.derived_names import split_derived
from domainbed_ext.algorithms.registry import METHODS
from domainbed_ext.datasets.registry import DATASETS
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.objectives.registry import OBJECTIVES
from domainbed_ext.system import option_values
from domainbed_ext.system.registry import Registry
from domainbed_ext.trackers.registry import TRACKERS

_REGISTRIES: tuple[Registry[Any], ...] = (METHODS, OBJECTIVES, DATASETS, TRACKERS)
_loaded: dict[str, str] = {}  # digest of the source of each module when it was imported


def add_option(parser: argparse._ActionsContainer) -> None:
    """Adds `--import`."""
    parser.add_argument(
        "--import",
        dest="imports",
        type=option_values.path,
        action="extend",
        nargs="+",
        metavar="MODULE_OR_FILE",
        help="Python files or modules that register your own methods, objectives, data sets and trackers",
    )


def load(imports: Iterable[str] | None) -> dict[str, str]:
    """Imports files and modules, once per process; a file is imported again after it has changed.

    Args:
        imports: Values of `--import`; None if it was not given.

    Returns:
        Digest of the imported source by name of the file or module.

    Raises:
        BenchmarkError: A file or module is missing, raises an error, or registers nothing.
    """
    return dict(_load_file(text) if _is_file(text) else _load_module(text) for text in imports or ())


def find_missing(record: Mapping[str, Any]) -> dict[str, str]:
    """Finds the method and the data set that a run imported and that are not registered here.

    Args:
        record: Record of the run.

    Returns:
        What `--import` takes for each, by its name.
    """
    imported = record["args"].get("imports")
    if not imported:  # as in almost all of a large sweep's records
        return {}
    algorithm = split_derived(record["args"]["algorithm"])[0].partition("@")[0]
    dataset = record["args"]["dataset"]
    names = [name for name, registry in ((algorithm, METHODS), (dataset, DATASETS)) if name not in registry]
    return dict.fromkeys(names, " ".join(imported))


def _is_file(text: str) -> bool:
    return text.endswith(".py") or os.sep in text or os.path.isfile(text)


def _load_file(text: str) -> tuple[str, str]:
    path = Path(text)
    try:
        source = path.read_bytes()
    except OSError as error:
        raise BenchmarkError(
            f"--import {text}: cannot read that file ({error.strerror}): give a Python file, or the name of a module"
        ) from error
    name, content = path.stem, source_digest(source)
    if _loaded.get(name) == content and _origin(name) == path.resolve():
        return path.name, content
    if (other := _origin(name)) not in (None, path.resolve()):
        raise BenchmarkError(f"--import {text}: there is another module {name} ({other}): rename the file")
    # As for a script: it can import modules beside it, and worker processes of a run can import it by its name.
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)

    def execute() -> None:
        code: CodeType = compile(source, str(path), "exec")
        spec = importlib.util.spec_from_file_location(name, path.resolve())
        assert spec is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        exec(code, module.__dict__)

    _execute(text, name, execute, str(path))
    _loaded[name] = content
    return path.name, content


def _load_module(text: str) -> tuple[str, str]:
    if text not in _loaded:
        if os.getcwd() not in map(os.path.abspath, sys.path):  # which `python -m` adds, and console scripts do not
            sys.path.append(os.getcwd())
        if text in sys.modules:
            importlib.import_module(text)
        else:
            _execute(text, text, lambda: importlib.import_module(text), None)
        origin = _origin(text)
        _loaded[text] = source_digest(origin.read_bytes() if origin else b"")
    return text, _loaded[text]


def _origin(name: str) -> Path | None:
    """The file of a module, whether it is imported or not; None if there is no such module."""
    module = sys.modules.get(name)
    if module is not None:
        file = getattr(module, "__file__", None)
        return Path(file).resolve() if file else Path(name)
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin or name).resolve() if spec else None


def _execute(text: str, name: str, execute: Callable[[], object], path: str | None) -> None:
    """Imports a module. If that fails, nothing of it stays registered."""
    before = [registry.registered() for registry in _REGISTRIES]
    try:
        execute()
    except (Exception, SystemExit) as error:
        for registry, things in zip(_REGISTRIES, before, strict=True):
            registry.restore(things)
        sys.modules.pop(name, None)
        missing = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
        if missing and f"{name}.".startswith(f"{missing}.") and path is None:
            raise BenchmarkError(
                f"--import {text}: there is no module {missing}: give an installed module, or a Python file"
            ) from error
        raise BenchmarkError(f"--import {text}: {_reason(error)} ({_place(error, path)}): fix it") from error
    if [registry.registered() for registry in _REGISTRIES] == before:
        sys.modules.pop(name, None)
        raise BenchmarkError(
            f"--import {text} registers nothing: decorate a class in it with "
            '@register_algorithm("Name"), @register_objective("Name"), @register_dataset("Name") or '
            '@register_tracker("Name")'
        )


def _reason(error: BaseException) -> str:
    if isinstance(error, BenchmarkError):
        return str(error)
    return traceback.format_exception_only(error)[-1].strip()


def _place(error: BaseException, path: str | None) -> str:
    """File and line of an error, in the imported file if possible."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename} line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == path] or [
        frame for frame in frames if "importlib" not in frame.filename
    ]
    return f"{own[-1].filename} line {own[-1].lineno}"


def source_digest(source: bytes) -> str:
    """Returns the digest of a source file, for records."""
    return hashlib.blake2b(source, digest_size=8).hexdigest()
