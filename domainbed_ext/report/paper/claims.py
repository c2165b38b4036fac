"""The claims of Zhu et al. (2024), checked on our single-source runs and on the paper's own tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, get_args

import numpy as np

from domainbed_ext.report.paper.tables import CITATION, FACTORS, paper_names, printed
from domainbed_ext.report.results import Results
from domainbed_ext.report.single_source import Quantity, SingleSource
from domainbed_ext.report.tables.table import NOT_RECORDED, Table, signed

RESAMPLES = 10_000
CONFIDENCE = 0.95
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
ENOUGH_TRIALS = 3  # of two, a bootstrap interval is the two themselves


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


class Evidence(NamedTuple):
    """What the blocks say on one claim; positive differences are for it.

    Attributes:
        holds: Number of environments in which the means are as claimed.
        of: Number of environments.
        difference: Mean over environments, in percentage points.
        interval: Confidence interval of the difference, by the bootstrap over trials; None of one trial.
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
        if self.trials < ENOUGH_TRIALS or self.interval is None:
            leaning = "for" if self.difference > 0 or (self.difference == 0 and not strict) else "against"
            count = {1: "one trial", 2: "two trials"}.get(self.trials, f"{self.trials} trials")
            return f"leans {leaning} it, {count} only"
        low, high = self.interval
        if low > 0 or (low >= 0 and not strict):
            return "supported"
        return "contradicted" if high < 0 else "undecided"


def weigh(blocks: Sequence[Block], strict: bool, seed: int = 0) -> Evidence:
    """Counts, averages and resamples.

    Args:
        blocks: Blocks with the method that is claimed to be better first, and numbers of which higher is better.
        strict: Whether a tie is against the claim.
        seed: Seed of the bootstrap.

    Returns:
        The evidence. Trials are drawn with replacement within each block, both methods' together where their trials
        are paired; environments and data sets are what they are.
    """
    means = np.concatenate([block.one.mean(0) - block.other.mean(0) for block in blocks])
    trials = min(min(len(block.one), len(block.other)) for block in blocks)
    holds = int((means > 0).sum() if strict else (means >= 0).sum())
    if trials < 2:
        return Evidence(holds, len(means), float(means.mean()), None, trials)
    random = np.random.default_rng(seed)
    total = np.zeros(RESAMPLES)
    for one, other, paired in blocks:
        drawn = random.integers(0, len(one), (RESAMPLES, len(one)))
        if paired:
            total += (one - other)[drawn].mean(1).sum(1)
        else:
            drawn_other = random.integers(0, len(other), (RESAMPLES, len(other)))
            total += one[drawn].mean(1).sum(1) - other[drawn_other].mean(1).sum(1)
    low, high = np.quantile(total / len(means), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Evidence(holds, len(means), float(means.mean()), (float(low), float(high)), trials)


def claims_table(results: Results) -> Table | None:
    """Each claim, in each comparison that our runs or the paper's tables allow; None without single-source runs."""
    if (single := results.single_source) is None:
        return None
    ours, paper = _of_runs(single), _of_paper()
    shared = [methods for place, methods in paper.items() if place in ours]
    rows: list[list[str]] = []
    verdicts: dict[str, list[str]] = {}
    trials = set()
    for claim in PAPER_CLAIMS:
        for one, other in _comparisons(
            claim, {name for methods in [*ours.values(), *paper.values()] for name in methods}
        ):
            row = [claim.text, f"{one} against {other}"]
            if evidence := _evidence(ours.values(), claim, one, other):
                verdict = evidence.verdict(claim.strict)
                verdicts.setdefault(claim.text, []).append(verdict)
                trials.add(evidence.trials)
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
        f"bootstrap over trials, {RESAMPLES:,} resamples, seed 0, environments fixed. {_caveat(trials)} Paper: the "
        f"same counts and differences from the means that {CITATION} print in tables 11 to 13, on the data sets and "
        "sources that our runs have too, and on all four; printed means allow no interval.",
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
    return Block(first, second, seeds == other_seeds)


def _conclusion(verdicts: Mapping[str, Iterable[str]]) -> str:
    if not verdicts:
        return "Our runs allow none of these comparisons yet."
    parts = []
    for text, each in verdicts.items():
        kinds = list(dict.fromkeys(each))
        parts.append(f"{text}: {' / '.join(kinds)}")
    return f"{'; '.join(parts)}."


def _caveat(trials: set[int]) -> str:
    if not trials:
        return ""
    least = min(trials)
    if least == 1:
        return "One trial has no interval: chance cannot be told from effect."
    if least < ENOUGH_TRIALS:
        return f"{least} trials are too few for the interval to mean much, so no verdict rests on it."
    return f"With {least} trials the interval is rough." if least < 10 else ""
