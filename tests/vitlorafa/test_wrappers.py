"""Adapters in a model that something wraps or holds: the same files, in and out."""

import copy
import hashlib
import json
import warnings

import pytest
import timm
import torch
import torch.distributed as dist
from messages import naming
from safetensors import safe_open
from safetensors.torch import load, save
from small_models import build, images, perturb
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel, DistributedDataParallel

import vitlorafa
from vitlorafa import AdapterConfig, AdapterError, AdapterWarning, adapter_layers, inject, load_adapter, save_adapter
from vitlorafa.adapted import head_parameters


class Lightning(nn.Module):
    """Holds a timm model, as a Lightning module and transformers' TimmWrapper do."""

    def __init__(self, model):
        super().__init__()
        self.timm_model = model
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x):
        return self.timm_model(x)


def compiled(model):
    return torch.compile(model, backend="eager")


def parts(model):
    """Wrappers inside of the names."""
    model.blocks[0] = compiled(model.blocks[0])
    model.blocks[1].attn = DataParallel(model.blocks[1].attn)
    model.blocks[2].mlp = checkpoint_wrapper(model.blocks[2].mlp)
    return model


WRAPPERS = {
    "compile": compiled,
    "DDP": DistributedDataParallel,
    "DataParallel": DataParallel,
    "compiled DDP": lambda model: compiled(DistributedDataParallel(model)),
    "average": torch.optim.swa_utils.AveragedModel,
    "parts": parts,
    "held": Lightning,
    "held and compiled": lambda model: compiled(Lightning(compiled(model))),
    "Sequential": lambda model: nn.Sequential(nn.Identity(), model),
}


@pytest.fixture(params=WRAPPERS)
def wrap(request, tmp_path):
    if "DDP" in request.param:
        if not dist.is_available():
            pytest.skip("torch is built without torch.distributed")
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield WRAPPERS[request.param]
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def trained(**kwargs):
    model = inject(build("test_vit", depth=3), AdapterConfig(rank=2, **kwargs), train_head=True)
    perturb(model)
    nn.init.normal_(model.head.weight)
    return model


def content(folder):
    """Of an adapter's files; safetensors writes the parts of a header in any order."""
    (path,) = folder.glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118
        others = {other.name: json.loads(other.read_text()) for other in folder.glob("*.json")}
        others["adapter.json"].pop("sha256")
        return tensors, file.metadata(), others


def fresh():
    return build("test_vit", depth=3)


@torch.no_grad()
@pytest.mark.parametrize("format", ["vitlorafa", "peft"])
def test_the_same_files_in_and_out(wrap, format, tmp_path):
    model = trained()
    x = images(model)
    y = model(x)
    wrapped = wrap(copy.deepcopy(model))
    save_adapter(wrapped, tmp_path / "wrapped", head=True, format=format)
    save_adapter(model, tmp_path / "plain", head=True, format=format)
    assert content(tmp_path / "wrapped") == content(tmp_path / "plain")

    assert torch.equal(load_adapter(fresh(), tmp_path / "wrapped")(x), y)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="DistributedDataParallel reduces")
        other = wrap(fresh())
        assert load_adapter(other, tmp_path / "plain") is other
    assert torch.equal(other.eval()(x), y)
    adapted = wrap(inject(fresh(), AdapterConfig(rank=2)))
    assert torch.equal(load_adapter(adapted, tmp_path / "plain").eval()(x), y)


@torch.no_grad()
def test_everything_else_works_on_wrapped_models(wrap, capsys):
    plain = fresh()
    model, expected = wrap(fresh()).eval(), trained(seed=3)
    x = images(plain)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="DistributedDataParallel reduces")
        inject(model, AdapterConfig(rank=2, seed=3), train_head=True)
    assert torch.equal(model(x), plain(x))
    assert [p.shape for p in model.parameters() if p.requires_grad] == [
        p.shape for p in expected.parameters() if p.requires_grad
    ]
    assert head_parameters(model).keys() == {"head.weight", "head.bias"}
    lines = [vitlorafa.summary(each).splitlines()[-1] for each in (model, expected)]
    assert lines[0].split() == lines[1].split()
    for each in (model, expected):
        vitlorafa.print_trainable_parameters(each)
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    for (_, layer), (_, other) in zip(adapter_layers(model), adapter_layers(expected), strict=True):
        layer.lora_B.copy_(other.lora_B), layer.lora_A.copy_(other.lora_A)
    y = model(x)
    assert not torch.equal(y, plain(x))
    vitlorafa.merge(model)
    torch.testing.assert_close(model(x), y, atol=1e-4, rtol=1e-4)
    with vitlorafa.disable_adapter(model):
        assert torch.equal(model(x), plain(x))
    vitlorafa.unmerge(model)
    assert torch.equal(model(x), y)
    vitlorafa.remove(model)
    assert torch.equal(model(x), plain(x)) and not list(adapter_layers(model))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")
