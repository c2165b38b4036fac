"""Prints the oldest version of each package that setup.cfg promises, as constraints for pip."""

import configparser
import re
from pathlib import Path

setup = configparser.ConfigParser()
setup.read(Path(__file__).parents[1] / "setup.cfg", encoding="utf-8")
required = "\n".join([setup["options"]["install_requires"], *setup["options.extras_require"].values()])
lowest = re.findall(r"([\w.-]+)(?:\[\w+\])?>=([\w.]+)$", required, flags=re.MULTILINE)
print("\n".join(sorted({f"{name}=={version}" for name, version in lowest})))
