import copy

import pytest
import timm
import torch
from adapted import same, snapshot
from messages import naming
from small_models import build, images, perturb
from torch import nn

import vitlorafa
from vitlorafa import AdapterConfig, AdapterError, LoRALinear, adapter_layers, inject, remove

CLOSE = {"atol": 2e-4, "rtol": 2e-4}  # float32 through two blocks, another order of sums


@pytest.fixture
def model(architecture):
    return build(architecture)


@pytest.fixture
def adapted(model, all_targets):
    inject(model, all_targets())
    perturb(model)
    return model


def test_starts_as_the_pretrained_model(model, all_targets):
    x = images(model)
    with torch.no_grad():
        before = model(x)
        inject(model, all_targets(train="B"))
        # Equal to rounding only: attentions that added the bias within the product add it after it now.
        torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)


def test_adapts_the_blocks_and_nothing_else(model, all_targets):
    linears = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    before = {id(parameter) for parameter in model.parameters()}
    inject(model, all_targets())
    layers = dict(adapter_layers(model))
    outside = linears - layers.keys()
    assert not any(name.startswith(("patch_embed", "head", "attn_pool", "fc_norm")) for name in layers)
    # What stays: heads, pools, patch merging and the MLP of Swin v2's position bias.
    kinds = ("head", "attn_pool.", "downsample.reduction", "cpb_mlp")
    assert all(any(kind in name for kind in kinds) for name in outside)
    assert before <= {id(parameter) for parameter in model.parameters()}
    assert all(parameter.requires_grad == name.endswith("lora_B") for name, parameter in model.named_parameters())
    assert {target for layer in layers.values() for target in layer.projections} >= {"q", "k", "v"}


@pytest.mark.parametrize("train", ["B", "A", "BA"])
def test_every_layer_gets_a_gradient_on_its_trained_factors_only(model, all_targets, train):
    inject(model, all_targets(train=train))
    perturb(model)
    model(images(model)).square().sum().backward()
    for name, parameter in model.named_parameters():
        trained = name.rpartition(".")[2] in [f"lora_{factor}" for factor in train]
        assert (parameter.grad is not None) == trained, name
        assert not trained or parameter.grad.flatten(1).any(1).all(), name


def test_every_layer_influences_the_output(model, all_targets):
    inject(model, all_targets())
    x = images(model)
    with torch.no_grad():
        start = model(x)
        for name, layer in adapter_layers(model):
            before = copy.deepcopy(layer.state_dict())
            perturb(model, only=name)
            assert (model(x) - start).abs().max() > 1e-4, name
            layer.load_state_dict(before)
        assert torch.equal(model(x), start)


def test_gradient_is_that_of_the_effective_weights(model, all_targets):
    """Backward through every layer against torch's own, on a copy whose weights are the effective ones."""
    inject(model, all_targets(train="BA", rank=3))
    perturb(model)
    model.double()
    x = images(model).double()
    plain = vitlorafa.merge_and_unload(copy.deepcopy(model))
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    for name, layer in adapter_layers(model):
        full = plain.get_submodule(name).weight.grad
        for j, start in enumerate(layer.starts):
            A, B = layer.lora_A[j].detach(), layer.lora_B[j].detach()
            rows = full[start : start + len(B)]
            torch.testing.assert_close(layer.lora_B.grad[j], layer.scale * rows @ A.T)
            torch.testing.assert_close(layer.lora_A.grad[j], layer.scale * B.T @ rows)


@torch.no_grad()
def test_merge_and_unmerge(adapted):
    x = images(adapted)
    before, y = snapshot(adapted), adapted(x)
    assert vitlorafa.merge(adapted) is adapted
    torch.testing.assert_close(adapted(x), y, **CLOSE)
    vitlorafa.unmerge(adapted)
    assert same(before, snapshot(adapted)) and torch.equal(adapted(x), y)


@torch.no_grad()
def test_merge_and_unload_gives_a_plain_timm_model(model, all_targets):
    before, x = snapshot(model), images(model)
    inject(model, all_targets())
    perturb(model)
    y = model(x)
    assert vitlorafa.merge_and_unload(model) is model
    after = snapshot(model)
    assert before[1:] == after[1:] and list(before[0]) == list(after[0])
    torch.testing.assert_close(model(x), y, **CLOSE)
    inject(model, all_targets())


@torch.no_grad()
def test_remove_restores_the_model(model, all_targets):
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    before, x = snapshot(model), images(model)
    y = model(x)
    inject(model, all_targets(), train_head=True)
    perturb(model)
    vitlorafa.merge(model)
    assert remove(model) is model
    assert same(before, snapshot(model)) and torch.equal(model(x), y)
    assert vars(model).keys() == vars(build_like(model)).keys()


