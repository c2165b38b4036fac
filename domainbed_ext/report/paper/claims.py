"""The claims of Zhu et al. (2024), checked on our single-source runs and on the paper's own tables."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, get_args

import numpy as np

from domainbed_ext.report.inference.student import student_interval
from domainbed_ext.report.paper.tables import CITATION, FACTORS, paper_names, printed
from domainbed_ext.report.results import Results
from domainbed_ext.report.single_source import Quantity, SingleSource
from domainbed_ext.report.tables.table import NOT_RECORDED, Table, signed

QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)


class PaperClaim(NamedTuple):
    """One sentence of the paper.

    Attributes:
        text: What is claimed.
        quantity: Accuracy, which is claimed to be higher, or gap, which is claimed to be smaller.
        strict: Whether a tie is against the claim.
        in_domain: Whether the environment trained on counts too.
    """

    text: str
    quantity: Quantity
    strict: bool
    in_domain: bool


PAPER_CLAIMS = (
    PaperClaim("LoRA-FA above LoRA-FB in out-of-domain accuracy", "accuracy", strict=True, in_domain=False),
    PaperClaim("LoRA-FA at least as good as LoRA in out-of-domain accuracy", "accuracy", strict=False, in_domain=False),
    PaperClaim("LoRA-FA and LoRA-FB have a smaller gap than LoRA", "gap", strict=True, in_domain=True),
)


class Block(NamedTuple):
    """Two methods on one data set and source, in %, [trials, environments] each."""

    one: np.ndarray
    other: np.ndarray
    paired: bool  # trial i of both has the same seed, hence the same split

    def samples(self) -> list[np.ndarray]:
        """What varies independently over trials, [trials, environments] each."""
        return [self.one - self.other] if self.paired else [self.one, self.other]


class Evidence(NamedTuple):
    """What the blocks say on one claim; positive differences are for it.

    Attributes:
        holds: Number of environments in which the means are as claimed.
        of: Number of environments.
        difference: Mean over environments, in percentage points.
        interval: 95 % interval of the difference, by Student's t over trials; None of one trial.
        trials: Smallest number of trials in any block.
    """

    holds: int
    of: int
    difference: float
    interval: tuple[float, float] | None
    trials: int

    def verdict(self, strict: bool) -> str:
        """In a few words.

        Args:
            strict: Whether a tie is against the claim.
        """
        if self.interval is None:
            leaning = "for" if self.difference > 0 or (self.difference == 0 and not strict) else "against"
            return f"leans {leaning} it, one trial only"
        low, high = self.interval
        if low > 0 or (low >= 0 and not strict):
            return "supported"
        return "contradicted" if high < 0 else "undecided"


def weigh(blocks: Sequence[Block], strict: bool) -> Evidence:
    """Counts and averages.

    Args:
        blocks: Blocks with the method that is claimed to be better first, and numbers of which higher is better.
        strict: Whether a tie is against the claim.

    Returns:
        The evidence. The difference varies over trials, whose differences are taken within each where they are paired;
        environments and data sets are what they are. Of several blocks, the one with the fewest trials sets the
        degrees of freedom.
    """
    means = np.concatenate([block.one.mean(0) - block.other.mean(0) for block in blocks])
    trials = min(min(len(block.one), len(block.other)) for block in blocks)
    holds = int((means > 0).sum() if strict else (means >= 0).sum())
    difference, interval = float(means.mean()), None
    if trials > 1:
        sums = [each.sum(1) for block in blocks for each in block.samples()]
        error = math.sqrt(sum(each.var(ddof=1) / len(each) for each in sums)) / len(means)
        interval = student_interval(difference, error, trials)
    return Evidence(holds, len(means), difference, interval, trials)


def claims_table(results: Results) -> Table | None:
    """Each claim, in each comparison that our runs or the paper's tables allow; None without single-source runs."""
    if (single := results.single_source) is None:
        return None
    ours, paper = _of_runs(single), _of_paper()
    shared = [methods for place, methods in paper.items() if place in ours]
    rows: list[list[str]] = []
    verdicts: dict[str, list[str]] = {}
    alone = False  # whether any evidence is one trial's
    for claim in PAPER_CLAIMS:
        for one, other in _comparisons(
            claim, {name for methods in [*ours.values(), *paper.values()] for name in methods}
        ):
            row = [claim.text, f"{one} against {other}"]
            if evidence := _evidence(ours.values(), claim, one, other):
                verdict = evidence.verdict(claim.strict)
                verdicts.setdefault(claim.text, []).append(verdict)
                alone |= evidence.interval is None
                interval = " to ".join(map(signed, evidence.interval)) if evidence.interval else NOT_RECORDED
                row += [verdict, f"{evidence.holds} of {evidence.of}", signed(evidence.difference), interval]
            else:
                row += ["not run", NOT_RECORDED, NOT_RECORDED, NOT_RECORDED]
            for printed_methods in (shared, paper.values()):
                of_paper = _evidence(printed_methods, claim, one, other)
                row.append(
                    f"{of_paper.holds} of {of_paper.of} ({signed(of_paper.difference)})" if of_paper else NOT_RECORDED
                )
            rows.append(row)
    sources = ", ".join(
        f"{dataset} ({', '.join(single.environments[dataset][source] for source in sources)})"
        for dataset, sources in single.sources.items()
    )
    return Table(
        f"Claims of {CITATION}, checked on our runs and on their tables",
        [
            "Claim",
            "Comparison",
            "Our runs",
            "Holds in",
            "Difference",
            "95 % interval",
            "Paper, same data",
            "Paper, all data",
        ],
        rows,
        f"{_conclusion(verdicts)} Our runs: single source, {sources}. Holds in: environments in which the mean is as "
        "claimed; gaps count the environment trained on too, accuracies do not. Difference: the mean over environments "
        "in percentage points, positive if for the claim (accuracy: first − second; gap: second − first). Interval: "
        "Student's t over trials, environments fixed."
        f"{' One trial has no interval: chance cannot be told from effect.' * alone} Paper: the same counts and "
        f"differences from the means that {CITATION} print in tables 11 to 13, on the data sets and sources that our "
        "runs have too, and on all four; printed means allow no interval.",
        texts=3,
    )


