import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from domainbed_ext.algorithms.base import Algorithm
from domainbed_ext.algorithms.full import FullFT
from domainbed_ext.algorithms.lora import BA
from domainbed_ext.algorithms.names import get_algorithm_class, parse_name
from domainbed_ext.algorithms.probe import LP
from domainbed_ext.algorithms.registry import ALGORITHMS
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.hparams_registry import resolve
from domainbed_ext.runs import checkpoint

SHAPE = (3, 32, 32)


def make(name, **hparams):
    torch.manual_seed(0)
    settings = {**resolve(name, "DigitsShift"), "weights": "none", "precision": "float32", **hparams}
    return get_algorithm_class(name)(SHAPE, 10, 3, settings)


def batches():
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(4, *SHAPE, generator=draw), torch.arange(4)) for _ in range(3)]


def trained_names(algorithm):
    before = {name: p.detach().clone() for name, p in algorithm.backbone.named_parameters()}
    for _ in range(2):
        algorithm.update(batches())
    return {name for name, p in algorithm.backbone.named_parameters() if not torch.equal(before[name], p)}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_loss_falls_and_logits_have_their_shape(name):
    algorithm = make(name, lr=3e-3)
    losses = [algorithm.update(batches())["loss"] for _ in range(12)]
    assert losses[-1] < losses[0]
    assert algorithm.predict(torch.randn(5, *SHAPE)).shape == (5, 10)


def test_each_method_trains_what_its_name_says():
    head = {"head.weight", "head.bias"}
    assert trained_names(make("LP")) == head
    for name, factors in {"BOnly": {"lora_B"}, "AOnly": {"lora_A"}, "BA": {"lora_A", "lora_B"}}.items():
        names = trained_names(make(name)) - head
        assert {n.rsplit(".", 1)[1] for n in names} == factors
        assert {n.split(".")[1] for n in names} == {"0", "1", "2", "3"}  # every block
    full = make("FullFT")
    assert trained_names(full) == {name for name, _ in full.backbone.named_parameters()}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_methods_own_update_needs_no_autocast(name):
    """Frozen weights are held in bfloat16, which torch would not multiply with float32 images."""
    algorithm = make(name, precision="bf16").eval()
    images = batches()[0][0]
    logits = algorithm.backbone(images)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, algorithm.predict(images), atol=0.05, rtol=0.05)
    torch.testing.assert_close(algorithm.backbone.double()(images.double()).float(), logits, atol=1e-3, rtol=1e-3)


def test_bonly_starts_from_a_random_orthonormal_a():
    A = make("BOnly").backbone.blocks[0].attn.qkv.lora_A[0]
    torch.testing.assert_close(A @ A.T, torch.eye(8), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "factor"), [("BOnly", "lora_B"), ("AOnly", "lora_A")])
def test_gradient_correction_reaches_the_optimizer(name, factor):
    """The frozen factor is orthonormal and the scale 2, so a step sees a quarter of the gradient; the head's stays."""
    steps = []
    for algorithm in (make(name), make(f"{name}@gradient_correction=true")):
        watched = (getattr(algorithm.backbone.blocks[0].attn.qkv, factor), algorithm.backbone.head.weight)
        seen = []
        algorithm.optimizer.register_step_pre_hook(lambda *_, s=seen, w=watched: s.extend(p.grad.clone() for p in w))
        algorithm.update(batches())
        steps.append(seen)
    (raw, head), (corrected, same_head) = steps
    torch.testing.assert_close(corrected, raw / 4, rtol=1e-4, atol=1e-7)
    assert raw.any() and torch.equal(head, same_head)


def test_the_same_seed_gives_the_same_run():
    first, second = make("BA"), make("BA")
    assert [first.update(batches()) for _ in range(3)] == [second.update(batches()) for _ in range(3)]


@pytest.mark.parametrize("name", ["BA", "BOnly@rank=4", "AOnly@gradient_correction=true", "LP", "FullFT"])
def test_what_was_saved_predicts_the_same(name, tmp_path):
    algorithm, images = make(name), torch.randn(3, *SHAPE)
    algorithm.update(batches())
    algorithm.save(tmp_path)
    fresh = make(name)  # same random start, which is the backbone's
    fresh.load(tmp_path)
    assert torch.equal(algorithm.eval().predict(images), fresh.eval().predict(images))
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors"}


def test_an_adapter_is_kilobytes(tmp_path):
    make("BOnly").save(tmp_path)
    backbone = sum(p.numel() * 4 for p in make("LP").parameters())
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < backbone / 10


def test_a_method_of_ones_own_is_a_class_and_a_line(monkeypatch):
    class Norms(Algorithm):
        def prepare(self, backbone, hparams):
            for name, parameter in backbone.named_parameters():
                parameter.requires_grad = "norm" in name or "head" in name

    monkeypatch.setitem(ALGORITHMS, "Norms", Norms)
    assert {name.split(".")[-2] for name in trained_names(make("Norms"))} == {"norm1", "norm2", "norm", "head"}


def test_a_rank_over_the_width_gets_a_sentence():
    with pytest.raises(BenchmarkError, match="BOnly on vit_pico_patch8_32: .*rank 4096"):
        make("BOnly@rank=4096")
    with pytest.raises(BenchmarkError, match="rank must be a whole number of at least 1, not 0"):
        make("BOnly@rank=0")


def test_names_are_taken_apart():
    assert parse_name("BOnly") == ("BOnly", {})
    assert parse_name("BA@rank=4,alpha=8.5") == ("BA", {"rank": 4, "alpha": 8.5})


