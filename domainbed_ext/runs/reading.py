"""Reads the records of a sweep for its tables, with warnings of what keeps runs from being compared."""

import sys
from pathlib import Path
from typing import Any

from domainbed_ext.runs import imports, mixture
from domainbed_ext.runs.folder import load_records


def read_records(
    input_dir: Path | str, unfinished: bool = False, unreadable: list[str] | None = None
) -> list[dict[str, Any]]:
    """Reads the records of all runs of a sweep. A run whose records cannot be read is left out with a warning.

    Args:
        input_dir: Folder that holds the runs' folders.
        unfinished: Whether unfinished runs count too.
        unreadable: List that takes a sentence for each run that is left out.

    Returns:
        Records, see `load_records`.

    Raises:
        BenchmarkError: No records, or runs of one data set's name on different data.
    """
    left_out = [] if unreadable is None else unreadable
    records = load_records(input_dir, unfinished, left_out)
    missing = {name: words for record in records for name, words in imports.find_missing(record).items()}
    warnings = [
        *(f"left out: {sentence}" for sentence in left_out),
        *(f"{name} is shown without its label and colour: add --import {words}" for name, words in missing.items()),
    ]
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for warning in mixture.check(records, input_dir):
        print(f"warning: {warning}", file=sys.stderr)
    return records
