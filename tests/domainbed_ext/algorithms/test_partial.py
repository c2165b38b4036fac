"""Partial tuning: what trains, and that nothing is computed or kept below it."""

from itertools import pairwise

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from domainbed_ext.algorithms.names import get_algorithm_class
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.hparams_registry import resolve

SHAPE = (3, 32, 32)
HEAD = {"head.weight", "head.bias"}


def make(name, **hparams):
    torch.manual_seed(0)
    settings = {**resolve(name, "DigitsShift"), "weights": "none", "precision": "float32", **hparams}
    return get_algorithm_class(name)(SHAPE, 10, 3, settings)


def batches():
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(4, *SHAPE, generator=draw), torch.arange(4)) for _ in range(3)]


def trained(name, **hparams):
    """Names of the parameters that two steps change; the others have no gradient."""
    algorithm = make(name, **hparams)
    before = {key: p.detach().clone() for key, p in algorithm.backbone.named_parameters()}
    for _ in range(2):
        algorithm.update(batches())
    after = dict(algorithm.backbone.named_parameters())
    names = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert {key for key, p in after.items() if p.requires_grad} == {
        key for key, p in after.items() if p.grad is not None
    }
    assert names <= {key for key, p in after.items() if p.requires_grad}
    return names


def parameters(**hparams):
    return [name for name, _ in make("FullFT", **hparams).backbone.named_parameters()]


def test_bitfit_trains_biases_and_head():
    names = trained("BitFit")
    biases = {name for name in parameters() if name.endswith(".bias")}
    assert (
        names == biases | HEAD and {"blocks.0.attn.qkv.bias", "blocks.3.norm2.bias", "patch_embed.proj.bias"} < biases
    )


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_norm_tuning_trains_norms_and_head(precision):
    norms = {f"{name}.{part}" for name in _norms() for part in ("weight", "bias")}
    assert trained("NormTuning", precision=precision) == norms | HEAD


def _norms():
    return ["norm", *(f"blocks.{block}.norm{number}" for block in range(4) for number in (1, 2))]


def test_norms_of_every_kind_are_tuned():
    """BatchNorm's statistics move then, as in full fine-tuning, and are saved."""
    algorithm = make("NormTuning", backbone="test_resnet")
    parameters = dict(algorithm.backbone.named_parameters())
    vectors = {name for name, p in parameters.items() if p.dim() == 1}  # its convolutions have no bias
    assert {name for name, p in parameters.items() if p.requires_grad} == vectors | {"fc.weight"} and len(vectors) > 10
    algorithm.update(batches())
    assert any("running_mean" in name for name in algorithm.trained())


@pytest.mark.parametrize("n", [1, 3, 4])
def test_last_blocks_trains_these_the_final_norm_and_the_head(n):
    blocks = tuple(f"blocks.{block}." for block in range(4 - n, 4))
    expected = {name for name in parameters() if name.startswith((*blocks, "norm.", "head."))}
    assert trained(f"LastBlocks@n={n}") == expected


def test_last_blocks_of_a_hierarchical_model_reach_into_the_stage_before():
    algorithm = make("LastBlocks@n=3", backbone="swin_tiny_patch4_window7_224", image_size=32)
    names = {name for name, p in algorithm.backbone.named_parameters() if p.requires_grad}
    assert {".".join(name.split(".")[:4]) for name in names if "blocks" in name} == {
        "layers.2.blocks.5",
        "layers.3.blocks.0",
        "layers.3.blocks.1",
    }
    assert {name.split(".")[0] for name in names} == {"layers", "norm", "head"}
    assert "layers.3.downsample.reduction.weight" in names


def kept_bytes(name, **hparams):
    """Bytes that a forward pass keeps for backward, parameters and images left out."""
    algorithm = make(name, **hparams)
    images = torch.cat([x for x, _ in batches()])
    own = {p.untyped_storage().data_ptr() for p in algorithm.parameters()} | {images.untyped_storage().data_ptr()}
    kept = {}
    with saved_tensors_hooks(lambda t: kept.update({t.untyped_storage().data_ptr(): t}) or t, lambda t: t):
        logits = algorithm.backbone(images)
    assert logits.requires_grad
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)


def test_nothing_is_kept_below_the_last_blocks():
    by_n = [kept_bytes(f"LastBlocks@n={n}") for n in (1, 2, 3, 4)]
    added = {more - less for less, more in pairwise(by_n)}
    assert len(added) == 1 and min(added) > by_n[0]  # the last block, with its one token, keeps least
    assert by_n[3] <= kept_bytes("FullFT")
    algorithm, needed = make("LastBlocks@n=2"), []
    for block in algorithm.backbone.blocks:
        block.register_forward_hook(lambda _, __, y: needed.append(y.requires_grad))
    algorithm.update(batches())
    assert needed == [False, False, True, True]


def test_biases_alone_keep_less_than_all_weights():
    assert kept_bytes("BitFit") < kept_bytes("FullFT")


@pytest.mark.parametrize("name", ["BitFit", "NormTuning", "LastBlocks@n=1"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_what_was_saved_predicts_the_same(name, precision, tmp_path):
    algorithm, images = make(name, precision=precision), torch.randn(3, *SHAPE)
    algorithm.update(batches())
    algorithm.save(tmp_path)
    fresh = make(name, precision=precision)
    start = fresh.eval().predict(images)
    fresh.load(tmp_path)
    assert torch.equal(algorithm.eval().predict(images), fresh.predict(images))
    assert not torch.equal(start, fresh.predict(images))


@pytest.mark.parametrize("n", ["0", "5", "-1", "1.5", "true"])
def test_a_number_of_blocks_that_cannot_be_gets_a_sentence(n):
    with pytest.raises(
        BenchmarkError, match="n .*(whole number from 1 to 4, the number of blocks of vit_pico|type int)"
    ):
        make(f"LastBlocks@n={n}")


def test_a_backbone_without_blocks_gets_a_sentence():
    with pytest.raises(BenchmarkError, match="LastBlocks: test_resnet has no transformer blocks: choose another"):
        make("LastBlocks", backbone="test_resnet")
