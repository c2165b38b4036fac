"""Updates that start at a part of the weight (PiSSA, MiLoRA): the frozen weight is the rest of it."""

import copy
import warnings

import pytest
import torch
from messages import naming
from safetensors.torch import load_file
from small_models import build, images, perturb
from torch import nn
from torch.nn.functional import gelu, linear

from vitlorafa import (
    AdapterConfig,
    AdapterError,
    LoRALinear,
    adapter_layers,
    disable_adapter,
    inject,
    load_adapter,
    merge,
    merge_and_unload,
    remove,
    save_adapter,
    unmerge,
)
from vitlorafa.layers import QKV

pytestmark = pytest.mark.numbers

VIT = "vit_tiny_patch16_224"
NAMES = pytest.mark.parametrize("name", ["pissa", "milora"])
TRAIN = pytest.mark.parametrize("train", ["B", "A", "BA"])


def layer(projections=("q", "v"), dtype=torch.float64, moved=True, **kwargs):
    config = AdapterConfig(**{"rank": 4, "seed": 0, "init_A": "pissa", "train": "BA", **kwargs})
    base = nn.Linear(24, 72, dtype=dtype).requires_grad_(False)
    adapted = LoRALinear(base, config, projections, QKV if projections != ("fc1",) else ())
    if moved:
        perturb(adapted)
    return adapted


def adapted(**kwargs):
    model = inject(build(VIT), AdapterConfig(**{"rank": 3, "seed": 0, "init_A": "pissa", **kwargs}), train_head=True)
    perturb(model)
    return model


@NAMES
@TRAIN
def test_starts_as_pretrained(name, train):
    plain = build(VIT)
    x = images(plain)
    model = inject(copy.deepcopy(plain), AdapterConfig(rank=3, train=train, init_A=name, targets="all"))
    before = plain.state_dict()
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), atol=1e-5, rtol=1e-5)  # W - s B A + s B A, rounded
        merge(model)
        for key, each in adapter_layers(model):
            assert not each.delta_weight().any() and torch.equal(each.base.weight, before[f"{key}.weight"])
        assert torch.equal(model(x), plain(x))
        unmerge(model)
        with disable_adapter(model):
            assert torch.equal(model(x), plain(x))


@TRAIN
@pytest.mark.parametrize("compute", ["folded", "separate"])
@pytest.mark.parametrize("init", ["pissa", "q=pissa", "v=milora,q=pissa"])
def test_values_and_gradients_are_those_of_the_formula(init, compute, train):
    each = layer(("q", "v"), train=train, compute=compute, init_A=init)
    A0, B0 = each.start_A, each.start_B
    assert B0[0].any() and bool(B0[1].any()) == (init != "q=pissa")
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    trained = [x, *(p for p in each.parameters() if p.requires_grad)]
    for _ in range(2):  # computed, and kept
        delta = torch.zeros(72, 24, dtype=torch.float64)
        for place, start in enumerate((0, 48)):
            update = each.lora_B[place] @ each.lora_A[place] - B0[place] @ A0[place]
            delta = delta + nn.functional.pad(each.scale * update, (0, 0, start, 48 - start))
        expected = linear(x, each.base.weight + delta, each.base.bias)
        torch.testing.assert_close(each(x), expected)
        torch.testing.assert_close(each.weight, each.base.weight + delta)
        ours, theirs = (torch.autograd.grad(y.sin().sum(), trained) for y in (each(x), expected))
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(each.eval()(x.detach(), gelu=True), gelu(expected))


def test_dropout_drops_the_input_of_the_update_alone():
    each = layer(dropout=0.5, moved=False)
    x = torch.randn(4000, 24, dtype=torch.float64)
    with torch.no_grad():
        mean = each(x[:1].expand(20000, 24)).mean(0)
    torch.testing.assert_close(mean, each.base(x[0]), atol=0.05, rtol=0.05)
    assert not torch.equal(each(x), each(x)) and torch.allclose(each.eval()(x), each.base(x))


def test_the_residual_is_computed_again_when_something_changes():
    each, x = layer(), torch.randn(3, 24, dtype=torch.float64)

    def expected():
        return linear(x, each.weight, each.base.bias)

    first = each._cast_base(None)[0]
    assert each._cast_base(None)[0] is first
    with torch.no_grad():
        each.base.weight.mul_(2)
        torch.testing.assert_close(each(x), expected())
        each.start_B.mul_(0.5)
        torch.testing.assert_close(each(x), expected())
        other = layer(init_A="milora")
        each.load_state_dict(other.state_dict())
        torch.testing.assert_close(each(x), other(x))
        torch.testing.assert_close(copy.deepcopy(each)(x), other(x))
        torch.testing.assert_close(each.float()(x.float()).double(), other(x), atol=1e-5, rtol=1e-5)
    assert set(each.state_dict()) == {"lora_A", "lora_B", "start_A", "start_B", "base.weight", "base.bias"}


