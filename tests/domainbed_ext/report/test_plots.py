import itertools
import random
import re

import matplotlib
import pytest
from matplotlib.text import Annotation, Text

from domainbed_ext.report.methods import algorithm_order, label_of
from domainbed_ext.report.plots.gaps import gap_plot
from domainbed_ext.report.plots.palette import styles_of
from domainbed_ext.report.plots.panels import make_panels
from domainbed_ext.report.plots.plots import draw_plots, render
from domainbed_ext.report.plots.scatter import generalisation_plot, parameters_plot, side_by_side
from domainbed_ext.report.plots.style import short_count
from domainbed_ext.report.plots.training import training_plot
from domainbed_ext.report.results import Results
from tests.domainbed_ext.fabricated_records import METHODS, left_out, paper_like, single_source_run


def records(algorithms, dataset="PACS", trials=2, seed=0, spread=0.3):
    rng = random.Random(seed)
    for number, algorithm in enumerate(algorithms):
        for trial, test_env in itertools.product(range(trials), range(2)):
            args = {"dataset": dataset, "algorithm": algorithm, "trial_seed": trial, "hparams_seed": 0}
            accuracies = {
                f"env{env}_{split}_acc": 0.5 + spread * rng.random() for env in range(2) for split in ("in", "out")
            }
            run = f"{dataset}{number}{trial}{test_env}"
            yield {"args": {**args, "test_envs": [test_env]}, "step": 0, "run": run, **accuracies}


def panels_of(records):
    return make_panels(Results(list(records)))


def labels(axes):
    return [child for child in axes.get_children() if isinstance(child, Annotation) and child.get_text() != "y = x"]


@pytest.mark.parametrize("draw", [generalisation_plot, parameters_plot])
def test_labels_do_not_overlap_where_trials_do(draw):
    names = ["BA@rank=8", "BA@rank=16", "BOnly@rank=8", "BOnly@rank=16", "AOnly@rank=8", "LP", "FullFT"]
    figure = draw(panels_of(left_out(names, trials=3)))
    (axes,) = figure.axes
    assert len(labels(axes)) == 7
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in labels(axes)]
    assert not any(one.padded(-1).overlaps(two.padded(-1)) for one, two in itertools.combinations(boxes, 2))


@pytest.mark.parametrize("spread", [0.3, 0.02])
def test_labels_are_in_the_panel_and_do_not_overlap(spread):
    long = "FullFT@clip_grad=1.0,label_smoothing=0.1,schedule=cosine,warmup=0.05"
    names = ["BA", "BOnly", "BOnly@rank=16", "AOnly", "AOnly@rank=16", "LP", long]
    figure = generalisation_plot(panels_of(records(names, spread=spread)))
    (axes,) = figure.axes
    assert [" ".join(text.get_text().split()) for text in labels(axes)] == list(map(label_of, names))
    figure.draw_without_rendering()
    # The text alone: an annotation's own extent holds its leader too.
    boxes = [Text.get_window_extent(text) for text in labels(axes)]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.padded(-1).overlaps(other.padded(-1))
    frame = axes.get_window_extent().padded(1)
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 for box in boxes)


def test_the_same_bytes_and_no_date():
    shown = panels_of(records(["BA", "ERM"]))
    for kind in ("png", "svg"):
        assert render(generalisation_plot(shown), kind) == render(generalisation_plot(shown), kind)
    svg = render(generalisation_plot(shown), "svg")
    assert not re.search(rb"<dc:date>|20\d\d-\d\d-\d\dT", svg)
    assert b">in-domain accuracy (%)</text>" in svg  # text that editors can change


def test_a_panel_for_each_data_set():
    both = [*records(["BA"], "VLCS"), *records(["BA", "LP"], "PACS"), *records(["LP"], "Toy"), *records(["LP"], "X")]
    figure = generalisation_plot(panels_of(both))
    assert [axes.get_title() for axes in figure.axes] == ["VLCS", "PACS", "Toy", "X", "", ""]
    assert [len(labels(axes)) for axes in figure.axes] == [1, 2, 1, 1, 0, 0]


def test_matplotlib_is_left_as_it_was():
    before = dict(matplotlib.rcParams)
    render(generalisation_plot(panels_of(records(["BA"], trials=1))), "svg")
    assert dict(matplotlib.rcParams) == before


def test_single_source_has_panels_too():
    both = panels_of([*records(["BA", "LP"], "PACS"), *paper_like(2, datasets=["VLCS", "PACS"])])
    titles = ["PACS", "VLCS, from L alone", "PACS, from C alone"]
    figure = generalisation_plot(both)
    assert [axes.get_title() for axes in figure.axes] == titles
    assert "small dots: trials" in figure.get_supxlabel()
    assert [axes.get_title() for axes in gap_plot(both).axes] == titles
    # Those of leave-one-out above have recorded no parameters.
    assert [axes.get_title() for axes in parameters_plot(both).axes] == titles[1:]


