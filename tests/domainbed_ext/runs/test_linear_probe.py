"""The linear probe is the optimum that its module says, chosen by validation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from domainbed_ext.cache.entries import Entries
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs import linear_probe
from domainbed_ext.runs.linear_probe import ProbeData, find_or_fit, fit

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
    return fit(data(training, classes, **options))


def data(training, classes, **options):
    return ProbeData(training, uniform(training), [domain(100, classes, 9)], classes, **options)


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
    both = [tuple(map(torch.cat, zip(small, large, strict=True)))]
    joined = fit(ProbeData(both, [np.full(90, 1 / 90)], [domain(9, 4, 9)], 4))
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
    labelled = [(x, torch.tensor(present)[y])]
    probe = fit(ProbeData(labelled, [np.full(200, 1 / 200)], labelled, classes))
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


def test_the_cache_keeps_it_until_anything_it_depends_on_changes(tmp_path, monkeypatch):
    fits = []

    def counted(*args):
        fits.append(args)
        return fit(*args)

    monkeypatch.setattr(linear_probe, "fit", counted)
    cache = Entries(tmp_path, 10**9)
    given = data([domain(80, 4, 1), domain(20, 4, 2)], 4)
    first, again = (find_or_fit(given, cache, "Some") for _ in range(2))
    assert len(fits) == 1 and (again.l2, again.accuracy) == (first.l2, first.accuracy)
    assert torch.equal(again.weight, first.weight) and torch.equal(again.bias, first.bias)
    (x, y), other = given.training
    changed = [
        {"training": [(x + 1e-6, y), other]},
        {"training": [(x, y.flip(0)), other]},
        {"training": [other, (x, y)], "weights": given.weights[::-1]},
        {"weights": [given.weights[0] ** 2 / np.square(given.weights[0]).sum() * 1.001, given.weights[1]]},
        {"validation": [domain(100, 4, 8)]},
        {"num_classes": 5},
        {"bias": False},
    ]
    for number, change in enumerate(changed, 2):
        find_or_fit(replace(given, **change), cache, "Some")
        assert len(fits) == number, change
    find_or_fit(given, None, "Some")
    assert len(fits) == len(changed) + 2
    find_or_fit(given, Entries(tmp_path / "full", 0), "Some")
    assert len(fits) == len(changed) + 3
    for entry in cache.list():
        (entry.path / "probe.safetensors").write_bytes(b"")
    with pytest.raises(BenchmarkError, match=r"Some/probe-\w+ cannot be read .*domainbed_ext.cache remove"):
        find_or_fit(given, cache, "Some")