def build_like(model):
    return build(model.pretrained_cfg["architecture"])


@torch.no_grad()
def test_disable_adapter(model, all_targets):
    x = images(model)
    original = model(x)
    inject(model, all_targets())
    perturb(model)
    y = model(x)
    with pytest.raises(KeyError), vitlorafa.disable_adapter(model) as same_model:
        assert same_model is model
        torch.testing.assert_close(model(x), original, atol=1e-5, rtol=1e-5)
        raise KeyError
    assert torch.equal(model(x), y)
    vitlorafa.merge(model)
    merged = model(x)
    with vitlorafa.disable_adapter(model):
        torch.testing.assert_close(model(x), original, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(x), merged)


@torch.no_grad()
def test_copies_and_state_dicts(adapted, all_targets):
    x = images(adapted)
    y = adapted(x)
    twin = copy.deepcopy(adapted)
    fresh = inject(build_like(adapted), all_targets(seed=7))
    fresh.load_state_dict(adapted.state_dict())
    perturb(adapted)
    assert torch.equal(twin(x), y) and torch.equal(fresh(x), y)
    remove(twin)


def test_modes(adapted):
    x = images(adapted)
    y = adapted(x)
    with torch.inference_mode():
        assert torch.equal(adapted(x), y)
    # Frozen weights in bf16 and factors in float32: gradients come back in float32.
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        adapted(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = adapted(x)
    torch.testing.assert_close(low.float(), y, atol=0.1 * y.abs().max().item(), rtol=0)
    low.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("train", ["B", "A"])
def test_gradient_checkpointing(model, all_targets, train):
    inject(model, all_targets(train=train, dropout=0.3))
    perturb(model)
    for _, layer in adapter_layers(model):
        layer.train()  # the adapters alone: other randomness of some models differs by timm's own doing
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        model(images(model)).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_train_head(model, all_targets):
    inject(model, all_targets(), train_head=True)
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    expected = {p for head in heads for p in head.parameters()}
    assert len(expected) == 2 * len(heads)
    expected |= {layer.lora_B for _, layer in adapter_layers(model)}
    assert expected == {p for p in model.parameters() if p.requires_grad}


def test_training_moves_only_what_trains(all_targets):
    model = build("vit_small_patch16_224")
    inject(model, all_targets(dropout=0.1), train_head=True).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, labels = images(model, 8), torch.arange(8) % 5
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    for name, parameter in model.named_parameters():
        moves = name.endswith("lora_B") or name.startswith("head.")
        assert torch.equal(parameter, before[name]) != moves


def test_seed():
    def factors(seed):
        model = inject(build("test_vit"), AdapterConfig(rank=2, seed=seed))
        return torch.cat([layer.lora_A.flatten() for _, layer in adapter_layers(model)])

    assert torch.equal(factors(1), factors(1)) and not torch.equal(factors(1), factors(2))
    assert torch.equal(factors(None), factors(None))  # both from the global generator, seeded by `build`
    model, state = build("test_vit"), torch.get_rng_state()
    inject(model, AdapterConfig(rank=2, seed=1))
    assert torch.equal(state, torch.get_rng_state())


def test_another_default_device_does_not_matter():
    """As torch.set_default_device("cuda") sets one for whole scripts; factors are drawn on the CPU all the same."""
    plain, other = build("test_vit"), build("test_vit")
    inject(plain, AdapterConfig(rank=2, seed=1))
    with torch.device("meta"):
        inject(other, AdapterConfig(rank=2, seed=1))
        AdapterConfig(rank=2).generator()
    for (_, one), (_, two) in zip(adapter_layers(plain), adapter_layers(other), strict=True):
        assert torch.equal(one.lora_A, two.lora_A) and torch.equal(one.lora_B, two.lora_B)


def test_modes_of_modules_are_left():
    model = build("test_vit").train()
    model.blocks[1].eval()
    inject(model, AdapterConfig(rank=2))
    assert model.blocks[0].attn.qkv.training and not model.blocks[1].attn.qkv.training
    assert model.training and not model.blocks[1].training


def test_attentions_that_read_the_weight_go_through_the_kernel(all_targets):
    model = build("beit_base_patch16_224")
    inject(model, all_targets(targets="q,v"))
    calls = []
    for _, layer in adapter_layers(model):
        layer.register_forward_hook(lambda *_: calls.append(1))
    model(images(model))
    assert len(calls) == 2
    remove(model)
    assert all(block.attn.qkv_bias_separate is False for block in model.blocks)


def test_inside_a_larger_model(all_targets):
    """As DomainBed nests it: blocks are found by their own containers, not by being numbered somewhere."""
    vit = build("vit_base_patch16_siglip_224")
    network = nn.Sequential(vit, nn.Linear(5, 3))
    inject(network, all_targets())
    names = [name for name, _ in adapter_layers(network)]
    assert names and all(name.startswith("0.blocks.") for name in names)


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("proj", ["attn.proj"]),
        ("fc1", ["mlp.fc1_g", "mlp.fc1_x"]),
        ("v,q", ["attn.q_proj", "attn.v_proj"]),
        ("k,fc2", ["attn.k_proj", "mlp.fc2"]),
    ],
)
def test_targets(targets, names):
    model = inject(build("eva02_base_patch14_224"), AdapterConfig(rank=2, targets=targets))
    assert [name for name, _ in adapter_layers(model)] == [f"blocks.{i}.{name}" for i in (0, 1) for name in names]


