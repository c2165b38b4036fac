"""Curves, tables and plots of accuracy along the strength of the update."""

import itertools
import math
import random

import pytest
from matplotlib.text import Annotation, Text

from domainbed_ext.report.frontier import curves
from domainbed_ext.report.page.cells import split
from domainbed_ext.report.plots.frontier import frontier_plot
from domainbed_ext.report.plots.palette import styles_of
from domainbed_ext.report.plots.plots import draw_plots
from domainbed_ext.report.results import Results
from domainbed_ext.report.summary import estimate
from domainbed_ext.report.tables.frontier import frontier_tables
from tests.domainbed_ext.fabricated_records import left_out_run, single_source_run

FIVE = (0.0, 0.25, 0.5, 0.75, 1.0)
# In-domain and out-of-domain accuracy at strength 1.
METHODS = {"BA": (0.84, 0.52), "BOnly": (0.82, 0.58), "AOnly": (0.81, 0.55), "LP": (0.73, 0.55), "FullFT": (0.87, 0.47)}
START = 0.72, 0.55


def evaluation(strength, inside, outside, tested, step):
    envs = range(4)
    accuracies = {f"env{env}_out_acc": outside if env in tested else inside for env in envs}
    accuracies |= {f"env{env}_in_acc": outside for env in tested}
    return {"strength": strength, "step": step, **accuracies}


def swept(methods=METHODS, trials=3, starts=None, strengths=FIVE, noise=0.01):
    """Leave-one-out runs on PACS along their strengths, from one start or from starts of their own."""
    draw = random.Random(0)
    records = []
    for name, (inside, outside) in methods.items():
        start = START if starts is None else starts[name]
        for trial, env in itertools.product(range(trials), range(4)):
            of_run = left_out_run(name, trial, env, outside, inside)
            moved = random.Random(trial).gauss(0, noise)
            ends = [end + moved + draw.gauss(0, noise) for end in (inside, outside)]
            of_run[-1]["strengths"] = [
                evaluation(
                    a,
                    *(first + moved + a * (end - first - moved) for first, end in zip(start, ends, strict=True)),
                    [env],
                    of_run[-1]["step"],
                )
                for a in strengths
            ]
            records += of_run
    return records


def labels(axes):
    return [child for child in axes.get_children() if isinstance(child, Annotation)]


@pytest.mark.parametrize("own_starts", [False, True])
def test_a_curve_per_method_with_labels_that_do_not_overlap(own_starts):
    starts = {name: (0.7 + 0.02 * number, 0.5 + 0.01 * number) for number, name in enumerate(METHODS)}
    figure = frontier_plot(Results(swept(starts=starts if own_starts else None)))
    (axes,) = figure.axes
    lines = [line for line in axes.lines if len(line.get_xdata()) == len(FIVE)]
    styles = styles_of(list(METHODS))
    assert [line.get_color() for line in lines] == [styles[name].colour for name in METHODS]
    texts = [label.get_text() for label in labels(axes)]
    assert texts[:5] == ["LoRA", "LoRA-FA", "LoRA-FB", "linear probe", "full fine-tuning"]
    assert texts.count("0") == (5 if own_starts else 1) and texts.count("0.5") >= 3
    assert ("dashed: the common start" in figure.get_supxlabel()) is not own_starts
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in labels(axes)]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.padded(-1).overlaps(other.padded(-1))
    frame = axes.get_window_extent().padded(1)
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 <= box.y1 <= frame.y1 for box in boxes)


def test_its_bars_are_intervals_over_trials():
    results = Results(swept({"BOnly": METHODS["BOnly"]}, strengths=(1.0,)))
    (axes,) = frontier_plot(results).axes
    (curve,) = curves(results.panels[0])
    inside = curve.estimate(1.0, "in_domain")
    (x0, y0), (x1, y1) = axes.collections[0].get_segments()[0]
    assert (x0, x1) == pytest.approx(inside.interval) and y0 == y1
    alone = frontier_plot(Results(swept(trials=1)))
    assert "bars" not in alone.get_supxlabel() and not alone.axes[0].collections


def test_an_interval_is_of_the_means_of_trials():
    assert str(estimate([0.71, 0.72, 0.73])) == "72.0 (69.5 to 74.5)"
    assert str(estimate([0.5])) == "50.0" and estimate([]) is None
    assert str(estimate([0.5, math.nan])) == "diverged"
    assert split("72.0 (69.5 to 74.5)") == ("72.0", "", "(69.5 to 74.5)")
    assert split("1,234 (0.1 to 0.2%)") == ("1,234 (0.1 to 0.2%)", "", "")


def test_the_table_of_a_curve_has_a_row_for_each_strength():
    results = Results(swept({"BOnly": (0.8, 0.6)}, noise=0.0))
    (table,) = frontier_tables(results.panels[0], "PACS")
    assert [row[:2] for row in table.rows] == [["BOnly (LoRA-FA)", f"{a:g}"] for a in FIVE]
    assert table.rows[0][2:] == ["72.0 (72.0 to 72.0)", "55.0 (55.0 to 55.0)", "-5.0 (-5.0 to -5.0)"]
    assert table.rows[-1][2:] == ["80.0 (80.0 to 80.0)", "60.0 (60.0 to 60.0)", "-"]
    assert len(table.origins[0, 2]) == 12


def test_runs_that_lack_strengths_are_left_out_and_counted():
    records = swept({"BOnly": (0.8, 0.6), "BA": (0.8, 0.6)}, trials=2)
    last = [record for record in records if "strengths" in record and record["args"]["algorithm"] == "BOnly"][-1]
    last["strengths"] = last["strengths"][:2]
    results = Results(records)
    (ba, bonly) = curves(results.panels[0])
    assert bonly.strengths == list(FIVE) and bonly.lack == "7 of 8 results" and ba.lack == ""
    assert any(label.get_text() == "LoRA-FA (7 of 8 results)" for label in labels(frontier_plot(results).axes[0]))


def test_strengths_without_the_trained_weights_have_no_difference():
    results = Results(swept({"BOnly": (0.8, 0.6)}, strengths=(0.0, 0.5)))
    (table,) = frontier_tables(results.panels[0], "PACS")
    assert [row[-1] for row in table.rows] == ["-", "-"]
    (axes,) = frontier_plot(results).axes
    assert [label.get_text() for label in labels(axes)] == ["LoRA-FA, 0.5", "0"]


def test_a_single_source_has_its_holdout_and_the_mean_of_the_others():
    records = [record for trial in range(2) for record in single_source_run("BOnly", trial)]
    for record in records:
        if record["step"] == 299:
            others = [0, 2, 3]
            point = evaluation(0.5, 0.9, 0.0, others, 299)
            point |= {f"env{env}_in_acc": value for env, value in zip(others, (0.1, 0.2, 0.6), strict=True)}
            record["strengths"] = [point]
    (comparison,) = Results(records).panels
    (curve,) = curves(comparison)
    assert curve.estimate(0.5, "in_domain").mean == pytest.approx(90.0)
    assert curve.estimate(0.5, "out_of_domain").mean == pytest.approx(30.0)


def test_sweeps_without_strengths_have_no_frontier():
    results = Results(left_out_run("BOnly", 0, 1, 0.5))
    assert frontier_plot(results) is None and "frontier" not in draw_plots(results)
    assert frontier_tables(results.panels[0], "PACS") == [] and results.frontier().empty
