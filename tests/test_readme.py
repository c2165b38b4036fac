"""What the README and results/README.md show was measured, and what they tell people to run is there."""

import csv
import html
import re
import statistics
import sys
from pathlib import Path

import pytest
from scipy.stats import binomtest, ttest_1samp

from domainbed_ext.report.differences import METRICS, Difference, difference_over_trials
from domainbed_ext.report.inference.holm import holm
from domainbed_ext.report.inference.power import trials_needed
from domainbed_ext.report.tables.table import signed
from tests import forked

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


RESULTS = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
FINDINGS = {path.parent.name: path.read_text(encoding="utf-8") for path in (ROOT / "results").glob("*/findings.md")}
SPEED = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")


def blocks(page, name):
    """What the page has between `<!-- name -->` and `<!-- /name -->`, as rows of tables."""
    (block,) = re.findall(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", page, flags=re.DOTALL)
    return [line for line in block.splitlines() if line.startswith("|")]


@pytest.mark.parametrize(
    ("page", "name", "rows"),
    [
        (README, "quickstart", 7),
        (README, "pacs_vit_tiny", 7),
        (RESULTS, "quickstart", 14),
        (RESULTS, "pacs_loo_vit_tiny", 20),
        (RESULTS, "pacs_vit_tiny", 14),
        (FINDINGS["pacs_methods"], "pacs_methods", 77),
        (FINDINGS["pacs_weight_space"], "pacs_weight_space", 41),
        (RESULTS, "pacs_cartoon_vit_tiny", 9),
        (FINDINGS["pacs_cartoon_power"], "pacs_cartoon_power", 23),
        (FINDINGS["pacs_factors"], "pacs_factors", 31),
        (FINDINGS["emoji_factors"], "emoji_factors", 31),
        (FINDINGS["pacs_inits"], "pacs_inits", 17),
        (FINDINGS["pacs_inits"], "pacs_inits_entries", 32),
        (FINDINGS["pacs_power"], "pacs_power", 20),
        (FINDINGS["pacs_power_rates"], "pacs_power_rates", 22),
        (FINDINGS["emoji_power"], "emoji_power", 20),
    ],
)
def test_tables_are_the_measured_ones(page, name, rows):
    shown = blocks(page, name)
    folder = name.removesuffix("_entries")
    measured = (ROOT / "results" / folder / "results.md").read_text(encoding="utf-8").splitlines()
    assert len(shown) == rows
    assert [row for row in shown if row not in measured] == []


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("pacs_weight_space", 10),
        ("pacs_cartoon_power", 20),
        ("pacs_inits", 28),
        ("pacs_power", 29),
        ("emoji_power", 29),
    ],
)
def test_differences_of_all_pairs_are_the_measured_ones(name, rows):
    measured = (ROOT / "results" / name / "pairs.md").read_text(encoding="utf-8").splitlines()
    shown = blocks(FINDINGS[name], f"{name}_differences")
    assert len(shown) == rows and all(row in measured for row in shown)


def section(heading):
    """The text under a heading of results/README.md."""
    return RESULTS.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize(
    ("page", "name", "least"),
    [
        (FINDINGS["pacs_power"], "pacs_power", 40),
        (FINDINGS["emoji_power"], "emoji_power", 40),
        (README.partition("On [EmojiStyles]")[0], "pacs_power", 2),
        (README.partition("On [EmojiStyles]")[2], "emoji_power", 2),
        (section("PACS at 96 px, each domain held out, 20 trials"), "pacs_power", 3),
        (section("EmojiStyles, each style held out, 20 trials"), "emoji_power", 3),
    ],
)
def test_intervals_in_the_text_are_those_of_the_table(page, name, least):
    with (ROOT / "results" / name / "pairs.csv").open(encoding="utf-8") as file:
        rows = [[float(row[key]) for key in ("mean", "low", "high")] for row in csv.DictReader(file)]
    # Two decimals are shown where one would not tell whether an interval excludes 0.
    measured = {
        "{:+.{n}f} ({:+.{n}f} to {:+.{n}f})".format(*(round(value, n) + 0.0 for value in row), n=n)  # + 0.0: no "-0.0"
        for row in rows
        for n in (1, 2)
    }
    interval = r"[+-]\d+\.\d+ \([+-]\d+\.\d+ to [+-]\d+\.\d+\)"
    shown = re.findall(interval, " ".join(page.split()).replace("−", "-"))
    assert len(shown) >= least and [each for each in shown if each not in measured] == []


