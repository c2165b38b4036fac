"""One HTML page of all results: the conclusion, plots, sortable tables, and behind each number its runs.

The page is a single file and loads nothing from anywhere; plots and tables can be downloaded from the files beside it.
Its templates, styles and scripts are in `assets/`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from domainbed_ext import __version__
from domainbed_ext.report.conclusion import conclude
from domainbed_ext.report.environments import environment_labels
from domainbed_ext.report.methods import adaptation_of, has_objectives, objective_of, objectives_of
from domainbed_ext.report.page import cells
from domainbed_ext.report.page.differences import pairs_parts
from domainbed_ext.report.page.downloads import figure_downloads, table_downloads
from domainbed_ext.report.page.facts import facts_of, page_title
from domainbed_ext.report.page.gallery import Gallery
from domainbed_ext.report.page.inline_svg import inline_svg, themed
from domainbed_ext.report.page.run_details import Commands, details_json, distinct
from domainbed_ext.report.page.runs import Run, chosen_steps, last_records, list_runs, runs_with_room
from domainbed_ext.report.plots.palette import styles_of
from domainbed_ext.report.plots.style import MANY
from domainbed_ext.report.results import Results
from domainbed_ext.report.tables.table import Origin, Table

ASSETS = Path(__file__).parent / "assets"
STYLES = ("page.css", "tables.css", "runs.css", "small.css")
SCRIPTS = ("tables.js", "pairs.js", "charts.js", "runs.js")
FILES = ("results.csv", "selected.csv", "results.md", "results.tex", "results_tables.tex")
MAIN_PICTURE = "plot"
WIDE = 7.0  # inches, of a plot that takes a whole row
PICTURES = {
    MAIN_PICTURE: "In-domain against out-of-domain accuracy",
    "frontier": "Accuracy along the strength of the update",
    "differences": "Differences to a reference",
    "gaps": "Generalisation gaps",
    "parameters": "Accuracy against trainable parameters",
    "training": "Training",
    "reliability": "Reliability: accuracy over confidence",
}


@dataclass(frozen=True)
class Context:
    """What the page tells besides the runs' records.

    Attributes:
        launches: Launches that the runs come from, as `provenance.json` lists them.
        commands: Function of a run's record that returns commands by what they do.
    """

    launches: Sequence[Mapping[str, Any]] = ()
    commands: Commands = field(default=lambda record: {})


@dataclass(frozen=True)
class Picture:
    """A plot of the page.

    Attributes:
        name: Name of its files.
        title: Title.
        drawing: SVG element.
        is_wide: Whether it takes a whole row.
    """

    name: str
    title: str
    drawing: Markup
    is_wide: bool


def render_page(
    results: Results,
    tables: Sequence[Table],
    figures: Mapping[str, Figure],
    titles: Mapping[str, str] = PICTURES,
    galleries: Sequence[Gallery] = (),
    context: Context | None = None,
) -> str:
    """Renders the page of a set of runs.

    Args:
        results: Figures of the runs.
        tables: Tables of the report.
        figures: Plots by name, as `plots.draw_plots` returns them.
        titles: Titles of the plots that are shown, by name, in the order of the page.
        galleries: Images that all methods get wrong, or one alone.
        context: What else is known of the runs; None for nothing.

    Returns:
        HTML; the same for the same runs. The runs' rows and details take `runs.ROOM` at most.
    """
    context = context or Context()
    shown = [table for table in tables if table.shown != "files"]
    last, chosen, kept = last_records(results), chosen_steps(shown), runs_with_room(results, shown)
    runs = list_runs(results, {name: record for name, record in last.items() if name in kept}, chosen)
    numbers = {run.name: number for number, run in enumerate(runs)}
    labels = environment_labels(results.records)
    pictures = [
        Picture(name, title, inline_svg(figures[name], name, title), figures[name].get_figwidth() > WIDE)
        for name, title in titles.items()
        if name in figures
    ]
    conclusions = [conclusion for each in results.panels if (conclusion := conclude(each)) is not None]
    numbered = list(enumerate(shown, 1))
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=page_title(results),
            facts=facts_of(results, last.values(), context.launches),
            style=_assets(STYLES),
            script=_assets(SCRIPTS),
            files=FILES,
            conclusions=conclusions,
            open_tables=[(number, table) for number, table in numbered if table.shown == "open"],
            folded_tables=[
                (number, table, _same(table, shown)) for number, table in numbered if table.shown == "folded"
            ],
            behind=lambda origins: _behind(origins, numbers),
            anchors=[run.anchor for run in runs],
            choices=_choices(results.algorithms),
            main_picture=next((picture for picture in pictures if picture.name == MAIN_PICTURE), None),
            # Those that take a row follow the others, so that no row has a hole.
            pictures=sorted((each for each in pictures if each.name != MAIN_PICTURE), key=lambda each: each.is_wide),
            compared=pairs_parts(results, conclusions),
            galleries=galleries,
            runs=runs,
            run_choices=_run_choices(runs),
            details=details_json(runs, results.runs, labels, context.commands),
            colours={name: themed(style.colour) for name, style in styles_of(results.algorithms).items()},
            chosen=len(chosen),
            total=len(last),
            whole=chosen.keys() <= kept,
            warning=results.duplicates(),
            launches=context.launches,
            versions=distinct(last.values(), "versions"),
            machines=distinct(last.values(), "machine"),
            own_version=__version__,
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= cells.FILTERS
    environment.globals |= {
        "adaptation_of": adaptation_of,
        "objective_of": objective_of,
        "table_downloads": table_downloads,
        "figure_downloads": figure_downloads,
        "cell_of": cells.cell_of,
        "head_of": cells.head_of,
        "widths_of": cells.error_widths,
        "key_of": cells.key_of,
    }
    return environment


def _assets(names: Sequence[str]) -> Markup:
    return Markup("\n".join((ASSETS / name).read_text(encoding="utf-8") for name in names))


def _same(table: Table, tables: Sequence[Table]) -> str:
    """The title of an earlier table with the same numbers, as the oracle's where every run has one evaluation."""
    alike = [other for other in tables[: tables.index(table)] if other.rows and other.rows == table.rows]
    return alike[0].title if alike and alike[0].columns == table.columns else ""


def _choices(algorithms: Sequence[str]) -> dict[str, list[str]]:
    """What tables can be filtered by, in the order of their rows: nothing where there are few rows to look through."""
    adaptations = list(dict.fromkeys(map(adaptation_of, algorithms)))
    choices = {"adaptation": adaptations, "objective": objectives_of(algorithms)}
    wanted = has_objectives(algorithms) or len(adaptations) > MANY
    return {name: values for name, values in choices.items() if wanted and len(values) > 1}


def _run_choices(runs: Sequence[Run]) -> dict[str, list[str]]:
    """What the list of runs can be filtered by: all values of each column in the order of the list."""
    choices = {
        "method": [run.label for run in runs],
        "environment": [run.environment for run in runs],
        "state": [run.state for run in runs],
    }
    distinct_values = {name: list(dict.fromkeys(values)) for name, values in choices.items()}
    return {name: values for name, values in distinct_values.items() if len(values) > 1}


def _behind(origins: Sequence[Origin], numbers: Mapping[str, int]) -> list[int]:
    """The places in the list of the runs behind a cell; none unless the page has room for all of them."""
    names = dict.fromkeys(run for run, _ in origins)
    return [numbers[name] for name in names] if names.keys() <= numbers.keys() else []
