"""A soup is evaluated on images that none of its ingredients was trained on."""

import itertools

import pytest

from domainbed_ext.data.splits import make_splits
from domainbed_ext.soups import images as soup_images
from domainbed_ext.soups.images import SoupImages


class Domain:
    name = "a domain"

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size


class Domains:
    def __init__(self, *sizes):
        self.datasets = [Domain(size) for size in sizes]


def member(splits, trial, uda=0.0):
    args = {"trial_seed": trial, "holdout_fraction": 0.2, "uda_holdout_fraction": uda}
    return {"args": args, "split_sizes": {name: len(split) for name, split in splits.items()}}


def make(trials, sizes=(300, 400, 500), uda=0.0, test_envs=(1,)):
    splits = [make_splits(Domains(*sizes), test_envs, 0.2, uda, trial) for trial in trials]
    members = [member(each, trial, uda) for each, trial in zip(splits, trials, strict=True)]
    return SoupImages.of(members, test_envs), splits


def test_within_a_trial_these_are_the_splits():
    images, (splits, *_) = make([3, 3, 3], uda=0.3)
    assert {name: cell.keys for name, cell in images.cells.items()} == {
        name: each.keys for name, each in splits.items()
    }
    assert images.has_held_out and images.why_unmeasured("ABC") == ""
    assert images.sizes == {name: len(split) for name, split in splits.items()}
    accuracies = {f"{name}_acc": (number + 1) / 7 for number, name in enumerate(splits)}
    assert images.accuracies(accuracies) == accuracies


def test_no_image_of_a_training_environment_was_trained_on_by_any():
    images, splits = make([0, 1])
    for env in (0, 2):
        trained_on = [set(each[f"env{env}_in"].keys) for each in splits]
        held_out = set(images.cells[f"env{env}_out"].keys)
        assert held_out and not held_out & set.union(*trained_on)
        assert set(images.cells[f"env{env}_in"].keys) == set.intersection(*trained_on)
    assert images.held_out == {env: len(images.cells[f"env{env}_out"].keys) for env in (0, 2)}


@pytest.mark.parametrize("uda", [0.0, 0.25])
def test_of_a_test_environment_accuracies_are_the_mean_over_the_splits_of_the_ingredients(uda):
    trials = [0, 1, 2]
    images, splits = make(trials, uda=uda)
    right = {key for key in range(400) if key % 7 < 4}
    of_cells = {f"{name}_acc": len(right & set(cell.keys)) / len(cell.keys) for name, cell in images.cells.items()}
    accuracies = images.accuracies(of_cells)
    for split in ("in", "out", *(["uda"] if uda else [])):
        of_each = [each[f"env1_{split}"].keys for each in splits]
        expected = sum(len(right & set(keys)) / len(keys) for keys in of_each) / len(trials)
        assert accuracies[f"env1_{split}_acc"] == pytest.approx(expected, abs=1e-12)
        assert images.sizes[f"env1_{split}"] == len(of_each[0])
    tested = [cell.keys for name, cell in images.cells.items() if name.startswith("env1_")]
    assert sorted(itertools.chain(*tested)) == list(range(400))  # each once


def test_too_few_held_out_images_are_not_measured(monkeypatch):
    images, _ = make([0, 1])
    fewest = min(images.held_out.values())
    monkeypatch.setattr(soup_images, "HELD_OUT_LEAST", fewest)
    assert images.has_held_out and "env0_out" in images.measured
    monkeypatch.setattr(soup_images, "HELD_OUT_LEAST", fewest + 1)
    assert not images.has_held_out and not {"env0_out", "env2_out"} & set(images.measured)
    assert "env0_in" in images.measured and images.sizes["env0_out"] == 0
    sentence = f"{fewest} images of A are held out by all ingredients, and at least {fewest + 1} are needed"
    assert sentence in images.why_unmeasured("ABC")
    many, _ = make(range(20))
    assert many.held_out == {0: 0, 2: 0} and not many.has_held_out
