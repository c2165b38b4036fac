"""Tables of the benchmark: rows of numbers, as Markdown and as CSV."""

import csv
import io
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vitlorafa.bench.case import Case
from vitlorafa.bench.costs import Cost
from vitlorafa.bench.measure import MIB, Memory, Times
from vitlorafa.bench.methods import METHODS

Row = dict[str, Any]
Curves = dict[tuple[str, str], dict[int, int]]  # (setting, method) -> rank -> bytes of kept activations


def step_rows(times: Iterable[Times]) -> list[Row]:
    """One row for each case and method: milliseconds, ratios to the lower bound, operations by formula."""
    times = list(times)
    bounds = {record.case: record for record in times if record.method == "lower_bound"}
    rows = []
    for record in times:
        step, bound = record.step, bounds.get(record.case)
        median = statistics.median(step)
        low, high = torch.tensor(step, dtype=torch.float64).quantile(torch.tensor([0.2, 0.8]).double()).tolist()
        rows.append(
            {
                **_case_columns(record.case),
                "method": METHODS[record.method].label,
                "step_ms": 1000 * median,
                "fastest_ms": 1000 * min(step),
                "q20_ms": 1000 * low,
                "q80_ms": 1000 * high,
                "forward_ms": 1000 * statistics.median(record.forward),
                "backward_ms": 1000 * statistics.median(record.backward),
                "optimizer_ms": 1000 * statistics.median(record.optimizer),
                "ratio_to_lower_bound": record.ratio(bound) if bound else None,
                "ratio_of_medians": median / statistics.median(bound.step) if bound else None,
                "images_per_s": record.case.batch_size / median,
                "gflop": record.flops / 1e9 if record.flops else None,
                "gflop_per_s": record.flops / 1e9 / median if record.flops else None,
                "trainable": record.trainable,
                "rounds": len(step),
            }
        )
    return rows


def memory_rows(memory: Iterable[Memory]) -> list[Row]:
    """One row for each case and method: kept MiB, measured and by formula, and the peak."""
    memory = list(memory)
    bounds = {record.case: record for record in memory if record.method == "lower_bound"}
    rows = []
    for record in memory:
        bound = bounds.get(record.case)
        rows.append(
            {
                **_case_columns(record.case),
                "method": METHODS[record.method].label,
                "kept_mib": record.saved.activations / MIB,
                "formula_mib": _to_mib(record.formula),
                "ratio_to_lower_bound": record.saved.activations / bound.saved.activations if bound else None,
                "kept_weights_mib": record.saved.weights / MIB,
                "peak_mib": _to_mib(record.peak.total),
                "step_peak_mib": _to_mib(record.peak.step),
            }
        )
    return rows


def rank_rows(curves: Curves) -> list[Row]:
    """One row for each setting and rank, with the MiB of activations that each method keeps.

    Args:
        curves: Bytes by setting, method and rank.
    """
    settings = dict.fromkeys(setting for setting, _ in curves)
    methods = list(dict.fromkeys(method for _, method in curves))
    ranks = sorted({rank for curve in curves.values() for rank in curve})
    return [
        {"setting": setting, "rank": rank}
        | {METHODS[method].label: _to_mib(curves.get((setting, method), {}).get(rank)) for method in methods}
        for setting in settings
        for rank in ranks
    ]


def method_rows(
    costs: Iterable[Cost], times: Iterable[Times], rate: float | None, memory: Mapping[str, int]
) -> list[Row]:
    """One row for each method: trained parameters, MiB of each part of the memory, time, MFU and the largest batches.

    Args:
        costs: Memory and operations of each method, of one case.
        times: Times of the same methods; empty if none were measured.
        rate: Operations per second of a large matmul; None if no times were measured.
        memory: Sizes in bytes by their text, for each of which a column has the largest batch.
    """
    costs, by_method = list(costs), {record.method: record for record in times}
    bound = by_method.get("lower_bound")
    kept = next((cost.saved.activations for cost in costs if cost.method == "lower_bound"), None)
    rows = []
    for cost in costs:
        record = by_method.get(cost.method)
        median = statistics.median(record.step) if record else None
        rows.append(
            {
                **_case_columns(cost.case),
                "method": METHODS[cost.method].label,
                "group": METHODS[cost.method].group,
                "adapter_parameters": cost.adapter,
                "head_parameters": cost.head,
                "frozen_mib": cost.frozen / MIB,
                "trained_mib": cost.trained / MIB,
                "gradients_mib": cost.trained / MIB,
                "optimizer_mib": cost.optimizer / MIB,
                "kept_weights_mib": cost.saved.weights / MIB,
                "kept_mib": cost.saved.activations / MIB,
                "formula_mib": _to_mib(cost.formula),
                "kept_ratio": cost.saved.activations / kept if kept else None,
                "images_mib": cost.case.batch_size * cost.image / MIB,
                "total_mib": cost.total / MIB,
                "peak_mib": _to_mib(cost.peak.total if cost.peak else None),
                "step_ms": median and 1000 * median,
                "fastest_ms": 1000 * min(record.step) if record else None,
                "ratio_to_lower_bound": record.ratio(bound) if record and bound else None,
                "model_gflop": cost.flops / 1e9,
                "matmul_gflop_per_s": rate and rate / 1e9,
                "mfu": cost.flops / median / rate if median and rate else None,
                "rounds": len(record.step) if record else 0,
                **{f"{_LARGEST}{text}": cost.largest_batch(size) for text, size in memory.items()},
            }
        )
    return rows


