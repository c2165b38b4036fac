"""Frozen weights in 8 or 4 bits: against the plain definition, under adapters, and as part of a model."""

import copy
import pickle
import sys
import warnings

import pytest
import torch
from adapted import COMPUTE_AND_DROPOUT, autocast, loss_of, step
from small_models import build, images, perturb
from torch import nn

import vitlorafa
from vitlorafa import AdapterConfig, AdapterError, QuantisedLinear, adapter_layers, dequantise, inject, quantise
from vitlorafa.layers import QKV, FastLinear, LoRALinear
from vitlorafa.ops import quantised, reference
from vitlorafa.ops.dropout import rounded

FORMATS = pytest.mark.parametrize("format", ["int8", "nf4"])


@pytest.fixture(autouse=True)
def package(request):
    """bitsandbytes, which all tests need but those of refusals."""
    if "refused" not in request.node.name:
        pytest.importorskip("bitsandbytes")


def frozen(d_in=48, d_out=96, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(d_in, d_out, dtype=dtype).requires_grad_(False)


def normal_floats():
    """The 16 values of NormalFloat4: quantiles of a normal distribution (QLoRA, section 3 and its appendix)."""
    quantile, most = torch.distributions.Normal(0.0, 1.0).icdf, 0.9677083
    positive = quantile(torch.linspace(most, 0.5, 9)[:-1].double())
    negative = -quantile(torch.linspace(most, 0.5, 8)[:-1].double())
    values = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive]).sort().values
    return values / values.max()