def test_in_bfloat16_and_in_a_compiler():
    each, x = layer(dtype=torch.bfloat16), torch.randn(3, 24)
    expected = linear(x, (each.base.weight.float() + each.delta_weight()).bfloat16().float(), each.base.bias.float())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(each(x).float(), expected, atol=0.03, rtol=0.03)
    each = layer(dtype=torch.float32)
    torch.testing.assert_close(torch.compile(each, fullgraph=True, backend="eager")(x), each(x))


@NAMES
@TRAIN
@pytest.mark.parametrize("format", ["vitlorafa", "peft"])
def test_what_was_saved_is_loaded_merged_and_removed(format, train, name, tmp_path):
    plain = build(VIT)
    model = adapted(train=train, init_A=name, targets="q,v,fc1")
    save_adapter(model, tmp_path, head=True, format=format)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_adapter(build(VIT), tmp_path)
    x = images(plain)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x)) and not torch.allclose(loaded(x), plain(x), atol=1e-3)
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
    merged = copy.deepcopy(loaded)
    with torch.no_grad():
        torch.testing.assert_close(merge_and_unload(merged)(x), model(x), atol=1e-5, rtol=1e-5)
    remove(loaded)
    restored, start = loaded.state_dict(), plain.state_dict()
    assert all(torch.equal(restored[key], start[key]) for key in start if not key.startswith("head."))


def test_loading_decomposes_no_weight(tmp_path, monkeypatch):
    """That of a large model would take longer than all else."""
    model = adapted()
    save_adapter(model, tmp_path)
    monkeypatch.setattr(torch.linalg, "svd", None)
    loaded = load_adapter(build(VIT), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(factors(loaded), factors(model), strict=True))


def factors(model):
    return [t for _, each in adapter_layers(model) for t in (each.lora_A, each.lora_B, each.start_A, each.start_B)]


def test_a_model_without_values_gets_a_sentence():
    with pytest.raises(AdapterError, match=naming("blocks.0.attn.qkv", "singular vectors", "meta device")):
        inject(build(VIT).to("meta"), AdapterConfig(rank=3, init_A="pissa"))


def test_a_state_dict_of_a_merged_model_has_the_pretrained_weights():
    model = merge(adapted())
    other = inject(build(VIT), AdapterConfig(rank=3, init_A="pissa"), train_head=True)
    other.load_state_dict(model.state_dict())
    x = images(model)
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x), atol=1e-5, rtol=1e-5)


def test_the_start_does_not_train_and_is_saved_once(tmp_path):
    model = adapted(train="BA")
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {
        "lora_A", "lora_B", "weight", "bias",
    }  # fmt: skip
    save_adapter(model, tmp_path, format="vitlorafa")
    names = list(load_file(tmp_path / "adapter.safetensors"))
    assert len(names) == 4 * len(list(adapter_layers(model)))


def test_a_file_with_a_start_does_not_fit_a_model_without(tmp_path):
    save_adapter(adapted(), tmp_path)
    model = inject(build(VIT), AdapterConfig(rank=3))
    with pytest.raises(AdapterError, match=naming("blocks.0.attn.qkv.start_A is unknown to the model")):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize("init_A", ["pissa", "q=pissa,v=gaussian,fc1=gaussian"])
def test_peft_loads_the_difference(init_A, tmp_path):
    peft = pytest.importorskip("peft")
    for rank_stabilised in (False, True):
        model = adapted(init_A=init_A, targets="q,v,fc1", rank_stabilised=rank_stabilised)
        save_adapter(model, tmp_path, head=True, format="peft")
        other = peft.PeftModel.from_pretrained(build(VIT), tmp_path).eval()
        x = images(model)
        with torch.no_grad():
            torch.testing.assert_close(other(x), model(x), atol=1e-4, rtol=1e-4)
            assert (model(x) - build(VIT)(x)).abs().max() > 1e-2


def test_pissa_is_pefts():
    peft = pytest.importorskip("peft")
    targets = [f"blocks.{block}.mlp.fc1" for block in range(2)]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights="pissa")
    theirs = peft.get_peft_model(build(VIT), config).base_model.model
    ours = inject(build(VIT), AdapterConfig(rank=3, alpha=5, targets="fc1", init_A="pissa", train="BA"))
    for name, each in adapter_layers(ours):
        module = theirs.get_submodule(name)
        A, B = (getattr(module, factor)["default"].weight for factor in ("lora_A", "lora_B"))
        torch.testing.assert_close(each.lora_B[0] @ each.lora_A[0], B @ A, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(each.lora_A[0].abs(), A.abs(), atol=1e-4, rtol=1e-3)  # up to signs
        torch.testing.assert_close(each._cast_base(None)[0], module.base_layer.weight, atol=1e-5, rtol=1e-4)
