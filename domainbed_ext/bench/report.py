"""Tables of measurements: printed, and kept as CSV and Markdown under the machine's name."""

import re
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pandas as pd

from domainbed_ext.files import write_atomically
from domainbed_ext.provenance import machine, versions


def slug() -> str:
    """This machine in a file's name, e.g. "amd_epyc_2_cores"."""
    about = machine()
    return re.sub(r"\W+", "_", f"{about['gpu'] or about['cpu']} {about['cores']} cores").lower()


def write(name: str, title: str, rows: Sequence[dict[str, Any]], output_dir: Path, notes: Sequence[str] = ()) -> None:
    """Prints a table and writes `<name>_<machine>.csv` and `.md`.

    Args:
        name: of the files.
        title: what the table shows, in one sentence.
        rows: of the table; the first one's keys are the columns.
        output_dir: made if it is not there.
        notes: sentences below it.
    """
    table = pd.DataFrame(rows)
    about = machine()
    used = ", ".join(f"{package} {versions()[package]}" for package in ("torch", "torchvision", "timm"))
    today = datetime.now(timezone.utc).date().isoformat()
    where = f"{about['gpu'] or about['cpu']}, {about['cores']} cores; {used}; {today}"
    lines = [title, "", where, "", table.to_markdown(index=False), *(f"\n{note}" for note in notes)]
    print("\n".join(lines))
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / f"{name}_{slug()}"
    write_atomically(path.with_suffix(".csv"), table.to_csv(index=False))
    write_atomically(path.with_suffix(".md"), "\n".join(lines) + "\n")
    print(f"written: {path}.csv, {path}.md")
