"""Our single-source figures beside those of the asymmetry paper (Zhu et al., 2024), tables 7 and 11 to 13."""

import csv
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import pandas as pd

from domainbed_ext.datasets.registry import DATASETS
from domainbed_ext.report.leave_one_out import Results, SingleSource, Summary
from domainbed_ext.report.tables.cells import origins, roles
from domainbed_ext.report.tables.table import MISSING, Cell, Origin, Table, narrow, signed
from domainbed_ext.system import resources

CITATION = "Zhu et al. (2024)"
FACTORS = ("BA", "BOnly", "AOnly")
Quantity = Literal["accuracy", "gap"]
# The paper names no model but "a pre-trained ViT"; its 86.4M parameters are ViT-B/16's.
BACKBONE = "vit_base_patch16_224"
STEPS = {"TerraIncognita": 20_000}  # it states no others


class Printed(NamedTuple):
    """A cell of the paper, in %."""

    mean: float
    std: float


@dataclass(frozen=True)
class PaperSource:
    """What the paper prints of one data set.

    Attributes:
        dataset: its name.
        environments: in the order of its tables, which is that of the folders.
        source: the index of the environment trained on.
        cells: by algorithm, quantity and environment.
    """

    dataset: str
    environments: list[str]
    source: int
    cells: dict[tuple[str, Quantity, int], Printed]

    def cell(self, algorithm: str, quantity: Quantity, env: int | None) -> Printed | None:
        """A printed cell; of environment None the plain average of those out of domain, as table 7 has it."""
        if env is not None:
            return self.cells.get((algorithm, quantity, env))
        others = [env for env in range(len(self.environments)) if env != self.source]
        found = [self.cells.get((algorithm, quantity, env)) for env in others]
        if any(cell is None for cell in found):
            return None
        return Printed(*(sum(values) / len(others) for values in zip(*filter(None, found), strict=True)))

    @cached_property
    def algorithms(self) -> list[str]:
        """In the order of the tables."""
        return list(dict.fromkeys(algorithm for algorithm, _, _ in self.cells))


def printed() -> dict[str, PaperSource]:
    """The paper's tables 11 to 13, by data set."""
    rows: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
    for number in (11, 12, 13):
        with (resources.results() / "paper" / f"table{number}.csv").open(newline="", encoding="ascii") as file:
            for row in csv.DictReader(file):
                rows[row["dataset"]].append(row)
    found = {}
    for dataset, cells in rows.items():
        names = list(dict.fromkeys(row["environment"] for row in cells))
        source = next(names.index(row["environment"]) for row in cells if row["role"] == "ID")
        by_place: dict[tuple[str, Quantity, int], Printed] = {}
        for row in cells:
            quantity: Quantity = "gap" if row["metric"] == "gap" else "accuracy"
            place = row["algorithm"], quantity, names.index(row["environment"])
            by_place[place] = Printed(float(row["mean"]), float(row["std"]))
        found[dataset] = PaperSource(dataset, names, source, by_place)
    return found


def known_as(single: SingleSource, dataset: str, source: int) -> dict[str, str]:
    """The paper's names of our algorithms, e.g. BOnly@rank=8 of BOnly where 8 is the rank it was run at.

    Args:
        single: our figures.
        dataset: a data set.
        source: the index of the environment trained on.

    Returns:
        Our name by the paper's. Of several that answer to one, the one of that very name, else the first.
    """
    names: dict[str, str] = {}
    for algorithm in single.algorithms:
        scores = single.scores(dataset, algorithm, source)
        family = algorithm.partition("@")[0]
        name = algorithm
        if family in FACTORS:
            ranks = {(score.record.get("hparams") or {}).get("rank") for score in scores}
            if len(ranks) == 1 and None not in ranks:
                name = f"{family}@rank={ranks.pop()}"
        if scores and (name not in names or name == algorithm):
            names[name] = algorithm
    return names


def comparisons(single: SingleSource) -> Iterator[tuple[PaperSource, dict[str, str]]]:
    """The data sets that both have, trained on the same source, with our names of the paper's methods."""
    for dataset, theirs in printed().items():
        ours = single.sources.get(dataset, [])
        same = len(single.environments.get(dataset, [])) == len(theirs.environments)
        # The paper's tables name the folders, which are in the order of the indices.
        if same and theirs.source in ours and list(getattr(DATASETS[dataset], "DOMAINS", ())) == theirs.environments:
            names = known_as(single, dataset, theirs.source)
            shared = {name: names[name] for name in theirs.algorithms if name in names}
            if shared:
                yield theirs, shared


def paper_tables(results: Results) -> list[Table]:
    """Accuracy and gap of every data set that the paper has too: a row each of ours, the paper's, the difference."""
    if results.single is None:
        return []
    found = []
    for theirs, names in comparisons(results.single):
        words = differences(results, results.single, theirs.dataset)
        for quantity in ("accuracy", "gap"):
            found.append(_table(results.single, theirs, names, quantity, words))
    return found


