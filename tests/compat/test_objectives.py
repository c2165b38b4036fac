"""Our objectives beside upstream's: the same loss of the same features, step after step; the same random draws."""

import importlib

import numpy as np
import pytest
import torch
from torch import nn

from domainbed_ext import hparams_registry
from domainbed_ext.algorithms.forward import Forward
from domainbed_ext.seeds import seed_hash
from tests.domainbed_ext.objectives.small_algorithms import CLASSES, DOMAINS, batches, make

STEPS = 5
OBJECTIVES = {
    "CORAL": {"mmd_gamma": 0.7},
    "MMD": {"mmd_gamma": 0.7},
    "IRM": {"irm_lambda": 30.0, "irm_penalty_anneal_iters": 2},
    "VREx": {"vrex_lambda": 30.0, "vrex_penalty_anneal_iters": 2},
    "GroupDRO": {"groupdro_eta": 0.5},
    "RSC": {"rsc_f_drop_factor": 0.4, "rsc_b_drop_factor": 0.25},
}
HYPERPARAMETERS = {**OBJECTIVES, "Mixup": {"mixup_alpha": 0.7}}  # Mixup has no features of single images


class Features(nn.Identity):
    """In place of upstream's network: its images are features already."""

    def __init__(self, n_outputs):
        super().__init__()
        self.n_outputs = n_outputs


@pytest.fixture
def upstreams(checkout, monkeypatch):
    """Makes one of upstream's algorithms on features of a width, in float64."""
    algorithms, networks = (importlib.import_module(f"domainbed.{name}") for name in ("algorithms", "networks"))
    monkeypatch.setattr(networks, "Featurizer", lambda shape, hparams: Features(*shape))

    def make_upstreams(name, width, hparams):
        settings = {"nonlinear_classifier": False, "lr": 1e-3, "weight_decay": 0.0, **hparams}
        return getattr(algorithms, name)((width,), CLASSES, DOMAINS, settings).double()

    return make_upstreams


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_is_upstreams_in_every_step(name, upstreams):
    ours = make(f"FullFT+{name}", **OBJECTIVES[name])
    head = ours.backbone.get_classifier()
    theirs = upstreams(name, head.in_features, OBJECTIVES[name])
    losses = []
    for step in range(STEPS):
        minibatches = batches(step, size=6)
        with torch.no_grad():
            features = Forward(ours.train()).outputs(torch.cat([x for x, _ in minibatches])).features.double()
        theirs.classifier.load_state_dict({key: value.double() for key, value in head.state_dict().items()})
        labels = [y for _, y in minibatches]
        features.requires_grad_()  # as those of a network do: RSC needs their gradients
        expected = theirs.update(list(zip(features.split(6), labels, strict=True)))
        if "mmd_gamma" in OBJECTIVES[name]:  # of these, upstream's "loss" is without the penalty
            expected = {**expected, "loss": expected["loss"] + 0.7 * expected["penalty"]}
        if name == "VREx":  # upstream records that of the last domain
            del expected["nll"]
        values = ours.update(minibatches)
        for key in expected:
            assert values[key] == pytest.approx(expected[key], rel=1e-6, abs=1e-6), (step, key)
        losses.append(values["loss"])
        (group,) = ours.optimizer.param_groups
        since_reset = {int(ours.optimizer.state[p]["step"]) for p in group["params"]}
        anneals = [value for key, value in OBJECTIVES[name].items() if key.endswith("anneal_iters")]
        assert since_reset == {step + 1 - (anneals[0] if anneals and step >= anneals[0] else 0)}
    assert len(set(losses)) == STEPS


def test_mixups_loss_is_upstreams_of_the_same_draws(upstreams, monkeypatch):
    """A linear probe is the model of both: its images may be features, and upstream's are."""
    ours = make("LP+Mixup", **HYPERPARAMETERS["Mixup"])
    head = ours.backbone.get_classifier()
    theirs = upstreams("Mixup", head.in_features, HYPERPARAMETERS["Mixup"])
    shares = [0.9, 0.3, 0.55]
    losses = set()
    for step in range(STEPS):
        draw = torch.Generator().manual_seed(step)
        minibatches = [
            (torch.randn(6, head.in_features, generator=draw), torch.randint(CLASSES, (6,), generator=draw))
            for _ in range(DOMAINS)
        ]
        theirs.classifier.load_state_dict({key: value.double() for key, value in head.state_dict().items()})
        values = {}
        for update, images in (
            (theirs.update, [(x.double(), y) for x, y in minibatches]),
            (ours.update, minibatches),
        ):
            drawn = iter(shares)
            monkeypatch.setattr(np.random, "beta", lambda a, b, drawn=drawn: next(drawn))
            monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self, drawn=drawn: torch.tensor(next(drawn)))
            torch.manual_seed(step)  # of the pairs of domains
            values[update] = update(images)["loss"]
        expected, loss = values.values()
        assert loss == pytest.approx(expected, rel=1e-6, abs=1e-6)
        losses.add(loss)
    assert len(losses) == STEPS


@pytest.mark.parametrize("dataset", ["PACS", "RotatedMNIST"])
@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_defaults_and_random_draws_are_upstreams(name, dataset, checkout):
    registry = importlib.import_module("domainbed.hparams_registry")
    seed = seed_hash(2, 1)
    own = set(HYPERPARAMETERS[name]) | {"lr", "weight_decay", "batch_size"}
    for function in ("default_hparams", "random_hparams"):
        arguments = (dataset, seed) if function == "random_hparams" else (dataset,)
        theirs = getattr(registry, function)(name, *arguments)
        ours = getattr(hparams_registry, function)(f"ERM+{name}", *arguments)
        assert {key: ours[key] for key in own} == {key: theirs[key] for key in own}
