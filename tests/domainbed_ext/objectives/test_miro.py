import pytest
import torch
import torch.nn.functional as F

from domainbed_ext.algorithms.forward import Forward
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.models.blocks import recorded, transformer_blocks
from domainbed_ext.objectives.miro import gap
from tests.domainbed_ext.objectives.small_algorithms import SHAPE, batches, make
from vitlorafa import adapter_layers, disable_adapter

METHODS = ["FullFT", "BOnly", "BA", "BitFit", "BA@init_A=pissa,init_B=pissa", "Peft@method=dora"]


def composed(method, **hparams):
    if method.startswith("Peft"):
        pytest.importorskip("peft")
    base, at, rest = method.partition("@")
    return make(f"{base}+MIRO{at}{rest}", **hparams)


def features_of(model, images):
    with torch.no_grad(), recorded(transformer_blocks(model)) as features:
        model(images)
    return features


def test_the_gap_is_a_gaussians_negative_log_density_without_its_constant():
    draw = torch.Generator().manual_seed(0)
    features, targets = torch.randn(2, 3, 4, 5, generator=draw).double()
    variance = torch.rand(5, generator=draw).double() + 0.1
    density = torch.distributions.Normal(features.float(), variance.float().sqrt()).log_prob(targets.float())
    expected = -density.mean() - torch.tensor(2 * torch.pi).log() / 2
    torch.testing.assert_close(gap(features, targets, variance.float()), expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_that_of_features_before_and_after_each_block(method):
    algorithm, pretrained = composed(method, miro_lambda=0.3), make("LP").backbone.eval()
    algorithm.update(batches())
    images, labels = (torch.cat(each) for each in zip(*batches(1), strict=True))
    own, targets = features_of(algorithm.backbone.eval(), images), features_of(pretrained, images)
    assert len(own) == 5 and own[-1].shape == (12, 1, 128)  # the embedding and four blocks; of the last, what is read
    variances = [F.softplus(v.detach().double()) + 1e-5 for v in algorithm.objective.variances]
    penalty = sum(
        ((t.double() - f.double()) ** 2 / v + v.log()).mean() / 2
        for f, t, v in zip(own, targets, variances, strict=True)
    )
    with torch.no_grad():
        nll = F.cross_entropy(algorithm.backbone(images), labels)
    values = algorithm.update(batches(1))
    assert values["penalty"] == pytest.approx(penalty.item(), rel=1e-4)
    assert values["nll"] == pytest.approx(nll.item(), rel=1e-4)
    assert values["loss"] == pytest.approx(nll.item() + 0.3 * penalty.item(), rel=1e-4)


def test_variances_start_at_a_tenth_and_have_their_own_learning_rate():
    algorithm = make("BOnly+MIRO", lr=1e-3)
    for variance in algorithm.objective.variances:
        torch.testing.assert_close(F.softplus(variance) + 1e-5, torch.full((128,), 0.1), atol=1e-6, rtol=0)
    model, encoders = algorithm.optimizer.param_groups
    assert model["lr"] == 1e-3 and encoders["lr"] == pytest.approx(1e-2)
    assert encoders["params"] == list(algorithm.objective.variances)
    before = [v.detach().clone() for v in algorithm.objective.variances]
    algorithm.update(batches())
    assert not any(torch.equal(*pair) for pair in zip(before, algorithm.objective.variances, strict=True))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_pretrained_features_are_those_without_adapters(precision):
    algorithm = make("BOnly+MIRO", precision=precision)
    for _ in range(2):
        algorithm.update(batches())
    images = torch.randn(3, *SHAPE)
    pretrained = algorithm.objective._pretrained
    with torch.no_grad(), disable_adapter(algorithm.backbone), recorded(algorithm.objective._features_of) as own:
        algorithm.predict(images)
    with torch.no_grad(), recorded(transformer_blocks(pretrained.model)) as theirs, Forward(algorithm).autocast():
        pretrained.model(images)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if precision == "float32" else {"atol": 0.05, "rtol": 0.05}
    for a, b in zip(own, theirs, strict=True):
        torch.testing.assert_close(a.float(), b.float(), **tolerance)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize(("method", "own"), [("BOnly", {"head.weight", "head.bias"}), ("FullFT", None)])
def test_what_stays_frozen_is_in_memory_once(method, own, precision):
    algorithm = make(f"{method}+MIRO", precision=precision)
    pretrained = algorithm.objective._pretrained
    of_model = {p.data_ptr() for p in algorithm.backbone.parameters()}
    names = {name for name, p in pretrained.model.named_parameters() if p.data_ptr() not in of_model}
    assert names == (own or {name for name, _ in pretrained.model.named_parameters()})
    before = {name: p.detach().clone() for name, p in pretrained.model.named_parameters()}
    for _ in range(2):
        algorithm.update(batches())
    assert all(torch.equal(p, before[name]) for name, p in pretrained.model.named_parameters())
    assert not any(p.requires_grad for p in pretrained.model.parameters())


def test_neither_the_pretrained_model_nor_variances_are_saved(tmp_path):
    algorithm, plain = make("BOnly+MIRO"), make("BOnly")
    algorithm.update(batches())
    kept = {name for name in algorithm.training_state()["tensors"] if name.startswith("objective.")}
    assert kept == {f"objective.variances.{index}" for index in range(5)}
    algorithm.save(tmp_path)
    plain.load(tmp_path)
    images = torch.randn(2, *SHAPE)
    assert torch.equal(algorithm.eval().predict(images), plain.eval().predict(images))
    assert len(list(adapter_layers(algorithm))) == len(list(adapter_layers(plain)))


def test_a_backbone_without_blocks_is_refused():
    with pytest.raises(BenchmarkError, match="this ResNet has no transformer blocks: choose another --backbone"):
        make("FullFT+MIRO", backbone="test_resnet.r160_in1k", image_size=32)
