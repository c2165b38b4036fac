"""What ten thousand runs would cost, counted on a few: reads and steps a run, and the bytes of the page."""

import collections
import json
import re
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rich.console import Console

import domainbed_ext
from domainbed_ext.collect_results import collect, main
from domainbed_ext.report.page import runs as page_runs
from domainbed_ext.report.page.page import render_page
from domainbed_ext.report.plots import plots
from domainbed_ext.report.plots.panels import make_panels
from domainbed_ext.report.results import Results
from domainbed_ext.report.tables.table import render_markdown
from domainbed_ext.runs.folder import load_records
from tests.domainbed_ext.fabricated_records import write_runs
from tests.domainbed_ext.generated_sweeps import sweep_records
from tests.domainbed_ext.report.test_page import Reader

PROTOCOLS = ["leave_one_out", "single_source"]
PACKAGE = str(Path(domainbed_ext.__file__).parent)
# Without adapters, whose shapes take seconds to get from timm.
SMALL = {"algorithms": ["LP", "FullFT"], "n_hparams": 2, "n_trials": 2, "steps": (0, 299), "nan": 0}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_each_run_is_opened_once_and_each_record_parsed_once(protocol, tmp_path, monkeypatch):
    records = list(sweep_records(protocol=protocol, **{**SMALL, "n_trials": 1}))
    write_runs(tmp_path / "runs", records)
    opened, parsed, parse, watching = collections.Counter(), [], json.loads, True

    def watch(event, args):
        if watching and event == "open" and str(args[0]).startswith(str(tmp_path / "runs")):
            opened[str(args[0])] += 1

    sys.addaudithook(watch)  # for good, so it is told when to stop
    monkeypatch.setattr(json, "loads", lambda text, **options: parsed.append(text) or parse(text, **options))
    monkeypatch.setattr(plots, "draw_plots", lambda results, reference: {"plot": Figure()})
    collect(tmp_path / "runs", tmp_path / "tables", console=Console(quiet=True))
    watching = False
    files = {str(tmp_path / "runs" / record["run"] / "results.jsonl") for record in records}
    assert opened == dict.fromkeys(files, 1) and len(files) == 16
    assert len([text for text in parsed if "args" in str(text)]) <= len(records)


def lines_run(folder):
    """How many lines of each function of ours run when everything is made of a folder but the plots' drawing."""
    counted = collections.Counter()

    def trace(frame, event, arg):
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE):
            return None
        counted[f"{Path(code.co_filename).name} {code.co_name}"] += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        results = Results(load_records(folder))
        tables = results.tables()
        assert (
            render_markdown(tables, results.duplicates()) and make_panels(results) and render_page(results, tables, {})
        )
        assert len(results.tidy()) and len(results.selected())
    finally:
        sys.settrace(before)
    return counted


@pytest.mark.parametrize("doubled", ["n_hparams", "n_trials"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_twice_the_runs_are_twice_the_steps(protocol, doubled, tmp_path):
    once, twice = (
        lines_run(write_runs(tmp_path / str(factor), sweep_records(protocol=protocol, **SMALL | {doubled: 2 * factor})))
        for factor in (1, 2)
    )
    assert once["model_selection.py accuracy"] > 100 and once["page.html root"] > 1000
    more = {name: (once[name], count) for name, count in twice.items() if count > 2.05 * once[name] + 10}
    assert not more


@pytest.fixture
def small_room(monkeypatch):
    """Sets the room that a page has for runs, in runs of some number of evaluations."""

    def set_to(runs, evaluations):
        monkeypatch.setattr(page_runs, "ROOM", runs * (page_runs.ENTRY + evaluations * page_runs.EVALUATION))

    return set_to


def html_of(records):
    results = Results(records)
    return render_page(results, results.tables(), {})


def linked(html):
    """The runs that are listed, and those that each number leads to."""
    found = Reader(html)
    assert set(found.targets) <= set(found.ids)
    links = [places.split() for places in re.findall(r'data-runs="([^"]+)"', html)]
    return set(found.runs), [" ".join(found.runs[int(place)] for place in places) for places in links]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("evaluations", [1, 2, 18])
def test_the_page_is_no_larger_than_said(protocol, evaluations, small_room):
    dimensions = {**SMALL, "n_hparams": 3, "n_trials": 1, "steps": range(0, 300 * evaluations, 300)}
    records = list(sweep_records(["DomainNet"], protocol=protocol, **dimensions))
    small_room(0, evaluations)
    empty = len(html_of(records).encode())
    for room in (1, 4, 12, 1000):  # of 36
        small_room(room, evaluations)
        html = html_of(records)
        assert len(html.encode()) - empty <= page_runs.ROOM
        assert len(linked(html)[0]) <= room
    assert len(linked(html)[0]) == 36 and "runs are listed here" not in html


def test_runs_that_no_number_comes_from_give_way(small_room):
    records = list(sweep_records(**{**SMALL, "n_hparams": 10, "n_trials": 1}))
    everything, all_links = linked(html_of(records))
    chosen = set(" ".join(all_links).split())
    assert len(everything) == 80 and len(chosen) < 17
    small_room(20, 2)
    html = html_of(records)
    assert linked(html) == (chosen, all_links)
    assert f"{len(chosen)} of 80 runs are listed here: those behind the tables' numbers." in html
    assert "80 runs, 160 records" in html and "Click a number" in html and "selected.csv" in html


def test_a_number_leads_to_all_of_its_runs_or_to_none(small_room):
    records = list(sweep_records(**{**SMALL, "n_hparams": 10, "n_trials": 3}))
    _, all_links = linked(html_of(records))
    chosen = set(" ".join(all_links).split())
    small_room(7, 2)
    html = html_of(records)
    shown, links = linked(html)
    assert len(shown) == 6 and set(links) <= set(all_links) and set(" ".join(links).split()) == shown
    assert f"6 of 240 runs are listed here: as many as fit of the {len(chosen)} behind the tables' numbers." in html
    assert "Click a linked number" in html


def test_a_run_that_cannot_be_read_stops_no_other(tmp_path, capsys):
    records = list(sweep_records(**{**SMALL, "n_hparams": 1, "steps": (0,)}))
    broken = write_runs(tmp_path, records) / records[0]["run"] / "results.jsonl"
    broken.write_text(broken.read_text()[:-100])
    assert main(["--input_dir", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "15 runs, 15 records" in out and "Incomplete: LP (7 of 8 results)." in out and "index.html" in out
    assert err.startswith(f"warning: left out: {broken} line 1 is not a record") and err.count("\n") == 1
    broken.parent.rename(tmp_path.parent / broken.parent.name)
    assert main(["--input_dir", str(tmp_path), "--output_dir", str(tmp_path / "again")]) == 0
    for path in (tmp_path / "tables").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
