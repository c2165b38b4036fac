"""Our single-source figures beside tables 7 and 11 to 13 of Zhu et al. (2024)."""

import csv
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import pandas as pd

from domainbed_ext.datasets.registry import DATASETS
from domainbed_ext.report.methods import family_of, label_of, row_label_of
from domainbed_ext.report.results import Results
from domainbed_ext.report.single_source import Quantity, SingleSource, SourceComparison
from domainbed_ext.report.summary import Summary
from domainbed_ext.report.tables.columns import narrow, origins
from domainbed_ext.report.tables.table import MISSING, Cell, Origin, Table, signed
from domainbed_ext.system import resources

CITATION = "Zhu et al. (2024)"
FACTORS = ("BA", "BOnly", "AOnly")
# The paper names its model only as "a pre-trained ViT"; its 86.4M parameters are ViT-B/16's.
BACKBONE = "vit_base_patch16_224"
STEPS = {"TerraIncognita": 20_000}  # the only number that it states


class Printed(NamedTuple):
    """A cell of the paper, in %."""

    mean: float
    std: float


@dataclass(frozen=True)
class PaperSource:
    """What the paper prints for one data set.

    Attributes:
        dataset: Name of the data set.
        environments: Names in the order of its tables, which is that of the folders.
        source: Index of the environment trained on.
        cells: Printed cells by algorithm, quantity and environment.
    """

    dataset: str
    environments: list[str]
    source: int
    cells: dict[tuple[str, Quantity, int], Printed]

    def cell(self, algorithm: str, quantity: Quantity, env: int | None) -> Printed | None:
        """A printed cell; for environment None the plain average of those out-of-domain, as in table 7."""
        if env is not None:
            return self.cells.get((algorithm, quantity, env))
        test_envs = [env for env in range(len(self.environments)) if env != self.source]
        cells = [self.cells[algorithm, quantity, env] for env in test_envs if (algorithm, quantity, env) in self.cells]
        if len(cells) < len(test_envs):
            return None
        return Printed(*(sum(values) / len(cells) for values in zip(*cells, strict=True)))

    @cached_property
    def algorithms(self) -> list[str]:
        """Ids in the order of the tables."""
        return list(dict.fromkeys(algorithm for algorithm, _, _ in self.cells))


def printed() -> dict[str, PaperSource]:
    """The paper's tables 11 to 13, by data set."""
    rows: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
    for number in (11, 12, 13):
        with (resources.results() / "paper" / f"table{number}.csv").open(newline="", encoding="ascii") as file:
            for row in csv.DictReader(file):
                rows[row["dataset"]].append(row)
    sources = {}
    for dataset, cells in rows.items():
        names = list(dict.fromkeys(row["environment"] for row in cells))
        source = next(names.index(row["environment"]) for row in cells if row["role"] == "ID")
        by_place: dict[tuple[str, Quantity, int], Printed] = {}
        for row in cells:
            quantity: Quantity = "gap" if row["metric"] == "gap" else "accuracy"
            place = row["algorithm"], quantity, names.index(row["environment"])
            by_place[place] = Printed(float(row["mean"]), float(row["std"]))
        sources[dataset] = PaperSource(dataset, names, source, by_place)
    return sources


def paper_names(comparison: SourceComparison) -> dict[str, str]:
    """The paper's names of our methods, e.g. BOnly@rank=8 of BOnly where 8 is the rank it was run at.

    Args:
        comparison: Our methods trained on one environment.

    Returns:
        Our name by the paper's. Of several that answer to one, the one of that very name, else the first.
    """
    names: dict[str, str] = {}
    for algorithm in comparison.algorithms:
        name = algorithm
        if (family := family_of(algorithm)) in FACTORS:
            ranks = {(record.get("hparams") or {}).get("rank") for record in comparison.records(algorithm)}
            if len(ranks) == 1 and None not in ranks:
                name = f"{family}@rank={ranks.pop()}"
        if name not in names or name == algorithm:
            names[name] = algorithm
    return names


class Shared(NamedTuple):
    """A data set that we and the paper trained on the same environment of.

    Attributes:
        paper: What the paper prints.
        comparison: Our methods.
        names: Our names of the paper's methods that we ran too.
    """

    paper: PaperSource
    comparison: SourceComparison
    names: dict[str, str]


