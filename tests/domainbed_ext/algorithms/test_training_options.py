"""The options of training that all methods have: clipping, accumulation and smoothed labels; and the adapters' seed."""

import math

import pytest
import torch
import torch.nn.functional as F

from domainbed_ext.objectives import OBJECTIVES, Objective
from tests.domainbed_ext.objectives.small_algorithms import CLASSES, DOMAINS, SHAPE, batches, make
from vitlorafa import adapter_layers

OPTIONS = {"clip_grad": None, "label_smoothing": 0.0, "accumulate": 1}
SMOOTHING = 0.3


def trained(algorithm):
    return {name: p for name, p in algorithm.named_parameters() if p.requires_grad}


def gradients(algorithm):
    return {name: p.grad for name, p in trained(algorithm).items() if p.grad is not None}


def updated(algorithm, minibatches):
    torch.manual_seed(2)
    return algorithm.update(minibatches)


@pytest.mark.parametrize("name", ["FullFT", "BA", "ERM"])
def test_by_default_a_step_is_that_of_a_plain_loop_to_the_last_bit(name):
    algorithm, plain = make(name), make(name)
    earlier = make(name)
    for option, default in OPTIONS.items():
        assert earlier.hparams.pop(option) == default  # as in records of earlier versions
    for seed in range(3):
        minibatches = batches(seed)
        values = updated(algorithm, minibatches)
        assert values.keys() == {"loss"} and values == updated(earlier, minibatches)
        images, labels = (torch.cat(each) for each in zip(*minibatches, strict=True))
        torch.manual_seed(2)
        loss = F.cross_entropy(plain.train().backbone(images), labels)
        plain.optimizer.zero_grad()
        loss.backward()
        plain.optimizer.step()
        assert values["loss"] == loss.item()
    for key, p in trained(plain).items():
        assert torch.equal(trained(algorithm)[key], p) and torch.equal(trained(earlier)[key], p)


@pytest.mark.parametrize("objective", ["ERM", "SAM", "L2SP", "MIRO"])
@pytest.mark.parametrize("method", ["FullFT", "BOnly", "LoRAPro"])
def test_accumulated_minibatches_have_the_gradient_of_one_large_minibatch(method, objective):
    name = f"{method}+{objective}"
    whole, parted = make(name), make(name, accumulate=3)
    expected, values = updated(whole, batches(size=6)), updated(parted, batches(size=6))
    assert values == pytest.approx(expected, rel=1e-5, abs=1e-6)
    for key, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(parted)[key], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


def test_one_part_is_computed_at_a_time_and_an_objective_sees_each_as_a_minibatch(monkeypatch):
    algorithm, seen = make("FullFT+GroupDRO", accumulate=2), []
    loss = algorithm.objective.loss

    def watched(batch, model):
        seen.append((batch.sizes, algorithm.objective.weights.clone(), batch.images))
        return loss(batch, model)

    monkeypatch.setattr(algorithm.objective, "loss", watched)
    minibatches = batches(size=4)
    values = updated(algorithm, minibatches)
    assert [sizes for sizes, *_ in seen] == [(2,) * DOMAINS] * 2
    for part, (*_, images) in enumerate(seen):
        assert torch.equal(images, torch.cat([x[2 * part : 2 * part + 2] for x, _ in minibatches]))
    assert not torch.equal(seen[0][1], seen[1][1])  # its weights move once per part
    assert values.keys() == {"loss", "nll", "worst"}


def test_the_penalty_of_a_method_counts_once_per_step():
    pytest.importorskip("peft")
    name = "Peft@method=adalora"
    whole, parted = make(name), make(name, accumulate=2)
    assert updated(parted, batches())["loss"] == pytest.approx(updated(whole, batches())["loss"], rel=1e-5)
    assert parted.adaptation.step == 1


