"""`vitlorafa.set_strength`: the update scaled between the pretrained model and the trained one."""

import copy

import numpy as np
import pytest
import torch
from adapted import AUTOCAST, COMPUTE_AND_DROPOUT, RANK, TARGETS, WAYS, assert_same, autocast, one_layer, step
from messages import naming
from small_models import build, images, perturb
from torch import nn
from torch._dynamo.testing import CompileCounter

import vitlorafa
from vitlorafa import (
    AdapterConfig,
    AdapterError,
    adapter_layers,
    disable_adapter,
    inject,
    load_adapter,
    merge,
    merge_and_unload,
    save_adapter,
    set_strength,
    unmerge,
)

VIT = "vit_tiny_patch16_224"
STARTS = pytest.mark.parametrize("init", ["zero", "pissa"])


def trained(init="zero", architecture=VIT, prepare=lambda model: model, **kwargs):
    """A plain model, and the same with a trained adapter."""
    plain = prepare(build(architecture))
    config = {"rank": RANK, "seed": 0, "train": "BA", "init_B": init, "targets": TARGETS, **kwargs}
    model = inject(copy.deepcopy(plain), AdapterConfig(**config))
    perturb(model)
    return plain, model


def between(plain, model, a):
    """The plain model with weights between its own and the trained ones."""
    model = merge_and_unload(copy.deepcopy(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            start = plain.get_parameter(name)
            parameter.copy_(start + a * (parameter - start))
    return model


@pytest.mark.numbers
@STARTS
@COMPUTE_AND_DROPOUT
@AUTOCAST
@torch.no_grad()
def test_weights_lie_between_the_pretrained_and_the_trained_ones(init, compute, dropout, low):
    plain, model = trained(init, compute=compute, dropout=dropout)
    x = images(plain)
    with autocast(low):
        before, full = plain(x), model(x)
        for a in (0.25, 0.75):
            expected = between(plain, model, a)(x)
            merged = merge(set_strength(copy.deepcopy(model), a))
            for each in (set_strength(model, a), merged):
                assert_same({"y": each(x)}, {"y": expected}, low)
            set_strength(model, 1)
        assert torch.equal(set_strength(model, 0)(x), before)
        assert torch.equal(set_strength(model, 1)(x), full) and not torch.equal(before, full)


@torch.no_grad()
def test_ends_are_exact_in_every_family(architecture):
    plain, model = trained(architecture=architecture, targets="all")
    x, before = images(plain), None
    before, full, weights = plain(x), model(x), [layer.weight for _, layer in adapter_layers(model)]
    assert torch.equal(set_strength(model, 0)(x), before) and not torch.equal(before, full)
    for _, layer in adapter_layers(model):
        assert torch.equal(layer.weight, layer.pretrained_weight)
    set_strength(set_strength(model, 0.3), 1)
    assert torch.equal(model(x), full)
    assert all(torch.equal(layer.weight, w) for (_, layer), w in zip(adapter_layers(model), weights, strict=True))


@STARTS
@torch.no_grad()
def test_merged_models_stay_merged(init):
    plain, model = trained(init)
    x, full = images(plain), merge(model)(images(plain))
    weights = copy.deepcopy(model.state_dict())
    for a in (0.5, 0.0, 1.0):
        assert set_strength(model, a) is model and all(layer.merged for _, layer in adapter_layers(model))
        expected = {0.0: plain, 1.0: model}.get(a) or between(plain, set_strength(unmerge(copy.deepcopy(model)), 1), a)
        torch.testing.assert_close(model(x), expected(x), atol=1e-5, rtol=1e-5)
        assert all(torch.equal(weights[name], each) for name, each in model.state_dict().items())
    assert torch.equal(model(x), full)
    assert torch.equal(set_strength(model, 0)(x), plain(x))
    plain_again = merge_and_unload(set_strength(model, 0))
    assert all(torch.equal(plain.state_dict()[name], each) for name, each in plain_again.state_dict().items())


@torch.no_grad()
def test_with_disabled_adapters():
    plain, model = trained()
    x = images(plain)
    half = merge(set_strength(copy.deepcopy(model), 0.5))(x)
    merge(model)
    with disable_adapter(model):
        set_strength(model, 0.5)
        assert torch.equal(model(x), plain(x))
    assert torch.equal(model(x), half)


@STARTS
@torch.no_grad()
def test_files_and_state_dicts_hold_the_trained_adapter(tmp_path, init):
    plain, model = trained(init)
    x, full, state = images(plain), model(images(plain)), copy.deepcopy(model.state_dict())
    set_strength(model, 0.25)
    quarter = model(x)
    assert all(torch.equal(state[name], each) for name, each in model.state_dict().items())
    assert state.keys() == model.state_dict().keys()
    for format in ("vitlorafa", "peft"):
        save_adapter(model, tmp_path / format, format=format)
        torch.testing.assert_close(load_adapter(build(VIT), tmp_path / format)(x), full, atol=1e-5, rtol=1e-5)
    assert torch.equal(load_adapter(build(VIT), tmp_path / "vitlorafa")(x), full)
    other = merge(set_strength(trained(init)[1], 0.25))
    perturb(other)
    for load in (lambda: other.load_state_dict(state), lambda: load_adapter(other, tmp_path / "vitlorafa")):
        load()
        torch.testing.assert_close(other(x), quarter, atol=1e-5, rtol=1e-5)
    assert {layer.strength for _, layer in adapter_layers(other)} == {0.25}
    assert torch.equal(copy.deepcopy(model)(x), quarter)


@STARTS
@pytest.mark.parametrize("format", ["int8", "nf4"])
@torch.no_grad()
def test_quantised_bases(format, init):
    pytest.importorskip("bitsandbytes")
    plain, model = trained(init)
    for each in (plain.requires_grad_(False), model):
        vitlorafa.quantise(each, format)
    x = images(plain)
    for low in (False, True):
        with autocast(low):
            before, full = plain(x), model(x)
            expected = merge(set_strength(copy.deepcopy(model), 0.5))(x)
            assert_same({"y": set_strength(model, 0.5)(x)}, {"y": expected}, low)
            assert not torch.equal(expected, before) and not torch.equal(expected, full)
            for each in (model, merge(copy.deepcopy(model))):
                assert torch.equal(set_strength(each, 0)(x), before)
            assert torch.equal(set_strength(model, 1)(x), full)
    half = merge_and_unload(set_strength(copy.deepcopy(model), 0.5))
    torch.testing.assert_close(half(x), set_strength(model, 0.5)(x), atol=1e-4, rtol=1e-4)


@AUTOCAST
@torch.no_grad()
def test_faster_models_and_cast_weights(low):
    def prepare(model):
        return vitlorafa.cast_frozen(vitlorafa.speed_up(model.requires_grad_(False)))

    plain, model = trained(prepare=prepare)
    x = images(plain)
    with autocast(low):
        before, full = plain(x), model(x)
        for each in (model, merge(copy.deepcopy(model))):
            assert torch.equal(set_strength(each, 0)(x), before)
        assert torch.equal(set_strength(model, 1)(x), full)


@STARTS
@WAYS
def test_gradients_are_those_of_the_scaled_update(init, compute):
    model = trained(init, compute=compute)[1]
    x = images(model)
    ours = step(set_strength(model, 0.25), x)
    set_strength(model, 1)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    half = set_strength(copy.deepcopy(model), 0.25)
    weights = {f"{name}.base.weight": layer.weight for name, layer in adapter_layers(half)}
    with disable_adapter(model):
        y = torch.func.functional_call(model, weights, (x,))
        y.sin().sum().backward()
    expected = {name: p.grad for name, p in half.named_parameters() if p.requires_grad}
    assert parameters.keys() == expected.keys()
    assert_same(ours, {"y": y.detach(), **expected})


def test_corrected_gradients_follow_the_strength():
    """The inverse of one strength is not used at another."""
    model = trained(train="B", targets="q", gradient_correction=True)[1]
    x, factors = images(model), [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(factors, lr=0.0)
    vitlorafa.correct_gradients(optimizer, model)
    seen: list[torch.Tensor] = []
    optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in factors))
    for a in (1, 0.5):
        step(set_strength(model, a), x)
        seen.clear()
        optimizer.step()
        for (_, layer), corrected in zip(adapter_layers(model), seen, strict=True):
            A, gradient = layer.lora_A, layer.lora_B.grad
            expected = gradient @ torch.linalg.inv(A @ A.mT) / (2 * a) ** 2
            torch.testing.assert_close(corrected, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@WAYS
def test_compiled_layers_do_not_have_a_graph_for_each_strength(compute):
    torch._dynamo.reset()
    layer, x, counter = one_layer(compute).eval(), torch.randn(3, 24), CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for layer.strength in np.linspace(0, 1, 12).tolist():
        torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count <= 4
    torch._dynamo.reset()


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: nn.Sequential(model, nn.LogSoftmax(1))])
@torch.no_grad()
def test_models_inside_others(wrap):
    plain, model = trained()
    x = images(plain)
    assert torch.equal(set_strength(wrap(model), 0)(x), wrap(plain)(x))
    assert {layer.strength for _, layer in adapter_layers(model)} == {0}


def test_text_of_a_layer():
    model = trained()[1]
    assert "strength" not in repr(model) and "strength=0.5" in repr(set_strength(model, np.float32(0.5)))
    assert "strength" not in repr(set_strength(model, torch.tensor(1)))


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), float("inf"), "0.5", None, True, [0.5], torch.ones(2), 1j])
def test_strengths_that_are_none(value):
    model = set_strength(trained()[1], 0.5)
    with pytest.raises(AdapterError, match="strength must be") as error:
        set_strength(model, value)
    assert "\n" not in str(error.value)
    assert {layer.strength for _, layer in adapter_layers(model)} == {0.5}


def test_a_model_without_adapters():
    with pytest.raises(AdapterError, match=naming("not adapted", "inject")):
        set_strength(build("test_vit"), 0.5)
