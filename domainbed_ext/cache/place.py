"""Where the cache lies, and how large it may grow, unless told."""

import os
from pathlib import Path

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.system.option_values import expanded

NONE = "none"  # in place of a folder
DEFAULT_GB = 32.0
VARIABLE = "DOMAINBED_EXT_CACHE"


def default_folder() -> Path:
    """The folder that the environment variable DOMAINBED_EXT_CACHE names, else one among the user's caches."""
    if named := os.environ.get(VARIABLE):
        return Path(expanded(VARIABLE, named))
    caches = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(caches) if caches else Path.home() / ".cache") / "domainbed_ext"
    except RuntimeError as error:
        raise BenchmarkError(
            f"no home folder is known, so no place for the image cache: give --cache_dir DIR (none: decode each time), "
            f"or set {VARIABLE}"
        ) from error


def chosen_folder(cache_dir: str | None) -> Path | None:
    """The folder that `--cache_dir` chooses; None if it says that there should be none.

    Args:
        cache_dir: Value of the option; None if it was not given.
    """
    if cache_dir == NONE:
        return None
    return Path(cache_dir) if cache_dir else default_folder()
