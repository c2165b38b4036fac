import pytest
import torch
import torch.nn.functional as F

from domainbed_ext.objectives import Batch
from domainbed_ext.objectives.cycle import draw_cycle
from domainbed_ext.objectives.mixup import Mixup, mixed_cross_entropy
from tests.domainbed_ext.objectives.small_algorithms import CLASSES, make


class Seen:
    """A linear model that keeps the images it was given."""

    def __init__(self, width):
        self.weight = torch.randn(width, CLASSES, generator=torch.Generator().manual_seed(0)).double()

    def logits(self, images):
        self.images = images
        return images @ self.weight


def minibatches(*sizes):
    draw = torch.Generator().manual_seed(1)
    return Batch.of(
        [(torch.randn(n, 5, generator=draw).double(), torch.randint(CLASSES, (n,), generator=draw)) for n in sizes],
        torch.device("cpu"),
    )


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_a_cycle_visits_every_domain(number):
    torch.manual_seed(0)
    pairs = draw_cycle(number)
    assert [first for first, _ in pairs[1:]] + [pairs[0][0]] == [second for _, second in pairs]
    assert sorted(first for first, _ in pairs) == list(range(number))
    orders = {tuple(draw_cycle(number)) for _ in range(40)}
    assert len(orders) > 1 or number == 1


def test_blends_have_the_loss_of_both_labels():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(6, CLASSES, generator=draw).double()
    first, second = torch.randint(CLASSES, (2, 6), generator=draw)
    targets = 0.3 * F.one_hot(first, CLASSES) + 0.7 * F.one_hot(second, CLASSES)
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(mixed_cross_entropy(logits, first, second, 0.3), expected)


def test_images_of_two_domains_are_blended(monkeypatch):
    shares = iter([0.9, 0.2, 0.6])
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self: torch.tensor(next(shares)).double())
    monkeypatch.setattr("domainbed_ext.objectives.mixup.draw_cycle", lambda n: [(2, 0), (0, 1), (1, 2)])
    batch, model = minibatches(4, 4, 3), Seen(5)
    loss = Mixup(CLASSES, 3, {"mixup_alpha": 0.2}).loss(batch, model)["loss"]
    x, y = batch.split(batch.images), batch.split(batch.labels)
    expected = []
    for (i, j), share, count in zip([(2, 0), (0, 1), (1, 2)], [0.9, 0.2, 0.6], [3, 4, 3], strict=True):
        blends = [share * x[i][k] + (1 - share) * x[j][k] for k in range(count)]
        losses = [
            share * F.cross_entropy(blend @ model.weight, y[i][k])
            + (1 - share) * F.cross_entropy(blend @ model.weight, y[j][k])
            for k, blend in enumerate(blends)
        ]
        expected.append(sum(losses) / count)
    torch.testing.assert_close(loss, sum(expected) / 3)


def test_images_of_a_single_domain_are_blended_with_each_other():
    torch.manual_seed(0)
    batch, model = minibatches(4), Seen(5)
    Mixup(CLASSES, 1, {"mixup_alpha": 5.0}).loss(batch, model)
    x = batch.images
    share = (model.images[0] - x[3])[0] / (x[0] - x[3])[0]
    torch.testing.assert_close(model.images, share * x + (1 - share) * x.roll(1, 0))
    assert 0 < share < 1


def test_every_pair_has_a_share_of_its_own():
    drawn = []
    for seed in range(30):
        torch.manual_seed(seed)
        batch, model = minibatches(2, 2), Seen(5)
        Mixup(CLASSES, 2, {"mixup_alpha": 0.2}).loss(batch, model)
        x, y = batch.split(batch.images)
        blends = model.images.split(2)
        for blend in blends:
            share = (blend - y)[0, 0] / (x - y)[0, 0]
            torch.testing.assert_close(blend, share * x + (1 - share) * y, atol=1e-6, rtol=1e-6)
            drawn.append(share.item())
    assert len(set(drawn)) > 30  # two pairs of each step
    assert sum(share < 0.1 or share > 0.9 for share in drawn) > 30  # Beta(0.2, 0.2) has its mass at both ends


def test_a_linear_probe_is_trained_on_images():
    assert make("LP+Mixup").objective.reads_images
