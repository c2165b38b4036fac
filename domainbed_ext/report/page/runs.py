"""The runs as the page shows them: an entry each, as far as there is room.

A run's entry, with its charts, its evaluations and what it recorded, takes some kilobytes, so that ten thousand would
make a page that no browser opens. Entries take `ROOM` at most: those of all runs, or else of the runs that the tables'
numbers come from, number by number until it is full.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from domainbed_ext.divergence import is_diverged
from domainbed_ext.model_selection import Record, training_environments
from domainbed_ext.protocols import protocol_of
from domainbed_ext.report.environments import dataset_order, environment_labels
from domainbed_ext.report.methods import algorithm_order, row_label
from domainbed_ext.report.page.chart import Chart, chart
from domainbed_ext.report.plots.palette import styles_of
from domainbed_ext.report.results import Results
from domainbed_ext.report.tables.table import Table
from domainbed_ext.report.trajectories import Moment, trajectory

# In bytes: 1,242 runs of 18 evaluations, which are DomainBed's default. A browser opens such a page in some 3 seconds.
ROOM = 20_000_000
ENTRY, EVALUATION = 8_000, 450  # at most: of a run with all the links to it, and of each of its evaluations


@dataclass(frozen=True)
class Run:
    """A run as the page shows it.

    Attributes:
        anchor: its place in the page.
        name: of its folder.
        method: its id, with the label of the method.
        colour: of the algorithm in the plots.
        where: the environments it was trained on, in words.
        record: its last record, for what holds of the whole run.
        moments: its evaluations.
        chosen: the steps that some table's number is from.
        charts: loss and accuracies, if it was evaluated more than once.
    """

    anchor: str
    name: str
    method: str
    colour: str
    where: str
    record: Record
    moments: list[Moment]
    chosen: list[int]
    charts: list[Chart]

    @property
    def shown(self) -> Moment:
        """The evaluation of its first chosen step, or its last."""
        return next((moment for moment in self.moments if moment.step in self.chosen), self.moments[-1])

    @property
    def seeds(self) -> dict[str, Any]:
        """What makes it this run and not another."""
        args = self.record["args"]
        names = ("trial_seed", "hparams_seed", "seed", "test_envs", "holdout_fraction", "steps")
        facts = {name.replace("_", " "): args[name] for name in names if args.get(name) is not None}
        extra = {"protocol": protocol_of(self.record), "precision": self.record.get("precision")}
        if is_diverged(self.record):
            extra["diverged"] = f"at step {self.record.get('first_nonfinite_step', '?')}"
        if count := self.record.get("trainable_parameters"):
            facts["trainable parameters"] = f"{count:,}"
        return {**facts, **{name: value for name, value in extra.items() if value is not None}}


def last_records(results: Results) -> dict[str, Record]:
    """The last record of every run, by the run's name and in the order of the tables' rows."""
    in_order = sorted(results.runs.items(), key=lambda item: _order(item[1][0]))
    return {name: max(records, key=lambda record: record["step"]) for name, records in in_order}


def chosen_steps(tables: Iterable[Table]) -> dict[str, list[int]]:
    """By run, the steps that some table's number is from."""
    chosen: dict[str, set[int]] = {}
    for table in tables:
        for origins in table.origins.values():
            for run, step in origins:
                chosen.setdefault(run, set()).add(step)
    return {run: sorted(steps) for run, steps in chosen.items()}


def with_entries(results: Results, tables: Iterable[Table]) -> set[str]:
    """The names of the runs that the page has room for.

    Args:
        results: the figures.
        tables: what the page shows of them.

    Returns:
        All, if they fit. Else the runs behind the tables' numbers: for a number all of them or, where they would be
        too many, none but those that another number comes from too.
    """
    sizes = {name: ENTRY + EVALUATION * len(records) for name, records in results.runs.items()}
    if sum(sizes.values()) <= ROOM:
        return set(sizes)
    kept: set[str] = set()
    room = ROOM
    for table in tables:
        for origins in table.origins.values():
            new = {run for run, _ in origins} - kept
            if (needed := sum(sizes[run] for run in new)) <= room:
                kept |= new
                room -= needed
    return kept


def entries(results: Results, last: Mapping[str, Record], chosen: Mapping[str, list[int]]) -> list[Run]:
    """The entries of some runs.

    Args:
        results: the figures.
        last: the last record of each, in the order wanted.
        chosen: by run, the steps that some table's number is from.

    Returns:
        The entries, in that order.
    """
    labels = environment_labels(results.records)
    styles = styles_of(results.algorithms)
    runs, anchors = [], set()
    for name, record in last.items():
        anchor = "run-" + re.sub(r"[^A-Za-z0-9_-]", "-", name)
        while anchor in anchors:
            anchor += "-"
        anchors.add(anchor)
        moments, steps, args = trajectory(results.runs[name]), chosen.get(name, []), record["args"]
        runs.append(
            Run(
                anchor,
                name,
                row_label(args["algorithm"]),
                styles[args["algorithm"]].colour,
                results.setting(record, labels[args["dataset"]]),
                record,
                moments,
                steps,
                _charts(moments, steps),
            )
        )
    return runs


def _order(record: Record) -> tuple[object, ...]:
    args = record["args"]
    key = dataset_order(args["dataset"]), protocol_of(record), training_environments(record)
    return *key, algorithm_order(args["algorithm"]), args["trial_seed"], args["hparams_seed"], record["run"]


def _charts(moments: Sequence[Moment], chosen: Sequence[int]) -> list[Chart]:
    steps = [moment.step for moment in moments]
    accuracies = [
        (kind, name, [getattr(moment, kind) for moment in moments])
        for kind, name in (("train", "train"), ("inside", "in domain"), ("outside", "out of domain"))
    ]
    both = [
        chart("Loss", steps, [("loss", "loss", [moment.loss for moment in moments])], chosen),
        chart("Accuracy (%)", steps, accuracies, chosen),
    ]
    return [each for each in both if each]
