import itertools
import random
import re

import matplotlib
import pytest
from matplotlib.text import Annotation, Text

from domainbed_ext.plots import generalisation_plot, render
from domainbed_ext.scores import Results


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


def labels(axes):
    return [child for child in axes.get_children() if isinstance(child, Annotation) and child.get_text() != "y = x"]


@pytest.mark.parametrize("spread", [0.3, 0.02])
def test_labels_are_in_the_panel_and_do_not_overlap(spread):
    names = ["BA", "BOnly", "BOnly@rank=16", "AOnly", "AOnly@rank=16", "LP", "FullFT"]
    figure = generalisation_plot(Results(list(records(names, spread=spread))))
    (axes,) = figure.axes
    assert [label.get_text() for label in labels(axes)] == names
    figure.draw_without_rendering()
    # The text alone: an annotation's own extent holds its leader too.
    boxes = [Text.get_window_extent(label) for label in labels(axes)]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.padded(-1).overlaps(other.padded(-1))
    frame = axes.get_window_extent().padded(1)
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 for box in boxes)


def test_the_same_bytes_and_no_date():
    results = Results(list(records(["BA", "ERM"])))
    for kind in ("png", "svg"):
        assert render(generalisation_plot(results), kind) == render(generalisation_plot(results), kind)
    assert not re.search(rb"<dc:date>|20\d\d-\d\d-\d\dT", render(generalisation_plot(results), "svg"))


def test_a_panel_for_each_data_set():
    both = [*records(["BA"], "VLCS"), *records(["BA", "LP"], "PACS"), *records(["LP"], "Toy"), *records(["LP"], "X")]
    figure = generalisation_plot(Results(both))
    assert [axes.get_title() for axes in figure.axes] == ["VLCS", "PACS", "Toy", "X", "", ""]
    assert [len(labels(axes)) for axes in figure.axes] == [1, 2, 1, 1, 0, 0]


def test_matplotlib_is_left_as_it_was():
    before = dict(matplotlib.rcParams)
    render(generalisation_plot(Results(list(records(["BA"], trials=1)))), "svg")
    assert dict(matplotlib.rcParams) == before
