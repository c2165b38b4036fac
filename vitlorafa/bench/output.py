"""The files of the benchmark: CSV and JSON with what was measured, and the Markdown and plots made from them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitlorafa.bench.plots import plot_growth, plot_memory, plot_methods, plot_ranks, save_figure
from vitlorafa.bench.tables import Row, csv_text, growth_markdown, markdown, rank_markdown, read_csv
from vitlorafa.errors import AdapterError

_PLOTS = {"memory": plot_memory, "methods": plot_methods, "growth": plot_growth}


def write(
    folder: Path, what: str, device: str, provenance: dict[str, Any], rows: Sequence[Row], ranks: Sequence[Row] = ()
) -> None:
    """Writes everything that was measured so far, and replaces files of the same names.

    Args:
        folder: Existing folder.
        what: "step", "memory", "methods" or "growth", the first part of the file names.
        device: Last part of the file names, as by `vitlorafa.bench.machine.file_name`.
        provenance: Command, date, machine and versions, from `collect_provenance`.
        rows: Rows of `step_rows`, `memory_rows`, `method_rows` or `growth_rows`.
        ranks: Rows of `rank_rows`.
    """
    stem = f"{what}_{device}"
    (folder / f"{stem}.csv").write_text(csv_text(rows), encoding="utf-8")
    (folder / f"{stem}.json").write_text(json.dumps(provenance, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if ranks:
        (folder / f"ranks_{device}.csv").write_text(csv_text(ranks), encoding="utf-8")
    _render(folder, what, device, provenance, rows, ranks)


def redraw(folder: Path) -> list[str]:
    """Regenerates tables and plots from the CSV and JSON files in a folder, without measuring.

    Args:
        folder: Folder that `write` wrote to.

    Returns:
        The names of the Markdown files.

    Raises:
        AdapterError: If the folder has no such files, or one of them is damaged.
    """
    written = []
    for what in ("step", "memory", "methods", "growth"):
        for path in sorted(folder.glob(f"{what}_*.csv")):
            device = path.stem.removeprefix(f"{what}_")
            ranks = folder / f"ranks_{device}.csv"
            try:
                provenance = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
                rank_rows = read_csv(ranks) if what == "memory" and ranks.exists() else []
                _render(folder, what, device, provenance, read_csv(path), rank_rows)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise AdapterError(f"{path} or the files next to it cannot be read ({error}): measure again") from None
            written.append(f"{path.stem}.md")
    if not written:
        raise AdapterError(
            f"{folder} has no step_*.csv, memory_*.csv, methods_*.csv or growth_*.csv: name the --output_dir of an "
            "earlier run"
        )
    return written


def _render(
    folder: Path, what: str, device: str, provenance: dict[str, Any], rows: Sequence[Row], ranks: Sequence[Row]
) -> None:
    machine, versions = provenance["machine"], provenance["versions"]
    limits = f" ({machine['limits']})" if machine.get("limits") else ""
    parts = [
        f"{machine['device']}{limits}, {machine['threads']} threads; torch {versions['torch']}, timm "
        f"{versions['timm']}, PEFT {versions['peft']}; {provenance['date']}\n\n`{provenance['command']}`\n",
        growth_markdown(rows) if what == "growth" else markdown(what, rows),
    ]
    if ranks:
        parts.append(rank_markdown(ranks))
        save_figure(plot_ranks(ranks), folder, f"ranks_{device}")
    if what in _PLOTS:
        save_figure(_PLOTS[what](rows), folder, f"{what}_{device}")
    (folder / f"{what}_{device}.md").write_text("\n".join(parts), encoding="utf-8")