def test_differences_between_processors_are_the_measured_ones():
    with (ROOT / "results" / "pacs_power" / "processors.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    probes, others = (
        [row for row in rows if row["algorithm"].startswith("LP") is is_probe] for is_probe in (True, False)
    )

    def differences(rows, metric):
        return [float(row[f"{metric}_avx512"]) - float(row[f"{metric}_amx"]) for row in rows]

    shown = " ".join(FINDINGS["pacs_power"].split())
    assert f"Of the {len(others)} runs that train more than the head" in shown
    for metric, words in (
        ("in_domain", "by {:.1f} points in domain (median; at most {:.1f})"),
        ("out_of_domain", "by {:.1f} points out of domain (at most {:.1f}, AOnly at rank 16 on sketches)"),
    ):
        sizes = [abs(value) for value in differences(others, metric)]
        assert words.format(statistics.median(sizes), max(sizes)) in shown
    means = [f"{statistics.fmean(differences(others, metric)):+.1f}" for metric in ("in_domain", "out_of_domain")]
    assert "by {} points in domain and {} out of domain".format(*means).replace("-", "−") in shown
    most = max(abs(value) for metric in ("in_domain", "out_of_domain") for value in differences(probes, metric))
    assert f"Of the eight linear probes, no accuracy differs by more than {most:.1f} points" in shown
    assert len(probes) == 8


def test_gains_of_averages_are_the_measured_ones():
    folder = "pacs_weight_space"
    out_of_domain, in_domain = (paired_differences(folder, metric) for metric in ("out_of_domain", "in_domain"))
    over_domains = paired_differences(folder, "out_of_domain", over="environment")
    rows = blocks(FINDINGS[folder], "pacs_weight_space_gains")[2:]
    assert len(rows) == 5
    for row in rows:
        name, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        method = name.split(" ")[0]
        separator = "," if "@" in method else "@"
        gains = [
            difference(f"{method}{separator}average={average}", method)
            for average in ("ma", "swad")
            for difference in (out_of_domain, in_domain)
        ]
        assert cells == [*gains, over_domains(f"{method} soup(trials)", method)], method


def paired_differences(name, metric, selection="training-domain", over="trial_seed"):
    """Mean and 95 % interval of the difference of two methods over trials (or environments), averaged over the rest."""
    values = paired_values(name, metric, selection, over)
    return lambda one, other: str(difference_over_trials(values(one, other))).replace("-", "−")