def test_axes_are_named_once_and_notes_are_smaller():
    both = panels_of([*paper_like(2, datasets=["VLCS", "PACS"])])
    for draw in (generalisation_plot, parameters_plot, gap_plot, training_plot):
        figure = draw(both)
        figure.draw_without_rendering()
        named = [axes.xaxis.label for axes in figure.axes if axes.get_xlabel()]
        assert named and all("(" in label.get_text() or label.get_text() == "step" for label in named)
        ticks = figure.axes[0].xaxis.get_ticklabels()[0].get_fontsize()
        assert named[0].get_fontsize() > ticks > figure._supxlabel.get_fontsize()
    assert [axes.get_ylabel() for axes in generalisation_plot(both).axes] == ["out-of-domain accuracy (%)", ""]
    (alone,) = generalisation_plot(panels_of(paper_like(2))).axes
    assert alone.get_title() == ""  # the page's heading has it


def test_few_trials_are_dots_and_many_are_error_bars():
    few, many = (generalisation_plot(panels_of(paper_like(trials))) for trials in (3, 6))
    dots = [line for line in few.axes[0].lines if line.get_marker() == "o" and line.get_markersize() == 3]
    assert len(dots) == 3 * len(METHODS) and not few.axes[0].containers
    assert len(many.axes[0].containers) == len(METHODS)
    assert "bars: standard error over trials" in many.get_supxlabel() and "dots" not in many.get_supxlabel()
    # The mean is in the middle of its trials.
    (panel,) = panels_of(paper_like(3))
    for point in panel.points:
        assert point.outside.mean == pytest.approx(sum(trial.outside for trial in point.trials) / 3)


def test_an_axis_shows_ten_points_at_least():
    (axes,) = generalisation_plot(panels_of(records(["BA", "LP"], spread=0.001))).axes
    assert all(high - low >= 10 for low, high in (axes.get_xlim(), axes.get_ylim()))


def test_methods_of_one_size_are_side_by_side_and_ranks_are_joined():
    places = side_by_side({"a": 100.0, "b": 100.5, "c": 1000.0}, 100.0)
    assert places["a"] < 100 < places["b"] and places["c"] == 1000
    (axes,) = parameters_plot(panels_of(paper_like(6))).axes
    joined = [line for line in axes.lines if line.get_alpha() == 0.6]
    assert len(joined) == 2  # LoRA-FA and LoRA-FB at ranks 8 and 16
    assert all(len(line.get_xdata()) == 2 for line in joined)


def test_the_probe_is_a_line_to_compare_with():
    (panel,) = panels_of(paper_like(3))
    (axes,) = generalisation_plot([panel]).axes
    probe = next(point for point in panel.points if point.algorithm == "LP")
    levels = [line.get_ydata()[0] for line in axes.lines if list(line.get_xdata()) == [0, 1]]
    assert levels == [probe.outside.mean]
    assert "dotted" not in generalisation_plot(panels_of(records(["BA", "BOnly"]))).get_supxlabel()


def test_gaps_are_bars():
    figure = gap_plot(panels_of(paper_like(2)))
    (axes,) = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["in-domain", "out-of-domain"]
    assert [text.get_text() for text in axes.get_yticklabels()] == list(map(label_of, METHODS))
    assert len(axes.patches) == 14
    shown = [float(text.get_text().replace("−", "-")) for text in labels(axes)]
    assert shown == pytest.approx([bar.get_width() for bar in axes.patches], abs=0.051)


def test_labels_of_parameters_do_not_overlap():
    figure = parameters_plot(panels_of(paper_like(2)))
    (axes,) = figure.axes
    assert axes.get_xscale() == "log" and len(labels(axes)) == 7
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in labels(axes)]
    assert not any(one.padded(-1).overlaps(two.padded(-1)) for one, two in itertools.combinations(boxes, 2))


def test_training_is_drawn_where_there_was_more_than_one_evaluation():
    figure = training_plot(panels_of(paper_like(2)))
    assert [len(axes.lines) for axes in figure.axes] == [7, 7, 7]
    assert len({(line.get_color(), line.get_marker()) for line in figure.axes[0].lines}) == 7
    # Few evaluations are not joined, and a band holds all trials.
    assert {line.get_linestyle() for line in figure.axes[0].lines} == {"None"}
    assert [len(axes.collections) for axes in figure.axes] == [7, 7, 7]
    many = training_plot(panels_of([*single_source_run("LP", steps=range(0, 100, 10))]))
    assert many.axes[0].lines[0].get_linestyle() != "None" and not many.axes[0].collections
    once = Results(single_source_run("LP", steps=(5,)))
    assert training_plot(make_panels(once)) is None and set(draw_plots(once)) == {"plot", "gaps", "parameters"}


