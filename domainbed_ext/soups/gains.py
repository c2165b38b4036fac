"""What soups gain over their ingredients, paired: both are tested on the same images."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from domainbed_ext.model_selection import Record, mean, target_accuracy, validation_accuracy
from domainbed_ext.report.differences import Difference, difference_over_trials
from domainbed_ext.report.methods import row_label_of

Row = tuple[str, str, str]
"""Data set, name of the row, and source of single-source runs."""


def gains_table(soups: Sequence[Record], runs: Mapping[str, Record]) -> Table:
    """A table of the soups' out-of-domain accuracy, and of its difference to that of the averaged runs.

    Args:
        soups: Records of soups.
        runs: Selected record of each run that they could be made of, by name.

    Returns:
        A row per data set and row of soups. Intervals are at 95 %, by Student's t over soups of different trials.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Out-of-domain accuracy in %", title_justify="left")
    for header in ("data set", "soup", "soups", "accuracy", "minus mean of its runs", "minus its best run"):
        table.add_column(header)
    by_row: defaultdict[Row, list[Record]] = defaultdict(list)
    for record in soups:
        args = record["args"]
        source = ", ".join(record["environments"][env] for env in args.get("source_envs") or ())
        by_row[args["dataset"], args["algorithm"], source].append(record)
    for (dataset, algorithm, source), records in by_row.items():
        accuracy = mean([value for values in _by_trials(records, _accuracy).values() for value in values])
        gains = [_difference(_by_trials(records, gain, runs)) for gain in (_gain_over_mean, _gain_over_best)]
        name = f"{row_label_of(algorithm)}{f', from {source} alone' if source else ''}"
        table.add_row(dataset, name, str(len(records)), f"{100 * accuracy:.1f}", *map(str, gains))
    return table


def _by_trials(records: Sequence[Record], value: Any, *args: Any) -> dict[tuple[int, ...], list[float]]:
    """Values of soups by the trials that they are of."""
    values: defaultdict[tuple[int, ...], list[float]] = defaultdict(list)
    for record in records:
        values[tuple(record["derived"]["trials"])].append(value(record, *args))
    return values


def _difference(by_trials: Mapping[tuple[int, ...], Sequence[float]]) -> Difference | None:
    return difference_over_trials([mean(values) for values in by_trials.values()])


def _accuracy(record: Record) -> float:
    """The mean accuracy of a run or a soup on the test domains of the soup."""
    return mean([target_accuracy(record, env) for env in record["args"]["test_envs"]])


def _of_runs(soup: Record, runs: Mapping[str, Record]) -> list[tuple[float, float]]:
    """Validation accuracy of each run, and its accuracy on the test domains of the soup."""
    candidates = [runs[each["run"]] for each in soup["derived"]["candidates"]]
    test_envs = soup["args"]["test_envs"]
    return [(validation_accuracy(run), mean([target_accuracy(run, env) for env in test_envs])) for run in candidates]


def _gain_over_mean(soup: Record, runs: Mapping[str, Record]) -> float:
    return _accuracy(soup) - mean([accuracy for _, accuracy in _of_runs(soup, runs)])


def _gain_over_best(soup: Record, runs: Mapping[str, Record]) -> float:
    """Over the run with the best validation accuracy."""
    return _accuracy(soup) - max(_of_runs(soup, runs))[1]
