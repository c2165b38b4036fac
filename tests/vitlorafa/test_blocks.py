"""Adapters on some of the transformer blocks."""

import json
import warnings

import pytest
import torch
from messages import naming
from small_models import build, images, perturb

from vitlorafa import (
    AdapterConfig,
    AdapterError,
    adapter_layers,
    inject,
    load_adapter,
    save_adapter,
    transformer_blocks,
)

VIT = "vit_tiny_patch16_224"


def adapted(blocks, depth=4, **kwargs):
    model = inject(build(VIT, depth=depth), AdapterConfig(rank=2, seed=0, blocks=blocks, **kwargs), train_head=True)
    perturb(model)
    return model


def blocks_of(model):
    return sorted({int(name.split(".")[1]) for name, _ in adapter_layers(model)})


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [(None, [0, 1, 2, 3]), ("0-1", [0, 1]), ("last2", [2, 3]), ([0, -1], [0, 3]), ([3, -1], [3]), (1, [1])],
)
def test_these_blocks_are_adapted(blocks, expected):
    assert blocks_of(adapted(blocks, targets="q,fc2")) == expected


@pytest.mark.parametrize("blocks", ["0-4", "last5", [0, 7]])
def test_a_block_that_the_model_does_not_have(blocks):
    model = build(VIT, depth=4)
    before = list(model.state_dict())
    with pytest.raises(AdapterError, match=naming("VisionTransformer has 4 blocks", "-4 to 3")):
        inject(model, AdapterConfig(rank=2, blocks=blocks))
    assert list(model.state_dict()) == before and all(p.requires_grad for p in model.parameters())


def test_nothing_below_the_lowest_adapted_block_has_a_gradient():
    model, needed = adapted("last1"), []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, y: needed.append(y.requires_grad))
    model(images(model)).sum().backward()
    assert needed == [False, False, False, True]


def test_blocks_are_counted_over_the_stages_of_a_hierarchical_model():
    model = build("swin_tiny_patch4_window7_224")
    names = [name for name, _ in transformer_blocks(model)]
    inject(model, AdapterConfig(rank=2, blocks=(1, -1)))
    assert {name.rpartition(".attn")[0] for name, _ in adapter_layers(model)} == {names[1], names[-1]}


@pytest.mark.parametrize("format", ["vitlorafa", "peft"])
def test_round_trip(format, tmp_path):
    model = adapted("1,-1", targets="q,v")
    save_adapter(model, tmp_path, head=True, format=format)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_adapter(build(VIT, depth=4), tmp_path)
    assert blocks_of(loaded) == [1, 3]
    x = images(model)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    save_adapter(loaded, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter.json").read_text())["config"]["blocks"] == [1, -1]


def test_peft_adapts_the_same_blocks(tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted("1-2")
    save_adapter(model, tmp_path, head=True, format="peft")
    other = peft.PeftModel.from_pretrained(build(VIT, depth=4), tmp_path).eval()
    x = images(model)
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x), atol=1e-4, rtol=1e-4)
