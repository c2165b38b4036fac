"""The linear probe is the optimum that its module says, chosen by validation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs import linear_probe
from domainbed_ext.runs.linear_probe import fit

WIDTH = 6


def domain(n, classes, seed, noise=2.0):
    """Features [n, WIDTH] off the origin and off scale, and labels that they tell roughly."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=draw)
    centres = torch.randn(classes, WIDTH, generator=torch.Generator().manual_seed(0))
    return 3 * (centres[labels] + noise * torch.randn(n, WIDTH, generator=draw)) + 5, labels


def uniform(domains):
    return [np.full(len(labels), 1 / len(labels)) for _, labels in domains]


def fitted(training, classes, **options):
    return fit(training, uniform(training), [domain(100, classes, 9)], classes, **options)


@pytest.mark.parametrize(("classes", "bias"), [(4, True), (4, False), (2, True)])
def test_it_is_the_optimum(classes, bias, monkeypatch):
    monkeypatch.setattr(linear_probe, "PENALTIES", (1e-2,))
    training = [domain(80, classes, 1), domain(20, classes, 2)]
    probe = fitted(training, classes, bias=bias)
    weight, offset = (tensor.double().requires_grad_() for tensor in (probe.weight, probe.bias))
    features = [x.double() for x, _ in training]
    centre = sum(x.mean(0) for x in features) / 2 if bias else 0
    square = sum((x - centre).square().mean() for x in features) / 2
    losses = [F.cross_entropy(x @ weight.T + offset, y) for x, (_, y) in zip(features, training, strict=True)]
    loss = sum(losses) / 2 + 1e-2 / 2 * square * weight.square().sum()
    of_weight, of_offset = torch.autograd.grad(loss, (weight, offset))
    assert of_weight.abs().max() < 1e-4 and loss < np.log(classes) - 0.1
    assert of_offset.abs().max() < 1e-4 if bias else not probe.bias.any()


def test_each_domain_weighs_the_same_whatever_its_size():
    small, large = domain(30, 4, 1), domain(60, 4, 2)
    doubled = tuple(torch.cat([each, each]) for each in large)
    once, twice = fitted([small, large], 4), fitted([small, doubled], 4)
    torch.testing.assert_close(once.weight, twice.weight, rtol=1e-3, atol=1e-4)
    joined = fit([tuple(map(torch.cat, zip(small, large, strict=True)))], [np.full(90, 1 / 90)], [domain(9, 4, 9)], 4)
    assert not torch.allclose(once.weight, joined.weight, rtol=1e-3, atol=1e-4)


def test_validation_chooses_the_penalty_and_of_equals_the_largest(monkeypatch):
    training, each = [domain(40, 4, 1)], {}
    chosen = fitted(training, 4)
    for l2 in linear_probe.PENALTIES:
        monkeypatch.setattr(linear_probe, "PENALTIES", (l2,))
        each[l2] = fitted(training, 4).accuracy
    best = max(each.values())
    assert chosen.accuracy == best and chosen.l2 == max(l2 for l2, accuracy in each.items() if accuracy == best)
    assert min(each.values()) < best


@pytest.mark.parametrize(("present", "classes"), [((0, 2, 3), 5), ((1, 3), 4)])
def test_a_class_without_an_image_is_never_predicted(present, classes):
    x, y = domain(200, len(present), 1)
    probe = fit([(x, torch.tensor(present)[y])], [np.full(200, 1 / 200)], [(x, torch.tensor(present)[y])], classes)
    everywhere = 100 * torch.randn(5000, WIDTH, generator=torch.Generator().manual_seed(3))
    predicted = (torch.cat([x, everywhere]) @ probe.weight.T + probe.bias).argmax(1)
    assert set(predicted.tolist()) == set(present) and probe.accuracy > 0.5


def test_the_same_images_give_the_same_probe():
    one, other = (fitted([domain(80, 4, 1)], 4) for _ in range(2))
    assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)


def test_what_has_no_probe_gets_a_sentence():
    x, y = domain(10, 4, 1)
    with pytest.raises(BenchmarkError, match="head_start=probe: all training images are of one class"):
        fitted([(x, torch.zeros_like(y))], 4)
    with pytest.raises(BenchmarkError, match="head_start=probe: the backbone's features are not finite"):
        fitted([(x * float("nan"), y)], 4)
