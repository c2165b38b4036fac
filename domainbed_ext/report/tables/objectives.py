"""A table of objectives: a row for each adaptation that has several, a column for each objective."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from domainbed_ext.report.methods import (
    adaptation_of,
    adaptation_settings_of,
    has_objectives,
    objective_of,
    objectives_of,
    settings_of,
)
from domainbed_ext.report.summary import Summary
from domainbed_ext.report.tables.captions import warning
from domainbed_ext.report.tables.columns import Column, Figure, lay_out
from domainbed_ext.report.tables.table import NOT_RECORDED, Origin, Table

if TYPE_CHECKING:
    from domainbed_ext.report.figures import Comparison


@dataclass(frozen=True)
class ObjectiveColumn(Column):
    """One objective's accuracies; a row goes by the id of its first method.

    Attributes:
        header: Head of the column.
        figure: Accuracy of a method.
        ids: Id of the method with this objective, by the row's id.
    """

    header: str
    figure: Figure
    ids: Mapping[str, str]

    def text(self, algorithm: str) -> str:
        """The accuracy; "-" of a combination that was not run."""
        return self.figure.text(self.ids[algorithm]) if algorithm in self.ids else NOT_RECORDED

    def origins(self, algorithm: str) -> list[Origin]:
        """The chosen records."""
        return self.figure.origins(self.ids[algorithm]) if algorithm in self.ids else []

    def ranked_value(self, algorithm: str) -> Summary | None:
        """The accuracy, compared within the objective."""
        return self.figure.ranked_value(self.ids[algorithm]) if algorithm in self.ids else None


def objectives_table(comparison: "Comparison", title: str) -> Table | None:
    """The out-of-domain accuracy of each adaptation with each objective.

    Args:
        comparison: The methods under one selection method.
        title: What the methods were run on.

    Returns:
        The table; None if all methods have the default objective.
    """
    if not has_objectives(comparison.algorithms):
        return None
    rows = _rows(comparison)
    figure = Figure("", comparison, "out_of_domain", ranked=True)
    objectives = objectives_of(algorithm for of_row in rows.values() for algorithm in of_row.values())
    firsts = [next(iter(of_row.values())) for of_row in rows.values()]
    columns = [
        ObjectiveColumn(
            objective,
            figure,
            {
                first: of_row[objective]
                for first, of_row in zip(firsts, rows.values(), strict=True)
                if objective in of_row
            },
        )
        for objective in objectives
    ]
    lacking = " -: not run." if any(len(of_row) < len(objectives) for of_row in rows.values()) else ""
    return lay_out(
        f"{title}, objectives",
        ["Adaptation"],
        [[name] for name in rows],
        firsts,
        columns,
        f"Out-of-domain accuracy in % of each adaptation with each objective, mean ± {comparison.error}.{lacking} "
        f"Selection: {comparison.selection.description}." + warning([comparison]),
    )


def _rows(comparison: "Comparison") -> dict[str, dict[str, str]]:
    """The ids by row and objective, of rows with several objectives.

    A row is an adaptation or, where the methods differ in more than the objective, a variant of one: by what trains if
    that tells them apart, else by all of their settings.
    """
    namings: list[Callable[[str], list[str]]] = [lambda algorithm: [], adaptation_settings_of, settings_of]
    by_adaptation: defaultdict[str, list[str]] = defaultdict(list)
    for algorithm in comparison.algorithms:
        by_adaptation[adaptation_of(algorithm)].append(algorithm)
    rows: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for adaptation, algorithms in by_adaptation.items():
        for settings in namings:
            places = [(", ".join([adaptation, *settings(each)]), objective_of(each)) for each in algorithms]
            if len(set(places)) == len(places):
                break
        for (name, objective), algorithm in zip(places, algorithms, strict=True):
            rows[name][objective] = algorithm
    return {name: of_row for name, of_row in rows.items() if len(of_row) > 1}
