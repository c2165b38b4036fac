import pytest
import torch
from small_models import build, images, perturb
from torch import nn

from vitlorafa import AdapterConfig, adapter_layers, cast_frozen, inject
from vitlorafa.convolutions import FastConv2d
from vitlorafa.layers import FastLinear

pytestmark = pytest.mark.numbers


def test_frozen_parameters_are_stored_in_bf16_and_trained_ones_are_untouched():
    trained, conv, bias_frozen = nn.Linear(3, 2), nn.Conv2d(3, 2, 1), nn.Linear(3, 2)
    conv.requires_grad_(False)
    bias_frozen.bias.requires_grad_(False)
    model = nn.ModuleList([trained, conv, bias_frozen])
    assert cast_frozen(model) is model
    assert [type(layer) for layer in model] == [nn.Linear, FastConv2d, FastLinear]
    cast = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert cast == {"1.weight", "1.bias", "2.bias"}


def test_outputs_under_autocast_do_not_change_and_adapted_layers_keep_their_weights():
    model = inject(build("test_vit"), AdapterConfig(rank=2), train_head=True).eval()
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(images)
        cast_frozen(model)
        after = model(images)
    assert {layer.base.weight.dtype for _, layer in adapter_layers(model)} == {torch.float32}
    assert model.patch_embed.proj.weight.dtype == model.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    torch.testing.assert_close(
        after, before, rtol=0.02, atol=0.02
    )  # a product with the bias inside may round otherwise
    assert model.float()(images).isfinite().all()


@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_on_a_model_that_was_cast_before_compute_with_rounded_weights(autocast):
    def adapted(prepare):
        model = prepare(build("test_vit").requires_grad_(False))
        return inject(model, AdapterConfig(rank=2, targets=("q", "fc2"), seed=0))

    def rounded(model):
        for layer in model.modules():
            for parameter in layer.parameters(recurse=False) if isinstance(layer, (nn.Linear, nn.Conv2d)) else ():
                parameter.data = parameter.data.bfloat16().float()
        return model

    results = []
    for prepare in (cast_frozen, rounded):
        model = adapted(prepare)
        torch.manual_seed(0)
        perturb(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(images(model)).float().sin().sum()
        loss.backward()
        results.append([loss.detach(), *(layer.lora_B.grad for _, layer in adapter_layers(model))])
        bases = {layer.base.weight.dtype for _, layer in adapter_layers(model)}
        assert bases == {torch.bfloat16 if prepare is cast_frozen else torch.float32}
    tolerance = 0.05 if autocast else 1e-4
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)
