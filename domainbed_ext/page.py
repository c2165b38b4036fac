"""One HTML page of everything: tables that sort, plots, and behind each number the runs that it comes from.

The page is a single file that asks for nothing from anywhere. Its template, style and script are in `assets/`.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from domainbed_ext import __version__, plots
from domainbed_ext.chart import HEIGHT, WIDTH, Chart, chart
from domainbed_ext.curves import Moment, trajectory
from domainbed_ext.grid import Origin, Table
from domainbed_ext.model_selection import Record, training_environments
from domainbed_ext.protocols import protocol_of
from domainbed_ext.scores import Results, algorithm_order, dataset_order
from domainbed_ext.style import colour
from domainbed_ext.summaries import by_run, environment_names

ASSETS = Path(__file__).parent / "assets"
PICTURES = {
    "plot": "In domain against out of domain",
    "gaps": "Generalisation gaps",
    "parameters": "Accuracy against trainable parameters",
    "training": "Training",
}

# Colours that a plot is drawn with, by what they are for: the page shows them in its own, light or dark.
_THEMED = {
    "#000000": "var(--ink)",
    "#ffffff": "var(--paper)",
    "#e6e6e6": "var(--rule)",
    "#9a9a9a": "var(--faint)",
    "#0072b2": "var(--blue)",  # the two of the palette that are dim on a dark ground
    "#7a7a7a": "var(--grey)",
}


@dataclass(frozen=True)
class Run:
    """A run as the page shows it.

    Attributes:
        anchor: its place in the page.
        name: of its folder.
        algorithm: its name.
        colour: of the algorithm in the plots.
        where: the environments it was trained on, in words.
        record: its last record, for what holds of the whole run.
        moments: its evaluations.
        chosen: the steps that some table's number is from.
        charts: loss and accuracies, if it was evaluated more than once.
    """

    anchor: str
    name: str
    algorithm: str
    colour: str
    where: str
    record: Record
    moments: list[Moment]
    chosen: list[int]
    charts: list[Chart]

    @property
    def shown(self) -> Moment:
        """The evaluation of its first chosen step, or its last."""
        return next((moment for moment in self.moments if moment.step in self.chosen), self.moments[-1])

    @property
    def seeds(self) -> dict[str, Any]:
        """What makes it this run and not another."""
        args = self.record["args"]
        names = ("trial_seed", "hparams_seed", "seed", "test_envs", "holdout_fraction", "steps")
        facts = {name.replace("_", " "): args[name] for name in names if args.get(name) is not None}
        extra = {"protocol": protocol_of(self.record), "precision": self.record.get("precision")}
        if count := self.record.get("trainable_parameters"):
            facts["trainable parameters"] = f"{count:,}"
        return {**facts, **{name: value for name, value in extra.items() if value is not None}}


def page(results: Results, tables: Sequence[Table], figures: Mapping[str, Figure]) -> str:
    """The page of a set of runs.

    Args:
        results: the figures.
        tables: what the report shows of them.
        figures: as `plots.all_plots` draws them.

    Returns:
        HTML; the same for the same runs.
    """
    runs = _runs(results, tables)
    by_name = {run.name: run for run in runs}
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"parts": _parts, "plain": _plain, "number": _number}
    return environment.get_template("page.html").render(
        title="Results: " + ", ".join(_datasets(results)),
        style=Markup((ASSETS / "page.css").read_text(encoding="utf-8")),
        script=Markup((ASSETS / "page.js").read_text(encoding="utf-8")),
        tables=tables,
        behind=lambda origins: _behind(origins, by_name),
        pictures=[
            (name, title, inline_svg(figures[name], name, title), figures[name].get_figwidth() > 6)
            for name, title in PICTURES.items()
            if name in figures
        ],
        groups=_groups(runs),
        runs=runs,
        records=len(results.records),
        warning=results.duplicates(),
        versions=_distinct(runs, "versions"),
        machines=_distinct(runs, "machine"),
        own_version=__version__,
        chart_size=(WIDTH, HEIGHT),
    )


def inline_svg(figure: Figure, prefix: str, label: str) -> Markup:
    """A figure as an element of an HTML page: in the page's colours and fonts, its ids its own.

    Args:
        figure: what to draw.
        prefix: of its ids, which would otherwise be those of every other figure too.
        label: for who cannot see it.

    Returns:
        The element.
    """
    text = plots.render(figure, "svg", text_as_text=True).decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    text = re.sub(rf"(?:{'|'.join(_THEMED)})\b", lambda found: _THEMED[found[0]], text)
    text = re.sub(r"font: ([^;\"]*?[\d.]+px) [^;\"]*", r"font: \1 var(--sans)", text)
    width = re.search(r'width="([\d.]+)pt"', text)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    opening = Markup('<svg role="img" aria-label="{}" style="max-width: {}px"').format(
        label, round(float(width[1]) * 4 / 3) if width else 800
    )
    # matplotlib has escaped what it wrote, and the label was just now.
    return Markup(str(opening) + text[len("<svg") :])


def _runs(results: Results, tables: Iterable[Table]) -> list[Run]:
    """Every run, in the order of the tables' rows."""
    chosen: dict[str, set[int]] = {}
    for table in tables:
        for origins in table.origins.values():
            for run, step in origins:
                chosen.setdefault(run, set()).add(step)
    environments = environment_names(results.records)
    algorithms = list({record["args"]["algorithm"]: None for record in results.records})
    found, anchors = [], set()
    for name, records in sorted(by_run(results.records).items(), key=lambda item: _order(item[1][0])):
        moments, last = trajectory(records), max(records, key=lambda record: record["step"])
        anchor = "run-" + re.sub(r"[^A-Za-z0-9_-]", "-", name)
        while anchor in anchors:
            anchor += "-"
        anchors.add(anchor)
        steps, algorithm = sorted(chosen.get(name, ())), last["args"]["algorithm"]
        found.append(
            Run(
                anchor,
                name,
                algorithm,
                colour(algorithm, sorted(algorithms)),
                _where(last, environments[last["args"]["dataset"]]),
                last,
                moments,
                steps,
                _charts(moments, steps),
            )
        )
    return found


