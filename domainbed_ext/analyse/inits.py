"""Accuracy by the start of A and B, and the distribution of A before and after training.

Zhu et al. 2024, tables 5 and 10, compare starts of the factors that train and of those that are frozen. LoRA-FA, table
5 and appendix E.3, compares those of the frozen A, and its figure 3 shows the entries of A before and after training.
"""

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from domainbed_ext.analyse.analysis import Analysis
from domainbed_ext.analyse.averages import mean_of
from domainbed_ext.analyse.matrices import Matrix
from domainbed_ext.analyse.plots import add_legend, grid_of, hide_others
from domainbed_ext.analyse.runs import ADAPTER, Adapter, ChosenRun, Sweep, group_by, read_adapters, without_setting
from domainbed_ext.analyse.tables import origins_of, ratio, start_breaks
from domainbed_ext.model_selection import mean
from domainbed_ext.report.differences import Difference
from domainbed_ext.report.figures import Comparison
from domainbed_ext.report.methods import algorithm_order, label_of, row_label_of
from domainbed_ext.report.plots.style import GREY, bare
from domainbed_ext.report.scores import Metric
from domainbed_ext.report.summary import Estimate, estimate
from domainbed_ext.report.tables.table import NOT_RECORDED, Table

ACCURACY, ENTRIES = "accuracy", "entries"
EDGES = np.linspace(-4, 4, 42)  # of the bins, in standard deviations
_METRICS: tuple[Metric, ...] = ("out_of_domain", "in_domain")
_PANEL_INCHES = 2.7, 2.2


@dataclass(frozen=True)
class Row:
    """The accuracy of a method, or the entries of its A's in one projection.

    Attributes:
        group: What the method was run on.
        kind: "accuracy" or "entries".
        algorithm: Id of the method.
        trained: Letters of the factors that train.
        init_A: How A starts.
        init_B: How B starts.
        reference: Id of the method with the default starts; empty if the sweep has none.
        trials: Number of trials.
        runs: The runs and their steps.
        accuracies: Out-of-domain and in-domain accuracy: mean, and lower and upper end of the 95 % interval over
            trials, in percent.
        differences: The same of their differences to the reference, paired by trial, in points.
        projection: Name of the projection.
        size_before: Root mean square of A's entries at the start, times √d_in.
        size_after: The same after training.
        kurtosis_before: Excess kurtosis of the entries at the start: 0 of a Gaussian, −1.2 of a uniform distribution.
        kurtosis_after: The same after training.
        moved: ‖A − A₀‖/‖A₀‖.
        before: Shares of the entries at the start in bins of their standard deviations, from −4 to 4.
        after: The same after training.
    """

    group: str
    kind: str
    algorithm: str
    trained: str
    init_A: str  # noqa: N815
    init_B: str  # noqa: N815
    reference: str
    trials: int
    runs: list[list[object]]
    accuracies: list[list[float]] = field(default_factory=list)
    differences: list[list[float]] = field(default_factory=list)
    projection: str = ""
    size_before: float = math.nan
    size_after: float = math.nan
    kurtosis_before: float = math.nan
    kurtosis_after: float = math.nan
    moved: float = math.nan
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)


def compute(sweep: Sweep, args: argparse.Namespace) -> list[Row]:
    """Computes the accuracy of each method with adapters, and the distribution of its A's if they train.

    Args:
        sweep: Runs of the sweep.
        args: Options; this analysis has none of its own.

    Raises:
        BenchmarkError: There are no runs with adapters.
    """
    runs = {each.run.name: each for each in sweep.adapted()}
    parts = [
        (comparison, algorithm, members)
        for comparison in sweep.results.panels
        for algorithm in comparison.algorithms
        if (members := [runs[name] for record in comparison.records(algorithm) if (name := record["run"]) in runs])
    ]
    # Read one method after the other, so that no more than the factors of one are in memory.
    adapters = read_adapters([each for _, _, members in parts for each in members])
    return [
        row
        for comparison, algorithm, members in parts
        for row in _rows(comparison, algorithm, list(itertools.islice(adapters, len(members))))
    ]


def tables(rows: Sequence[Row]) -> list[Table]:
    """Makes a table of accuracies and one of the entries of A.

    Args:
        rows: Rows of `compute`.
    """
    made = []
    for group, members in group_by(rows, lambda row: row.group).items():
        accuracies, entries = ([row for row in members if row.kind == kind] for kind in (ACCURACY, ENTRIES))
        made.append(_accuracy_table(group, accuracies))
        if entries:
            made.append(_entries_table(group, entries))
    return made


