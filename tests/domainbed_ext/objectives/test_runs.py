"""Runs with an objective: what they train on, what they record, and what they refuse."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from domainbed_ext import register_algorithm, register_objective, train
from domainbed_ext.algorithms.full import FullFT
from domainbed_ext.objectives import Objective
from domainbed_ext.runs.feed import Feed
from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.runs.setup import set_up
from domainbed_ext.sweep.finished import _sources
from domainbed_ext.system.exit_codes import ExitCode

pytestmark = pytest.mark.usefixtures("registries", "few_evaluated")
seen = []


class Watching(Objective):
    """Notes what it sees."""

    def prepare(self, backbone):
        self.encoder = nn.Linear(2, 3)

    def loss(self, batch, model):
        seen.append(tuple(batch.images.shape))
        return {"loss": F.cross_entropy(model.logits(batch.images), batch.labels) + self.encoder.weight.mean()}


class WatchingImages(Watching):
    """The same of images."""

    reads_images = True


@pytest.fixture(autouse=True)
def watching(registries):
    seen.clear()
    for kind in (Watching, WatchingImages):
        register_objective(kind.__name__)(kind)


@pytest.mark.parametrize(
    ("objective", "augmented", "shape"),
    [("Watching", False, (12, 128)), ("Watching", True, (12, 3, 32, 32)), ("WatchingImages", False, (12, 3, 32, 32))],
)
def test_a_probe_trains_on_features_unless_the_objective_reads_images(
    make_args, monkeypatch, objective, augmented, shape
):
    monkeypatch.setattr(Feed, "_all_features", lambda feed, env: torch.randn(len(feed.setup.dataset[env]), 128))
    hparams = f'{{"data_augmentation": {str(augmented).lower()}, "batch_size": 4}}'
    args = make_args(algorithm=f"LP+{objective}", hparams=hparams, steps=2)
    assert train.run(args) == ExitCode.DONE
    assert seen == [shape] * 2


def test_a_record_names_the_objective_and_its_source_and_counts_no_parameters_of_it(make_args):
    args = make_args(algorithm="BOnly+watching", steps=1)
    assert train.run(args) == ExitCode.DONE
    (record,) = RunFolder(args.output_dir).records()
    assert record["args"]["algorithm"] == "BOnly+Watching" and record["hparams"]["objective"] == "Watching"
    assert list(record["sources"]) == ["Watching"] == list(_sources("BOnly+Watching", "DigitsShift"))
    plain = set_up(make_args(algorithm="BOnly")).make_algorithm()
    assert record["trainable_parameters"] == sum(p.numel() for p in plain.parameters() if p.requires_grad)
    assert record["total_parameters"] == sum(p.numel() for p in plain.parameters())


class Own(FullFT):
    """Has a training step of its own."""

    def update(self, minibatches, unlabeled=None):
        return {"loss": 1.0}


class Delegating(FullFT):
    """Adds to the step of all methods."""

    def update(self, minibatches, unlabeled=None):
        return {**super().update(minibatches, unlabeled), "more": 1.0}


def test_a_method_that_ignores_its_objective_is_refused(make_args, tmp_path):
    for kind in (Own, Delegating):
        register_algorithm(kind.__name__)(kind)

    def run(algorithm):
        return train.run(make_args(algorithm=algorithm, steps=1, output_dir=str(tmp_path / algorithm)))

    assert run("Own+Watching") == ExitCode.BAD_INPUT
    failed = json.loads((tmp_path / "Own+Watching" / "failed").read_text())
    assert failed["error"].startswith("Own has an update of its own, which does not minimise Watching: leave")
    assert run("Own") == run("Delegating+Watching") == ExitCode.DONE
    assert RunFolder(tmp_path / "Delegating+Watching").records()[0]["more"] == 1.0


def test_a_probe_that_cannot_be_ends_in_one_sentence(make_args):
    args = make_args(algorithm="LP+CORAL", steps=1)
    assert train.run(args) == ExitCode.BAD_INPUT
    sentence = json.loads((RunFolder(args.output_dir).path / "failed").read_text())["error"]
    assert sentence.startswith("LP+CORAL: CORAL shapes features, which LP does not train: choose another method")