def growth_rows(costs: Iterable[tuple[str, int, Cost]]) -> list[Row]:
    """One row for each point of the plots of growing memory.

    Args:
        costs: Panel ("rank", "first blocks", "last blocks" or "resolution"), value and memory of each point.
    """
    return [
        {
            **_case_columns(cost.case),
            "case": cost.case.size,
            "panel": panel,
            "value": value,
            "method": METHODS[cost.method].label,
            "adapter_parameters": cost.adapter,
            "kept_mib": cost.saved.activations / MIB,
            "kept_weights_mib": cost.saved.weights / MIB,
            "total_mib": cost.total / MIB,
        }
        for panel, value, cost in costs
    ]


def growth_markdown(rows: Sequence[Row]) -> str:
    """One Markdown table for each panel of the plots of growing memory: all counted MiB by value and method.

    Args:
        rows: Rows of `growth_rows`.
    """
    parts = ["Memory, counted, in MiB: weights, gradients, optimizer state, what is kept for backward, and images."]
    for panel in dict.fromkeys(row["panel"] for row in rows):
        within = [row for row in rows if row["panel"] == panel]
        methods = dict.fromkeys(row["method"] for row in within)
        totals = {(row["value"], row["method"]): row["total_mib"] for row in within}
        lines = [
            {panel: value} | {method: totals.get((value, method)) for method in methods}
            for value in dict.fromkeys(row["value"] for row in within)
        ]
        parts += [
            f"**{within[0]['case']}**",
            table(lines, {panel: (panel, "{}")} | {m: (m, "{:.1f}") for m in methods}),
        ]
    return "\n\n".join(parts) + "\n"


# Key of a row -> header of the Markdown table and format of the number.
_STEP = {
    "method": ("method", "{}"),
    "step_ms": ("step, ms", "{:.1f}"),
    "fastest_ms": ("fastest", "{:.1f}"),
    "q20_ms": ("20 %", "{:.1f}"),
    "q80_ms": ("80 %", "{:.1f}"),
    "forward_ms": ("forward", "{:.1f}"),
    "backward_ms": ("backward", "{:.1f}"),
    "optimizer_ms": ("optimizer", "{:.1f}"),
    "ratio_to_lower_bound": ("× lower bound", "{:.3f}"),
    "ratio_of_medians": ("× lower bound, of medians", "{:.3f}"),
    "images_per_s": ("images/s", "{:.1f}"),
    "gflop": ("GFLOP", "{:.1f}"),
    "gflop_per_s": ("GFLOP/s", "{:.0f}"),
    "trainable": ("trainable", "{:,}"),
}
_MEMORY = {
    "method": ("method", "{}"),
    "kept_mib": ("kept activations, MiB", "{:.1f}"),
    "formula_mib": ("by formula", "{:.1f}"),
    "ratio_to_lower_bound": ("× lower bound", "{:.3f}"),
    "kept_weights_mib": ("kept weights", "{:.1f}"),
    "peak_mib": ("peak", "{:.1f}"),
    "step_peak_mib": ("increase in the step", "{:.1f}"),
}
_FORMULA = {
    "method": ("method", "{}"),
    "gflop": ("GFLOP", "{:.2f}"),
    "flop_ratio": ("× lower bound", "{:.3f}"),
    "formula_mib": ("kept activations, MiB", "{:.2f}"),
    "kept_ratio": ("× lower bound", "{:.3f}"),
}
_METHODS_TABLE = {
    "method": ("method", "{}"),
    "adapter_parameters": ("trained, without head", "{:,}"),
    "head_parameters": ("head", "{:,}"),
    "kept_mib": ("kept activations, MiB", "{:.1f}"),
    "kept_ratio": ("× lower bound", "{:.3f}"),
    "kept_weights_mib": ("kept weights", "{:.1f}"),
    "frozen_mib": ("frozen weights", "{:.1f}"),
    "optimizer_mib": ("optimizer state", "{:.2f}"),
    "total_mib": ("all parts", "{:.0f}"),
    "peak_mib": ("peak", "{:.0f}"),
    "step_ms": ("step, ms", "{:.0f}"),
    "ratio_to_lower_bound": ("× lower bound", "{:.2f}"),
    "mfu": ("MFU", "{:.1%}"),
}
_BOUND = "Lower bound: the frozen model's forward pass and the gradients of its activations."
_NOTES = {
    "step": f"Medians over the rounds. {_BOUND}\n"
    "× lower bound: median of the ratios within each round. GFLOP: by formula.",
    "memory": f"Kept: what autograd saves from forward to backward, without parameters. {_BOUND}\n"
    "Peak: weights, gradients, optimizer state and activations together.",
    "methods": f"{_BOUND}\n"
    "Memory is counted, in MiB; all parts: also trained weights, their gradients and the images.\n"
    "Step: median; × lower bound: median of the ratios within each round.\n"
    "MFU, model FLOPs utilisation: the operations that the model itself needs, divided by time and by the rate of a\n"
    "large matmul. They are the forward pass, the gradients of activations back to the first layer that trains or is\n"
    "adapted, and the gradients of the model's own trained weights; what a method adds counts as time only.\n"
    "Largest batch: its counted bytes fit; what is allocated for a moment only is not counted.",
    "formula": f"By formula; nothing was run. {_BOUND}",
}
_HEADERS = {"step": _STEP, "memory": _MEMORY, "formula": _FORMULA, "methods": _METHODS_TABLE}
_LARGEST = "batch_in_"  # first part of the names of these columns, which end in the size