def test_ddp_is_told_to_come_after(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.warns(AdapterWarning, match=naming("DistributedDataParallel", "inject first")):
            inject(DistributedDataParallel(fresh()), AdapterConfig(rank=2))
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def test_folders_that_earlier_versions_wrote_from_wrapped_models(tmp_path):
    model = trained()
    save_adapter(model, tmp_path, head=True, format="vitlorafa")
    description = json.loads((tmp_path / "adapter.json").read_text())
    tensors = load((tmp_path / "adapter.safetensors").read_bytes())
    for old in ("_orig_mod.", "module.", "0.", "module._orig_mod.timm_model."):
        data = save({old + name: tensor for name, tensor in tensors.items()})
        kept = {key: description[key] for key in ("format", "architecture", "config", "metadata")}
        kept |= {"layers": {old + name: v for name, v in description["layers"].items()}}
        kept |= {"head": [old + name for name in description["head"]], "sha256": hashlib.sha256(data).hexdigest()}
        (tmp_path / "adapter.json").write_text(json.dumps(kept))
        (tmp_path / "adapter.safetensors").write_bytes(data)
        x = images(model)
        for other in (fresh(), Lightning(fresh()), nn.Sequential(fresh())):
            assert torch.equal(load_adapter(other, tmp_path)(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_features_only(architecture, tmp_path):
    model = inject(build(architecture), AdapterConfig(rank=2), train_head=True)
    perturb(model)
    save_adapter(model, tmp_path, head=True)
    settings = {"features_only": True, "img_size": 32, "pretrained": False}
    if architecture.startswith("swin"):
        settings |= {"depths": (2, 2), "embed_dim": 24, "num_heads": (2, 4), "window_size": 2, "out_indices": (0, 1)}
    else:
        settings |= {"depth": 2, "out_indices": (0, 1)}
    features = timm.create_model(architecture, **settings).eval()
    features.load_state_dict(
        {
            own: value
            for name, value in build(architecture).state_dict().items()
            for own in (name, f"model.{name}", name.replace("layers.", "layers_"))
        },
        strict=False,
    )
    x = images(model)
    plain = features(x)
    with pytest.warns(AdapterWarning, match=naming(str(tmp_path), "head")) as warned:
        load_adapter(features, tmp_path)
    assert len(warned) == 1
    adapted = features(x)
    expected = model.forward_intermediates(x, indices=(0, 1), intermediates_only=True, output_fmt="NCHW", norm=False)
    for index, ours in enumerate(adapted):
        theirs = expected[index]
        ours = ours.permute(0, 3, 1, 2) if ours.shape != theirs.shape else ours
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        assert not torch.equal(adapted[index], plain[index])
    save_adapter(features, tmp_path / "again")
    assert torch.equal(
        load_adapter(build(architecture), tmp_path / "again").forward_features(x), model.forward_features(x)
    )


class Pair(nn.Module):
    """Two timm models in one."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = fresh(), build("test_vit", depth=2)


def test_prefix_says_which(tmp_path):
    pair, model = Pair(), trained()
    for call in (head_parameters, lambda m: inject(m, AdapterConfig(rank=2), train_head=True)):
        with pytest.raises(AdapterError, match=naming("timm models (student, teacher)", "prefix=")):
            call(pair)
    with pytest.raises(AdapterError, match=naming("'techer'", "Pair", "student, teacher")):
        inject(pair, AdapterConfig(rank=2), prefix="techer")
    save_adapter(model, tmp_path, head=True)
    load_adapter(pair, tmp_path, prefix="student")
    x = images(model)
    assert torch.equal(pair.student(x), model(x))
    assert not any(p.requires_grad for p in pair.teacher.parameters())
    inject(pair, AdapterConfig(rank=2), prefix="teacher", train_head=True)
    perturb(pair)
    with pytest.raises(AdapterError, match=naming("adapted models (student, teacher)", "prefix=")):
        save_adapter(pair, tmp_path)
    for prefix in ("student", "teacher"):
        save_adapter(pair, tmp_path / prefix, head=True, prefix=prefix)
        save_adapter(getattr(pair, prefix), tmp_path / "direct", head=True)
        saved = [json.loads((tmp_path / folder / "adapter.json").read_text()) for folder in (prefix, "direct")]
        for description in saved:
            del description["sha256"]  # safetensors writes its metadata in any order
        assert saved[0] == saved[1]
    vitlorafa.remove(pair)
    assert all(p.requires_grad for p in pair.parameters())


def test_what_trains_around_the_timm_model_is_saved_too(tmp_path):
    def make():
        return nn.Sequential(build("test_vit", num_classes=0), nn.BatchNorm1d(64), nn.Linear(64, 3))

    network = inject(make(), AdapterConfig(rank=2))
    perturb(network)
    network[1:].requires_grad_(True).train()(torch.randn(8, 64))
    with torch.no_grad():
        network[2].weight.normal_()
    save_adapter(network, tmp_path)
    x = images(network[0])
    other = load_adapter(make(), tmp_path)
    assert torch.equal(other.eval()(x), network.eval()(x))
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in network.parameters()]
    with pytest.warns(AdapterWarning, match=naming(str(tmp_path), "1.bias, ", "not loaded")):
        model = load_adapter(build("test_vit", num_classes=0), tmp_path)
    assert torch.equal(model(x), network[0](x))
    with pytest.raises(AdapterError, match=naming("PEFT", "outside:1.weight")):
        save_adapter(network, tmp_path / "none", format="peft")
    assert not (tmp_path / "none").exists()