def differences(results: Results, single: SingleSource, dataset: str) -> str:
    """In words, what of our runs differs from the paper's, or is not known of the paper's.

    Args:
        results: the figures.
        single: those of single-source runs.
        dataset: a data set.
    """
    records = [
        score.record
        for name, algorithm, source in single.rows()
        for score in single.scores(name, algorithm, source)
        if name == dataset
    ]
    backbones = sorted({str((record.get("hparams") or {}).get("backbone", "not recorded")) for record in records})
    runs = {record["run"] for record in records}
    lengths: defaultdict[str, int] = defaultdict(int)
    for record in results.records:
        if record["run"] in runs:
            lengths[record["run"]] = max(lengths[record["run"]], int(record["step"]) + 1)
    steps = sorted(set(lengths.values()))
    trials = sorted({int(record["args"]["trial_seed"]) for record in records})
    parts = []
    if any(not name.startswith(BACKBONE) for name in backbones):
        parts.append(f"the backbone is {' or '.join(backbones)}, where the paper's parameter counts are ViT-B/16's")
    ran = f"{' or '.join(f'{count:,}' for count in steps)} steps"
    stated = STEPS.get(dataset)
    if stated is None:
        parts.append(f"we train for {ran}, the paper does not say for how many on {dataset}")
    elif any(abs(count - stated) > 1 for count in steps):
        parts.append(f"we train for {ran}, the paper for {stated:,}")
    parts.append(
        f"we ran {len(trials)} trial{'s' if len(trials) != 1 else ''}, the paper states neither its number nor its "
        "learning rates"
    )
    level = (
        ""
        if len(parts) < 2 or not parts[0].startswith("the backbone")
        else (" So levels cannot be compared with the paper's, only the order of the methods.")
    )
    return f"What differs: {'; '.join(parts)}.{level}"


def tidy(results: Results) -> pd.DataFrame:
    """Both sides in numbers: a row per data set, method, quantity and environment ("Avg": the mean out of domain)."""
    rows: list[dict[str, object]] = []
    if (single := results.single) is None:
        return pd.DataFrame(rows)
    for theirs, names in comparisons(single):
        for name, algorithm in names.items():
            for quantity in ("accuracy", "gap"):
                for env in [*range(len(theirs.environments)), None]:
                    ours, paper = _pair(single, theirs, algorithm, name, quantity, env)
                    rows.append(
                        {
                            "dataset": theirs.dataset,
                            "source": theirs.environments[theirs.source],
                            "environment": "Avg" if env is None else theirs.environments[env],
                            "role": "ID" if env == theirs.source else "OOD",
                            "metric": quantity,
                            "method": name,
                            "algorithm": algorithm,
                            "ours": ours and ours.mean,
                            "ours_std": ours and ours.err,
                            "trials": ours and ours.trials,
                            "paper": paper and paper.mean,
                            "paper_std": paper and paper.std,
                            "difference": ours.mean - paper.mean if ours and paper else None,
                        }
                    )
    return pd.DataFrame(rows)


def _pair(
    single: SingleSource, theirs: PaperSource, algorithm: str, name: str, quantity: Quantity, env: int | None
) -> tuple[Summary | None, Printed | None]:
    ours = single.summary(theirs.dataset, algorithm, theirs.source, quantity, env)
    return ours, theirs.cell(name, quantity, env)


def _table(single: SingleSource, theirs: PaperSource, names: dict[str, str], quantity: Quantity, words: str) -> Table:
    dataset, source = theirs.dataset, theirs.source
    environments = [*range(len(theirs.environments)), None]
    rows: list[list[str]] = []
    sources: dict[Cell, list[Origin]] = {}
    for name, algorithm in names.items():
        pairs = [_pair(single, theirs, algorithm, name, quantity, env) for env in environments]
        records = [score.record for score in single.scores(dataset, algorithm, source)]
        sources |= {(len(rows), column): origins(records) for column in range(2, len(environments) + 2)}
        rows.append([algorithm, "ours", *(narrow(ours) for ours, _ in pairs)])
        rows.append(
            [algorithm, "paper", *(f"{cell.mean:.1f}±{cell.std:.1f}" if cell else MISSING for _, cell in pairs)]
        )
        rows.append([algorithm, "difference", *(_signed(ours, cell) for ours, cell in pairs)])
    numbers = {"accuracy": "12" if dataset == "TerraIncognita" else "7 and 11", "gap": "13"}[quantity]
    what = "Accuracy" if quantity == "accuracy" else "Train accuracy minus accuracy"
    return Table(
        f"{dataset}, {'accuracy' if quantity == 'accuracy' else 'generalisation gap'} beside the paper's",
        ["Algorithm", "Whose", *roles(theirs.environments, source), "OOD mean"],
        rows,
        f"{what} in %, trained on {theirs.environments[source]} alone, mean ± standard deviation over trials; paper: "
        f"{CITATION}, table{'s' if ' ' in numbers else ''} {numbers}, its OOD mean the plain average of its printed "
        f"means and deviations; difference: ours − paper. {words}",
        origins=sources,
        texts=2,
    )


def _signed(ours: Summary | None, paper: Printed | None) -> str:
    return signed(ours.mean - paper.mean) if ours and paper else MISSING
