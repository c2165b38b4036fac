"""What a table's caption says besides what its columns are: what keeps figures from meaning what they seem."""

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from domainbed_ext import divergence
from domainbed_ext.model_selection import Record
from domainbed_ext.protocols import CONCEPTS

if TYPE_CHECKING:
    from domainbed_ext.report.figures import Comparison


def warning(compared: Sequence["Comparison"], algorithms: Collection[str] | None = None) -> str:
    """What keeps a table's figures from meaning what they seem to, as sentences to append to its caption.

    Args:
        compared: Comparisons that the table shows, of the same methods.
        algorithms: Ids of the methods that it shows; None for all.
    """
    rows = [
        (f"{algorithm}{f' on {comparison.dataset}' if len(compared) > 1 else ''}", algorithm, comparison)
        for algorithm in compared[0].algorithms
        if algorithms is None or algorithm in algorithms
        for comparison in compared
    ]
    lacking = [f"{name} ({lack})" for name, algorithm, comparison in rows if (lack := comparison.incomplete(algorithm))]
    trials = max((comparison.trials(algorithm) for _, algorithm, comparison in rows), default=0)
    diverged = {
        name: comparison.diverged[algorithm] for name, algorithm, comparison in rows if algorithm in comparison.diverged
    }
    alone = " One trial only: its error is not known." if trials == 1 else ""
    return alone + (f" Incomplete: {', '.join(lacking)}." if lacking else "") + divergence.sentence(diverged)


def without_in_domain(comparison: "Comparison", algorithms: Collection[str] | None = None) -> str:
    """Says which rows have no in-domain accuracy and why, as a sentence to append to a caption.

    Args:
        comparison: Comparison that the table shows.
        algorithms: Ids of the methods that it shows; None for all.
    """
    shown = [each for each in comparison.algorithms if algorithms is None or each in algorithms]
    rows: dict[str, list[str]] = {}  # by reason
    for algorithm in shown:
        if reason := comparison.unmeasured(algorithm):
            rows.setdefault(reason, []).append(algorithm)
    said = [f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} {reason}" for reason, names in rows.items()]
    return f" -: not measured; {'; '.join(said)}." if said else ""


def train_share(records: Iterable[Record]) -> str:
    """How much of the training images the train accuracies are of, where runs saved time on a part of them."""
    shares = {float(record["args"].get("train_eval_share") or 1) for record in records}
    return "" if shares <= {1.0} else f" (estimated from {_percent(shares)} of them)"


def holdout_share(records: Iterable[Record]) -> str:
    """The share of images or concepts held out for selection, as in "20 %"; DomainBed's default where none was
    recorded."""
    args = [record["args"] for record in records]
    share = _percent({float(each.get("holdout_fraction") or 0.2) for each in args} or {0.2})
    by_concepts = [each.get("split_by") == CONCEPTS for each in args]
    if not any(by_concepts):
        return share
    return f"{share} (split by concepts)" if all(by_concepts) else f"{share} (of some runs split by concepts)"


def _percent(shares: Iterable[float]) -> str:
    return f"{' or '.join(f'{100 * share:g}' for share in sorted(shares))} %"
