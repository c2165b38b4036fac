"""The page: what it holds, that it asks for nothing, and that it works in a browser, where there is one."""

import contextlib
import itertools
import json
import re
import shutil
import subprocess
import urllib.request
from html.parser import HTMLParser

import pytest

from domainbed_ext.report.page import differences
from domainbed_ext.report.page.page import render_page
from domainbed_ext.report.plots.plots import draw_plots
from domainbed_ext.report.results import Results
from tests.domainbed_ext.fabricated_records import METHODS, left_out, paper_like, single_source_run
from tests.domainbed_ext.launched_processes import wait_for

FEW = {name: METHODS[name] for name in ("BA@rank=8", "BOnly@rank=8", "LP")}
NASTY = "<img src=x onerror=alert(1)>&\"'"


def html_of(records):
    results = Results(records)
    return render_page(results, results.tables(), draw_plots(results))


class Reader(HTMLParser):
    """Collects what tests ask about."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.targets, self.addresses, self.tags, self.words = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            elif name == "data-runs":
                self.targets += value.split()
            elif name in ("href", "xlink:href") and value.startswith("#"):
                self.targets.append(value[1:])
            elif name in ("href", "src", "xlink:href", "srcset", "action"):
                self.addresses.append(value)
            self.targets += re.findall(r"url\(#([^)]+)\)", value or "")

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def html():
    return html_of(paper_like(2, methods=FEW))


def test_anchors_resolve_and_ids_are_unique(html):
    found = Reader(html)
    assert len(found.ids) == len(set(found.ids))
    assert found.targets and set(found.targets) <= set(found.ids)
    assert {"tables", "plots", "runs", "provenance", "run-PACS-LP-1-0", "table-1"} <= set(found.ids)


def test_it_asks_for_nothing(html):
    found = Reader(html)
    assert found.addresses == ["data:,"]
    assert not {"link", "iframe", "img", "object", "embed", "base", "form"} & (set(found.tags) - {"link"})
    assert found.tags.count("link") == 1 and found.tags.count("script") == 1
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    assert "default-src 'none'" in html


def test_every_figure_leads_to_its_runs(html):
    row = re.search(r'<th scope="row">BA@<wbr>rank=8 \(LoRA\)</th>(.*?)</tr>', html, re.DOTALL)[1]
    assert row.count('data-runs="run-PACS-BA-rank8-1-0 run-PACS-BA-rank8-1-1"') == 6
    run = html[html.index('<details id="run-PACS-BA-rank8-1-0"') :]
    run = " ".join(" ".join(Reader(run[: run.index("</dl>")]).words).split())
    for fact in (
        "BA@rank=8 (LoRA)",
        "trial 0",
        "selected step 299",
        "seed 1234",
        "protocol single_source",
        "[0, 2, 3]",
    ):
        assert fact in run
    assert all(fact in html for fact in ("A processor", "2.9.0", "vit_base_patch16_224.augreg_in21k", "300,295"))


def test_nothing_is_taken_for_markup():
    records = single_source_run(f"BOnly@note={NASTY}", note=NASTY)
    for record in records:
        record["args"] = {**record["args"], "dataset": NASTY}
        record["environments"] = [f"{NASTY}{env}" for env in range(4)]
        record["run"] = f"{NASTY} run"
        record["machine"] = {NASTY: NASTY}
    html = html_of(records)
    found = Reader(html)
    assert "img" not in found.tags and found.tags.count("script") == 1
    assert len(found.ids) == len(set(found.ids)) and set(found.targets) <= set(found.ids)
    assert f"{NASTY}0 (OOD)" in found.words and NASTY in found.words


def test_the_same_runs_give_the_same_page(html):
    records = paper_like(2, methods=FEW)
    assert html_of(records) == html == html_of(records[::-1])
    assert not re.search(r"20\d\d-\d\d-\d\d", html)


def test_negative_numbers_have_a_minus_sign():
    html = html_of(single_source_run("LP", accuracies=(0.6, 0.9, 0.7, 0.5), train=0.8))
    row = html[html.index("generalisation gap</h2>") :].partition("<tbody>")[2].partition("</tbody>")[0]
    assert ">−10.0<" in row and not re.search(r">-\d", row)


def test_runs_with_one_evaluation_and_of_upstream():
    (record,) = single_source_run("ERM", steps=(10,))
    record = {name: value for name, value in record.items() if name.startswith(("env", "step", "run", "args"))}
    del record["environments"]
    record["args"] = {k: v for k, v in record["args"].items() if k != "protocol"} | {"test_envs": [2]}
    html = html_of([record])
    assert "<polyline" not in html and "recorded neither versions nor machines" in html
    assert "PACS, test domain P" in html


def test_few_methods_of_one_objective_need_no_filter(html):
    assert 'id="choose"' not in html and 'class="break"' not in html


@pytest.fixture(scope="module")
def grouped():
    return html_of(left_out(["BA", "BA+CORAL", "BOnly", "BOnly+CORAL", "LP"], trials=1))


def test_rows_and_runs_say_what_they_are_filtered_by(grouped):
    row = re.search(r'<tr class="break" data-adaptation="LoRA-FA" data-objective="ERM">(.*?)</tr>', grouped, re.DOTALL)
    assert '<th scope="row">BOnly</th>' in row[1] and '<td class="objective">ERM</td>' in row[1]
    assert re.search(r'<details id="run-BA-CORAL-0-0" data-adaptation="LoRA" data-objective="CORAL">', grouped)
    filters = grouped[grouped.index('id="choose"') : grouped.index('id="table-1"')]
    choices = re.findall(r'<select data-by="(\w+)">(.*?)</select>', filters, re.DOTALL)
    assert [(name, re.findall(r"<option>(.*?)</option>", options)) for name, options in choices] == [
        ("adaptation", ["LoRA", "LoRA-FA", "linear probe"]),
        ("objective", ["ERM", "CORAL"]),
    ]
    assert re.search(r'<p id="choose" class="choose" hidden>', grouped)  # of no use without the script


class Browser:
    """A headless Chromium by WebDriver's plain JSON."""

    def __init__(self, port, profile):
        self.base = f"http://127.0.0.1:{port}/session"
        flags = ["headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"]
        flags += ["disable-background-networking", "disable-component-update", f"user-data-dir={profile}"]
        options = {"args": [f"--{flag}" for flag in flags]}
        if binary := shutil.which("chromium") or shutil.which("google-chrome"):
            options["binary"] = binary
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.base += "/" + self.call("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def call(self, path, body=None, method=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.base}{path}", data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
            return json.load(response)["value"]

    def run(self, script):
        return self.call("/execute/sync", {"script": script, "args": []})


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("needs chromium and chromedriver")
    process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        line = next(line for line in process.stdout if "on port" in line and "successfully" in line)
        opened = Browser(re.search(r"port (\d+)", line)[1], tmp_path_factory.mktemp("profile"))
        yield opened
        with contextlib.suppress(OSError):
            opened.call("", method="DELETE")
    finally:
        process.terminate()
        process.wait(timeout=20)


def pair_rows(html):
    """Of each row of the table of all pairs: whether it is hidden, its two methods, its metric, and its difference."""
    part = html[html.index('<section id="differences"') : html.index('<section id="runs"')]
    row = (
        r'<tr( class="reversed" hidden)? data-first="(.*?)" data-second="(.*?)" data-metric="(.*?)">.*?"figure">(.*?)<'
    )
    return re.findall(row, part, re.DOTALL)


def test_without_scripts_every_pair_is_there_once(html):
    shown = [row[1:4] for row in pair_rows(html) if not row[0]]
    metrics = ("Out-of-domain", "In-domain", "Gap source", "Gap target")
    assert shown == [(*pair, metric) for metric in metrics for pair in itertools.combinations(FEW, 2)]
    part = html[html.index('<section id="differences"') :]
    assert part.count('<p class="choose pairs" hidden>') == 1
    assert all(part.count(f"<option>{name}</option>") == 2 for name in FEW)
    assert "PACS, from C alone, differences between all pairs" in part and "paired by trial and test domain" in part


def test_each_pair_is_there_in_both_directions(html):
    rows = pair_rows(html)
    differences = {row[1:4]: float(row[4].replace("−", "-")) for row in rows}
    assert len(differences) == len(rows) == 2 * sum(not row[0] for row in rows)
    assert any(differences.values())
    assert all(differences[two, one, metric] == -value for (one, two, metric), value in differences.items())


def test_of_very_many_pairs_those_with_the_best_are_there(monkeypatch):
    records = left_out(["BA", "BOnly", "AOnly", "LP"], 2)
    assert len(pair_rows(html_of(records))) == 2 * 4 * 6
    monkeypatch.setattr(differences, "PAIRS", 5)
    few = html_of(records)
    assert len(pair_rows(few)) == 2 * 4 * 3
    assert "Of 6 pairs these are the ones with the row of the best in-domain accuracy" in few


def test_without_pairs_there_is_no_such_part():
    html = html_of(left_out(["BA"], 2))
    assert 'id="differences"' not in html and 'href="#differences"' not in html


COLUMN = "[...document.querySelectorAll('#table-1 tbody tr')].map((row) => row.cells[6].textContent.trim())"
SHOWN = "[...document.querySelectorAll('.group > details')].filter((run) => !run.hidden).map((run) => run.id)"


def test_in_a_browser(browser, html, tmp_path):
    (tmp_path / "index.html").write_text(html, encoding="utf-8")
    browser.call("/url", {"url": (tmp_path / "index.html").as_uri()})
    assert browser.run("return document.title") == "Results: PACS"
    assert browser.run("return document.querySelector('#plot-figure svg').getBoundingClientRect().height") > 100

    # A click on a header sorts by it, a second one the other way round; by the keyboard too.
    button = "document.querySelectorAll('#table-1 thead button')[6]"
    before = browser.run(f"return {COLUMN}")
    down = browser.run(f"{button}.click(); return {COLUMN}")
    assert [float(text.split(" ")[0]) for text in down] == sorted(
        (float(t.split(" ")[0]) for t in before), reverse=True
    )
    assert browser.run(f"return {button}.parentElement.ariaSort") == "descending"
    element = browser.call("/element", {"using": "css selector", "value": "#table-1 thead th:nth-child(7) button"})
    browser.call(f"/element/{next(iter(element.values()))}/value", {"text": "\ue007"})
    assert browser.run(f"return {COLUMN}") == down[::-1]
    assert "ascending" in browser.run("return document.getElementById('announcement').textContent")

    # A figure leads to its runs and to no others.
    every = browser.run(f"return {SHOWN}")
    browser.run("document.querySelector('#table-1 a[data-runs*=\"run-PACS-LP-1-0\"]').click()")
    assert browser.run(f"return {SHOWN}") == ["run-PACS-LP-1-0", "run-PACS-LP-1-1"]
    assert "The 2 runs behind" in browser.run("return document.getElementById('filter').textContent")
    browser.run("document.querySelector('#filter button').click()")
    assert browser.run(f"return {SHOWN}") == every and len(every) == 6

    # An address with a run's anchor opens it.
    browser.run("location.hash = '#run-PACS-BA-rank8-1-0'")
    wait_for(lambda: browser.run("return document.getElementById('run-PACS-BA-rank8-1-0').open"))
    assert browser.run("return document.querySelectorAll('#run-PACS-BA-rank8-1-0 .chart polyline').length") == 4

    # Nothing sticks out of a phone's screen but what scrolls in its own box.
    browser.call("/window/rect", {"width": 500, "height": 900})
    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.call("/se/log", {"type": "browser"}) == []


def test_a_choice_of_adaptation_and_objective_in_a_browser(browser, grouped, tmp_path):
    (tmp_path / "index.html").write_text(grouped, encoding="utf-8")
    browser.call("/url", {"url": (tmp_path / "index.html").as_uri()})
    browser.call("/window/rect", {"width": 1400, "height": 900})
    rows = (
        "return [...document.querySelectorAll('#table-1 tbody tr')].filter((row) => row.offsetParent)"
        ".map((row) => row.cells[0].textContent)"
    )
    change = (
        "const choice = document.querySelector('[data-by={}]'); choice.value = '{}';"
        "choice.dispatchEvent(new Event('change'));"
    )
    assert len(browser.run(rows)) == 5
    assert browser.run(change.format("adaptation", "LoRA-FA") + rows) == ["BOnly", "BOnly+CORAL"]
    assert browser.run(change.format("objective", "CORAL") + rows) == ["BOnly+CORAL"]
    assert sorted(browser.run(f"return {SHOWN}")) == [f"run-BOnly-CORAL-{env}-0" for env in range(4)]
    assert "LoRA-FA, objective CORAL" in browser.run("return document.getElementById('announcement').textContent")
    # An address with the anchor of a hidden run shows it.
    browser.run("location.hash = '#run-LP-0-0'")
    wait_for(lambda: browser.run("return document.getElementById('run-LP-0-0').open"))
    assert len(browser.run(rows)) == 5 and len(browser.run(f"return {SHOWN}")) == 20
    # Sorted by a number, rows of an adaptation are no longer together.
    browser.run("document.querySelectorAll('#table-1 thead button')[3].click()")
    assert browser.run("return document.querySelectorAll('#table-1 .break').length") == 0
    browser.call("/window/rect", {"width": 500, "height": 900})
    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.call("/se/log", {"type": "browser"}) == []


def test_a_choice_of_two_rows_in_a_browser(browser, html, tmp_path):
    (tmp_path / "index.html").write_text(html, encoding="utf-8")
    browser.call("/url", {"url": (tmp_path / "index.html").as_uri()})
    browser.call("/window/rect", {"width": 1400, "height": 900})
    rows = (
        "return [...document.querySelectorAll('#differences-1 tbody tr')].filter((row) => row.offsetParent)"
        ".map((row) => [0, 1, 2].map((cell) => row.cells[cell].textContent).join(' '))"
    )
    change = (
        "const choice = document.querySelector('#differences-1 [data-by={}]'); choice.value = '{}';"
        "choice.dispatchEvent(new Event('change'));"
    )
    assert browser.run(rows) == [
        "BA@rank=8 BOnly@rank=8 Out-of-domain",
        "BA@rank=8 LP Out-of-domain",
        "BOnly@rank=8 LP Out-of-domain",
    ]
    assert browser.run(change.format("first", "LP") + rows) == [
        "LP BA@rank=8 Out-of-domain",
        "LP BOnly@rank=8 Out-of-domain",
    ]
    assert browser.run(change.format("second", "BA@rank=8") + rows) == ["LP BA@rank=8 Out-of-domain"]
    assert "1 difference is shown" in browser.run("return document.getElementById('announcement').textContent")
    assert len(browser.run(change.format("metric", "") + rows)) == 4
    browser.call("/window/rect", {"width": 500, "height": 900})
    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.call("/se/log", {"type": "browser"}) == []