def figure(rows: Sequence[Row]) -> Figure | None:
    """Draws the entries of A before and after training: a panel for each method and projection.

    Args:
        rows: Rows of `compute`.
    """
    shown = [row for row in rows if row.kind == ENTRIES]
    if not shown:
        return None
    several = len({row.group for row in shown}) > 1
    panels = {(f"{row.group}, " * several + label_of(row.algorithm), row.projection): row for row in shown}
    projections = list(dict.fromkeys(row.projection for row in shown))
    drawn, axes = grid_of(list(dict.fromkeys(name for name, _ in panels)), projections, _PANEL_INCHES)
    middles, width = (EDGES[1:] + EDGES[:-1]) / 2, float(EDGES[1] - EDGES[0])
    gaussian = np.exp(-np.square(middles) / 2) / math.sqrt(2 * math.pi)
    for place, row in panels.items():
        ax = axes[place]
        bare(ax, "y")
        ax.plot(middles, gaussian, color=GREY, linewidth=1, label="Gaussian")
        for shares, colour, label in ((row.before, "#56B4E9", "before"), (row.after, "#D55E00", "after")):
            if shares:
                ax.stairs(np.asarray(shares) / width, EDGES, color=colour, linewidth=1.4, label=label)
        ax.set_ylim(bottom=0)
    hide_others(axes, list(panels))
    add_legend(drawn, list(axes.values()))
    drawn.supxlabel("entries of A, in standard deviations\nover all layers and runs", fontsize=9)
    drawn.supylabel("density", fontsize=9)
    return drawn


ANALYSIS = Analysis(
    "inits",
    "Entries of A before and after training",
    "Accuracy by the start of A and B, and the distribution of A before and after training",
    Row,
    compute,
    tables,
    figure,
)


def _rows(comparison: Comparison, algorithm: str, adapters: Sequence[Adapter]) -> list[Row]:
    layers = [layer for each in adapters for layer in each.layers.values()]
    reference = without_setting(without_setting(algorithm, "init_A"), "init_B")
    if reference == algorithm or not comparison.scores(reference):
        reference = ""
    estimates: list[Estimate | None] = []
    differences: list[Estimate | None] = []
    for metric in _METRICS:
        by_trial = group_by(comparison.scores(algorithm), lambda score: score.trial_seed)
        values = [mean([score.value(metric) for score in scores]) for scores in by_trial.values()]  # NaN if one is
        estimates.append(None if comparison.unmeasured(algorithm, metric) else estimate(values))
        paired = comparison.differences.between(algorithm, reference, metric) if reference else None
        differences.append(paired.over_trials if paired else None)
    shared = partial(
        Row,
        group=comparison.title,
        algorithm=algorithm,
        trained=layers[0].trained,
        init_A=_start(adapters[0].chosen, "A"),
        init_B=_start(adapters[0].chosen, "B"),
        reference=reference,
        trials=comparison.trials(algorithm),
        runs=[each.chosen.origin for each in adapters],
    )
    rows = [
        shared(kind=ACCURACY, accuracies=list(map(_numbers, estimates)), differences=list(map(_numbers, differences)))
    ]
    for projection, members in group_by(layers, lambda layer: layer.projection).items():
        if "A" in layers[0].trained:
            before, after = [layer.start_A for layer in members], [layer.A for layer in members]
            rows.append(
                shared(
                    kind=ENTRIES,
                    projection=projection,
                    size_before=_size(before),
                    size_after=_size(after),
                    kurtosis_before=_kurtosis(before),
                    kurtosis_after=_kurtosis(after),
                    moved=_moved(before, after),
                    before=_histogram(before),
                    after=_histogram(after),
                )
            )
    return rows


def _start(chosen: ChosenRun, factor: str) -> str:
    """How a factor starts: a name of `vitlorafa.INITS`, or several by projection."""
    description = json.loads((chosen.saved.folder / ADAPTER).read_text(encoding="utf-8"))
    return str(description["config"][f"init_{factor}"]).replace(",", ", ")