def markdown(what: str, rows: Sequence[Row]) -> str:
    """One Markdown table for each case, with a note on what it shows.

    Args:
        what: "step", "memory", "methods" or "formula".
        rows: Rows of `step_rows`, `memory_rows` or `method_rows`, or others with the case's name under "case".
    """
    parts = [_NOTES[what]]
    largest = [key for key in rows[0] if key.startswith(_LARGEST)]
    headers = _HEADERS[what] | {key: (f"largest batch in {key.removeprefix(_LARGEST)}", "{:,}") for key in largest}
    for case in dict.fromkeys(row["case"] for row in rows):
        parts.append(f"**{case}**")
        parts.append(table([row for row in rows if row["case"] == case], headers))
    return "\n\n".join(parts) + "\n"


def rank_markdown(rows: Sequence[Row]) -> str:
    """The Markdown table of kept activations by rank.

    Args:
        rows: Rows of `rank_rows`.
    """
    formats = {key: (key, "{}" if key in ("setting", "rank") else "{:.1f}") for key in rows[0]}
    return f"**Kept activations by rank, MiB**\n\n{table(rows, formats)}\n"


def table(rows: Sequence[Row], headers: dict[str, tuple[str, str]] | None = None) -> str:
    """One Markdown table, of the numbers as `csv_text` writes them: a table made from the CSV file is the same.

    Args:
        rows: Rows, all with the same keys.
        headers: Keys to show, each with its header and format; if None, all keys unchanged.
    """
    headers = headers or {key: (key, "{}") for key in rows[0]}
    lines = [[header for header, _ in headers.values()], ["---", *["---:"] * (len(headers) - 1)]]
    for row in rows:
        lines.append(
            ["-" if row[key] is None else form.format(_rounded(row[key])) for key, (_, form) in headers.items()]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def csv_text(rows: Sequence[Row]) -> str:
    """The rows as CSV, with six significant digits."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _written(value) for key, value in row.items()})
    return buffer.getvalue()


def _written(value: Any) -> Any:
    """A cell of the CSV file."""
    return f"{value:.6g}" if isinstance(value, float) else value


def _rounded(value: Any) -> Any:
    """A cell of the CSV file, read again."""
    return float(_written(value)) if isinstance(value, float) else value


def read_csv(path: Path) -> list[Row]:
    """The rows of a file that `csv_text` made, with numbers as numbers and None for empty cells.

    Args:
        path: CSV file.
    """
    with path.open(encoding="utf-8", newline="") as file:
        return [{key: _parse(cell) for key, cell in row.items()} for row in csv.DictReader(file)]


def _parse(cell: str) -> str | int | float | None:
    if re.fullmatch(r"[+-]?\d+", cell):
        return int(cell)
    try:
        return float(cell)
    except ValueError:
        return cell or None


def _case_columns(case: Case) -> Row:
    blocks = None if case.blocks is None else " ".join(map(str, case.blocks))
    return {"case": str(case), **case.to_dict(), "targets": " ".join(case.targets), "blocks": blocks}


def _to_mib(size: int | None) -> float | None:
    return None if size is None else size / MIB
