"""Where the cache lies, and how large it may grow, unless told."""

import os
from pathlib import Path

DEFAULT_GB = 32.0
VARIABLE = "DOMAINBED_EXT_CACHE"


def default_folder() -> Path:
    """The folder that the environment variable DOMAINBED_EXT_CACHE names, else one among the user's caches."""
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "domainbed_ext"
