"""Runs with options of training: what they record and print, what they train on, and what a method may not ignore."""

import json

import pytest
import torch
import torch.nn.functional as F

from domainbed_ext import register_algorithm, register_objective, train
from domainbed_ext.algorithms.full import FullFT
from domainbed_ext.algorithms.schedules import Schedule
from domainbed_ext.objectives import Objective
from domainbed_ext.runs import setup as run_setup
from domainbed_ext.runs.feed import Feed
from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.system.exit_codes import ExitCode

pytestmark = pytest.mark.usefixtures("registries", "few_evaluated")


def test_a_run_records_the_rate_of_its_step_and_counts_the_images_of_all_minibatches(make_args, capsys):
    name = "BOnly@schedule=linear,warmup=0.25,accumulate=2,clip_grad=0.1,adapter_seed=7"
    args = make_args(algorithm=name, steps=8, checkpoint_freq=1, hparams='{"batch_size": 4, "lr": 0.01}')
    assert train.run(args) == ExitCode.DONE
    assert "8 steps of 3 x 8 images in 2 parts, seed 0; evaluates 8 times" in capsys.readouterr().out
    records = RunFolder(args.output_dir).records()
    rates = [0.01 * Schedule("linear", 0.25, 8).factor(step) for step in range(8)]
    assert [record["learning_rate"] for record in records] == pytest.approx(rates)
    assert records[3]["epoch"] == pytest.approx(
        3 * 8 / min(n for k, n in records[0]["split_sizes"].items() if "_in" in k)
    )
    assert all(record["hparams"]["adapter_seed"] == 7 and record["grad_norm"] > 0 for record in records)


def test_the_minibatches_of_a_step_are_the_images_of_one_large_minibatch(make_args):
    def images(hparams):
        setup = run_setup.set_up(make_args(algorithm="FullFT", hparams=json.dumps(hparams)))
        return [x for batches in Feed(setup, setup.make_algorithm()).training(range(2)) for x, _ in batches]

    parted, whole = images({"batch_size": 3, "accumulate": 4}), images({"batch_size": 12})
    assert [len(each) for each in parted] == [12] * 6 and all(map(torch.equal, parted, whole))


class Own(FullFT):
    """Has a training step and a loss of its own."""

    def update(self, minibatches, unlabeled=None):
        images, labels = (torch.cat(each) for each in zip(*minibatches, strict=True))
        loss = F.cross_entropy(self.backbone(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item()}


class Delegating(FullFT):
    """Adds to the step of all methods."""

    def update(self, minibatches, unlabeled=None):
        return {**super().update(minibatches, unlabeled), "more": 1.0}


class Plain(Objective):
    """Computes its loss without smoothed labels."""

    def loss(self, batch, model):
        return {"loss": F.cross_entropy(model.logits(batch.images), batch.labels)}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Own@clip_grad=1", "Own has an update of its own, which ignores clip_grad: leave that out, or call super()"),
        ("Own@clip_grad=1,accumulate=2", "Own has an update of its own, which ignores accumulate and clip_grad"),
        ("Own@label_smoothing=0.1", "Own has a loss of its own, which ignores label_smoothing: leave that out, or"),
        ("BOnly+Plain@label_smoothing=0.1", "Plain has a loss of its own, which ignores label_smoothing"),
    ],
)
def test_a_method_or_objective_that_ignores_an_option_is_refused(make_args, name, sentence):
    register_algorithm("Own")(Own)
    register_objective("Plain")(Plain)
    args = make_args(algorithm=name, steps=1, hparams='{"batch_size": 2}')
    assert train.run(args) == ExitCode.BAD_INPUT
    assert json.loads((RunFolder(args.output_dir).path / "failed").read_text())["error"].startswith(sentence)


def test_a_method_with_an_update_of_its_own_has_those_that_it_heeds(make_args, tmp_path):
    for kind in (Own, Delegating):
        register_algorithm(kind.__name__)(kind)
    for name in ("Own@schedule=cosine", "Delegating@clip_grad=1,accumulate=2,label_smoothing=0.1,warmup=0.5"):
        args = make_args(algorithm=name, steps=2, hparams='{"batch_size": 2}', output_dir=str(tmp_path / name))
        assert train.run(args) == ExitCode.DONE
        record = RunFolder(args.output_dir).records()[-1]
        assert record["learning_rate"] == pytest.approx(record["hparams"]["lr"] * (0.5 if "Own" in name else 1))
