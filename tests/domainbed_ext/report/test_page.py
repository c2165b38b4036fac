"""The page: what it holds, and that it asks for nothing. `test_page_in_a_browser` opens it."""

import itertools
import json
import re
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

from domainbed_ext.report.conclusion import conclude
from domainbed_ext.report.page import differences
from domainbed_ext.report.page.page import Context, render_page
from domainbed_ext.report.plots.plots import draw_plots
from domainbed_ext.report.results import Results
from tests.domainbed_ext.fabricated_records import METHODS, left_out, left_out_run, paper_like, single_source_run

FEW = {name: METHODS[name] for name in ("BA@rank=8", "BOnly@rank=8", "LP")}
NASTY = "<img src=x onerror=alert(1)>&\"'"


def html_of(records, context=None):
    results = Results(records)
    return render_page(results, results.tables(), draw_plots(results), context=context)


class Reader(HTMLParser):
    """Collects what tests ask about."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.targets, self.addresses, self.tags, self.words = [], [], [], [], []
        self.runs, self.places, self.details, self.within = [], [], "", ""
        self.feed(text)
        self.targets += [self.runs[place] for place in self.places]

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.within = values.get("id", "") if tag == "script" else ""
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
                if tag == "tr":
                    self.runs.append(value)
            elif name == "data-runs":
                self.places += map(int, value.split())
            elif name in ("href", "xlink:href") and value.startswith("#"):
                self.targets.append(value[1:])
            elif name in ("href", "src", "xlink:href", "srcset", "action"):
                self.addresses.append((value, "download" in values))
            self.targets += re.findall(r"url\(#([^)]+)\)", value or "")

    def handle_data(self, data):
        self.words.append(data)
        if self.within == "details":
            self.details += data

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def html():
    return html_of(paper_like(2, methods=FEW))


def test_anchors_resolve_and_ids_are_unique(html):
    found = Reader(html)
    assert len(found.ids) == len(set(found.ids))
    assert found.targets and set(found.targets) <= set(found.ids)
    assert {"result", "tables", "plots", "runs", "provenance", "run-PACS-LP-1-0", "table-1"} <= set(found.ids)


def test_it_asks_for_nothing(html):
    found = Reader(html)
    loaded = [address for address, is_download in found.addresses if not is_download]
    assert loaded == ["data:,"]
    assert not {"iframe", "img", "object", "embed", "base", "form"} & set(found.tags)
    assert found.tags.count("link") == 1 and found.tags.count("script") == 2
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    assert "default-src 'none'" in html


def test_it_answers_first(html):
    results = Results(paper_like(2, methods=FEW))
    (comparison,) = results.panels
    conclusion = conclude(comparison)
    found = Reader(html).text
    sections = re.findall(r'<section id="(\w+)"', html)
    assert sections == ["result", "tables", "plots", "differences", "more", "runs", "provenance"]
    result = conclusion.result.replace("\u00a0", " ")
    assert f"Best out of domain: {conclusion.best} , {result}." in found and conclusion.against in found
    assert html.index('id="plot-figure"') < html.index('id="tables"') < html.index('id="gaps-figure"')


def test_the_head_says_what_was_run():
    launch = {"command": "python -m x", "date": "2026-01-02T03:04:05+00:00", "seconds": 7772, "commit": "abc1234"}
    records = paper_like(2, methods=FEW)
    found = Reader(html_of(records, Context([launch]))).text
    assert "PACS from cartoon backbone vit_base_patch16_224.augreg_in21k protocol single source" in found
    for fact in (
        "training 300 steps",
        "trials 2",
        "rank 8",
        "precision bfloat16",
        "date 2026-01-02",
        "time 2 h 10 min",
        "commit abc1234",
        "python -m x",
    ):
        assert fact in found
    records = left_out(["BA"], batch_size=8)
    assert "<h1>PACS, leave one out</h1>" in html_of(records)
    assert "11 steps of 24 images" in Reader(html_of(records)).text


def details_of(html):
    return json.loads(Reader(html).details)


def test_every_figure_leads_to_its_runs(html):
    name = '<span class="label">LoRA, rank 8</span> <code>BA@<wbr>rank=8</code></th>'
    row = html[html.index(name) :].partition("</tr>")[0]
    assert row.count('href="#run-PACS-BA-rank8-1-0" data-runs="0 1"') == 6
    assert Reader(html).runs[:2] == ["run-PACS-BA-rank8-1-0", "run-PACS-BA-rank8-1-1"]
    run = re.search(r'<tr id="run-PACS-BA-rank8-1-0">(.*?)<tr', html, re.DOTALL)[1]
    assert Reader(run).text.startswith("LoRA, rank 8 trained on cartoon alone selected 0 0 299")
    details = details_of(html)["runs"]["run-PACS-BA-rank8-1-0"]
    assert dict(details["facts"])["protocol"] == "single_source" and dict(details["facts"])["seed"] == "1234"
    assert dict(details["facts"])["trainable parameters"] == "300,295"
    assert [name for name, _ in details["environments"]] == ["A (OOD)", "C (ID)", "P (OOD)", "S (OOD)"]
    assert details["steps"] == [0, 100, 200, 299] and details["chosen"] == [299]
    assert len(details["outside"]) == 4 and details["outside"][-1] > details["outside"][0]


def test_what_all_runs_share_is_there_once(html):
    details = details_of(html)
    assert details["common"]["Machine"] == {"cpu": "A processor", "cores": "2", "gpu": "none"}
    assert details["common"]["Versions"] == {"python": "3.11.2", "torch": "2.9.0"}
    assert details["common"]["Hyperparameters"] == {"backbone": "vit_base_patch16_224.augreg_in21k", "lr": "0.001"}
    groups = [run["groups"] for run in details["runs"].values()]
    assert groups[0] == {"Hyperparameters": {"rank": "8", "targets": "q,v"}} and groups[-1] == {}


def test_hyperparameters_are_those_that_were_used():
    records = single_source_run("BA", alpha=None, rank=8, image_size=None)
    for record in records:
        record["hparams"]["precision"] = "auto"
    used = details_of(html_of(records))["common"]["Hyperparameters"]
    assert [used[name] for name in ("alpha", "image_size", "precision")] == ["16", "224", "bfloat16"]


def test_a_run_has_its_commands():
    html = html_of(single_source_run("LP"), Context(commands=lambda record: {"Do it": f"do {record['run']}"}))
    assert details_of(html)["runs"]["run-PACS-LP-1-0"]["commands"] == {"Do it": "do PACS-LP-1-0"}


def test_runs_are_in_the_order_of_the_columns_and_have_a_state():
    records = left_out(["LP", "BA"], trials=1)
    for record in left_out_run("LP", 1, 0, 0.5):
        records.append(record | {"args": record["args"] | {"steps": 100}})
    found = Reader(html_of(records))
    assert found.runs[:3] == ["run-BA-0-0", "run-LP-0-0", "run-LP-0-1"]
    assert found.runs[3:] == [f"run-{name}-{env}-0" for env in (1, 2, 3) for name in ("BA", "LP")]
    run = re.search(r'<tr id="run-LP-0-1">(.*?)<tr', html_of(records), re.DOTALL)[1]
    assert "unfinished" in run and "test domain art_painting" in run


def test_nothing_is_taken_for_markup():
    records = single_source_run(f"BOnly@note={NASTY}", note=NASTY)
    for record in records:
        record["args"] = {**record["args"], "dataset": NASTY}
        record["environments"] = [f"{NASTY}{env}" for env in range(4)]
        record["run"] = f"{NASTY} run"
        record["machine"] = {NASTY: NASTY}
    html = html_of(records, Context([{"command": NASTY, "date": NASTY}], lambda record: {NASTY: NASTY}))
    found = Reader(html)
    assert "img" not in found.tags and found.tags.count("script") == 2
    assert len(found.ids) == len(set(found.ids)) and set(found.targets) <= set(found.ids)
    assert f"{NASTY}0 (OOD)" in found.words and NASTY in found.words
    assert json.loads(found.details)["common"]["Machine"] == {NASTY: NASTY}


def test_the_same_runs_give_the_same_page(html):
    records = paper_like(2, methods=FEW)
    assert html_of(records) == html == html_of(records[::-1])
    assert not re.search(r"20\d\d-\d\d-\d\d", html)


def test_negative_numbers_have_a_minus_sign():
    html = html_of(single_source_run("LP", accuracies=(0.6, 0.9, 0.7, 0.5), train=0.8))
    row = html[html.index("single source C: generalisation gap") :].partition("<tbody>")[2].partition("</tbody>")[0]
    assert ">−10.0<" in row and not re.search(r">-\d", row)


def test_labels_of_environments_explain_themselves(html):
    heads = re.findall(r'<abbr title="(\w+)">(\w)</abbr> \((\w+)\)', html)
    assert heads[:2] == [("art_painting", "A", "OOD"), ("cartoon", "C", "ID")]
    assert heads[2:4] == [("photo", "P", "OOD"), ("sketch", "S", "OOD")]
    assert "A: art_painting, C: cartoon, P: photo, S: sketch." in Reader(html).text


def test_errors_of_a_column_are_of_one_width_and_the_average_has_one():
    html = html_of(left_out(["BA", "LP"], trials=3, noise=0.2))
    body = re.search(r"<tbody>(.*?)</tbody>", html, re.DOTALL)[1]
    rows = re.findall(r'<span class="error" style="min-width:(\d)ch">± ([\d.]+)</span>', body)
    assert len(rows) == 10  # four domains and the average, twice
    assert all(rows[column][0] == rows[column + 5][0] for column in range(5))
    assert {int(width) for width, _ in rows} == {5, 6} and any(len(error) == 4 for _, error in rows)


def test_what_is_as_good_as_the_best_is_marked():
    records = [
        record
        for trial, shift in enumerate((-0.05, 0.0, 0.05))
        for name, accuracy in (("BA", 0.6), ("BOnly", 0.599 + shift / 10), ("LP", 0.5))
        for env in range(4)
        for record in left_out_run(name, trial, env, accuracy + shift)
    ]
    body = re.search(r"<tbody>(.*?)</tbody>", html_of(records), re.DOTALL)[1]
    marks = [re.findall(r'class="figure ?(\w*)"', row) for row in body.split("</tr>")[:3]]
    assert marks == [["best"] * 5, ["near"] * 5, [""] * 5]


def test_tables_and_plots_can_be_downloaded(html):
    found = Reader(html)
    downloads = [address for address, is_download in found.addresses if is_download]
    assert {"results.csv", "results_tables.tex", "plot.png", "plot.svg", "gaps.svg"} <= set(downloads)
    tables = Results(paper_like(2, methods=FEW)).tables()
    of_tables = [unquote(address.partition(",")[2]) for address in downloads if address.startswith("data:text/csv")]
    assert of_tables == [table.to_csv() for table in tables]
    assert sum(address.startswith("data:text/x-tex") for address in downloads) == len(tables)
    assert all(html.count(f'href="#table-{number}"') >= 1 for number in range(1, len(tables) + 1))


def test_what_matters_less_is_folded():
    html = html_of(left_out(["BA", "LP"], 2))
    more = html[html.index('<section id="more"') : html.index('<section id="runs"')]
    assert re.findall(r"<summary>(PACS, .*?)(?: <span|</summary>)", more) == [
        "PACS, model selection: test-domain validation set (oracle)",
        "PACS, bounds on the gap",
    ]
    assert "same numbers as PACS, model selection: training-domain validation set" in more
    assert "Averages" not in html


def test_runs_with_one_evaluation_and_of_upstream():
    (record,) = single_source_run("ERM", steps=(10,))
    record = {name: value for name, value in record.items() if name.startswith(("env", "step", "run", "args"))}
    del record["environments"]
    record["args"] = {k: v for k, v in record["args"].items() if k != "protocol"} | {"test_envs": [2]}
    html = html_of([record])
    assert "recorded neither versions nor machines" in html
    assert "test domain photo" in html and len(details_of(html)["runs"]["run-PACS-ERM-1-0"]["steps"]) == 1


def test_few_methods_of_one_objective_need_no_filter(html):
    assert 'id="choose"' not in html and 'class="break"' not in html


@pytest.fixture(scope="module")
def grouped():
    return html_of(left_out(["BA", "BA+CORAL", "BOnly", "BOnly+CORAL", "LP"], trials=1))


def choices_of(html, name):
    part = html[html.index(f'<p id="{name}"') :].partition("</p>")[0]
    found = re.findall(r'<select data-by="(\w+)">(.*?)</select>', part, re.DOTALL)
    return [(by, re.findall(r"<option>(.*?)</option>", options)) for by, options in found]


def test_rows_and_runs_say_what_they_are_filtered_by(grouped):
    row = re.search(r'<tr class="break" data-adaptation="LoRA-FA" data-objective="ERM">(.*?)</tr>', grouped, re.DOTALL)
    assert "<code>BOnly</code>" in row[1] and '<td class="part" data-head="Objective">ERM</td>' in row[1]
    assert choices_of(grouped, "choose") == [
        ("adaptation", ["LoRA", "LoRA-FA", "linear probe"]),
        ("objective", ["ERM", "CORAL"]),
    ]
    assert choices_of(grouped, "choose-runs") == [
        ("method", ["LoRA", "LoRA + CORAL", "LoRA-FA", "LoRA-FA + CORAL", "linear probe"]),
        ("environment", [f"test domain {name}" for name in ("art_painting", "cartoon", "photo", "sketch")]),
    ]
    assert re.search(r'<p id="choose" class="choose" hidden>', grouped)  # of no use without the script


def pair_rows(html):
    """Of each row of the table of all pairs: its two methods, its metric, and its difference."""
    part = html[html.index('<section id="differences"') : html.index('<section id="runs"')]
    row = r'<tr data-first="(.*?)" data-second="(.*?)" data-metric="(.*?)" .*?"figure">(.*?)<'
    return re.findall(row, part, re.DOTALL)


def test_every_pair_is_there_once(html):
    rows = [row[:3] for row in pair_rows(html)]
    metrics = ("Out-of-domain", "In-domain", "Gap source", "Gap target")
    assert rows == [(*pair, metric) for metric in metrics for pair in itertools.combinations(FEW, 2)]
    part = html[html.index('<section id="differences"') :]
    assert part.count('<p class="choose pairs" hidden data-chosen=') == 1
    assert all(part.count(f'<option value="{name}">') == 2 for name in FEW)
    assert "Compare two methods: PACS, from C alone" in part and "paired by trial and test domain" in part


def test_of_very_many_pairs_those_with_the_best_are_there(monkeypatch):
    records = left_out(["BA", "BOnly", "AOnly", "LP"], 2)
    assert len(pair_rows(html_of(records))) == 4 * 6
    monkeypatch.setattr(differences, "PAIRS", 5)
    few = html_of(records)
    assert len(pair_rows(few)) == 4 * 3
    assert "Of 6 pairs these are the ones with the row of the best in-domain accuracy" in few


def test_without_pairs_there_is_no_such_part():
    html = html_of(left_out(["BA"], 2))
    assert 'id="differences"' not in html and 'href="#differences"' not in html