def shared(single: SingleSource) -> Iterator[Shared]:
    """The data sets that both have, trained on the same source."""
    for dataset, paper in printed().items():
        same = len(single.environments.get(dataset, [])) == len(paper.environments)
        # The paper's tables name the folders, which are in the order of the indices.
        if (
            same
            and paper.source in single.sources.get(dataset, [])
            and list(getattr(DATASETS[dataset], "DOMAINS", ())) == paper.environments
        ):
            comparison = single.comparison(dataset, paper.source)
            names = paper_names(comparison)
            if both := {name: names[name] for name in paper.algorithms if name in names}:
                yield Shared(paper, comparison, both)


def paper_tables(results: Results) -> list[Table]:
    """Accuracy and gap of every data set that the paper has too: a row each of ours, the paper's, the difference."""
    if results.single_source is None:
        return []
    tables = []
    for each in shared(results.single_source):
        words = differences(results, results.single_source, each.paper.dataset)
        tables += [_table(each, "accuracy", words), _table(each, "gap", words)]
    return tables


def differences(results: Results, single: SingleSource, dataset: str) -> str:
    """Says what of our runs differs from the paper's, or is not known of the paper's.

    Args:
        results: All figures.
        single: Figures of single-source runs.
        dataset: Name of the data set.
    """
    records = [
        record
        for comparison in single.comparisons
        if comparison.dataset == dataset
        for algorithm in comparison.algorithms
        for record in comparison.records(algorithm)
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
    """Both sides in numbers: a row per data set, method, quantity and environment ("Avg": the out-of-domain mean)."""
    rows: list[dict[str, object]] = []
    if (single := results.single_source) is None:
        return pd.DataFrame(rows)
    quantities: tuple[Quantity, ...] = ("accuracy", "gap")
    for each in shared(single):
        for name, algorithm in each.names.items():
            for quantity in quantities:
                for env in [*range(len(each.paper.environments)), None]:
                    ours, paper = _pair(each, name, quantity, env)
                    rows.append(
                        {
                            "dataset": each.paper.dataset,
                            "source": each.paper.environments[each.paper.source],
                            "environment": "Avg" if env is None else each.paper.environments[env],
                            "role": "ID" if env == each.paper.source else "OOD",
                            "metric": quantity,
                            "method": name,
                            "algorithm": algorithm,
                            "ours": ours and ours.mean,
                            "ours_std": ours and ours.err,
                            "trials": ours and ours.trials,
                            "paper": paper and paper.mean,
                            "paper_std": paper and paper.std,
                            "difference": ours.mean - paper.mean if ours and paper else None,
                            "label": label_of(algorithm),
                        }
                    )
    return pd.DataFrame(rows)


def _pair(each: Shared, name: str, quantity: Quantity, env: int | None) -> tuple[Summary | None, Printed | None]:
    """Our figure and the paper's."""
    ours = each.comparison.summary(each.names[name], *each.comparison.metric_of(quantity, env))
    return ours, each.paper.cell(name, quantity, env)


def _table(each: Shared, quantity: Quantity, words: str) -> Table:
    paper = each.paper
    environments = [*range(len(paper.environments)), None]
    rows: list[list[str]] = []
    sources: dict[Cell, list[Origin]] = {}
    for name, algorithm in each.names.items():
        pairs = [_pair(each, name, quantity, env) for env in environments]
        records = each.comparison.records(algorithm)
        sources |= {(len(rows), column): origins(records) for column in range(2, len(environments) + 2)}
        cells = {
            "ours": [narrow(ours) for ours, _ in pairs],
            "paper": [f"{cell.mean:.1f}±{cell.std:.1f}" if cell else MISSING for _, cell in pairs],
            "difference": [_signed(ours, cell) for ours, cell in pairs],
        }
        rows += [[row_label_of(algorithm), whose, *texts] for whose, texts in cells.items()]
    numbers = {"accuracy": "12" if paper.dataset == "TerraIncognita" else "7 and 11", "gap": "13"}[quantity]
    what = "Accuracy" if quantity == "accuracy" else "Train accuracy minus accuracy"
    return Table(
        f"{paper.dataset}, {'accuracy' if quantity == 'accuracy' else 'generalisation gap'} beside {CITATION}",
        ["Algorithm", "Whose", *each.comparison.roles(), "OOD mean"],
        rows,
        f"{what} in %, trained on {each.comparison.source} alone, mean ± standard deviation over trials; "
        f"paper: {CITATION}, table{'s' if ' ' in numbers else ''} {numbers}, its OOD mean the plain average of its "
        f"printed means and deviations; difference: ours − paper. {words}",
        origins=sources,
        texts=2,
        dataset=paper.dataset,
        group=3,
    )


def _signed(ours: Summary | None, paper: Printed | None) -> str:
    return signed(ours.mean - paper.mean) if ours and paper else MISSING
