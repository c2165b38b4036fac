"""The losses of the objectives on features and logits of few numbers, computed here in another way."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from domainbed_ext.algorithms.forward import Forward
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.objectives import OBJECTIVES, Batch, Outputs
from tests.domainbed_ext.objectives.small_algorithms import CLASSES, DOMAINS, batches, make

WIDTH, SIZE = 5, 6


class Linear:
    """A model whose images are features."""

    def __init__(self):
        self.head = nn.Linear(WIDTH, CLASSES).double()
        nn.init.normal_(self.head.weight, generator=torch.Generator().manual_seed(0))

    def logits(self, images):
        return self.head(images)

    def outputs(self, images):
        return Outputs(images, self.head(images))

    classify = logits

    def autocast(self):
        return nullcontext()


def minibatches(domains=DOMAINS):
    draw = torch.Generator().manual_seed(1)
    return Batch.of(
        [
            (
                (1 + d) * torch.randn(SIZE, WIDTH, generator=draw).double() + d,
                torch.randint(CLASSES, (SIZE,), generator=draw),
            )
            for d in range(domains)
        ],
        torch.device("cpu"),
    )


def objective(name, domains=DOMAINS, **hparams):
    declared = {each: kind.default for each, kind in OBJECTIVES[name].hyperparameters.items()}
    return OBJECTIVES[name].load()(CLASSES, domains, {**declared, **hparams}).double()


def domain_losses(batch, model):
    each = zip(batch.split(batch.images), batch.split(batch.labels), strict=True)
    return [F.cross_entropy(model.logits(x), y) for x, y in each]


def test_erm_is_the_mean_cross_entropy():
    batch, model = minibatches(), Linear()
    loss = objective("ERM").loss(batch, model)["loss"]
    torch.testing.assert_close(loss, F.cross_entropy(model.logits(batch.images), batch.labels))


def test_coral_compares_means_and_covariances():
    batch, model = minibatches(), Linear()
    values = objective("CORAL", mmd_gamma=0.5).loss(batch, model)
    parts = [part.detach().numpy() for part in batch.split(batch.images)]
    means = [part.mean(0) for part in parts]
    covariances = [
        [[((p[:, i] - m[i]) * (p[:, j] - m[j])).sum() / (SIZE - 1) for i in range(WIDTH)] for j in range(WIDTH)]
        for p, m in zip(parts, means, strict=True)
    ]
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = sum(
        sum((means[a] - means[b]) ** 2) / WIDTH
        + sum(
            (x - y) ** 2 for r, s in zip(covariances[a], covariances[b], strict=True) for x, y in zip(r, s, strict=True)
        )
        / WIDTH**2
        for a, b in pairs
    ) / len(pairs)
    nll = sum(domain_losses(batch, model)) / DOMAINS
    assert values["penalty"].item() == pytest.approx(expected)
    assert values["loss"].item() == pytest.approx(nll.item() + 0.5 * expected)


def test_mmd_sums_kernels_of_all_pairs_of_images():
    batch, model = minibatches(2), Linear()
    x, y = (part.tolist() for part in batch.split(batch.images))

    def kernel(p, q):
        squares = [sum((a - b) ** 2 for a, b in zip(u, v, strict=True)) for u in p for v in q]
        return sum(math.exp(-(10.0**k) * d) for d in squares for k in range(-3, 4)) / len(squares)

    penalty = objective("MMD", 2).loss(batch, model)["penalty"].item()
    assert penalty == pytest.approx(kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    same = Batch(torch.cat([batch.images[:SIZE]] * 2), batch.labels, batch.sizes)
    assert objective("MMD", 2).loss(same, model)["penalty"].item() == pytest.approx(0, abs=1e-12)


def test_irm_multiplies_the_gradients_of_two_halves():
    batch, model = minibatches(), Linear()
    values = objective("IRM").loss(batch, model)
    penalties = []
    for x, y in zip(batch.split(batch.images), batch.split(batch.labels), strict=True):
        factor = torch.ones((), dtype=torch.double, requires_grad=True)
        halves = [F.cross_entropy(factor * model.logits(x[half::2]), y[half::2]) for half in (0, 1)]
        first, second = (torch.autograd.grad(half, factor)[0] for half in halves)
        penalties.append(first * second)
    torch.testing.assert_close(values["penalty"], sum(penalties) / DOMAINS)
    nll = sum(domain_losses(batch, model)) / DOMAINS
    torch.testing.assert_close(values["loss"], nll + values["penalty"])  # of weight 1 at first


def test_vrex_adds_the_variance_of_the_losses():
    batch, model = minibatches(), Linear()
    values, losses = objective("VREx").loss(batch, model), domain_losses(batch, model)
    mean = sum(losses) / DOMAINS
    torch.testing.assert_close(values["penalty"], sum((each - mean) ** 2 for each in losses).detach() / DOMAINS)
    torch.testing.assert_close(values["loss"], mean + values["penalty"])


def test_groupdro_moves_its_weights_to_the_domain_of_the_highest_loss():
    batch, model = minibatches(), Linear()
    losses, groups = domain_losses(batch, model), objective("GroupDRO", groupdro_eta=2.0)
    weights = [1.0] * DOMAINS
    for _ in range(3):
        weights = [w * math.exp(2.0 * each.item()) for w, each in zip(weights, losses, strict=True)]
        weights = [w / sum(weights) for w in weights]
        values = groups.loss(batch, model)
        assert groups.weights.tolist() == pytest.approx(weights)
        assert values["loss"].item() == pytest.approx(
            sum(w * each.item() for w, each in zip(weights, losses, strict=True))
        )
    assert groups.weights.argmax() == torch.stack(losses).argmax() and values["worst"] == max(losses)
    values["loss"].backward()
    groups.loss(batch, model)["loss"].backward()  # the first graph keeps weights of its own


@pytest.mark.parametrize("name", ["IRM", "VREx"])
def test_a_penalty_weighs_more_after_its_steps_and_the_optimizer_starts_again(name):
    prefix = name.lower()
    algorithm = make(f"LP+{name}", **{f"{prefix}_lambda": 7.0, f"{prefix}_penalty_anneal_iters": 2})
    weights, ages = [], []
    for step in range(4):
        values = algorithm.update(batches(step))
        weights.append((values["loss"] - values["nll"]) / values["penalty"])
        ages.append(int(next(iter(algorithm.optimizer.state.values()))["step"]))
    assert weights == pytest.approx([1, 1, 7, 7], rel=1e-3) and ages == [1, 2, 1, 2]


@pytest.mark.parametrize("name", ["IRM", "VREx"])
def test_a_run_that_ends_before_the_penalty_weighs_more_is_warned_of(name, capsys):
    prefix = name.lower()
    hparams = {f"{prefix}_lambda": 7.5, f"{prefix}_penalty_anneal_iters": 31}
    annealed = OBJECTIVES[name].load()(CLASSES, DOMAINS, hparams)
    annealed.begin(32)
    assert capsys.readouterr().err == ""
    annealed.begin(31)
    sentence = f"{prefix}_penalty_anneal_iters 31 is not below the 31 steps of the run: its penalty has weight 1"
    assert f"warning: {sentence} throughout, not {prefix}_lambda 7.5\n" == capsys.readouterr().err


@pytest.mark.parametrize("name", ["CORAL", "MMD", "VREx", "GroupDRO"])
def test_with_one_training_domain_it_is_the_mean_cross_entropy_and_says_so(name, capsys):
    batch, model = minibatches(1), Linear()
    values = objective(name, 1).loss(batch, model)
    torch.testing.assert_close(values["loss"], F.cross_entropy(model.logits(batch.images), batch.labels))
    Forward(make("BOnly")).check(objective(name, 1))
    assert f"warning: {name} compares training domains, and there is one: BOnly+{name}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["CORAL", "IRM"])
def test_a_minibatch_of_one_image_is_refused(name):
    with pytest.raises(BenchmarkError, match=f"{name} needs 2 images of each domain a step, not batch_size 1: raise"):
        make(f"BOnly+{name}", batch_size=1)


@pytest.mark.parametrize("name", ["CORAL", "MMD"])
def test_features_that_do_not_train_cannot_be_matched(name):
    with pytest.raises(BenchmarkError, match=rf"LP\+{name}: {name} shapes features, which LP does not train"):
        make(f"LP+{name}")