def _numbers(figure: Estimate | None) -> list[float]:
    """Mean, and lower and upper end of the interval; NaN for what is not known."""
    if figure is None:
        return [math.nan] * 3
    return [figure.mean, *(figure.interval or (math.nan, math.nan))]


def _size(matrices: Sequence[Matrix]) -> float:
    """The root mean square of the entries times √width, which is 1 for orthonormal rows."""
    return mean_of([float(np.sqrt(np.square(matrix).mean() * matrix.shape[1])) for matrix in matrices])


def _kurtosis(matrices: Sequence[Matrix]) -> float:
    """The mean over matrices of the excess kurtosis of their entries; NaN if they are all the same."""
    kurtoses = []
    for matrix in matrices:
        centred = matrix - matrix.mean()
        variance = float(np.square(centred).mean())
        kurtoses.append(float((centred**4).mean()) / variance**2 - 3 if variance else math.nan)
    return mean_of(kurtoses)


def _moved(before: Sequence[Matrix], after: Sequence[Matrix]) -> float:
    return mean_of(
        [
            float(np.linalg.norm(now - start) / np.linalg.norm(start)) if start.any() else math.nan
            for start, now in zip(before, after, strict=True)
        ]
    )


def _histogram(matrices: Sequence[Matrix]) -> list[float]:
    """Shares in the bins of each matrix's own standard deviations; none if there is no spread."""
    scaled = [(matrix - matrix.mean()) / matrix.std() for matrix in matrices if matrix.std()]
    if not scaled:
        return []
    entries = np.concatenate([matrix.ravel() for matrix in scaled])
    return [float(count / len(entries)) for count in np.histogram(entries, EDGES)[0]]


def _accuracy_table(group: str, rows: Sequence[Row]) -> Table:
    in_order = sorted(rows, key=lambda row: algorithm_order(row.algorithm))
    return Table(
        f"{group}, accuracy by the start of A and B",
        [
            "Algorithm",
            "Trains",
            "A starts",
            "B starts",
            "Out-of-domain",
            "In-domain",
            "Out-of-domain vs default",
            "Trials",
        ],
        [
            [
                row_label_of(row.algorithm),
                row.trained,
                row.init_A,
                row.init_B,
                *(str(_estimate(each, row.trials)) for each in row.accuracies),
                str(Difference(*_estimate(row.differences[0], row.trials))) if row.reference else NOT_RECORDED,
                str(row.trials),
            ]
            for row in in_order
        ],
        "Accuracy in %, mean over trials of each trial's mean over test domains, with the 95 % interval by Student's "
        "t. Vs default: the difference to the same method with its default starts, in points, paired by trial; - where "
        "the sweep has no such runs. Zhu et al. 2024, tables 5 and 10; LoRA-FA, table 5 and appendix E.3.",
        texts=4,
        algorithms=[row.algorithm for row in in_order],
        origins={(number, column): origins_of(row.runs) for number, row in enumerate(in_order) for column in (4, 5, 6)},
        breaks=start_breaks([row.trained for row in in_order]),
    )


def _estimate(numbers: Sequence[float], trials: int) -> Estimate:
    mean, low, high = numbers
    return Estimate(mean, None if math.isnan(low) else (low, high), trials)


def _entries_table(group: str, rows: Sequence[Row]) -> Table:
    in_order = sorted(rows, key=lambda row: algorithm_order(row.algorithm))
    columns = ["size_before", "size_after", "kurtosis_before", "kurtosis_after", "moved"]
    return Table(
        f"{group}, entries of A before and after training",
        [
            "Algorithm",
            "A starts",
            "Projection",
            "Size before",
            "Size after",
            "Kurtosis before",
            "Kurtosis after",
            "Moved",
        ],
        [
            [row_label_of(row.algorithm), row.init_A, row.projection, *(ratio(getattr(row, name)) for name in columns)]
            for row in in_order
        ],
        "Size: root mean square of the entries times √d_in, 1 for orthonormal rows. Kurtosis: excess kurtosis of a "
        "matrix's entries, 0 for a Gaussian and −1.2 for a uniform distribution. Moved: ‖A − A₀‖/‖A₀‖. Means over "
        "layers and runs; - where A starts at zero.",
        texts=3,
        algorithms=[row.algorithm for row in in_order],
        origins={
            (number, column): origins_of(row.runs) for number, row in enumerate(in_order) for column in range(3, 8)
        },
        breaks=start_breaks([row.algorithm for row in in_order]),
    )
