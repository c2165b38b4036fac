"""What the benchmark writes: tables, plots, where the numbers come from, and which targets they meet."""

import csv
import io
import json
import os
import platform
import re
import shlex
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch

import vitlorafa
from vitlorafa.bench.floors import rank_saved
from vitlorafa.bench.measure import MIB, Memory, Times
from vitlorafa.bench.methods import Case, described, stack_of
from vitlorafa.config import TARGETS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]

# Okabe and Ito's palette, which the colour-blind can tell apart.
_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
_GREY = "#7A7A7A"


@dataclass(frozen=True)
class Target:
    """A ratio that training B alone should stay under, in one case.

    Attributes:
        quantity: "step time", "kept activations" (x Aᵀ comes on top of what is allowed), or "peak memory".
        against: The method that it is compared with.
        at_most: The ratio.
        device: "cpu" or "cuda".
        model: timm's name.
        batch_size: Images.
        rank: Of the adapter.
        dropouts: Dropouts at which it holds.
    """

    quantity: str
    against: str
    at_most: float
    device: str = "cpu"
    model: str = "vit_small_patch16_224"
    batch_size: int = 16
    rank: int = 8
    dropouts: tuple[float, ...] = (0.0,)

    def covers(self, case: Case) -> bool:
        """Whether it says something of a case."""
        return (
            (case.model, case.batch_size, case.rank) == (self.model, self.batch_size, self.rank)
            and (case.precision, case.resolution, case.targets, case.depth) == ("bf16", 224, TARGETS, None)
            and case.dropout in self.dropouts
            and torch.device(case.device).type == self.device
        )


STEP, KEPT, PEAK = "step time", "kept activations", "peak memory"
GOALS = (
    Target(STEP, "floor", 1.06),
    Target(STEP, "peft_lora_fa", 0.80),
    Target(STEP, "peft_lora", 0.73),
    Target(STEP, "floor", 1.15, rank=64),
    Target(KEPT, "floor", 1.01, dropouts=(0.0, 0.1)),
    Target(STEP, "floor", 1.06, device="cuda", model="vit_base_patch16_224", batch_size=128),
    Target(PEAK, "peft_lora", 0.70, device="cuda", model="vit_base_patch16_224", batch_size=128),
)


def targets(times: Iterable[Times], memory: Iterable[Memory]) -> list[Row]:
    """Which targets the results say something of, what was measured, and whether they are met."""
    timed = {(result.case, result.method): result for result in times}
    weighed = {(result.case, result.method): result for result in memory}
    rows = []
    for goal in GOALS:
        results: dict[Any, Any] = timed if goal.quantity == STEP else weighed
        for (case, method), result in results.items():
            other = results.get((case, goal.against))
            if not (goal.covers(case) and method.startswith("B-") and other):
                continue
            limit = f"{goal.at_most:.2f} × {goal.against}"
            if goal.quantity == STEP:
                ratio = result.ratio(other)
            elif goal.quantity == PEAK:
                if None in (result.peak.total, other.peak.total):
                    continue
                ratio = result.peak.total / other.peak.total
            else:
                limit += " + x Aᵀ"
                stack = stack_of(case)
                own = rank_saved(stack, described(method, case)) if stack else 0
                ratio = (result.saved.activations - own) / other.saved.activations
            rows.append(
                {
                    "quantity": goal.quantity,
                    "method": method,
                    "case": str(case),
                    "at most": limit,
                    "measured": f"{ratio:.3f}",
                    "met": "yes" if ratio <= goal.at_most else "no",
                }
            )
    return rows


def text(times: Sequence[Times], memory: Sequence[Memory]) -> str:
    """All tables, in Markdown."""
    parts = []
    if times:
        parts.append(markdown("step", step_rows(times)))
    if memory:
        parts.append(markdown("memory", memory_rows(memory)))
    if goals := targets(times, memory):
        parts.append(f"**Targets**\n\n{table(goals)}\n")
    return "\n".join(parts)