def paired_values(name, metric, selection, over="trial_seed"):
    """The differences of two methods in each trial (or environment), averaged over the rest."""
    with (ROOT / "results" / name / "selected.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["selection"] == selection]

    def value(row):
        if metric == "gap":  # of one source: over all four domains
            return (float(row["gap_source"]) + 3 * float(row["gap_target"])) / 4
        return float(row[metric])

    def difference(one, other):
        groups = sorted({row[over] for row in rows})
        means = [
            [
                statistics.fmean(value(row) for row in rows if row[over] == group and row["algorithm"] == method)
                for group in groups
            ]
            for method in (one, other)
        ]
        return [first - second for first, second in zip(*means, strict=True)]

    return difference


@pytest.mark.parametrize("name", ["pacs_cartoon_power", "pacs_inits", "pacs_weight_space"])
def test_intervals_over_trials_alone_are_those_of_the_selected_runs(name):
    with (ROOT / "results" / name / "pairs.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if "soup" not in row["algorithm"]]
    assert len(rows) >= 36
    for row in rows:
        measured = paired_differences(name, row["metric"], row["selection"])(row["algorithm"], row["reference"])
        shown = Difference(float(row["mean"]), (float(row["low"]), float(row["high"])), int(row["trials"]))
        assert str(shown).replace("-", "−") == measured and row["over_images"] == "False"


@pytest.mark.parametrize("name", ["pacs_cartoon_power", "pacs_inits", "pacs_weight_space"])
def test_tests_over_trials_alone_are_those_of_the_selected_runs(name):
    with (ROOT / "results" / name / "pairs.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if "soup" not in row["algorithm"]]
    for metric in dict.fromkeys(row["metric"] for row in rows):
        of_metric = [row for row in rows if row["metric"] == metric]
        for row in of_metric:
            values = paired_values(name, metric, row["selection"])(row["algorithm"], row["reference"])
            higher, lower = (sum(sign * value > 1e-9 for value in values) for sign in (1, -1))
            mean, deviation = 100 * statistics.fmean(values), 100 * statistics.stdev(values)
            needed = trials_needed(mean, deviation)
            signs = [higher, lower, len(values) - higher - lower]
            assert [int(row[key]) for key in ("higher", "lower", "equal")] == signs
            assert float(row["p"]) == pytest.approx(ttest_1samp(values, 0).pvalue)
            assert float(row["p_signs"]) == pytest.approx(binomtest(higher, higher + lower).pvalue)
            assert row["trials_needed"] == ("" if needed is None else str(needed))
        adjusted = holm([float(row["p"]) for row in of_metric])
        assert [float(row["p_holm"]) for row in of_metric] == pytest.approx(adjusted)


def test_differences_are_those_of_the_measured_runs():
    metrics = "out_of_domain", "in_domain", "gap_target"
    differences = [paired_differences("pacs_loo_vit_tiny", metric) for metric in metrics]
    rows = blocks(RESULTS, "differences")[2:]
    assert len(rows) == 9
    for row in rows:
        methods, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        one, other = (name.split("(")[0].strip() for name in methods.split(" − "))
        assert cells == [difference(one, other) for difference in differences], methods


PAGES = sorted(
    path.parent.name
    for path in (ROOT / "results").glob("*/index.html")
    if any(path.with_name(f"{name}.csv").exists() for name in ("pairs", "differences"))
)


def differences_of_page(name):
    """The text of each difference on the page, by source, methods and metric."""
    page = (ROOT / "results" / name / "index.html").read_text(encoding="utf-8")
    found = {}
    for article in re.findall(r'<article id="differences-\d+">.*?</article>', page, flags=re.DOTALL):
        source = re.findall(r"from (\w) alone", article)[:1]
        heads = [re.sub("<.*?>", "", head) for head in re.findall("<button.*?</button>", article)][3:]
        for row in re.findall(r"<tr [^>]*data-first=.*?</tr>", article, flags=re.DOTALL):
            pair = [html.unescape(each) for each in re.findall(r'data-(?:first|second|metric)="(.*?)"', row)]
            figures = [re.sub("<.*?>", "", cell) for cell in re.findall(r'<td class="figure">(.*?)</td>', row)]
            found[(*source, *pair)] = dict(zip(heads, map(html.unescape, figures), strict=True))
    return found


@pytest.mark.parametrize("name", PAGES)
def test_differences_on_pages_are_those_of_the_tables(name):
    shown, checked = differences_of_page(name), 0
    for path in (ROOT / "results" / name).glob("*.csv"):
        if path.stem not in ("pairs", "differences"):
            continue
        with path.open(encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["mean"]]
        for row in rows:
            source = [row["source"]] if row["source"] else []
            one, other, metric = row["algorithm"], row["reference"], METRICS[row["metric"]]
            mean, low, high = (float(row[end]) if row[end] else None for end in ("mean", "low", "high"))
            if (*source, one, other, metric) not in shown:  # a page may have a pair in the other order alone
                one, other, mean = other, one, -mean
                low, high = (None, None) if low is None else (-high, -low)
            figures = shown[(*source, one, other, metric)]
            interval = "" if low is None else f" ({signed(low)} to {signed(high)})"
            assert figures["Difference"].replace("−", "-") == f"{signed(mean)}{interval}", row
            assert figures["Trials"] == row["trials"]
            for head, column in (("p", "p"), ("p (signs)", "p_signs")):
                p = row[column]
                assert figures[head] == ("-" if not p else "<0.001" if float(p) < 0.001 else f"{float(p):.3f}"), row
            checked += 1
    assert checked > 3


def test_the_cost_of_quantised_weights_is_the_measured_one():
    out_of_domain, in_domain = (
        paired_differences("pacs_methods", metric)("BA@quantise=nf4", "BA") for metric in ("out_of_domain", "in_domain")
    )
    assert f"is {out_of_domain} out of domain and {in_domain} in domain" in " ".join(FINDINGS["pacs_methods"].split())


def negated(interval):
    """That of the second method minus the first, of an interval such as "+1.2 (-2.9 to +5.3)"."""
    mean, low, high = (number.translate(str.maketrans("+-", "-+")) for number in re.findall(r"[+-][0-9.]+", interval))
    return f"{mean} ({high} to {low})"


def test_answers_to_claims_are_those_of_the_findings():
    interval = r"[+-]?\d+\.\d+ \([+-]?\d+\.\d+ to [+-]?\d+\.\d+\)"
    checked = 0
    for row in blocks(RESULTS, "all_claims")[2:]:
        (folder,) = re.findall(r"\((\w+)/findings\.md\)", row)
        # The table of claims has an interval in a cell of its own.
        findings = re.sub(r"([+-]\d+\.\d) \| ([+-][\d.]+ to [+-][\d.]+) \|", r"\1 (\2)", FINDINGS[folder])
        findings = " ".join(findings.split()).replace("−", "-")
        intervals = re.findall(interval, row.replace("−", "-"))
        # That table counts a smaller gap as positive; here all differences are LoRA-FA minus the other method.
        shown = map(negated, intervals) if "gap is smaller" in row else intervals
        assert [each for each in shown if each not in findings] == [], row
        checked += len(intervals)
    assert checked >= 22


WANTED = {  # sign of the difference, LoRA-FA's minus the other's, that a claim names
    "LoRA-FA is above LoRA-FB out of domain": 1,
    "LoRA-FA is at least as good as LoRA out of domain": 1,
    "LoRA-FA's gap is smaller than LoRA's": -1,
    "LoRA-FA is at least as accurate as LoRA in domain": 1,
    "a Gaussian frozen A is better than a uniform one": 1,
}


def verdict(wanted, low, high):
    """The word for a claim by the interval of a difference, as results/README.md defines it."""
    if low <= 0 <= high:
        return "undecided"
    return "supported" if (low > 0) == (wanted > 0) else "contradicted"


def test_claims_hold_or_not_by_their_intervals():
    claim, checked = "", set()
    for row in blocks(RESULTS, "all_claims")[2:]:
        first, _, measured, holds, _ = (cell.strip() for cell in row.strip("|").split(" |"))
        claim = first or claim
        if claim not in WANTED:
            continue
        number = r"[+-][\d.]+"
        found = re.findall(
            rf"(rank \d+|as many parameters)?:? ?{number} \(({number}) to ({number})\)", measured.replace("−", "-")
        )
        words = {place: verdict(WANTED[claim], float(low), float(high)) for place, low, high in found}
        said = re.findall(r"(\w+)(?: (?:at|with) (rank \d+|as many parameters))?(?:; |$)", holds)
        general = [word for word, place in said if not place]
        assert words == {**dict.fromkeys(words, *general), **{place: word for word, place in said if place}}, row
        checked.add(claim)
    assert checked == set(WANTED)


def test_claims_are_the_measured_ones():
    accuracy, gap = (
        paired_differences("pacs_cartoon_vit_tiny", metric, "source-holdout") for metric in ("out_of_domain", "gap")
    )
    cells = [accuracy(f"BOnly@rank={rank}", f"AOnly@rank={rank}") for rank in (8, 16)]
    cells += [accuracy(f"BOnly@rank={rank}", "BA@rank=8") for rank in (8, 16)]
    cells += [gap("BA@rank=8", f"{one}@rank={rank}") for one in ("BOnly", "AOnly") for rank in (8, 16)]
    shown = [cell.strip() for row in blocks(RESULTS, "claims")[2:] for cell in row.strip("|").split("|")[1:]]
    assert shown == cells


@pytest.mark.parametrize("page", [README, RESULTS])
def test_costs_are_the_measured_ones(page):
    def measured(name, key, value):
        with (ROOT / "results" / "bench" / f"{name}.csv").open(encoding="utf-8") as file:
            return {(row["method"], float(row[key])): float(row[value]) for row in csv.DictReader(file)}

    machines = "intel_r_xeon_r_processor_2_cores", "amd_epyc_2_cores", "amd_epyc_2_cores_avx2"
    steps = [measured(f"step_{machine}", "rank", "ratio_to_lower_bound") for machine in machines]
    kept = measured("memory_amd_epyc_2_cores", "dropout", "kept_mib")
    numbers = [[float(n) for n in re.findall(r"([0-9.]+) (?:×|MiB)", line)] for line in blocks(page, "bench")]
    methods = ["lower bound", "LoRA-FA", "LoRA-FA (plain PyTorch)", "LoRA-FA (PEFT)", "LoRA (PEFT)"]
    with_dropout = ["lower bound", "LoRA-FA (separate)", *methods[2:]]
    assert [row for row in numbers if row] == [
        [round(each[one, rank], 2) for each in steps for rank in (8, 64)]
        + [round(kept[one, 0]), round(kept[other, 0.1])]
        for one, other in zip(methods, with_dropout, strict=True)
    ]


def test_speeds_are_the_measured_ones():
    def measured(what, way, column):
        path = ROOT / "results" / "bench" / f"{what}_amd_epyc_2_cores.csv"
        with path.open(encoding="utf-8") as file:
            return next(float(row[column]) for row in csv.DictReader(file) if row["way"] == way)

    text = " ".join(SPEED.split())
    assert f"at {measured('stages', 'ours: read, augment, normalise', '× plain'):.1f} × the rate of PIL" in text
    assert f"is {measured('run_upstream_fullft', 'defaults', '× upstream'):.1f} × as fast as upstream's" in text
    assert f"one of linear probing {measured('run_upstream_lp', 'defaults', '× upstream'):.1f} ×" in text


def test_it_is_short():
    assert len(README.splitlines()) <= 120


def test_its_pictures_and_make_targets_exist():
    pictures = re.findall(r"!\[[^]]*]\(([^)]+)\)", README)
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake ([a-z]+)", README))
    assert {"quickstart", "test"} <= targets
    assert all(f"\n{target}:" in makefile for target in targets)


def test_its_five_lines_adapt_a_model(tmp_path):
    code = README.split("```python\n")[1].split("```")[0]
    code = code.replace("pretrained=True", "pretrained=False").replace("vit_small_patch16_224", "test_vit")
    forked.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert {path.suffix for path in (tmp_path / "my_adapter").iterdir()} == {".json", ".safetensors"}