def test_a_distilled_backbone_has_two_heads_to_probe():
    heads = {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
    settings = {**resolve("LP", "PACS"), "backbone": "deit_tiny_distilled_patch16_224", "weights": "none"}
    probe = get_algorithm_class("LP")((3, 224, 224), 7, 3, settings)
    assert {name for name, p in probe.backbone.named_parameters() if p.requires_grad} == heads


def statistics(algorithm):
    return {name: buffer.clone() for name, buffer in algorithm.named_buffers() if "running" in name}


def moved(algorithm):
    before = statistics(algorithm)
    algorithm.update(batches())
    return {name for name, buffer in statistics(algorithm).items() if not torch.equal(buffer, before[name])}


@pytest.mark.parametrize("name", ["FullFT", "ERM"])
def test_statistics_that_training_moves_are_saved(name, tmp_path):
    algorithm, images = make(name, backbone="test_resnet"), torch.randn(3, *SHAPE)
    assert len(moved(algorithm)) == len(statistics(algorithm)) > 10
    algorithm.save(tmp_path)
    fresh = make(name, backbone="test_resnet")
    fresh.load(tmp_path)
    assert torch.equal(algorithm.eval().predict(images), fresh.eval().predict(images))
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in algorithm.state_dict().items())


@pytest.mark.parametrize(("name", "backbone"), [("LP", "test_resnet"), ("BOnly@rank=2", "xcit_nano_12_p16_224")])
def test_statistics_of_a_frozen_backbone_stay(name, backbone, tmp_path):
    algorithm, images = make(name, backbone=backbone), torch.randn(3, *SHAPE)
    assert statistics(algorithm) and not moved(algorithm)
    assert algorithm.training and algorithm.backbone.get_classifier().training
    algorithm.save(tmp_path)
    assert not any("running" in name for path in tmp_path.glob("*.safetensors") for name in load_file(path))
    fresh = make(name, backbone=backbone)
    fresh.load(tmp_path)
    assert torch.equal(algorithm.eval().predict(images), fresh.eval().predict(images))


class Probed(LP):
    """MAE's linear probe: BatchNorm without weights before the linear layer."""

    def prepare(self, backbone, hparams):
        backbone.head = nn.Sequential(nn.BatchNorm1d(backbone.num_features, affine=False), backbone.head)
        super().prepare(backbone, hparams)


class Adversarial(FullFT):
    """Keeps something of its own beside the backbone, as DANN does."""

    def prepare(self, backbone, hparams):
        self.head = nn.Sequential(nn.Linear(10, 3), nn.BatchNorm1d(3))  # a name that the backbone has too

    def logits(self, images):
        logits = self.backbone(images)
        return logits + self.head(logits).sum(1, keepdim=True)

    def predict(self, x):
        return self.logits(x)


class AdversarialBA(Adversarial, BA):
    """The same with adapters."""

    def prepare(self, backbone, hparams):
        BA.prepare(self, backbone, hparams)
        Adversarial.prepare(self, backbone, hparams)


@pytest.mark.parametrize("kind", [Probed, Adversarial, AdversarialBA])
def test_whatever_trains_is_saved(kind, monkeypatch, tmp_path):
    monkeypatch.setitem(ALGORITHMS, "Mine", kind)
    settings = {**resolve("BA", "DigitsShift"), "weights": "none", "precision": "float32", "lr": 0.1}

    def mine():
        torch.manual_seed(0)
        return kind(SHAPE, 10, 3, settings)

    algorithm, images = mine(), torch.randn(3, *SHAPE)
    assert moved(algorithm) == statistics(algorithm).keys() and len(moved(algorithm)) == 2
    algorithm.save(tmp_path)
    fresh = mine()
    fresh.load(tmp_path)
    assert torch.equal(algorithm.eval().predict(images), fresh.eval().predict(images))
    assert not torch.equal(fresh.predict(images), mine().eval().predict(images))


def test_files_that_do_not_fit(tmp_path):
    make("LP").save(tmp_path)
    with pytest.raises(BenchmarkError, match=r"does not fit this FullFT \(cls_token, .* in all\): give the run's own"):
        make("FullFT").load(tmp_path)
    make("FullFT", backbone="test_resnet").save(tmp_path)
    with pytest.raises(BenchmarkError, match="does not fit this LP"):
        make("LP", backbone="test_resnet").load(tmp_path)
    full = make("FullFT", backbone="test_resnet")
    weights = {name: p.detach().clone() for name, p in full.backbone.named_parameters()}
    save_file(weights, tmp_path / "trained.safetensors")  # as earlier versions wrote it
    with pytest.raises(BenchmarkError, match="by an earlier version, which left out the statistics of .* BatchNorm"):
        full.load(tmp_path)
    probe = make("LP", backbone="test_resnet")
    head = {f"{key}": p.detach().clone() for key, p in probe.backbone.named_parameters() if p.requires_grad}
    save_file(head, tmp_path / "trained.safetensors")
    probe.load(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
@pytest.mark.parametrize("name", ["LP", "BOnly"])
def test_files_are_for_whom_the_umask_says(name, umask, tmp_path):
    algorithm, before = make(name), os.umask(umask)
    try:
        algorithm.save(tmp_path / "model")
        checkpoint.save(tmp_path, 3, {"a": torch.ones(2)})
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask} and len(files) > 1


def test_a_probe_of_a_model_that_adds_two_heads_logits_has_no_features_to_train_on():
    """VOLO's second head reads other features than the one that timm names."""
    algorithm = make("LP", backbone="volo_d1_224", image_size=32)
    assert not algorithm.embeds
    assert all(parameter.requires_grad for parameter in algorithm.backbone.aux_head.parameters())