def definition(layer):
    """The weight that a quantised layer stores, in float64, by indexing alone."""
    shape, tensors = layer.quantised_weight.shape, [t.double() for t in layer.quantised_weight.tensors]
    if layer.format == "int8":
        codes, largest = tensors
        return codes * largest[:, None] / 127
    codes, scales, groups, mean, values = tensors
    scales = values[scales.long()] * groups.repeat_interleave(256)[: len(scales)] + mean
    pairs = torch.stack([codes.long() // 16, codes.long() % 16], 1).reshape(-1)
    n = shape[0] * shape[1]
    return (normal_floats()[pairs][:n] * scales.repeat_interleave(64)[:n]).view(shape)


@FORMATS
@pytest.mark.parametrize("shape", [(96, 64), (64, 48), (64, 16), (33, 77), (5, 3), (1, 1), (130, 192)])
def test_the_stored_weight_is_the_plain_definition(format, shape):
    source = frozen(shape[1], shape[0])
    source.weight.data[0] *= 30  # rows and blocks of other sizes
    layer = QuantisedLinear(source, format)
    weight = definition(layer)
    torch.testing.assert_close(layer.weight.double(), weight, rtol=1e-6, atol=1e-7)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        value = layer.quantised_weight.dequantise(dtype)
        assert value.dtype == dtype and torch.equal(value, layer.weight.to(dtype))
    if format == "int8":
        step = source.weight.abs().amax(1, keepdim=True) / 127
        assert ((weight - source.weight).abs() <= step / 2 * 1.001).all()
    else:
        flat = nn.functional.pad(source.weight.reshape(-1), (0, -source.weight.numel() % 64)).view(-1, 64)
        largest = flat.abs().amax(1, keepdim=True).expand_as(flat).reshape(-1)[: source.weight.numel()].view(shape)
        wrong = (weight - source.weight).abs() / largest
        # Half the widest gap between two values; scales are rounded too, to one of 256 values of all scales.
        assert wrong.max() < 0.152 + 0.1 and wrong.mean() < 0.09


@FORMATS
def test_zeros_stay_zeros_and_the_bias_is_shared(format):
    source = frozen()
    source.weight.data.zero_()
    layer = QuantisedLinear(source, format)
    assert not layer.weight.any() and layer.bias is source.bias
    assert torch.equal(layer(torch.randn(2, 48)), source.bias.expand(2, -1))


def test_nf4_codes_are_the_nearest_values():
    source = frozen(128, 64)
    layer = QuantisedLinear(source, "nf4")
    blocks = source.weight.double().view(-1, 64)
    codes, *_ = layer.quantised_weight.tensors
    values = normal_floats()[torch.stack([codes.long() // 16, codes.long() % 16], 1).view(-1)].view_as(blocks)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / largest)[..., None].sub(normal_floats()).abs().amin(-1)
    torch.testing.assert_close((blocks / largest - values).abs(), nearest, rtol=0, atol=1e-6)


def quantised_layer(format, compute, dropout, train="BA", d_in=24, projections=QKV, bias=True):
    torch.manual_seed(0)
    stack = QKV if len(projections[0]) == 1 else ()
    source = nn.Linear(d_in, 72, bias=bias).requires_grad_(False)
    config = AdapterConfig(rank=4, seed=0, compute=compute, dropout=dropout, train=train)
    layer = LoRALinear(QuantisedLinear(source, format), config, projections, stack)
    nn.init.normal_(layer.lora_B)
    return layer.train()


@FORMATS
@COMPUTE_AND_DROPOUT
@pytest.mark.parametrize("train", ["B", "A", "BA"])
@pytest.mark.parametrize(("d_in", "projections"), [(24, ("q", "v")), (77, QKV), (24, ("proj",))])
def test_an_adapted_layer_is_the_definition_with_the_dequantised_weight(
    format, compute, dropout, train, d_in, projections
):
    layer = quantised_layer(format, compute, dropout, train, d_in, projections, bias=d_in == 24)
    x = torch.randn(2, 5, d_in, requires_grad=True)
    torch.manual_seed(3)
    y = layer(x)
    loss_of(y).backward()

    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, ()) if dropout else None
    A, B, z = (t.detach().double().requires_grad_() for t in (layer.lora_A, layer.lora_B, x))
    bias = None if layer.bias is None else layer.bias.double()
    weight = definition(layer.base)
    expected = reference.lora_linear(
        z, weight, bias, A, B, layer.scale, starts=layer.starts, dropout=rounded(dropout), seed=seed
    )
    loss_of(expected).backward()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), z.grad, rtol=1e-4, atol=1e-5)
    for factor, definition_of in ((layer.lora_A, A), (layer.lora_B, B)):
        assert (factor.grad is not None) == factor.requires_grad
        if factor.requires_grad:
            torch.testing.assert_close(factor.grad.double(), definition_of.grad, rtol=1e-4, atol=1e-4)


@FORMATS
@COMPUTE_AND_DROPOUT
def test_gradients_are_those_of_finite_differences(format, compute, dropout):
    layer = quantised_layer(format, compute, dropout).double()
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)

    def forward(x, A, B):
        torch.manual_seed(3)
        return vitlorafa.lora_linear(
            x,
            layer.base.quantised_weight,
            layer.bias,
            A,
            B,
            layer.scale,
            starts=layer.starts,
            dropout=dropout,
            fold=compute == "folded",
        )

    assert torch.autograd.gradcheck(forward, (x, layer.lora_A, layer.lora_B), fast_mode=True)


@FORMATS
@pytest.mark.parametrize("low", [False, True], ids=["float32", "autocast"])
def test_a_frozen_layer_without_adapter(format, low):
    layer = QuantisedLinear(frozen(48, 72), format)
    layer.bias.requires_grad_()
    x = torch.randn(2, 5, 48, requires_grad=True)
    with autocast(low):
        y = layer(x)
        z = x.detach().clone().requires_grad_()
        bias = layer.bias.detach().clone().requires_grad_()
        expected = nn.functional.linear(z, layer.weight, bias)
    loss_of(y).backward()
    loss_of(expected).backward()
    tolerance = {"rtol": 0.02, "atol": 0.02} if low else {"rtol": 1e-5, "atol": 1e-6}
    assert y.dtype == expected.dtype
    for ours, theirs in ((y, expected), (x.grad, z.grad), (layer.bias.grad, bias.grad)):
        torch.testing.assert_close(ours, theirs, **tolerance)
    if not low:
        double = QuantisedLinear(frozen(6, 4), format).double()
        assert torch.autograd.gradgradcheck(double, torch.randn(2, 6, dtype=torch.float64, requires_grad=True))


def kept(layer, x, low):
    """Bytes that are kept for backward, besides parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    storages = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in parameters:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast(low):
        layer(x)
    return sum(storages.values())


@FORMATS
@COMPUTE_AND_DROPOUT
@pytest.mark.parametrize("low", [False, True], ids=["float32", "autocast"])
def test_no_dequantised_weight_is_kept(format, compute, dropout, low):
    x = torch.randn(10, 24, requires_grad=True)
    layer = quantised_layer(format, compute, dropout, train="B")
    seed = 8 if dropout else 0
    assert kept(layer, x, low) == 10 * 3 * 4 * (2 if low else 4) + seed  # x A, and the seed of the mask
    assert kept(layer.base, x, low) == 0


def adapted(format, when="after", architecture="vit_small_patch16_224", **kwargs):
    """A quantised model in training mode whose factors have moved."""
    model = build(architecture).requires_grad_(False)
    if when == "before":
        quantise(model, format)
    inject(model, AdapterConfig(**{"rank": 4, "targets": ("q", "v", "fc2"), "seed": 0, **kwargs}), train_head=True)
    if when == "after":
        quantise(model, format)
    torch.manual_seed(0)
    perturb(model)
    return model.train()


@FORMATS
def test_before_and_after_inject_are_the_same_and_only_frozen_layers_of_blocks_change(format):
    models = [adapted(format, when) for when in ("before", "after")]
    x = images(models[0])
    first, second = (step(model, x) for model in models)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    of = {name for name, module in models[0].named_modules() if isinstance(module, QuantisedLinear)}
    blocks = ("attn.qkv.base", "attn.proj", "mlp.fc1", "mlp.fc2.base")
    assert of == {f"blocks.{index}.{name}" for index in range(2) for name in blocks}
    trained = build("vit_small_patch16_224").requires_grad_(False)
    trained.blocks[1].requires_grad_(True)
    quantise(trained, format)
    assert type(trained.blocks[1].mlp.fc1) is nn.Linear and type(trained.blocks[0].mlp.fc1) is QuantisedLinear
    assert vitlorafa.count_parameters(trained)[1] == vitlorafa.count_parameters(build("vit_small_patch16_224"))[1]


@pytest.mark.parametrize(
    "architecture", ["beit_base_patch16_224", "eva02_base_patch14_224", "swin_tiny_patch4_window7_224"]
)
def test_other_families(architecture):
    plain = build(architecture)
    x = images(plain)
    model = inject(quantise(build(architecture).requires_grad_(False), "int8"), AdapterConfig(rank=2))
    expected = plain(x)
    assert (model(x) - expected).norm() < 0.1 * expected.norm()
    loss_of(model.train()(x)).backward()
    assert all(layer.lora_B.grad.abs().sum() > 0 for _, layer in adapter_layers(model))


@FORMATS
def test_with_speed_up_and_cast_frozen(format):
    model = adapted(format)
    x = images(model)
    expected = step(model, x)
    vitlorafa.speed_up(model)
    for name, value in step(model, x).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)
    low = step(model, x, low=True)
    vitlorafa.cast_frozen(model)
    for name, value in step(model, x, low=True).items():
        torch.testing.assert_close(value, low[name], rtol=0.02, atol=0.02)
    cast = vitlorafa.cast_frozen(build("vit_small_patch16_224").requires_grad_(False))
    assert type(cast.blocks[0].mlp.fc1) is FastLinear
    assert type(quantise(cast, format).blocks[0].mlp.fc1) is QuantisedLinear


@FORMATS
def test_copies_state_dicts_and_conversions(format, tmp_path):
    model = adapted(format)
    x = images(model)
    expected = step(model, x)
    other = adapted(format, seed=5)
    assert not torch.equal(step(other, x)["y"], expected["y"])
    other.load_state_dict(model.state_dict())
    torch.save(model, tmp_path / "model.pt")
    others = {
        "state dict": other,
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(tmp_path / "model.pt", weights_only=False),
    }
    for name, each in others.items():
        ours = step(each, x)
        assert all(torch.equal(ours[key], expected[key]) for key in expected), name
    base = model.blocks[0].attn.qkv.base
    weight = base.weight
    storages = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(storages)) == len(storages)  # as safetensors wants
    model.half()
    assert torch.equal(base.weight, weight)  # no scale was rounded
    assert base.bias.dtype == torch.float16 and model.to("meta").blocks[0].attn.qkv.base.codes.is_meta


@FORMATS
@COMPUTE_AND_DROPOUT
def test_merge_unmerge_disable_and_remove(format, compute, dropout):
    model = adapted(format, compute=compute, dropout=dropout).eval()
    x = images(model)
    y, state = model(x), {name: t.clone() for name, t in model.state_dict().items()}
    vitlorafa.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    with vitlorafa.disable_adapter(model):
        plain = model(x)
    torch.testing.assert_close(copy.deepcopy(model)(x), y, rtol=1e-4, atol=1e-5)
    vitlorafa.unmerge(model)
    assert torch.equal(model(x), y)
    expected = quantise(build("vit_small_patch16_224").requires_grad_(False), format)
    assert torch.equal(expected(x), plain)
    bases = [layer.base for _, layer in adapter_layers(model)]
    vitlorafa.remove(model)
    assert bases[0] is model.blocks[0].attn.qkv and torch.equal(model(x), plain)
    assert not any(p.requires_grad for p in model.parameters())


@FORMATS
@pytest.mark.parametrize("when", ["before", "after"])
def test_merge_and_unload_gives_a_plain_float_model(format, when):
    model = adapted(format, when).eval()
    x = images(model)
    y = model(x)
    vitlorafa.merge_and_unload(model)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    plain = build("vit_small_patch16_224")
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(x), model(x))
    assert not any(isinstance(module, QuantisedLinear) for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())


@FORMATS
def test_dequantise_and_quantise_again(format):
    model = adapted(format)
    x = images(model)
    expected = step(model, x)
    dequantise(model)
    assert type(model.blocks[0].attn.qkv.base) is nn.Linear and type(model.blocks[0].attn.proj) is nn.Linear
    for name, value in step(model, x).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)
    quantise(model, format)
    assert type(model.blocks[0].attn.qkv.base) is QuantisedLinear


@FORMATS
@pytest.mark.parametrize("file", ["vitlorafa", "peft"])
def test_an_adapter_is_saved_without_the_base_and_loads_onto_any(format, file, tmp_path):
    model = adapted(format).eval()
    x = images(model)
    vitlorafa.save_adapter(model, tmp_path, head=True, format=file)
    assert not [name for name in (tmp_path / "adapter.safetensors").parent.iterdir() if name.stat().st_size > 60_000]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = vitlorafa.load_adapter(quantise(build("vit_small_patch16_224").requires_grad_(False), format), tmp_path)
        on_float = vitlorafa.load_adapter(build("vit_small_patch16_224"), tmp_path)
    assert torch.equal(same.eval()(x), model(x))
    torch.testing.assert_close(dequantise(model)(x), model(x))
    assert 0 < (on_float(x) - model(x)).norm() < 0.5 * model(x).norm()
    other = build("vit_small_patch16_224").requires_grad_(False)
    other.blocks[0].mlp.fc1.weight.data.mul_(1.1)
    if file == "vitlorafa":
        with pytest.warns(vitlorafa.AdapterWarning, match="trained on other weights"):
            vitlorafa.load_adapter(quantise(other, format), tmp_path)


@FORMATS
def test_compiled_and_functional(format):
    layers = nn.Sequential(quantised_layer(format, "folded", 0.0), QuantisedLinear(frozen(72, 24), format))
    x = torch.randn(5, 24)
    expected = step(layers, x)
    for name, value in step(layers, x, forward=torch.compile(layers, fullgraph=True, backend="aot_eager")).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    model = adapted(format)
    x = images(model)
    expected = step(model, x)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters):
        return loss_of(torch.func.functional_call(model, parameters, (x,)))

    for name, value in torch.func.grad(loss)(parameters).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


def of_bitsandbytes(kind, source):
    import bitsandbytes

    if kind == "int8":
        layer = bitsandbytes.nn.Linear8bitLt(source.in_features, source.out_features, has_fp16_weights=False)
    else:
        options = {"quant_type": kind[:3], "compress_statistics": "nested" in kind}
        layer = bitsandbytes.nn.Linear4bit(source.in_features, source.out_features, **options)
    layer.load_state_dict(source.state_dict())
    return layer.requires_grad_(False).to("cpu")  # moving quantises


@pytest.mark.parametrize("kind", ["int8", "nf4", "nf4 nested", "fp4 nested"])
def test_layers_that_bitsandbytes_quantised(kind):
    model = build("vit_small_patch16_224").requires_grad_(False)
    before = model(images(model))
    layers = {}
    for block in model.blocks:
        for owner, name in ((block.attn, "qkv"), (block.mlp, "fc1")):
            source = getattr(owner, name)
            layers[source.out_features] = layer = of_bitsandbytes(kind, source)
            setattr(owner, name, layer)
    inject(model, AdapterConfig(rank=4, targets=("q", "v", "fc1"), train="BA"))
    x = images(model)
    assert (model(x) - before).norm() < (0.05 if kind == "int8" else 0.6) * before.norm()
    loss_of(model.train()(x)).backward()
    for _, layer in adapter_layers(model):
        assert layer.lora_B.grad.abs().sum() > 0
        assert layer.pretrained_weight.shape == (layer.out_features, layer.in_features)
    if "nested" in kind and kind.startswith("nf4"):
        ours = QuantisedLinear(build("vit_small_patch16_224").blocks[0].attn.qkv, "nf4")
        assert torch.equal(model.blocks[0].attn.qkv.pretrained_weight, ours.weight)
    merged = vitlorafa.merge_and_unload(copy.deepcopy(model).eval())
    torch.testing.assert_close(merged(x), model.eval()(x), rtol=1e-4, atol=1e-4)
    vitlorafa.remove(model)
    assert model.blocks[-1].mlp.fc1 is layers[192]


def test_layers_that_torchao_quantised():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = build("vit_small_patch16_224").requires_grad_(False)
    before = model(images(model))
    quantize_(model.blocks, Int8WeightOnlyConfig())
    inject(model, AdapterConfig(rank=4, targets="all"))
    x = images(model)
    assert (model(x) - before).norm() < 0.05 * before.norm()
    loss_of(model.train()(x)).backward()
    assert all(layer.lora_B.grad.abs().sum() > 0 for _, layer in adapter_layers(model))


@FORMATS
def test_a_missing_package_is_refused(format, monkeypatch):
    quantised.bitsandbytes.cache_clear()
    for name in ("bitsandbytes", "bitsandbytes.functional"):
        monkeypatch.setitem(sys.modules, name, None)
    model = build("test_vit").requires_grad_(False)
    with pytest.raises(AdapterError, match=r"need bitsandbytes .*: pip install 'vitlorafa\[quant\]'"):
        quantise(model, format)
    assert type(model.blocks[0].mlp.fc1) is nn.Linear
    quantised.bitsandbytes.cache_clear()


@pytest.mark.parametrize("format", ["fp8", "NF4", None])
def test_an_unknown_format_is_refused(format):
    with pytest.raises(
        AdapterError, match="unknown format of quantised weights .*: (choose from int8, nf4|did you mean)"
    ):
        quantise(build("test_vit").requires_grad_(False), format)


def test_a_model_that_is_quantised_already_says_so():
    model = quantise(inject(build("test_vit"), AdapterConfig(rank=2)))
    with pytest.raises(AdapterError, match="quantised already: call dequantise"):
        quantise(model)


def test_models_that_are_refused_say_why():
    with pytest.raises(AdapterError, match="call inject or model.requires_grad_.False. before quantise"):
        quantise(build("test_vit"))
    with pytest.raises(AdapterError, match="merged: call unmerge"):
        quantise(vitlorafa.merge(inject(build("test_vit"), AdapterConfig(rank=2))))
    with pytest.raises(AdapterError, match="meta device, without values"):
        quantise(build("test_vit").requires_grad_(False).to("meta"))
    with pytest.raises(AdapterError, match="Sequential has no transformer blocks"):
        quantise(nn.Sequential(nn.Linear(4, 4)).requires_grad_(False))


@FORMATS
@pytest.mark.parametrize("compute", ["folded", "separate"])
def test_a_start_at_a_part_of_the_weight(format, compute):
    """The residual is formed whenever the weight is dequantised, and neither kept nor cached."""
    quantised_base = quantise(build("vit_small_patch16_224").requires_grad_(False), format)
    x = images(quantised_base)
    config = AdapterConfig(rank=4, targets="all", init_A="pissa", init_B="pissa", train="BA", compute=compute, seed=0)
    model = inject(copy.deepcopy(quantised_base), config)
    torch.testing.assert_close(model(x), quantised_base(x), rtol=1e-4, atol=1e-4)
    perturb(model)
    ours = step(model, x)
    layer = model.blocks[0].attn.qkv
    assert layer._cast is None and layer.weight.shape == layer.pretrained_weight.shape
    for name, value in step(dequantise(copy.deepcopy(model)), x).items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4)
    y = model.eval()(x)
    torch.testing.assert_close(vitlorafa.merge(model)(x), y, rtol=1e-4, atol=1e-4)
    assert torch.equal(vitlorafa.remove(model)(x), quantised_base(x))