@pytest.mark.parametrize("name", ["FullFT", "BOnly", "LP+SAM", "BOnly+MIRO", "LoRAPro"])
def test_the_gradients_of_a_step_are_clipped_together(name):
    free = make(name)
    updated(free, batches())
    norm = math.sqrt(sum(p.grad.double().square().sum() for p in free._trained_parameters() if p.grad is not None))
    for largest, factor in ((norm / 3, 1 / 3), (3 * norm, 1.0)):
        clipped = make(name, clip_grad=largest)
        values = updated(clipped, batches())
        assert values["grad_norm"] == pytest.approx(norm, rel=1e-4)
        for key, gradient in gradients(free).items():
            expected = gradient if key.startswith("objective") else gradient * factor  # of predictions' weights alone
            torch.testing.assert_close(gradients(clipped)[key], expected, rtol=1e-4, atol=1e-9)


def test_gradients_are_clipped_before_they_are_corrected():
    name, seen = "LoRAPro", {}
    norm = updated(make(name, clip_grad=1e9), batches())["grad_norm"]
    for largest in (None, norm / 2):
        algorithm = make(name, clip_grad=largest)
        B = algorithm.backbone.blocks[0].attn.qkv.lora_B
        algorithm.optimizer.register_step_pre_hook(lambda *_, B=B, key=largest: seen.update({key: B.grad.clone()}))
        updated(algorithm, batches())
    free, clipped = seen.values()
    torch.testing.assert_close(clipped, free / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_smooths_labels(name, monkeypatch):
    def of_probabilities(objective, logits, labels):
        objective.smoothed = True
        wanted = F.one_hot(labels, CLASSES) * (1 - SMOOTHING) + SMOOTHING / CLASSES
        return -(wanted * logits.log_softmax(1)).sum(1).mean()

    method, minibatches = f"FullFT+{name}", batches()
    smoothed = make(method, label_smoothing=SMOOTHING)
    values = updated(smoothed, minibatches)
    assert smoothed.objective.smoothed and values != updated(make(method), minibatches)
    monkeypatch.setattr(Objective, "cross_entropy", of_probabilities)
    assert updated(make(method, label_smoothing=SMOOTHING), minibatches) == pytest.approx(values, rel=1e-4, abs=1e-6)


def test_the_penalty_of_irm_is_of_the_smoothed_loss():
    """The gradient of each half's loss by a factor of the logits, computed by autograd."""
    algorithm = make("FullFT+IRM", label_smoothing=SMOOTHING)
    images, labels = (torch.cat(each) for each in zip(*batches(size=6), strict=True))
    logits = algorithm.train().logits(images).detach()
    penalties = []
    for z, y in zip(logits.split(6), labels.split(6), strict=True):
        factor = torch.ones((), requires_grad=True)
        halves = [F.cross_entropy(factor * z[i::2], y[i::2], label_smoothing=SMOOTHING) for i in (0, 1)]
        first, second = (torch.autograd.grad(half, factor)[0] for half in halves)
        penalties.append(first * second)
    values = algorithm.update(batches(size=6))
    assert values["penalty"] == pytest.approx(torch.stack(penalties).mean().item(), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize(("name", "frozen"), [("BA", "lora_A"), ("BOnly", "lora_A"), ("AOnly", "lora_B")])
def test_the_adapters_seed_gives_every_run_the_same_frozen_factor(name, frozen):
    default = make(name)

    def factors(seed, **hparams):
        torch.manual_seed(seed)
        algorithm = type(default)(SHAPE, CLASSES, DOMAINS, {**default.hparams, **hparams})
        return [getattr(layer, frozen).detach() for _, layer in adapter_layers(algorithm.backbone)]

    def are_equal(one, other):
        return all(map(torch.equal, one, other))

    assert not are_equal(factors(0), factors(1))
    shared = factors(0, adapter_seed=5)
    assert are_equal(shared, factors(1, adapter_seed=5)) and not are_equal(shared, factors(0, adapter_seed=6))
