"""Whatever training changed comes back: buffers, heads that are more than a layer, norms that were unfrozen."""

import copy
import hashlib
import json

import pytest
import timm
import torch
from messages import naming
from safetensors.torch import load_file, save, save_file
from small_models import build, images, perturb
from torch import nn

import vitlorafa
from vitlorafa import AdapterConfig, AdapterError, AdapterWarning, inject, load_adapter, save_adapter


def probed():
    """A ViT with the head of MAE's linear probe."""
    model = build("test_vit")
    model.head = nn.Sequential(nn.BatchNorm1d(64, affine=False), nn.Linear(64, 5))
    return model.eval()


def hybrid():
    """Transformer blocks behind a convolution with BatchNorm."""
    return with_batch_norm(build("test_vit"))


def with_batch_norm(model):
    norm = nn.BatchNorm2d(64)
    with torch.no_grad():
        norm.running_mean.normal_(generator=torch.Generator().manual_seed(2))
    model.patch_embed.proj = nn.Sequential(model.patch_embed.proj, norm)
    return model.eval()


def train(model, steps=3):
    model.train()
    x = images(model, 8)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(steps):
        model(x).square().mean().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("format", ["vitlorafa", "peft"])
def test_a_head_with_batch_norm(format, tmp_path):
    model = train(inject(probed(), AdapterConfig(rank=2), train_head=True))
    x = images(model)
    save_adapter(model, tmp_path, head=True, format=format)
    other = load_adapter(probed(), tmp_path)
    assert torch.equal(other(x), model(x)) and not torch.equal(other(x), probed()(x))
    assert torch.equal(other.head[0].num_batches_tracked, torch.tensor(3))
    save_adapter(model, tmp_path, format=format)
    without = load_adapter(probed(), tmp_path)
    assert torch.equal(without.head[0].running_mean, torch.zeros(64))
    assert torch.equal(without.forward_features(x), model.forward_features(x))


def test_peft_loads_the_statistics_of_a_head(tmp_path):
    peft = pytest.importorskip("peft")
    model = train(inject(probed(), AdapterConfig(rank=2), train_head=True))
    save_adapter(model, tmp_path, head=True, format="peft")
    other = peft.PeftModel.from_pretrained(probed(), tmp_path).eval()
    torch.testing.assert_close(other(images(model)), model(images(model)), atol=1e-5, rtol=1e-5)


def test_folders_without_the_statistics_of_a_head(tmp_path):
    """As earlier versions wrote them."""
    model = train(inject(probed(), AdapterConfig(rank=2), train_head=True))
    save_adapter(model, tmp_path, head=True, format="vitlorafa")
    tensors = load_file(tmp_path / "adapter.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.0")}
    data = save(tensors)
    (tmp_path / "adapter.safetensors").write_bytes(data)
    kept = json.loads((tmp_path / "adapter.json").read_text())
    kept = {key: kept[key] for key in ("format", "architecture", "config", "layers", "metadata")}
    kept |= {"head": ["head.1.weight", "head.1.bias"], "sha256": hashlib.sha256(data).hexdigest()}
    (tmp_path / "adapter.json").write_text(json.dumps(kept))
    with pytest.warns(AdapterWarning, match=naming("head.0.running_mean, head.0.running_var, head.0.num")):
        other = load_adapter(probed(), tmp_path)
    assert torch.equal(other.head[1].weight, model.head[1].weight)


@pytest.mark.parametrize("format", ["vitlorafa", "peft"])
@pytest.mark.parametrize("head", [False, True])
def test_norms_that_were_unfrozen(format, head, tmp_path):
    model = inject(build("test_vit"), AdapterConfig(rank=2), train_head=True)
    for name, parameter in model.named_parameters():
        if "norm" in name and "weight" in name:
            parameter.requires_grad_(True)
    train(model)
    save_adapter(vitlorafa.merge(copy.deepcopy(model)), tmp_path, head=head, format=format)
    other = load_adapter(build("test_vit"), tmp_path)
    x = images(model)
    assert torch.equal(other.forward_features(x), model.forward_features(x))
    assert head == torch.equal(other(x), model(x))
    assert not torch.equal(other.blocks[0].norm1.weight, build("test_vit").blocks[0].norm1.weight)
    assert other.blocks[0].norm1.weight.requires_grad and not other.blocks[0].mlp.fc1.weight.requires_grad
    missing = build("test_vit", global_pool="avg", fc_norm=False)
    missing.norm = nn.Identity()
    with pytest.raises(AdapterError, match=naming("norm.weight", "unknown")):
        load_adapter(missing, tmp_path, head=False)


