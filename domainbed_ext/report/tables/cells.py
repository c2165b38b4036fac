"""What a table has to say besides its means: parameter counts, and what keeps figures from meaning what they seem."""

from collections.abc import Iterable, Sequence

from domainbed_ext import divergence
from domainbed_ext.model_selection import Record, SelectionMethod
from domainbed_ext.report.leave_one_out import Results, Score, SourceScore, recorded
from domainbed_ext.report.tables.table import MISSING, NOT_RECORDED, Origin


def warning(results: Results, method: SelectionMethod, datasets: list[str]) -> str:
    """What keeps a table's figures from meaning what they seem to, as sentences to append to its caption.

    Args:
        results: the figures.
        method: the table's selection method.
        datasets: the table's data sets.
    """
    lacking = [
        f"{algorithm}{f' on {dataset}' if len(datasets) > 1 else ''} ({lack})"
        for algorithm in results.algorithms
        for dataset in datasets
        if (lack := results.incomplete(method, dataset, algorithm))
    ]
    trials = {
        len({score.group.trial_seed for score in results.scores(method, dataset, algorithm)})
        for algorithm in results.algorithms
        for dataset in datasets
    }
    alone = " One trial only: its error is not known." if max(trials) == 1 else ""
    diverged = {
        f"{algorithm}{f' on {dataset}' if len(datasets) > 1 else ''}": results.diverged[dataset, algorithm]
        for algorithm in results.algorithms
        for dataset in datasets
        if (dataset, algorithm) in results.diverged
    }
    return alone + (f" Incomplete: {', '.join(lacking)}." if lacking else "") + divergence.sentence(diverged)


def roles(names: Sequence[str], source: int) -> list[str]:
    """The columns of a single source's environments: the one trained on is in domain (ID), all others out (OOD)."""
    return [f"{name} ({'ID' if env == source else 'OOD'})" for env, name in enumerate(names)]


def train_share(records: Iterable[Record]) -> str:
    """How much of the training images the train accuracies are of, where runs saved time on a part of them."""
    shares = {float(record["args"].get("train_eval_share") or 1) for record in records}
    return "" if shares <= {1.0} else f" (estimated from {' or '.join(f'{100 * s:g} %' for s in sorted(shares))} of it)"


def parameters(scores: Sequence[Score | SourceScore]) -> str:
    """Trainable parameters and their share, as a range where the chosen hyperparameters differ in rank."""
    if not scores:
        return MISSING
    trainable, total = recorded(scores, "trainable_parameters"), recorded(scores, "total_parameters")
    if not trainable:
        return NOT_RECORDED
    text = " to ".join(f"{count:,}" for count in sorted({min(trainable), max(trainable)}))
    if len(trainable) == len(total):
        shares = {f"{100 * part / whole:.3g}": part / whole for part, whole in zip(trainable, total, strict=True)}
        ends = sorted(shares, key=lambda share: shares[share])
        text += f" ({' to '.join(dict.fromkeys((ends[0], ends[-1])))}%)"
    return text


def origins(records: Iterable[Record]) -> list[Origin]:
    """Where numbers come from, each record once."""
    return list(dict.fromkeys(Origin(record["run"], int(record["step"])) for record in records))
