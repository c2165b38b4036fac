"""What the parts of a card's measurement found, read from what their commands wrote and printed.

Each reader takes the folder that the commands of a part wrote into, and their output.
"""

import csv
import re
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from xml.etree import ElementTree

from domainbed_ext.system import resources
from vitlorafa.bench.tables import Row

_ENDED = re.compile(r"%\] (PASSED|FAILED|ERROR|SKIPPED) (tests/\S+)")  # lines of pytest's log, with and without xdist
_ENDED_ALONE = re.compile(r"^(tests/\S+) (PASSED|FAILED|ERROR|SKIPPED)\b")
_STEPS = 5000  # of the run that the bar is for
_SKIPPED = "needs a CUDA device"  # why tests/conftest.py skips a test


@dataclass
class Findings:
    """What a part found.

    Attributes:
        tables: Rows by title.
        needs_card: What could not be done without a GPU.
        failures: What is wrong, each in a sentence.
    """

    tables: dict[str, list[Row]] = field(default_factory=dict)
    needs_card: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def read_nothing(folder: Path, text: str) -> Findings:
    """None: accuracies of a rehearsal mean nothing."""
    return Findings(needs_card=["comparing accuracies"])


def read_tables(folder: Path, text: str) -> Findings:
    """Every CSV file that was written, by its folder and name."""
    tables: dict[str, list[Row]] = {}
    for path in sorted(folder.rglob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            title = str(path.relative_to(folder).with_suffix(""))
            tables[title] = [dict(row) for row in csv.DictReader(file)]
    return Findings(tables)


def read_tests(folder: Path, text: str) -> Findings:
    """How many tests passed, and those that did not with the first line of their error."""
    if not (folder / "tests.xml").is_file():
        return _read_log_of_tests(text)
    cases = list(ElementTree.parse(folder / "tests.xml").getroot().iter("testcase"))
    failed = [(case, bad) for case in cases for bad in (*case.findall("failure"), *case.findall("error"))]
    skips = [skip.get("message", "") for case in cases for skip in case.findall("skipped")]
    on_cards = sum(_SKIPPED in reason for reason in skips)
    counts = {"passed": len(cases) - len(failed) - len(skips), "failed": len(failed), "skipped": len(skips)}
    findings = Findings({"tests": [counts]})
    if failed:
        first_lines = [
            {"test": f"{case.get('classname')}::{case.get('name')}", "error": bad.get("message", "").splitlines()[0]}
            for case, bad in failed
        ]
        findings.tables["failed tests"] = first_lines
    if on_cards:
        findings.needs_card.append(f"{on_cards} tests")
    return findings


def _read_log_of_tests(text: str) -> Findings:
    """The same of tests that were stopped before they wrote their report."""
    ended = [(word, name) for line in text.splitlines() for word, name in _ENDED.findall(line)]
    ended += [(word, name) for line in text.splitlines() for name, word in _ENDED_ALONE.findall(line)]
    words = [word for word, _ in ended]
    counts = {"passed": words.count("PASSED"), "failed": words.count("FAILED"), "skipped": words.count("SKIPPED")}
    findings = Findings({"tests that ended": [counts]}, failures=["the tests were stopped before their end"])
    if failed := [{"test": name} for word, name in ended if word in ("FAILED", "ERROR")]:
        findings.tables["failed tests"] = failed
    return findings


def read_steps(folder: Path, text: str) -> Findings:
    """The main columns of the tables of `vitlorafa.bench`, and the share of the matmul rate that was measured."""
    findings = read_tables(folder, text)
    rate = next((float(row["value"]) for rows in findings.tables.values() for row in rows if _is_rate(row)), None)
    for title, rows in findings.tables.items():
        if rows and "step_ms" in rows[0]:
            findings.tables[title] = [_main_columns(row, rate) for row in rows]
    return findings


def _is_rate(row: Row) -> bool:
    return row.get("question") == "rate" and row.get("variant") == "bf16"


def _main_columns(row: Row, rate: float | None) -> Row:
    names = ("model", "rank", "dropout", "method", "step_ms", "ratio_to_lower_bound", "images_per_s", "gflop_per_s")
    of_rate = float(row["gflop_per_s"]) / 1e3 / rate if rate and row["gflop_per_s"] else None
    return {**{name: row[name] for name in names}, "of the matmul rate": None if of_rate is None else f"{of_rate:.2f}"}


def read_runs(folder: Path, text: str) -> Findings:
    """The tables of `bench gpu`, and whether the whole run met its bars."""
    findings = read_tables(folder, text)
    whole = [rows[0] for title, rows in findings.tables.items() if title.startswith("run_cuda")]
    if whole:
        seconds = float(whole[0]["seconds, start to end"]) * _STEPS / int(whole[0]["steps"])  # the start as often, too
        waits = float(whole[0]["data wait, %"])
        findings.tables["bars of the whole run"] = [
            {
                "bar": f"{_STEPS:,} steps in 180 s, at this pace",
                "measured": round(seconds, 1),
                "met": "yes" if seconds < 180 else "no",
            },
            {"bar": "waits for data under 5 %", "measured": waits, "met": "yes" if waits < 5 else "no"},
        ]
    else:
        findings.needs_card.append("the bars of the whole run")
    return findings


def read_quickstart(folder: Path, text: str) -> Findings:
    """The averages of the quickstart's methods beside the committed ones, which a CPU gave."""
    here, there = (_averages(path) for path in (folder / "tables" / "results.csv", _committed()))
    rows: list[Row] = []
    for metric in sorted({metric for _, metric in there}):
        errors = [err for results in (here, there) for (_, name), (_, err) in results.items() if name == metric]
        noise = 3 * sqrt(2 * sum(err**2 for err in errors) / len(errors))  # standard errors of three trials are rough
        for (method, name), (mean, _) in there.items():
            if name != metric or (method, name) not in here:
                continue
            difference = here[method, name][0] - mean
            within = "yes" if abs(difference) <= noise else "no"
            numbers = {"CPU": f"{mean:.1f}", "GPU": f"{mean + difference:.1f}", "noise": f"{noise:.1f}"}
            rows.append({"method": method, "metric": metric, **numbers, "within": within})
    missing = there.keys() - here.keys()
    failures = [f"{len(missing)} accuracies of the quickstart are missing"] if missing else []
    if beyond := sum(row["within"] == "no" for row in rows):
        failures.append(f"{beyond} accuracies of the quickstart differ from the CPU's by more than noise")
    return Findings({"accuracies of the quickstart in %, beside the CPU's": rows}, failures=failures)


def _committed() -> Path:
    return resources.results() / "quickstart" / "results.csv"


def _averages(path: Path) -> dict[tuple[str, str], tuple[float, float]]:
    """Mean and standard error of each method's average by method and metric, selected by validation."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["environment"] == "Avg" and row["err"]]
    return {
        (row["algorithm"], row["metric"]): (float(row["mean"]), float(row["err"]))
        for row in rows
        if row["selection"] == "training-domain" and row["metric"] in ("in_domain", "out_of_domain")
    }
