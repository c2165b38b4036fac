"""Which method is best out of domain, and whether its differences to the others are more than chance, in sentences."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from domainbed_ext.report.differences import PairedDifference
from domainbed_ext.report.methods import label_of
from domainbed_ext.report.summary import Summary
from domainbed_ext.report.tables.differences import NAMED, describe_intervals
from domainbed_ext.report.tables.table import minus, signed

if TYPE_CHECKING:
    from domainbed_ext.report.figures import Comparison


class Opponent(NamedTuple):
    """A method beside the best one.

    Attributes:
        algorithm: Id of the method.
        difference: The best method minus this one in out-of-domain accuracy; None where they share no trial.
    """

    algorithm: str
    difference: PairedDifference | None

    @property
    def is_lower(self) -> bool:
        """Whether the 95 % interval of the difference is above 0."""
        return self.difference is not None and self.difference.interval is not None and self.difference.interval[0] > 0


@dataclass(frozen=True)
class Conclusion:
    """What a comparison says of out-of-domain accuracy.

    Attributes:
        title: What the methods were run on.
        ranking: Ids of the methods with all results, the best first.
        best: Label of the best method.
        result: Its accuracies.
        against: What is known of its differences to the others, in sentences.
        note: How the intervals are computed.
    """

    title: str
    ranking: list[str]
    best: str
    result: str
    against: str
    note: str


def conclude(comparison: "Comparison") -> Conclusion | None:
    """Draws the conclusion of a comparison.

    Args:
        comparison: The methods under one selection method.

    Returns:
        The conclusion; None if no method has all of its results.
    """
    summaries = {name: summary for name in comparison.algorithms if (summary := _comparable(comparison, name))}
    if not summaries:
        return None
    in_order = sorted(summaries, key=lambda name: -summaries[name].mean)
    best = in_order[0]
    others = [Opponent(name, _between(comparison, best, name)) for name in in_order[1:]]
    return Conclusion(
        comparison.title,
        in_order,
        label_of(best),
        _result(comparison, best, summaries[best]),
        " ".join(filter(None, [_against(others), _unranked(comparison, summaries)])),
        _note(comparison, others),
    )


def _comparable(comparison: "Comparison", algorithm: str) -> Summary | None:
    summary = comparison.comparable(algorithm, comparison.summary(algorithm, "out_of_domain"))
    return summary if summary is not None and summary.complete and summary.mean == summary.mean else None


def _between(comparison: "Comparison", best: str, other: str) -> PairedDifference | None:
    difference = comparison.differences.between(best, other, "out_of_domain")
    return None if difference is None or difference.mean != difference.mean else difference


def _result(comparison: "Comparison", best: str, summary: Summary) -> str:
    error = f" ± {summary.err:.1f}" if summary.trials > 1 else ""
    over = comparison.error.replace(" over trials", f" over {summary.trials} trials")
    what = f"mean ± {over}" if summary.trials > 1 else "one trial"
    inside = comparison.summary(best, "in_domain")
    in_domain = f"; in domain it has {inside.mean:.1f}\u00a0%" if inside and inside.mean == inside.mean else ""
    return f"{summary.mean:.1f}{error}\u00a0% ({what}){in_domain}"


def _against(others: Sequence[Opponent]) -> str:
    """The difference to the next best in full, and how many of all others are lower."""
    if not others:
        return "There is no other method to compare it with."
    sentences = []
    following = others[0]
    if following.difference is None:
        sentences.append(f"The next best, {label_of(following.algorithm)}, shares no trial with it.")
    else:
        name, points = label_of(following.algorithm), f"{minus(signed(following.difference.mean))} points"
        if following.difference.interval is None:
            sentences.append(f"It is {points} from the next best, {name}: of one trial, this may be chance.")
        else:
            verdict = "more than chance" if following.is_lower else "it may be chance"
            sentences.append(
                f"Its difference to the next best, {name}, is {points} (95 % interval "
                f"{_interval(following.difference)}): {verdict}."
            )
    rest = others[1:]
    if rest and any(other.difference and other.difference.interval for other in rest):
        lower = [other for other in others if other.is_lower]
        sentences.append(_count(lower, len(others)))
    return " ".join(sentences)


def _count(lower: Sequence[Opponent], total: int) -> str:
    if not lower:
        return f"None of the {total} other methods is lower by more than chance."
    names = "; ".join(
        f"{label_of(other.algorithm)} by {other.difference.mean:.1f} ({_interval(other.difference)})"
        for other in lower[:NAMED]
        if other.difference is not None
    )
    more = f"; and {len(lower) - NAMED} more" if len(lower) > NAMED else ""
    verb = "is" if len(lower) == 1 else "are"
    return f"Of the {total} other methods, {len(lower)} {verb} lower by more than chance: {names}{more}."


def _unranked(comparison: "Comparison", summaries: dict[str, Summary]) -> str:
    left_out = [
        f"{label_of(name)} ({comparison.incomplete(name) or 'diverged'})"
        for name in comparison.algorithms
        if name not in summaries and comparison.scores(name)
    ]
    return f"Not ranked, as results are missing: {', '.join(left_out)}." if left_out else ""


def _note(comparison: "Comparison", others: Sequence[Opponent]) -> str:
    differences = {label_of(other.algorithm): other.difference for other in others if other.difference is not None}
    if not any(difference.interval for difference in differences.values()):
        return ""
    adjusted = "" if len(others) == 1 else f" They are not adjusted for choosing the best of {len(others) + 1} methods."
    return (
        f"Differences are paired by trial and test domain. {describe_intervals(differences, comparison)} An interval "
        f"without 0 is called more than chance.{adjusted}"
    )


def _interval(difference: PairedDifference) -> str:
    return " to ".join(minus(signed(end)) for end in difference.interval or ())