def test_biases_and_embeddings_that_were_unfrozen(tmp_path):
    model = inject(build("test_vit"), AdapterConfig(rank=2))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or name in ("cls_token", "blocks.0.attn.qkv.base.weight"):
            parameter.requires_grad_(True)
    train(model)
    x = images(model)
    save_adapter(vitlorafa.merge(copy.deepcopy(model)), tmp_path)
    for target in (build("test_vit"), vitlorafa.merge(inject(build("test_vit"), AdapterConfig(rank=2)))):
        other = vitlorafa.unmerge(load_adapter(target, tmp_path))
        assert torch.equal(other.forward_features(x), model.forward_features(x))
    with pytest.raises(AdapterError, match=naming("PEFT", "cls_token", "format='vitlorafa'")):
        save_adapter(model, tmp_path / "none", format="peft")


@pytest.mark.parametrize("format", ["vitlorafa", "peft"])
def test_statistics_of_a_frozen_batch_norm(format, tmp_path):
    model = inject(hybrid(), AdapterConfig(rank=2))
    x = images(model)
    save_adapter(model, tmp_path, format=format)
    assert not any("running" in name for name in load_file(next(tmp_path.glob("*.safetensors"))))
    train(model)
    save_adapter(model, tmp_path, format=format)
    other = load_adapter(hybrid(), tmp_path)
    assert torch.equal(other(x), model(x))
    plain = hybrid()
    for each in (model, other):
        vitlorafa.remove(each)
        assert all(torch.equal(value, each.state_dict()[name]) for name, value in plain.state_dict().items())


def test_remove_keeps_the_statistics_of_what_trained():
    model = inject(with_batch_norm(probed()), AdapterConfig(rank=2), train_head=True)
    model.patch_embed.proj[1].requires_grad_(True)
    train(model)
    x = images(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.zero_()
    y = model(x)
    torch.testing.assert_close(vitlorafa.remove(model)(x), y, atol=1e-4, rtol=1e-4)


def test_remove_after_other_pretrained_weights_were_loaded():
    weights = hybrid()
    weights.patch_embed.proj[1].running_mean.fill_(3.0)
    model = inject(hybrid(), AdapterConfig(rank=2))
    model.load_state_dict(inject(weights, AdapterConfig(rank=2)).state_dict())
    assert vitlorafa.remove(model).patch_embed.proj[1].running_mean.eq(3).all()


def test_buffers_that_a_state_dict_leaves_out_stay_out(tmp_path):
    model = build("test_vit")
    model.register_buffer("scratch", torch.zeros(3), persistent=False)
    inject(model, AdapterConfig(rank=2))
    model.scratch.fill_(1.0)
    save_adapter(model, tmp_path, format="vitlorafa")
    assert "scratch" not in load_file(tmp_path / "adapter.safetensors")
    load_adapter(build("test_vit"), tmp_path)


def test_tied_and_shared_parts(tmp_path):
    def make():
        model = build("test_vit")
        model.blocks[1].norm1 = model.blocks[0].norm1
        model.blocks[1].norm2.weight = model.blocks[0].norm2.weight
        return model

    model = inject(make(), AdapterConfig(rank=2))
    for block in model.blocks[:2]:
        block.norm1.requires_grad_(True), block.norm2.requires_grad_(True)
    flat = torch.zeros(128)  # memory that two parameters share
    model.blocks[2].norm1.weight.data, model.blocks[2].norm2.weight.data = flat[:64], flat[64:]
    model.blocks[2].norm1.requires_grad_(True), model.blocks[2].norm2.requires_grad_(True)
    train(model)
    save_adapter(model, tmp_path)
    other = load_adapter(make(), tmp_path)
    assert torch.equal(other(images(model)), model(images(model)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_precision(dtype, tmp_path):
    model = inject(build("test_vit").to(dtype), AdapterConfig(rank=2), train_head=True)
    perturb(model)
    save_adapter(model, tmp_path, head=True)
    other = load_adapter(build("test_vit").to(dtype), tmp_path)  # the same weights: no warning
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    load_adapter(build("test_vit"), tmp_path)


def test_the_meta_device(tmp_path):
    model = inject(build("test_vit"), AdapterConfig(rank=2))
    save_adapter(model, tmp_path)
    with torch.device("meta"):
        empty = timm.create_model("test_vit", img_size=32, num_classes=5)
    with pytest.raises(AdapterError, match=naming("meta device")):
        load_adapter(empty, tmp_path)
    with pytest.raises(AdapterError, match=naming("meta device")):
        save_adapter(inject(empty, AdapterConfig(rank=2)), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    save_adapter(empty, tmp_path)
    load_adapter(build("test_vit"), tmp_path)  # the same weights: no warning


def test_tensors_that_nobody_asked_for(tmp_path):
    model = inject(build("test_vit"), AdapterConfig(rank=2))
    save_adapter(model, tmp_path, format="vitlorafa")
    path = tmp_path / "adapter.safetensors"
    save_file({**load_file(path), "more": torch.ones(1)}, path)
    description = json.loads((tmp_path / "adapter.json").read_text())
    description["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "adapter.json").write_text(json.dumps(description))
    with pytest.raises(AdapterError, match=naming("1 place", "more is unknown")):
        load_adapter(build("test_vit"), tmp_path)
