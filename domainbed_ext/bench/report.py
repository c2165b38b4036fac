"""Tables of measurements: printed, and written as CSV and Markdown with the machine in their names."""

import re
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from domainbed_ext.runs.provenance import machine, rounding, versions
from domainbed_ext.system.files import write_atomically
from vitlorafa import instruction_limits
from vitlorafa.bench.machine import device_name, file_name
from vitlorafa.bench.tables import Row, csv_text, table

NEEDS_CARD = "needs a card: "  # begins a line of a measurement that was left out for lack of a GPU


def print_need(what: str) -> None:
    """Prints that something was not measured because it needs a GPU.

    Args:
        what: What was left out.
    """
    print(f"{NEEDS_CARD}{what}", flush=True)


def write(
    name: str, title: str, rows: Sequence[Row], output_dir: Path, notes: Sequence[str] = (), show: bool = True
) -> None:
    """Writes a table to `<name>_<machine>.csv` and `.md`, and prints it. Limited instructions are named in files too.

    Args:
        name: Name of the files; characters other than letters and digits become "_".
        title: Sentence that says what the table shows.
        rows: Rows, all with the same keys, which are the columns.
        output_dir: Folder for the files; it is created if it does not exist.
        notes: Sentences below the table.
        show: Whether it is printed too.
    """
    used = ", ".join(f"{package} {versions()[package]}" for package in ("torch", "torchvision", "timm"))
    today = datetime.now(timezone.utc).date().isoformat()
    where = f"{device_name(device())}, {instructions()}; {used}; {today}"
    text = "\n\n".join([title, where, table(rows), *notes])
    if show:
        print(text)
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / f"{re.sub('[^a-z0-9]+', '_', name.lower())}_{file_name(device())}"
    write_atomically(path.with_suffix(".csv"), csv_text(rows))
    write_atomically(path.with_suffix(".md"), text + "\n")
    if show:
        print(f"written: {path}.csv, {path}.md")


def device() -> str:
    """What runs compute on here: "cuda" or "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def instructions() -> str:
    """What torch uses of the processor's instructions: those for bf16 too, or the variables that limit them."""
    used = machine()["instructions"]
    if limits := instruction_limits():
        return f"{used} ({limits})"
    return " ".join([used, *(name for name in ("avx512_bf16", "amx_bf16") if rounding()["has"].get(name))])
