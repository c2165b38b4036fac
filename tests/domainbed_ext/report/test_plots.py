import itertools
import random
import re

import matplotlib
import pytest
from matplotlib.text import Annotation, Text

from domainbed_ext.report.methods import algorithm_order, label_of
from domainbed_ext.report.plots.palette import styles_of
from domainbed_ext.report.plots.panels import make_panels
from domainbed_ext.report.plots.plots import (
    draw_plots,
    gap_plot,
    generalisation_plot,
    parameters_plot,
    render,
    training_plot,
)
from domainbed_ext.report.plots.style import short_count
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
    assert not re.search(rb"<dc:date>|20\d\d-\d\d-\d\dT", render(generalisation_plot(shown), "svg"))


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
    assert "standard error" in (note := figure.get_supxlabel()) and "standard deviation" in note
    assert [axes.get_title() for axes in gap_plot(both).axes] == titles
    # Those of leave-one-out above have recorded no parameters.
    assert [axes.get_title() for axes in parameters_plot(both).axes] == titles[1:]


def test_gaps_are_bars():
    (axes,) = gap_plot(panels_of(paper_like(2))).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == list(map(label_of, METHODS))
    assert len(axes.patches) == 14
    shown = [float(text.get_text()) for text in labels(axes)]
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
    once = Results(single_source_run("LP", steps=(5,)))
    assert training_plot(make_panels(once)) is None and set(draw_plots(once)) == {"plot", "gaps", "parameters"}


def test_one_trial_and_nothing_selected():
    one = Results(single_source_run("LP"))
    assert all(render(figure, "svg") for figure in draw_plots(one).values())
    assert "bars" not in generalisation_plot(make_panels(one)).get_supxlabel()
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
    assert axes.get_ylim()[0] == pytest.approx(axes.get_yticks()[-1] + 0.5)


def test_training_of_many_methods_is_in_parts_of_whole_adaptations():
    figure = training_plot(panels_of(left_out(MANY)))
    coloured = [[line for line in axes.lines if line.get_label() in set(map(label_of, MANY))] for axes in figure.axes]
    assert [len(lines) for lines in coloured] == [10, 10, 10, 5, 5, 5]
    assert [len(axes.lines) for axes in figure.axes] == [25, 25, 25, 20, 20, 20]  # all others are pale behind them