def test_one_trial_and_nothing_selected():
    one = Results(single_source_run("LP"))
    assert all(render(figure, "svg") for figure in draw_plots(one).values())
    assert "one trial (n = 1)" in generalisation_plot(make_panels(one)).get_supxlabel()
    pair = list(records(["BA"], trials=1))
    for record in pair:
        record["args"]["test_envs"] = [0, 1]
    assert set(draw_plots(Results(pair))) == {"plot"}


def test_colours_and_counts():
    styles = styles_of(["BOnly", "BOnly@rank=16", "AOnly", "ERM", "ZNet", "ZNet@x=1"])
    assert styles["BOnly@rank=16"].colour == styles["BOnly"].colour
    assert len({style.colour for style in styles.values()}) == 4 and len(set(styles.values())) == 6
    assert [short_count(count) for count in (950, 1500, 86_000_000, 2e9)] == ["950", "1.5k", "86M", "2G"]


def test_a_method_has_one_colour_and_marker_in_all_panels():
    apart = panels_of([*records(["BOnly@rank=8", "ERM", "ZNet"], "PACS"), *records(["BOnly@rank=16", "ZNet"], "VLCS")])
    styles = [{point.algorithm: point.style for point in panel.points} for panel in apart]
    assert styles[0]["ZNet"] == styles[1]["ZNet"]
    assert styles[0]["BOnly@rank=16"].colour == styles[1]["BOnly@rank=8"].colour
    assert styles[0]["BOnly@rank=16"].marker != styles[1]["BOnly@rank=8"].marker


MANY = [
    f"{method}{objective}" for method in ("BA", "BOnly", "LP") for objective in ("", "+CORAL", "+IRM", "+MMD", "+X")
]


def test_colours_are_of_adaptations_and_markers_of_objectives():
    styles = styles_of(["BA", "BA@rank=16", "BA+CORAL", "BOnly", "BOnly+CORAL", "FullFT+IRM"])
    assert styles["BOnly+CORAL"].colour == styles["BOnly"].colour != styles["BA+CORAL"].colour
    assert styles["BOnly+CORAL"].marker == styles["BA+CORAL"].marker != styles["BOnly"].marker
    assert styles["BA"].marker == styles["BOnly"].marker
    markers = [styles[name].marker for name in ("BA", "BA@rank=16", "BA+CORAL", "FullFT+IRM")]
    assert len(set(markers)) == 4


def test_thirty_adaptations_have_colours():
    names = [f"Net{number}" for number in range(30)]
    styles = styles_of(["BA", "LP", *names])
    assert len({styles[name].colour for name in ["BA", "LP", *names[:20]]}) == 22
    assert all(re.fullmatch("#[0-9A-F]{6}", style.colour) for style in styles.values())


@pytest.mark.parametrize("draw", [generalisation_plot, parameters_plot])
def test_many_methods_are_numbered_and_listed_beside_the_panel(draw):
    figure = draw(panels_of(left_out(MANY)))
    (axes,) = figure.axes
    assert sorted(int(text.get_text()) for text in labels(axes)) == list(range(1, 16))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        f"{number}  {label_of(name)}" for number, name in enumerate(sorted(MANY, key=algorithm_order), 1)
    ]
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in labels(axes)]
    assert not any(one.padded(-1).overlaps(two.padded(-1)) for one, two in itertools.combinations(boxes, 2))
    # The legend is beside the panel, and both are in the figure.
    beside, frame = legend.get_window_extent(), axes.get_window_extent()
    assert frame.x1 <= beside.x0 and beside.x1 <= figure.bbox.x1 and figure.bbox.y0 <= beside.y0


def test_a_method_has_the_same_number_in_all_panels():
    apart = [*left_out(MANY[2:]), *records(["BA"], "VLCS")]
    figure = generalisation_plot(panels_of(apart))
    assert [text.get_text() for text in labels(figure.axes[0])] == ["1"]  # BA, which is not among PACS's
    assert sorted(int(text.get_text()) for text in labels(figure.axes[1])) == list(range(2, 15))
    # One below the other, so that a page need not shrink them.
    above, below = (axes.get_window_extent() for axes in figure.axes)
    assert above.y0 > below.y1 and figure.get_figwidth() < 13


def test_bars_of_adaptations_are_apart():
    (axes,) = gap_plot(panels_of(left_out(["BA", "BA+CORAL", "BOnly", "LP"]))).axes
    steps = [after - before for before, after in itertools.pairwise(axes.get_yticks())]
    assert steps == pytest.approx([1, 1.7, 1])
    assert axes.get_ylim()[0] == pytest.approx(axes.get_yticks()[-1] + 0.65)


def test_training_of_many_methods_is_in_parts_of_whole_adaptations():
    figure = training_plot(panels_of(left_out(MANY)))
    coloured = [[line for line in axes.lines if line.get_label() in set(map(label_of, MANY))] for axes in figure.axes]
    assert [len(lines) for lines in coloured] == [10, 10, 10, 5, 5, 5]
    assert [len(axes.lines) for axes in figure.axes] == [25, 25, 25, 20, 20, 20]  # all others are pale behind them
