"""One HTML page of all results: sortable tables, plots, and behind each number the runs that it comes from.

The page is a single file and loads nothing from anywhere. Its template, style and script are in `assets/`.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from domainbed_ext import __version__
from domainbed_ext.model_selection import Record
from domainbed_ext.report.environments import dataset_order
from domainbed_ext.report.methods import adaptation_of, has_objectives, objective_of, objectives_of
from domainbed_ext.report.page.chart import HEIGHT, WIDTH
from domainbed_ext.report.page.differences import pairs_parts
from domainbed_ext.report.page.gallery import Gallery
from domainbed_ext.report.page.runs import Run, chosen_steps, last_records, make_entries, runs_with_room
from domainbed_ext.report.plots import plots
from domainbed_ext.report.plots.style import MANY
from domainbed_ext.report.results import Results
from domainbed_ext.report.tables.table import NEGATIVE, Origin, Table
from domainbed_ext.system import strict_json

ASSETS = Path(__file__).parent / "assets"
PICTURES = {
    "plot": "In-domain against out-of-domain accuracy",
    "frontier": "Accuracy along the strength of the update",
    "differences": "Differences to a reference",
    "gaps": "Generalisation gaps",
    "parameters": "Accuracy against trainable parameters",
    "training": "Training",
    "reliability": "Reliability: accuracy over confidence",
}

# Colours of plots, and the variables of the page that replace them, as it is light or dark.
_THEMED = {
    "#000000": "var(--ink)",
    "#ffffff": "var(--paper)",
    "#e6e6e6": "var(--rule)",
    "#9a9a9a": "var(--faint)",
    "#0072b2": "var(--blue)",  # the two of the palette that are dim on a dark ground
    "#7a7a7a": "var(--grey)",
}


def render_page(
    results: Results,
    tables: Sequence[Table],
    figures: Mapping[str, Figure],
    titles: Mapping[str, str] = PICTURES,
    galleries: Sequence[Gallery] = (),
) -> str:
    """Renders the page of a set of runs.

    Args:
        results: Figures of the runs.
        tables: Tables of the report.
        figures: Plots by name, as `plots.draw_plots` returns them.
        titles: Titles of the plots that are shown, by name, in the order of the page.
        galleries: Images that all methods get wrong, or one alone.

    Returns:
        HTML; the same for the same runs. The runs' entries take `runs.ROOM` at most.
    """
    last, chosen, kept = last_records(results), chosen_steps(tables), runs_with_room(results, tables)
    runs = make_entries(results, {name: record for name, record in last.items() if name in kept}, chosen)
    by_name = {run.name: run for run in runs}
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"parts": _parts, "plain": _plain, "number": _number, "breakable": _breakable}
    environment.globals |= {"adaptation_of": adaptation_of, "objective_of": objective_of}
    return environment.get_template("page.html").render(
        title="Results: " + ", ".join(_datasets(results)),
        style=Markup((ASSETS / "page.css").read_text(encoding="utf-8")),
        script=Markup((ASSETS / "page.js").read_text(encoding="utf-8")),
        tables=tables,
        behind=lambda origins: _behind(origins, by_name),
        choices=_choices(results.algorithms),
        pictures=[
            (name, title, inline_svg(figures[name], name, title), figures[name].get_figwidth() > 6)
            for name, title in titles.items()
            if name in figures
        ],
        compared=pairs_parts(results),
        galleries=galleries,
        groups=_groups(runs),
        anchors={run.name: run.anchor for run in runs},
        shown=len(runs),
        chosen=len(chosen),
        total=len(last),
        whole=chosen.keys() <= kept,
        headline=results.headline,
        warning=results.duplicates(),
        versions=_distinct(last.values(), "versions"),
        machines=_distinct(last.values(), "machine"),
        own_version=__version__,
        chart_size=(WIDTH, HEIGHT),
    )


def inline_svg(figure: Figure, prefix: str, label: str) -> Markup:
    """Renders a figure as an element of an HTML page, in the page's colours and fonts.

    Args:
        figure: Figure to draw.
        prefix: Prefix of its ids, which would otherwise be those of every other figure too.
        label: Description for screen readers.

    Returns:
        SVG element.
    """
    text = plots.render(figure, "svg", text_as_text=True).decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    text = re.sub(rf"(?:{'|'.join(_THEMED)})\b", lambda match: _THEMED[match[0]], text)
    text = re.sub(r"font: ([^;\"]*?[\d.]+px) [^;\"]*", r"font: \1 var(--sans)", text)
    width = re.search(r'width="([\d.]+)pt"', text)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    opening = Markup('<svg role="img" aria-label="{}" style="max-width: {}px"').format(
        label, round(float(width[1]) * 4 / 3) if width else 800
    )
    # matplotlib has escaped what it wrote, and the label is escaped above.
    return Markup(str(opening) + text[len("<svg") :])


def _groups(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs under headings, by data set and setting."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(f"{run.record['args']['dataset']}, {run.setting}", []).append(run)
    return groups


def _choices(algorithms: Sequence[str]) -> dict[str, list[str]]:
    """What the page can be filtered by, in the order of tables: nothing where there are few rows to look through."""
    adaptations = list(dict.fromkeys(map(adaptation_of, algorithms)))
    choices = {"adaptation": adaptations, "objective": objectives_of(algorithms)}
    wanted = has_objectives(algorithms) or len(adaptations) > MANY
    return {name: values for name, values in choices.items() if wanted and len(values) > 1}


def _behind(origins: Sequence[Origin], runs: dict[str, Run]) -> list[str]:
    """The anchors of the runs behind a cell; none unless the page has room for all of them."""
    names = dict.fromkeys(run for run, _ in origins)
    return [runs[name].anchor for name in names] if names.keys() <= runs.keys() else []


def _distinct(records: Iterable[Record], key: str) -> list[tuple[dict[str, Any], int]]:
    """What runs recorded under a key, and how many recorded the same."""
    counts: dict[str, int] = {}
    for record in records:
        if value := record.get(key):
            text = strict_json.dumps(value, sort_keys=True)
            counts[text] = counts.get(text, 0) + 1
    return [(json.loads(text), count) for text, count in counts.items()]


def _datasets(results: Results) -> list[str]:
    return sorted({record["args"]["dataset"] for record in results.records}, key=dataset_order)


def _parts(cell: str) -> tuple[str, str]:
    """A cell's number, and its error or interval apart, which the page sets smaller."""
    if interval := re.fullmatch(r"(\S+) (\([^\s%]+ to [^\s%]+\))", cell):
        number, error = interval.groups()
        return NEGATIVE.sub("−", number), NEGATIVE.sub("−", error)
    number, sign, error = re.fullmatch(r"(.*?)(?:\s*(±|\+/-)\s*(\S+))?", cell, re.DOTALL).groups()  # type: ignore
    return NEGATIVE.sub("−", number), f"± {error}" if sign else ""


def _breakable(name: str) -> Markup:
    """A method's name that may wrap between its parts, as after the comma of `BA@rank=8,lr=0.001`, and nowhere else."""
    return Markup(re.sub(r"(?<=\w)([@+,])(?=\w)", r"\1<wbr>", str(escape(name))))


def _plain(value: Any) -> str:
    """A recorded value as text."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else strict_json.dumps(value, ensure_ascii=False)


def _number(value: float) -> str:
    """One decimal, or a dash for what was not measured."""
    return f"{value:.1f}" if value == value else "–"
