"""Tables of measurements: printed, and kept as CSV and Markdown under the machine's name."""

import re
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from domainbed_ext.runs.provenance import versions
from domainbed_ext.system.files import write_atomically
from vitlorafa.bench.machine import device_name, file_name
from vitlorafa.bench.tables import Row, csv_text, table


def write(name: str, title: str, rows: Sequence[Row], output_dir: Path, notes: Sequence[str] = ()) -> None:
    """Prints a table and writes `<name>_<machine>.csv` and `.md`.

    Args:
        name: of the files; characters that names do without become "_".
        title: what the table shows, in one sentence.
        rows: of the table, all with the same keys, its columns.
        output_dir: made if it is not there.
        notes: sentences below it.
    """
    used = ", ".join(f"{package} {versions()[package]}" for package in ("torch", "torchvision", "timm"))
    today = datetime.now(timezone.utc).date().isoformat()
    where = f"{device_name(device())}; {used}; {today}"
    text = "\n\n".join([title, where, table(rows), *notes])
    print(text)
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / f"{re.sub('[^a-z0-9]+', '_', name.lower())}_{file_name(device())}"
    write_atomically(path.with_suffix(".csv"), csv_text(rows))
    write_atomically(path.with_suffix(".md"), text + "\n")
    print(f"written: {path}.csv, {path}.md")


def device() -> str:
    """What runs compute on here: "cuda" or "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"
