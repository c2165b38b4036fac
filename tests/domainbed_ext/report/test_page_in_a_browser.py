"""The page in a browser, where there is one: Chromium by WebDriver."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest

from tests.domainbed_ext.fabricated_records import left_out, paper_like
from tests.domainbed_ext.launched_processes import wait_for
from tests.domainbed_ext.report.test_page import FEW, html_of


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


COLUMN = "[...document.querySelectorAll('#table-1 tbody tr')].map((row) => row.cells[6].textContent.trim())"
SHOWN = "[...document.querySelectorAll('#list tbody tr')].filter((run) => !run.hidden && run.id).map((run) => run.id)"


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return write(tmp_path_factory, paper_like(2, methods=FEW))


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    return write(tmp_path_factory, left_out(["BA", "BA+CORAL", "BOnly", "BOnly+CORAL", "LP"], trials=2))


def write(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(html_of(records), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def opened(browser):
    """Opens a page; nothing may be in the console afterwards, nor stick out of a phone's screen."""

    def open_page(address, width=1400):
        browser.call("/url", {"url": "about:blank"})
        browser.call("/window/rect", {"width": width, "height": 900})
        browser.call("/url", {"url": address})
        return browser.run

    yield open_page
    browser.call("/window/rect", {"width": 500, "height": 900})
    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.call("/se/log", {"type": "browser"}) == []


def choose(controls, by, value):
    """Script that chooses an option of one of the page's selects."""
    return (
        f"const choice = document.querySelector('{controls} [data-by={by}]'); choice.value = '{value}';"
        "choice.dispatchEvent(new Event('change'));"
    )


def test_sorting(opened, browser, single):
    run = opened(single)
    assert run("return document.title") == "Results: PACS from cartoon"
    assert run("return document.querySelector('#plot-figure svg').getBoundingClientRect().height") > 100
    button = "document.querySelectorAll('#table-1 thead button')[6]"
    before = run(f"return {COLUMN}")
    down = run(f"{button}.click(); return {COLUMN}")
    assert [float(text.split("±")[0]) for text in down] == sorted(
        (float(text.split("±")[0]) for text in before), reverse=True
    )
    assert run(f"return {button}.parentElement.ariaSort") == "descending"
    element = browser.call("/element", {"using": "css selector", "value": "#table-1 thead th:nth-child(7) button"})
    browser.call(f"/element/{next(iter(element.values()))}/value", {"text": "\ue007"})  # by the keyboard
    assert run(f"return {COLUMN}") == down[::-1]
    assert "ascending" in run("return document.getElementById('announcement').textContent")
    assert run(f"{button}.click(); return {COLUMN}") == before
    assert run(f"return {button}.parentElement.ariaSort") == "none"


def test_rows_that_belong_together_stay_together(opened, single):
    run = opened(single)
    # Of groups of three, the first row is what is sorted by.
    groups = (
        "const body = document.createElement('tbody');"
        "for (const [name, values] of [['a', [1, 9, 0]], ['b', [2, 1, 1]]]) for (const value of values) {"
        "const row = body.insertRow(); row.append(Object.assign(document.createElement('th'), {textContent: name}));"
        "row.insertCell().textContent = value; }"
        "const table = document.createElement('table'); table.dataset.group = 3;"
        "table.innerHTML = '<thead><tr><th aria-sort=none><button>n</button></th><th class=figure aria-sort=none>"
        "<button>v</button></th></tr></thead>'; table.append(body); sortable(table);"
        "table.querySelectorAll('button')[1].click();"
        "return [...body.rows].map((row) => row.textContent).join(' ')"
    )
    assert run(groups) == "b2 b1 b1 a1 a9 a0"


def test_a_number_leads_to_its_runs(opened, single):
    run = opened(single)
    every = run(f"return {SHOWN}")
    assert len(every) == 6
    run("document.querySelector('#table-1 a[data-runs=\"4 5\"]').click()")
    assert run(f"return {SHOWN}") == ["run-PACS-LP-1-0", "run-PACS-LP-1-1"]
    assert "The 2 runs behind" in run("return document.getElementById('filter').textContent")
    run("history.back()")
    wait_for(lambda: len(run(f"return {SHOWN}")) == 6)
    run("document.querySelector('#table-1 a[data-runs=\"4 5\"]').click()")
    run("document.querySelector('#filter button').click()")
    assert run(f"return {SHOWN}") == every
    # An address with a run's anchor opens it.
    run("location.hash = '#run-PACS-BA-rank8-1-0'")
    detail = "document.getElementById('run-PACS-BA-rank8-1-0').nextElementSibling"
    wait_for(lambda: run(f"return {detail}.className") == "detail")
    assert run(f"return {detail}.querySelectorAll('.chart polyline').length") == 4 + 3  # and the keys of three
    text = run(f"return {detail}.innerText")
    for fact in ("A processor", "vit_base_patch16_224.augreg_in21k", "300,295", "4 evaluations", "C (ID)"):
        assert fact in text, fact
    run("document.querySelector('#run-PACS-BA-rank8-1-0 .expand').click()")
    assert run(f"return {detail}.id") == "run-PACS-BA-rank8-1-1"