def _order(record: Record) -> tuple[object, ...]:
    args = record["args"]
    key = dataset_order(args["dataset"]), protocol_of(record), training_environments(record)
    return *key, algorithm_order(args["algorithm"]), args["trial_seed"], args["hparams_seed"], record["run"]


def _where(record: Record, names: Sequence[str]) -> str:
    sources = training_environments(record)
    if len(sources) == 1:
        return f"from {names[sources[0]]}"
    return "without " + " and ".join(names[env] for env in record["args"]["test_envs"])


def _charts(moments: Sequence[Moment], chosen: Sequence[int]) -> list[Chart]:
    steps = [moment.step for moment in moments]
    accuracies = [
        (kind, name, [getattr(moment, kind) for moment in moments])
        for kind, name in (("train", "train"), ("inside", "in domain"), ("outside", "out of domain"))
    ]
    both = [
        chart("Loss", steps, [("loss", "loss", [moment.loss for moment in moments])], chosen),
        chart("Accuracy (%)", steps, accuracies, chosen),
    ]
    return [each for each in both if each]


def _groups(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs under headings, by data set and what they were trained on."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(f"{run.record['args']['dataset']}, {run.where}", []).append(run)
    return groups


def _behind(origins: Sequence[Origin], runs: dict[str, Run]) -> list[str]:
    """The anchors of the runs behind a cell."""
    return list(dict.fromkeys(runs[run].anchor for run, _ in origins))


def _distinct(runs: Iterable[Run], key: str) -> list[tuple[dict[str, Any], int]]:
    """What runs recorded under a key, and how many recorded the same."""
    found: dict[str, int] = {}
    for run in runs:
        if value := run.record.get(key):
            text = json.dumps(value, sort_keys=True)
            found[text] = found.get(text, 0) + 1
    return [(json.loads(text), count) for text, count in found.items()]


def _datasets(results: Results) -> list[str]:
    return sorted({record["args"]["dataset"] for record in results.records}, key=dataset_order)


def _parts(cell: str) -> tuple[str, str]:
    """A cell's number and its error apart, so that the eye meets the number first."""
    number, sign, error = re.fullmatch(r"(.*?)(?:\s*(±|\+/-)\s*(\S+))?", cell, re.DOTALL).groups()  # type: ignore
    return number, f"± {error}" if sign else ""


def _plain(value: Any) -> str:
    """A recorded value as text."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _number(value: float) -> str:
    """One decimal, or a dash for what was not measured."""
    return f"{value:.1f}" if value == value else "–"
