"""The runs as the page lists them, a row of a table each.

A run takes some hundred bytes of the table, and its details, which a script shows on request, some kilobytes of JSON.
Ten thousand runs would make a page that no browser opens, so runs take `ROOM` at most: all runs if they fit, or else
those that the tables' numbers come from, number by number until `ROOM` is full.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from domainbed_ext.divergence import is_diverged
from domainbed_ext.model_selection import Record, training_environments
from domainbed_ext.protocols import SINGLE_SOURCE, protocol_of
from domainbed_ext.report.environments import dataset_order, environment_labels, full_names
from domainbed_ext.report.methods import algorithm_order, label_of
from domainbed_ext.report.results import Results
from domainbed_ext.report.tables.table import Table
from domainbed_ext.report.trajectories import Moment, trajectory

# In bytes: 4,000 runs of 18 evaluations, which are DomainBed's default. A browser opens such a page in some 3 seconds.
ROOM = 20_000_000
ENTRY, EVALUATION = 4_000, 60  # at most: of a run with all the links to it, and of each of its evaluations


@dataclass(frozen=True)
class Run:
    """A run as the page shows it.

    Attributes:
        anchor: Anchor of its row in the page.
        name: Name of its folder.
        environment: Test domains or source, in words.
        record: Last record, for what holds of the whole run.
        moments: Evaluations by step.
        chosen: Steps that some table's number comes from.
    """

    anchor: str
    name: str
    environment: str
    record: Record
    moments: list[Moment]
    chosen: list[int]

    @property
    def algorithm(self) -> str:
        """Id of its method."""
        return str(self.record["args"]["algorithm"])

    @property
    def label(self) -> str:
        """Label of its method."""
        return label_of(self.algorithm)

    @property
    def shown(self) -> Moment:
        """The evaluation of its first chosen step, or its last."""
        return next((moment for moment in self.moments if moment.step in self.chosen), self.moments[-1])

    @property
    def state(self) -> str:
        """Whether some table's number comes from it, or why not."""
        if is_diverged(self.record):
            return "diverged"
        steps = self.record["args"].get("steps")
        if "derived" not in self.record and steps and self.record["step"] + 1 < steps:
            return "unfinished"
        if self.chosen:
            return "selected"
        return "derived" if "derived" in self.record else "not selected"


def last_records(results: Results) -> dict[str, Record]:
    """The last record of every run, by the run's name and in the order of the tables' rows and columns."""
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


def list_runs(results: Results, last: Mapping[str, Record], chosen: Mapping[str, list[int]]) -> list[Run]:
    """Lists some runs.

    Args:
        results: Figures of all runs.
        last: Last record of each run to show, in order.
        chosen: Steps that some table's number comes from, by run.

    Returns:
        Runs in the order of `last`.
    """
    names = {dataset: _spelled_out(dataset, labels) for dataset, labels in environment_labels(results.records).items()}
    several = len(names) > 1
    runs, anchors = [], set()
    for name, record in last.items():
        anchor = "run-" + re.sub(r"[^A-Za-z0-9_-]", "-", name)
        while anchor in anchors:
            anchor += "-"
        anchors.add(anchor)
        dataset = record["args"]["dataset"]
        setting = results.setting(record, names[dataset])
        environment = f"{dataset}, {setting}" if several else setting
        runs.append(Run(anchor, name, environment, record, trajectory(results.runs[name]), chosen.get(name, [])))
    return runs


def _spelled_out(dataset: str, labels: Sequence[str]) -> list[str]:
    names = full_names(dataset)
    return [names.get(label, label) for label in labels]


def _order(record: Record) -> tuple[object, ...]:
    """Sort key of runs: as the tables' columns, then as their rows."""
    args = record["args"]
    single = protocol_of(record) == SINGLE_SOURCE
    environments = training_environments(record) if single else sorted(args["test_envs"])
    key = dataset_order(args["dataset"]), protocol_of(record), len(environments), environments
    return *key, algorithm_order(args["algorithm"]), args["trial_seed"], args["hparams_seed"], record["run"]