def test_runs_are_filtered_and_listed_ten_at_a_time(opened, grouped):
    run = opened(grouped)
    assert len(run(f"return {SHOWN}")) == 10
    pages = "return document.getElementById('pages').innerText"
    assert "1 to 10 of 40 runs" in run(pages)
    seen = run(f"return {SHOWN}")
    run("document.querySelector('#pages button:last-child').click()")
    assert "11 to 20 of 40 runs" in run(pages) and not set(seen) & set(run(f"return {SHOWN}"))
    assert len(run(choose("#choose-runs", "method", "LoRA-FA + CORAL") + f"return {SHOWN}")) == 8
    only = run(choose("#choose-runs", "environment", "test domain sketch") + f"return {SHOWN}")
    assert only == ["run-BOnly-CORAL-3-0", "run-BOnly-CORAL-3-1"]
    # The address of a run that is not listed lists it.
    run("location.hash = '#run-LP-0-0'")
    wait_for(lambda: "run-LP-0-0" in run(f"return {SHOWN}"))
    accuracies = "return [...document.querySelectorAll('#list tbody tr[id]')].map((row) => row.cells[7].textContent)"
    run("document.querySelectorAll('#list thead button')[7].click()")
    sorted_down = list(map(float, run(accuracies)))
    assert sorted_down == sorted(sorted_down, reverse=True) and len(run(f"return {SHOWN}")) == 10


def test_a_choice_of_adaptation_and_objective(opened, grouped):
    run = opened(grouped)
    rows = (
        "return [...document.querySelectorAll('#table-1 tbody tr')].filter((row) => row.offsetParent)"
        ".map((row) => row.cells[0].querySelector('code')?.textContent || row.cells[0].textContent.trim())"
    )
    assert len(run(rows)) == 5
    assert run(choose("#choose", "adaptation", "LoRA-FA") + rows) == ["BOnly", "BOnly+CORAL"]
    assert run(choose("#choose", "objective", "CORAL") + rows) == ["BOnly+CORAL"]
    assert "LoRA-FA, objective CORAL" in run("return document.getElementById('announcement').textContent")
    # Sorted by a number, rows of an adaptation are no longer together.
    run("document.querySelectorAll('#table-1 thead button')[3].click()")
    assert run("return document.querySelectorAll('#table-1 .break').length") == 0


def test_a_choice_of_two_methods(opened, single):
    run = opened(single)
    rows = (
        "return [...document.querySelectorAll('#differences-1 tbody tr')].filter((row) => row.offsetParent)"
        ".map((row) => [0, 1, 2, 3, 7].map((cell) => row.cells[cell].textContent.trim()).join(' | '))"
    )
    first = run(rows)  # the best out of domain and the next
    assert len(first) == 4 and len({row.split(" | ")[:2][0] for row in first}) == 1
    controls = "#differences-1"
    run(choose(controls, "metric", "Out-of-domain"))
    run(choose(controls, "first", "LP"))
    (there,) = run(choose(controls, "second", "BA@rank=8") + rows)
    run(choose(controls, "first", ""))
    run(choose(controls, "second", "LP"))
    (back,) = run(choose(controls, "first", "BA@rank=8") + rows)
    assert there.startswith("linear probe | LoRA, rank 8 | Out-of-domain | −")
    assert back.startswith("LoRA, rank 8 | linear probe | Out-of-domain | +")
    numbers = [re.findall(r"[\d.]+", row.split(" | ")[3]) for row in (there, back)]
    assert numbers[0] == [numbers[1][0], numbers[1][2], numbers[1][1]]
    assert [row.split(" | ")[4] for row in (there, back)] == ["0 of 2", "2 of 2"]
    assert "1 difference is shown" in run("return document.getElementById('announcement').textContent")
    run(choose(controls, "first", ""))
    assert len(run(choose(controls, "second", "") + rows)) == 3


def test_links_open_folds(opened, grouped):
    run = opened(grouped)
    fold = "document.querySelector('#more details')"
    assert run(f"return {fold}.open") is False
    run(f"location.hash = '#' + {fold}.id")
    wait_for(lambda: run(f"return {fold}.open"))


def test_on_a_phone_the_average_is_the_first_figure(opened, grouped):
    heads = "return [...document.querySelectorAll('#table-1 thead th')].map((head) => head.textContent.trim())"
    assert opened(grouped)(heads)[-1] == "Avg"
    run = opened(grouped, width=500)
    assert run(heads)[3] == "Avg" and run(heads)[-1] == "S"
    assert run("return document.querySelector('#table-1 tbody tr').cells.length") == 8


def test_without_scripts_tables_plots_and_runs_are_there(opened, browser, single):
    browser.call("/goog/cdp/execute", {"cmd": "Emulation.setScriptExecutionDisabled", "params": {"value": True}})
    try:
        browser.call("/url", {"url": single})
        text = browser.call("/element", {"using": "css selector", "value": "body"})
        words = browser.call(f"/element/{next(iter(text.values()))}/text")
    finally:
        browser.call("/goog/cdp/execute", {"cmd": "Emulation.setScriptExecutionDisabled", "params": {"value": False}})
    assert "Best out of domain" in words and "PACS-LP-1-1" in words and "Out-of-domain" in words
    opened(single)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(opened, browser, grouped, single, scheme):
    """With AXE_CORE, the path of axe.min.js (`npm pack axe-core` has it)."""
    script = os.environ.get("AXE_CORE", "")
    if not script:
        pytest.skip("needs axe-core: set AXE_CORE to the path of its axe.min.js")
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.call("/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": {"features": features}})
    for address in (single, grouped):
        run = opened(address)
        run("for (const fold of document.querySelectorAll('details')) fold.open = true;")
        run("document.querySelector('#list .expand').click()")
        run(Path(script).read_text(encoding="utf-8"))
        found = browser.call("/execute/async", {"script": "axe.run().then(arguments[0])", "args": []})
        assert [(each["id"], each["nodes"][0]["html"]) for each in found["violations"]] == []
