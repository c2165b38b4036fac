"""What was run, for the head of the page: its title and a strip of facts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from domainbed_ext.model_selection import Record
from domainbed_ext.protocols import protocol_of
from domainbed_ext.report.environments import full_names
from domainbed_ext.report.page.run_details import images_a_step
from domainbed_ext.report.results import Results

LISTED = 4  # values of a fact that are named
PROTOCOL_NAMES = {
    "leave_one_out": "leave one domain out",
    "single_source": "single source",
    "domainbed": "DomainBed's leave one domain out",
}


class Fact(NamedTuple):
    """A fact with its name."""

    name: str
    value: str


def page_title(results: Results) -> str:
    """`PACS, leave one out`, or `PACS from cartoon`; of many comparisons, the data sets alone.

    Args:
        results: Figures of the runs.
    """
    titles = []
    for comparison in results.panels:
        source = full_names(comparison.dataset).get(comparison.source, comparison.source)
        titles.append(f"{comparison.dataset} from {source}" if source else f"{comparison.dataset}, leave one out")
    titles = list(dict.fromkeys(titles))
    if len(titles) > LISTED:
        titles = list(dict.fromkeys(comparison.dataset for comparison in results.panels))
    return " · ".join(titles)


def facts_of(results: Results, last: Iterable[Record], launches: Sequence[Mapping[str, Any]]) -> list[Fact]:
    """The facts that a reader asks for first; what was not recorded is left out.

    Args:
        results: Figures of the runs.
        last: Last record of every run.
        launches: Launches that the runs come from, as `provenance.json` lists them.
    """
    trained = [record for record in last if "derived" not in record]

    def listed(value: Callable[[Record], object]) -> str:
        return _list(map(value, trained))

    facts = [
        Fact("backbone", listed(lambda record: _hparam(record, "backbone"))),
        Fact("protocol", listed(lambda record: PROTOCOL_NAMES.get(protocol_of(record), protocol_of(record)))),
        Fact("training", listed(_length)),
        Fact("trials", str(len({record["args"]["trial_seed"] for record in trained}))),
        Fact("rank", listed(lambda record: _hparam(record, "rank"))),
        Fact("image size", listed(lambda record: _pixels(_hparam(record, "image_size")))),
        Fact("precision", listed(lambda record: record.get("precision"))),
        Fact("runs", results.headline),
        Fact("date", _list(str(launch.get("date", ""))[:10] for launch in launches)),
        Fact("time", _duration(sum(launch.get("seconds") or 0 for launch in launches))),
        Fact("commit", _list(launch.get("commit") for launch in launches)),
    ]
    return [fact for fact in facts if fact.value]


def _hparam(record: Record, name: str) -> Any:
    return (record.get("hparams") or {}).get(name)


def _length(record: Record) -> str:
    """Steps and images a step, of all training domains together."""
    steps = record["args"].get("steps") or record["step"] + 1
    images = images_a_step(record)
    return f"{steps:,} steps of {images} images" if images else f"{steps:,} steps"


def _pixels(size: object) -> str:
    return f"{size} px" if size else ""


def _list(values: Iterable[object]) -> str:
    """The distinct values that there are, numbers ascending."""
    distinct = list(dict.fromkeys(value for value in values if value not in (None, "")))
    numbers = sorted(value for value in distinct if isinstance(value, int))
    texts = list(map(str, numbers if len(numbers) == len(distinct) else distinct))
    more = f" and {len(texts) - LISTED} more" if len(texts) > LISTED else ""
    return ", ".join(texts[:LISTED]) + more


def _duration(seconds: float) -> str:
    """As hours and minutes; empty for nothing."""
    if not seconds:
        return ""
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
