from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from domainbed_ext.objectives import Batch, Outputs
from domainbed_ext.objectives.rsc import RSC, are_lowest
from tests.domainbed_ext.objectives.small_algorithms import CLASSES, batches, make

WIDTH, SIZE = 12, 9


class Head:
    """A model whose images are features, with a classifier that is not linear."""

    def __init__(self):
        draw = torch.Generator().manual_seed(0)
        self.first = torch.randn(WIDTH, WIDTH, generator=draw).double().requires_grad_()
        self.second = torch.randn(WIDTH, CLASSES, generator=draw).double()

    def classify(self, features):
        return (features @ self.first).tanh() @ self.second

    def outputs(self, images):
        return Outputs(images, self.classify(images))

    def autocast(self):
        return nullcontext()


def batch():
    draw = torch.Generator().manual_seed(1)
    images, labels = torch.randn(SIZE, WIDTH, generator=draw).double(), torch.randint(CLASSES, (SIZE,), generator=draw)
    return Batch(images, labels, (4, 5))


@pytest.mark.parametrize("share", [0.0, 1 / 3, 0.5, 2 / 3, 0.9, 1.0])
def test_the_lowest_values_are_those_below_numpys_percentile(share):
    values = torch.randn(7, 13, generator=torch.Generator().manual_seed(0))
    limits = np.percentile(values.numpy(), share * 100, axis=1)
    expected = values.numpy() < limits[:, None]
    assert np.array_equal(are_lowest(values, share).numpy(), expected)


@pytest.mark.parametrize(("f_drop", "b_drop"), [(1 / 3, 1 / 3), (0.5, 0.2), (0.1, 0.5)])
def test_the_strongest_features_of_the_images_that_depend_on_them_are_muted(f_drop, b_drop):
    model, seen = Head(), batch()
    loss = RSC(CLASSES, 2, {"rsc_f_drop_factor": f_drop, "rsc_b_drop_factor": b_drop}).loss(seen, model)["loss"]
    masks, falls = [], []
    for x, y in zip(seen.images, seen.labels, strict=True):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model.classify(leaf[None])[0, y], leaf)
        masks.append(gradient < np.percentile(gradient.numpy(), 100 * (1 - f_drop)))
        with torch.no_grad():
            before, after = (model.classify(each[None])[0].softmax(0)[y] for each in (x, x * masks[-1]))
        falls.append((before - after).item())
    limit = np.percentile(falls, 100 * (1 - b_drop))
    kept = [mask if fall >= limit else torch.ones(WIDTH) for mask, fall in zip(masks, falls, strict=True)]
    assert 0 < sum(fall >= limit for fall in falls) < SIZE
    expected = F.cross_entropy(model.classify(seen.images * torch.stack([each.double() for each in kept])), seen.labels)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, model.first)[0], torch.autograd.grad(expected, model.first)[0])


@pytest.mark.parametrize("method", ["FullFT", "BOnly", "LP"])
def test_it_trains_what_the_method_trains(method):
    algorithm = make(f"{method}+RSC")
    before = {name: p.detach().clone() for name, p in algorithm.named_parameters()}
    algorithm.update(batches())
    moved = {name for name, p in algorithm.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in algorithm.named_parameters() if p.requires_grad}