def test_parameter_count_of_the_paper():
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    inject(model, AdapterConfig(rank=8))
    trainable, total = vitlorafa.count_parameters(model)
    assert trainable == 12 * 2 * 8 * 768 == 147_456
    assert trainable / total == pytest.approx(0.0017, abs=5e-5)


class Quantised(nn.Linear):
    def forward(self, x):
        return super().forward(x)


def with_layer(attribute, layer):
    model = build("test_vit")
    owner, _, name = attribute.rpartition(".")
    setattr(model.get_submodule(owner), name, layer)
    return model


@pytest.mark.parametrize(
    ("model", "config", "named"),
    [
        (lambda: timm.create_model("test_resnet"), {}, ["ResNet", "transformer blocks"]),
        (
            lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
            {},
            ["Sequential", "no transformer blocks", "linear layers are N", "targets=r'"],
        ),
        (lambda: build("test_vit"), {"rank": 65}, ["blocks.0.attn.qkv", "rank 65", "64"]),
        (
            lambda: with_layer("blocks.1.attn.proj", nn.Conv1d(64, 64, 1)),
            {"targets": "proj"},
            ["blocks.1.attn.proj", "Conv1d", "leave proj out"],
        ),
        (
            lambda: with_layer("blocks.1.mlp.fc1", Quantised(64, 192)),
            {"targets": "fc1"},
            ["blocks.1.mlp.fc1", "Quantised", "leave fc1 out"],
        ),
        (
            lambda: with_layer("blocks.0.mlp.fc1", nn.utils.parametrizations.weight_norm(nn.Linear(64, 192))),
            {"targets": "all"},
            ["blocks.0.mlp.fc1", "ParametrizedLinear"],
        ),
        (
            lambda: with_layer("blocks.1.attn.qkv", nn.Linear(64, 128)),
            {},
            ["blocks.1.attn.qkv", "leave q, k and v out"],
        ),
        (lambda: timm.create_model("tiny_vit_5m_224"), {}, ["stages.1.blocks.0.attn.qkv", "q, k and v"]),
        (
            lambda: without_keys(build("eva02_base_patch14_224")),
            {"targets": "q,k,proj"},
            ["Eva", "no k", "q, v, proj, fc1, fc2"],
        ),
    ],
)
def test_refuses_and_leaves_the_model(model, config, named):
    model = model()
    before = snapshot(model)
    with pytest.raises(AdapterError, match=naming(*named)):
        inject(model, AdapterConfig(**config))
    assert same(before, snapshot(model))


def without_keys(model):
    for block in model.blocks:
        block.attn.k_proj = None
    return model


def test_refuses_twice_and_unadapted():
    model = inject(build("test_vit"), AdapterConfig(rank=2))
    with pytest.raises(AdapterError, match=naming("remove(model)", "merge_and_unload(model)")):
        inject(model, AdapterConfig(rank=2))
    with pytest.raises(AdapterError, match=naming("remove(model)", "merge_and_unload(model)")):
        inject(nn.Sequential(model), AdapterConfig(rank=2))
    remove(model)
    for function in (remove, vitlorafa.merge, vitlorafa.unmerge, vitlorafa.merge_and_unload):
        with pytest.raises(AdapterError, match=naming("inject(model, config)")):
            function(model)
    with pytest.raises(AdapterError, match=naming("inject(model, config)")), vitlorafa.disable_adapter(model):
        pass


def test_train_head_without_a_head():
    model = build("test_vit", num_classes=0)
    with pytest.raises(AdapterError, match=naming("head", "num_classes above 0")):
        inject(model, AdapterConfig(rank=2), train_head=True)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