def write(
    folder: Path,
    what: str,
    source: dict[str, Any],
    times: Sequence[Times],
    memory: Sequence[Memory],
    curves: dict[tuple[str, str], dict[int, int]],
) -> None:
    """Writes what was measured so far, over what stands there: Markdown, CSV, JSON and plots.

    Args:
        folder: An existing one.
        what: "step" or "memory": a part of the files' names, as the device is.
        source: Of `provenance`.
        times: All of them.
        memory: All of it.
        curves: (setting, method) -> rank -> bytes.
    """
    if what == "step":
        memory, curves, rows = [], {}, step_rows(times)
    else:
        times, rows = [], memory_rows(memory)
    device = rows[0]["device"]
    stem = f"{what}_{file_name(device)}"
    machine, versions = source["machine"], source["versions"]
    origin = (
        f"{machine['device']}, {machine['threads']} threads; torch {versions['torch']}, timm {versions['timm']}, "
        f"PEFT {versions['peft']}; {source['date']}\n\n`{source['command']}`"
    )
    content = f"{origin}\n\n{text(times, memory)}"
    if curves:
        rank_table = rank_rows(curves)
        formats = {key: (key, "{}" if key in ("setting", "rank") else "{:.1f}") for key in rank_table[0]}
        content += f"\n**Kept activations against rank, MiB**\n\n{table(rank_table, formats)}\n"
        (folder / f"ranks_{file_name(device)}.csv").write_text(csv_text(rank_table), encoding="utf-8")
        save_figure(memory_against_rank(curves), folder, f"ranks_{file_name(device)}")
    if memory:
        save_figure(memory_by_method(memory), folder, stem)
    (folder / f"{stem}.md").write_text(content, encoding="utf-8")
    (folder / f"{stem}.csv").write_text(csv_text(rows), encoding="utf-8")
    (folder / f"{stem}.json").write_text(json.dumps(source, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def step_rows(times: Iterable[Times]) -> list[Row]:
    """A row a case and method: milliseconds, ratios to the floor, operations by formula."""
    times = list(times)
    floors = {record.case: record for record in times if record.method == "floor"}
    rows = []
    for record in times:
        step, floor = record.step, floors.get(record.case)
        median = statistics.median(step)
        low, high = torch.tensor(step, dtype=torch.float64).quantile(torch.tensor([0.2, 0.8]).double()).tolist()
        rows.append(
            {
                **_columns(record.case),
                "method": record.method,
                "step_ms": 1000 * median,
                "fastest_ms": 1000 * min(step),
                "q20_ms": 1000 * low,
                "q80_ms": 1000 * high,
                "forward_ms": 1000 * statistics.median(record.forward),
                "backward_ms": 1000 * statistics.median(record.backward),
                "optimizer_ms": 1000 * statistics.median(record.optimizer),
                "ratio_to_floor": record.ratio(floor) if floor else None,
                "ratio_of_medians": median / statistics.median(floor.step) if floor else None,
                "images_per_s": record.case.batch_size / median,
                "gflop": record.flops / 1e9 if record.flops else None,
                "gflop_per_s": record.flops / 1e9 / median if record.flops else None,
                "trainable": record.trainable,
                "rounds": len(step),
            }
        )
    return rows


def memory_rows(memory: Iterable[Memory]) -> list[Row]:
    """A row a case and method: MiB kept, measured and by formula, and the peak."""
    memory = list(memory)
    floors = {record.case: record for record in memory if record.method == "floor"}
    rows = []
    for record in memory:
        floor = floors.get(record.case)
        rows.append(
            {
                **_columns(record.case),
                "method": record.method,
                "kept_mib": record.saved.activations / MIB,
                "formula_mib": _mib(record.formula),
                "ratio_to_floor": record.saved.activations / floor.saved.activations if floor else None,
                "kept_weights_mib": record.saved.weights / MIB,
                "peak_mib": _mib(record.peak.total),
                "step_peak_mib": _mib(record.peak.step),
            }
        )
    return rows


# Key of a row -> header of the Markdown table, and how to write the number.
_STEP = {
    "method": ("method", "{}"),
    "step_ms": ("step, ms", "{:.1f}"),
    "fastest_ms": ("fastest", "{:.1f}"),
    "q20_ms": ("20 %", "{:.1f}"),
    "q80_ms": ("80 %", "{:.1f}"),
    "forward_ms": ("forward", "{:.1f}"),
    "backward_ms": ("backward", "{:.1f}"),
    "optimizer_ms": ("optimizer", "{:.1f}"),
    "ratio_to_floor": ("× floor", "{:.3f}"),
    "ratio_of_medians": ("× floor, of medians", "{:.3f}"),
    "images_per_s": ("images/s", "{:.1f}"),
    "gflop": ("GFLOP", "{:.1f}"),
    "gflop_per_s": ("GFLOP/s", "{:.0f}"),
    "trainable": ("trainable", "{:,}"),
}
_MEMORY = {
    "method": ("method", "{}"),
    "kept_mib": ("kept activations, MiB", "{:.1f}"),
    "formula_mib": ("by formula", "{:.1f}"),
    "ratio_to_floor": ("× floor", "{:.3f}"),
    "kept_weights_mib": ("kept weights", "{:.1f}"),
    "peak_mib": ("peak", "{:.1f}"),
    "step_peak_mib": ("of it in the step", "{:.1f}"),
}
_FORMULA = {
    "method": ("method", "{}"),
    "gflop": ("GFLOP", "{:.2f}"),
    "flop_ratio": ("× floor", "{:.3f}"),
    "formula_mib": ("kept activations, MiB", "{:.2f}"),
    "kept_ratio": ("× floor", "{:.3f}"),
}
_NOTES = {
    "step": "Medians over the rounds. × floor: the median of each round's ratio. GFLOP: by formula.",
    "memory": "Kept: what autograd saves from forward to backward, parameters left out. Peak: weights, gradients,\n"
    "optimizer and activations together.",
    "formula": "By formula; nothing was run.",
}
_HEADERS = {"step": _STEP, "memory": _MEMORY, "formula": _FORMULA}


def markdown(what: str, rows: Sequence[Row]) -> str:
    """A table a case.

    Args:
        what: "step", "memory" or "formula".
        rows: Of `step_rows`, `memory_rows`, or the like with the case's name as "case".
    """
    parts = [_NOTES[what]]
    for case in dict.fromkeys(row["case"] for row in rows):
        parts.append(f"**{case}**")
        parts.append(table([row for row in rows if row["case"] == case], _HEADERS[what]))
    return "\n\n".join(parts) + "\n"


def table(rows: Sequence[Row], headers: dict[str, tuple[str, str]] | None = None) -> str:
    """One Markdown table.

    Args:
        rows: All with the same keys.
        headers: Which keys to show, with their header and format; all, as they are, if None.
    """
    headers = headers or {key: (key, "{}") for key in rows[0]}
    lines = [[header for header, _ in headers.values()], ["---", *["---:"] * (len(headers) - 1)]]
    for row in rows:
        lines.append(["-" if row[key] is None else form.format(row[key]) for key, (_, form) in headers.items()])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rank_rows(curves: dict[tuple[str, str], dict[int, int]]) -> list[Row]:
    """A row a setting and rank, with the MiB that each method keeps.

    Args:
        curves: (setting, method) -> rank -> bytes.
    """
    settings = dict.fromkeys(setting for setting, _ in curves)
    methods = list(dict.fromkeys(method for _, method in curves))
    ranks = sorted({rank for curve in curves.values() for rank in curve})
    return [
        {"setting": setting, "rank": rank}
        | {method: _mib(curves.get((setting, method), {}).get(rank)) for method in methods}
        for setting in settings
        for rank in ranks
    ]


def csv_text(rows: Sequence[Row]) -> str:
    """The rows as CSV."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
    return buffer.getvalue()


def provenance(argv: Sequence[str], device: str) -> dict[str, Any]:
    """Command, date, machine and versions, for the JSON beside the tables.

    Args:
        argv: The command's arguments.
        device: Where it ran.
    """
    packages = (vitlorafa, torch, timm)
    versions = {"python": platform.python_version(), **{module.__name__: module.__version__ for module in packages}}
    try:
        versions["peft"] = version("peft")  # without importing it, which takes seconds
    except PackageNotFoundError:
        versions["peft"] = "not installed"
    return {
        "command": shlex.join(["python", "-m", "vitlorafa.bench", *argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "device": device_name(device),
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "versions": versions,
    }


def device_name(device: str) -> str:
    """The GPU's name, or the processor's with its number of cores."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {os.cpu_count()} cores"


def file_name(device: str) -> str:
    """The device's name as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "_", device_name(device).lower()).strip("_")


def memory_by_method(memory: Sequence[Memory]) -> "Figure":
    """Bars of each method's peak memory, and in them of the activations it keeps; a panel a case."""
    cases = list(dict.fromkeys(record.case for record in memory))
    height = sum(0.9 + 0.3 * sum(record.case == case for record in memory) for case in cases)
    figure, panels = _figure(len(cases), 7.5, height)
    for axes, case in zip(panels, cases, strict=True):
        records = [record for record in memory if record.case == case][::-1]
        names = [record.method for record in records]
        kept = [record.saved.activations / MIB for record in records]
        peaks = [_mib(record.peak.total) or 0 for record in records]
        if any(peaks):
            axes.barh(names, peaks, color="#C9D8E6", label="peak: weights, gradients, optimizer, activations")
        axes.barh(names, kept, color=_COLOURS[0], height=0.45, label="activations kept for backward")
        for y, (inside, whole) in enumerate(zip(kept, peaks, strict=True)):
            text = f" {inside:,.0f} of {whole:,.0f}" if whole else f" {inside:,.0f}"
            axes.text(max(inside, whole), y, text, va="center", fontsize=8)
        axes.set_xlim(0, 1.2 * max(*kept, *peaks))
        axes.set_title(str(case), fontsize=9, loc="left")
        axes.grid(axis="y", visible=False)
    panels[-1].set_xlabel("MiB", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=8, frameon=False, ncols=2)
    return figure


def memory_against_rank(curves: dict[tuple[str, str], dict[int, int]]) -> "Figure":
    """Activations kept over the rank, a line a method and a panel a setting.

    Args:
        curves: (setting, method) -> rank -> bytes.
    """
    settings = list(dict.fromkeys(setting for setting, _ in curves))
    methods = list(dict.fromkeys(method for _, method in curves))
    figure, panels = _figure(len(settings), 6.0, 3.8 * len(settings))
    for axes, setting in zip(panels, settings, strict=True):
        top = 0.0
        for index, method in enumerate(methods):
            curve = curves.get((setting, method))
            if not curve:
                continue
            floor = method == "floor"
            style = {"color": _GREY, "linestyle": "--"} if floor else {"color": _COLOURS[index % len(_COLOURS)]}
            values = [size / MIB for size in curve.values()]
            axes.plot(list(curve), values, label=method, marker="" if floor else "osD^vP"[index % 6], **style)
            top = max(top, *values)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_ylim(0, 1.08 * top)
        axes.set_title(setting, fontsize=9, loc="left")
        axes.set_ylabel("activations kept for backward (MiB)", fontsize=9)
        axes.legend(fontsize=8, frameon=False)
    panels[-1].set_xlabel("rank", fontsize=9)
    return figure


def save_figure(figure: "Figure", folder: Path, stem: str) -> None:
    """Writes a figure as SVG and PNG, the same bytes for the same figure."""
    import matplotlib

    # Without a salt and with a date, an SVG would differ from one run to the next.
    with matplotlib.rc_context({"svg.hashsalt": "vitlorafa"}):
        figure.savefig(folder / f"{stem}.svg", metadata={"Date": None})
        figure.savefig(folder / f"{stem}.png", metadata={"Software": None})


def _figure(panels: int, width: float, height: float) -> tuple["Figure", list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(panels, squeeze=False).flat)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(color="#E6E6E6", linewidth=0.6)
        each.set_axisbelow(True)
        each.tick_params(labelsize=8)
    return figure, axes


def _columns(case: Case) -> Row:
    fields = case.to_dict()
    return {"case": str(case), **fields, "targets": " ".join(case.targets)}


def _mib(size: int | None) -> float | None:
    return None if size is None else size / MIB


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "unknown processor"
