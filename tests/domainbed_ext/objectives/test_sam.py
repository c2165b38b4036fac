import pytest
import torch
import torch.nn.functional as F
from torch import nn

from domainbed_ext.objectives.sam import SAM, climbed
from tests.domainbed_ext.objectives.small_algorithms import CLASSES, batches, make

METHODS = ["FullFT", "BA", "BOnly@adapter_dropout=0.5", "AOnly@gradient_correction=true", "LP", "BitFit"]


def gradients_of(algorithm, minibatches):
    """The gradients of the mean cross-entropy, of all trained parameters."""
    images, labels = (torch.cat(each) for each in zip(*minibatches, strict=True))
    trained = [p for p in algorithm.parameters() if p.requires_grad]
    return torch.autograd.grad(F.cross_entropy(algorithm.logits(images), labels), trained)


def composed(method):
    base, at, rest = method.partition("@")
    return make(f"{base}+SAM{at}{rest}")


@pytest.mark.parametrize("method", METHODS)
def test_a_step_uses_the_gradients_of_a_two_step_of_its_own(method):
    algorithm, plain = composed(method), make(method)
    torch.manual_seed(3)
    plain.train()
    trained = [p for p in plain.parameters() if p.requires_grad]
    first = gradients_of(plain, batches())
    length = sum(g.double().square().sum() for g in first).sqrt().item()
    with torch.no_grad():
        for p, g in zip(trained, first, strict=True):
            p += 0.05 / length * g
    torch.manual_seed(3)  # the same dropout
    second = gradients_of(plain, batches())

    torch.manual_seed(3)
    algorithm.update(batches())
    gradients = [p.grad for p in algorithm.parameters() if p.requires_grad]
    for gradient, expected in zip(gradients, second, strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-4)
    assert any((a - b).abs().max() > 1e-2 * a.abs().max() for a, b in zip(first, second, strict=True))


def test_frozen_parameters_stay_and_trained_ones_are_restored_exactly():
    algorithm = make("BOnly+SAM", sam_rho=10.0)
    before = {name: p.detach().clone() for name, p in algorithm.named_parameters()}
    seen = []

    def compute():
        algorithm.optimizer.zero_grad()
        seen.append({name: p.detach().clone() for name, p in algorithm.named_parameters()})
        images, labels = (torch.cat(each) for each in zip(*batches(), strict=True))
        loss = F.cross_entropy(algorithm.logits(images), labels)
        loss.backward()
        return {"loss": loss}

    trained = [p for p in algorithm.parameters() if p.requires_grad]
    algorithm.objective.gradients(compute, trained)
    assert all(torch.equal(p, before[name]) for name, p in algorithm.named_parameters())
    first, second = seen
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    assert moved and moved <= {name for name, p in algorithm.named_parameters() if p.requires_grad}
    distance = sum((second[name] - first[name]).square().sum() for name in moved).sqrt()
    torch.testing.assert_close(distance, torch.tensor(10.0))


def test_a_plateau_is_no_direction():
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    parameters[0].grad = torch.zeros(2)  # the other has none
    with climbed(parameters, 0.05):
        assert all(torch.equal(p, torch.ones_like(p)) for p in parameters)


def test_parameters_are_restored_after_an_error():
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    with pytest.raises(KeyboardInterrupt), climbed([parameter], 1.0):
        assert not torch.equal(parameter, torch.ones(2))
        raise KeyboardInterrupt
    assert torch.equal(parameter, torch.ones(2))


def test_statistics_are_those_of_the_first_pass():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES))
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randn(8, 3, generator=draw), torch.randint(CLASSES, (8,), generator=draw)
    objective = SAM(CLASSES, 1, {"sam_rho": 5.0})
    objective.attach(model, None)
    seen = []

    def compute():
        model.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        seen.append(model[1].running_mean.clone())
        return {"loss": loss}

    objective.gradients(compute, list(model.parameters()))
    assert torch.equal(model[1].running_mean, seen[0]) and not torch.equal(*seen)
    assert model[1].num_batches_tracked == 1
