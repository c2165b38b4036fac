"""The runs as the page shows them, an entry each.

A run's entry, with its charts, its evaluations and what it recorded, takes some kilobytes, so that ten thousand would
make a page that no browser opens. Entries take `ROOM` at most: those of all runs if they fit, or else of the runs that
the tables' numbers come from, number by number until `ROOM` is full.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from domainbed_ext.divergence import is_diverged
from domainbed_ext.model_selection import Record, training_environments, trials_of
from domainbed_ext.protocols import CONCEPTS, protocol_of
from domainbed_ext.report.environments import dataset_order, environment_labels
from domainbed_ext.report.methods import algorithm_order, row_label_of
from domainbed_ext.report.page.chart import Chart, lay_out_chart
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
        anchor: Anchor of its entry in the page.
        name: Name of its folder.
        method: Id of its method, with the label.
        colour: Colour of the method in the plots.
        setting: Test domains or source, in words.
        record: Last record, for what holds of the whole run.
        moments: Evaluations by step.
        chosen: Steps that some table's number comes from.
        charts: Loss and accuracies, if it was evaluated more than once.
    """

    anchor: str
    name: str
    method: str
    colour: str
    setting: str
    record: Record
    moments: list[Moment]
    chosen: list[int]
    charts: list[Chart]

    @property
    def shown(self) -> Moment:
        """The evaluation of its first chosen step, or its last."""
        return next((moment for moment in self.moments if moment.step in self.chosen), self.moments[-1])

    @property
    def ingredients(self) -> list[tuple[str, float]]:
        """The runs that a derived run is made of, each with its weight; none of a run that was trained."""
        derived = self.record.get("derived") or {}
        return list(zip(derived.get("ingredients", ()), derived.get("weights", ()), strict=True))

    @property
    def seeds(self) -> dict[str, Any]:
        """What tells the run from all others."""
        args = self.record["args"]
        names = ("trial_seed", "hparams_seed", "seed", "test_envs", "holdout_fraction", "steps")
        facts = {name.replace("_", " "): args[name] for name in names if args.get(name) is not None}
        if args.get("split_by") == CONCEPTS:
            facts["split by"] = CONCEPTS
        if len(trials := trials_of(self.record)) > 1:
            facts["trials"] = ", ".join(map(str, trials))
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
    """Returns the steps that some table's number comes from, by run."""
    chosen: dict[str, set[int]] = {}
    for table in tables:
        for origins in table.origins.values():
            for run, step in origins:
                chosen.setdefault(run, set()).add(step)
    return {run: sorted(steps) for run, steps in chosen.items()}


def runs_with_room(results: Results, tables: Iterable[Table]) -> set[str]:
    """Returns the names of the runs that the page has room for.

    Args:
        results: Figures of the runs.
        tables: Tables that the page shows.

    Returns:
        All names, if they fit. Else those of the runs behind the tables' numbers: for a number all of its runs or,
        where they would be too many, none but those that another number comes from too.
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


def make_entries(results: Results, last: Mapping[str, Record], chosen: Mapping[str, list[int]]) -> list[Run]:
    """Makes the entries of some runs.

    Args:
        results: Figures of all runs.
        last: Last record of each run to show, in order.
        chosen: Steps that some table's number comes from, by run.

    Returns:
        Entries in the order of `last`.
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
                row_label_of(args["algorithm"]),
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
        for kind, name in (("train", "train"), ("inside", "in-domain"), ("outside", "out-of-domain"))
    ]
    both = [
        lay_out_chart("Loss", steps, [("loss", "loss", [moment.loss for moment in moments])], chosen),
        lay_out_chart("Accuracy (%)", steps, accuracies, chosen),
    ]
    return [each for each in both if each]