def _comparisons(claim: PaperClaim, available: set[str]) -> list[tuple[str, str]]:
    """(better, worse) as claimed: at equal rank, and one factor at twice LoRA's rank, which has as many parameters."""
    ranks = {
        family: sorted(int(n.partition("=")[2]) for n in available if n.startswith(f"{family}@rank="))
        for family in FACTORS
    }
    if claim is PAPER_CLAIMS[0]:
        return [(f"BOnly@rank={r}", f"AOnly@rank={r}") for r in ranks["BOnly"] if r in ranks["AOnly"]]
    families = ["BOnly"] if claim is PAPER_CLAIMS[1] else ["BOnly", "AOnly"]
    return [
        (f"{family}@rank={r}", f"BA@rank={both}")
        for both in ranks["BA"]
        for family in families
        for r in ranks[family]
        if r in (both, 2 * both)
    ]


# For each data set and source: method -> quantity -> (trial seeds, [trials, environments], index of the source).
Measured = dict[str, dict[Quantity, tuple[list[int], np.ndarray, int]]]


def _of_runs(single: SingleSource) -> dict[tuple[str, int], Measured]:
    measured = {}
    for dataset, sources in single.sources.items():
        environments = range(len(single.environments[dataset]))
        for source in sources:
            comparison = single.comparison(dataset, source)
            methods: Measured = {}
            for name, algorithm in paper_names(comparison).items():
                scores = comparison.scores(algorithm)
                methods[name] = {
                    quantity: (
                        [score.trial_seed for score in scores],
                        np.array(
                            [
                                [100 * score.value(*comparison.metric_of(quantity, env)) for env in environments]
                                for score in scores
                            ]
                        ),
                        source,
                    )
                    for quantity in QUANTITIES
                }
            measured[dataset, source] = methods
    return measured


def _of_paper() -> dict[tuple[str, int], Measured]:
    measured = {}
    for paper in printed().values():
        environments = range(len(paper.environments))
        measured[paper.dataset, paper.source] = {
            name: {
                quantity: (
                    [0],
                    np.array([[paper.cells[name, quantity, env].mean for env in environments]]),
                    paper.source,
                )
                for quantity in QUANTITIES
            }
            for name in paper.algorithms
        }
    return measured


def _evidence(places: Iterable[Measured], claim: PaperClaim, one: str, other: str) -> Evidence | None:
    blocks = [block for methods in places if (block := _block(methods, claim, one, other))]
    return weigh(blocks, claim.strict) if blocks else None


def _block(methods: Mapping[str, Mapping], claim: PaperClaim, one: str, other: str) -> Block | None:
    if one not in methods or other not in methods:
        return None
    seeds, first, source = methods[one][claim.quantity]
    other_seeds, second, _ = methods[other][claim.quantity]
    if not claim.in_domain:
        first, second = np.delete(first, source, axis=1), np.delete(second, source, axis=1)
    if claim.quantity == "gap":  # the smaller, the better
        first, second = -first, -second
    if common := [seed for seed in seeds if seed in other_seeds]:
        first = first[[seeds.index(seed) for seed in common]]
        second = second[[other_seeds.index(seed) for seed in common]]
    return Block(first, second, paired=bool(common))


def _conclusion(verdicts: Mapping[str, Iterable[str]]) -> str:
    if not verdicts:
        return "Our runs allow none of these comparisons yet."
    parts = []
    for text, each in verdicts.items():
        kinds = list(dict.fromkeys(each))
        parts.append(f"{text}: {' / '.join(kinds)}")
    return f"{'; '.join(parts)}."
