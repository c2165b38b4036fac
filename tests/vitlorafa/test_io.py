import hashlib
import json

import pytest
import torch
from messages import naming
from safetensors.torch import load_file, save_file
from small_models import build, images, perturb

import vitlorafa
from vitlorafa import AdapterConfig, AdapterError, adapter_layers, inject, load_adapter, save_adapter


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter and head of test_vit, and the model."""
    model = inject(build("test_vit"), AdapterConfig(rank=2, seed=0), train_head=True)
    perturb(model)
    torch.nn.init.normal_(model.head.weight)
    folder = tmp_path / "a" / "b"
    return save_adapter(model, folder, head=True, metadata={"step": 3}, format="vitlorafa"), model


@torch.no_grad()
@pytest.mark.parametrize("train", ["B", "A", "BA"])
def test_round_trip(architecture, all_targets, tmp_path, train):
    model = inject(build(architecture), all_targets(train=train))
    perturb(model)
    save_adapter(model, tmp_path)
    other = load_adapter(build(architecture), tmp_path)
    assert torch.equal(other(images(model)), model(images(model)))
    assert {n: p.requires_grad for n, p in other.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }


@torch.no_grad()
def test_head(saved):
    folder, model = saved
    x = images(model)
    for head in ("auto", True):
        other = load_adapter(build("test_vit"), folder, head=head)
        assert torch.equal(other(x), model(x)) and other.head.weight.requires_grad
    other = load_adapter(build("test_vit"), folder, head=False)
    assert torch.equal(other.forward_features(x), model.forward_features(x))
    assert not torch.equal(other.head.weight, model.head.weight) and not other.head.weight.requires_grad
    headless = build("test_vit")
    headless.reset_classifier(0)
    load_adapter(headless, folder, head=False)
    assert torch.equal(headless.forward_features(x), model.forward_features(x))


def test_files(saved):
    folder, model = saved
    assert sorted(path.name for path in folder.iterdir()) == ["adapter.json", "adapter.safetensors"]
    description = json.loads((folder / "adapter.json").read_text())
    assert description["architecture"] == "test_vit"
    assert description["metadata"] == {"step": 3}
    assert description["layers"]["blocks.0.attn.qkv"] == ["q", "v"]
    assert description["head"] == ["head.weight", "head.bias"]
    assert description["config"]["rank"] == 2
    tensors = load_file(folder / "adapter.safetensors")
    assert tensors.keys() == {"head.weight", "head.bias"} | {
        f"{name}.lora_{factor}" for name, _ in adapter_layers(model) for factor in "AB"
    }


@torch.no_grad()
def test_into_an_adapted_model(saved):
    folder, model = saved
    other = inject(build("test_vit"), AdapterConfig(rank=2, train="BA"))
    vitlorafa.merge(other)
    load_adapter(other, folder)
    torch.testing.assert_close(other(images(model)), model(images(model)), atol=1e-4, rtol=1e-4)
    vitlorafa.unmerge(other)
    assert torch.equal(other(images(model)), model(images(model)))
    assert all(layer.lora_A.requires_grad for _, layer in adapter_layers(other))
    save_adapter(other, folder)  # over the old one
    load_adapter(build("test_vit"), folder, head=False)


@pytest.mark.parametrize(
    ("build_model", "kwargs", "named"),
    [
        (lambda: build("vit_small_patch16_224"), {"head": False}, ["test_vit", "vit_small_"]),
        (
            lambda: build("test_vit", depth=4),
            {"head": False},
            ["4 places", "blocks.4.attn.qkv.lora_A", "unknown"],
        ),
        (
            lambda: build("vit_tiny_patch16_224", depth=6),
            {"head": False},
            ["12", "blocks.0.attn.qkv.lora_A", "[2, 2, 64]", "[2, 2, 192]"],
        ),
        (
            lambda: build("vit_tiny_patch16_224", depth=7),
            {"head": False},
            ["12", "blocks.0", "..."],
        ),
        (lambda: build("test_vit", num_classes=7), {}, ["head", "7", "num_classes=5", "head=False"]),
        (lambda: build("test_vit", num_classes=0), {"head": True}, ["head", "num_classes"]),
        (
            lambda: inject(build("test_vit"), AdapterConfig(rank=2, alpha=1)),
            {},
            ["scale 2", "0.5", "alpha"],
        ),
        (
            lambda: inject(build("test_vit"), AdapterConfig(rank=2, targets="q,k")),
            {},
            ["blocks.0.attn.qkv", "['q', 'v']", "['q', 'k']"],
        ),
        (
            lambda: inject(build("test_vit"), AdapterConfig(rank=2, targets="q,v,proj")),
            {},
            ["blocks.0.attn.proj.lora_A", "missing"],
        ),
    ],
)
def test_wrong_model(saved, build_model, kwargs, named):
    model = build_model()
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(AdapterError, match=naming(*named)):
        load_adapter(model, saved[0], **kwargs)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[n]) and r == after[n].requires_grad for n, (t, r) in before.items())


def test_no_head_saved(saved, tmp_path):
    save_adapter(saved[1], tmp_path)
    with pytest.raises(AdapterError, match=naming(str(tmp_path), "head=True", "head=False")):
        load_adapter(build("test_vit"), tmp_path, head=True)
    load_adapter(build("test_vit"), tmp_path)


def edit(folder, **changes):
    path = folder / "adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: (f / "adapter.json").unlink(), ["adapter.json"]),
        (lambda f: (f / "adapter.safetensors").unlink(), ["adapter.safetensors"]),
        (lambda f: (f / "adapter.json").write_text("{"), ["cannot read", "line 1"]),
        (lambda f: (f / "adapter.json").write_text("[]"), ["adapter.json", "format 1"]),
        (lambda f: (f / "adapter.json").write_text('{"format": 1}'), ["adapter.json", "config, layers, head, sha256"]),
        (lambda f: edit(f, format=2), ["adapter.json", "format 1"]),
        (lambda f: edit(f, config=3, head=[1]), ["adapter.json", "config, head"]),
        (lambda f: edit(f, layers={"blocks.0.attn.qkv": 3}, extra=None), ["adapter.json", "layers, extra"]),
        (lambda f: edit(f, config={"rnk": 2}), ["AdapterConfig", "'rnk'", "'rank'"]),
        (
            lambda f: (f / "adapter.safetensors").write_bytes(b"x"),
            ["adapter.safetensors", "save it again"],
        ),
        (
            lambda f: save_file({"a": torch.ones(1)}, f / "adapter.safetensors"),
            ["adapter.safetensors", "save it again"],
        ),
    ],
)
def test_damaged(saved, damage, named):
    damage(saved[0])
    with pytest.raises(AdapterError, match=naming(*named)):
        load_adapter(build("test_vit"), saved[0])


def test_refuses_to_save_what_is_not_there(tmp_path):
    model = build("test_vit", num_classes=0)
    with pytest.raises(AdapterError, match=naming("inject(model, config)")):
        save_adapter(model, tmp_path / "none")
    inject(model, AdapterConfig(rank=2))
    with pytest.raises(AdapterError, match=naming("num_classes")):
        save_adapter(model, tmp_path / "none", head=True)
    with pytest.raises(AdapterError, match=naming("metadata['x']", "object", "JSON")):
        save_adapter(model, tmp_path / "none", metadata={"x": object()})
    assert not (tmp_path / "none").exists()


def test_folders_as_people_write_them(saved, tmp_path, monkeypatch):
    _, model = saved
    monkeypatch.setenv("HOME", str(tmp_path))
    assert save_adapter(model, "~/one") == tmp_path / "one"
    assert (tmp_path / "one" / "adapter.json").exists()
    load_adapter(build("test_vit"), "~/one")
    monkeypatch.chdir(tmp_path)
    save_adapter(model, "two")
    load_adapter(build("test_vit"), str(tmp_path / "two"))


def test_a_folder_that_cannot_be(saved, tmp_path, monkeypatch):
    _, model = saved
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(AdapterError, match=naming(str(folder), "another folder")):
            save_adapter(model, folder)
        with pytest.raises(AdapterError, match=naming(str(folder))):
            load_adapter(build("test_vit"), folder)
    assert (tmp_path / "file").read_text() == "mine"

    def full(*_):
        raise OSError(28, "No space left on device")

    before = {path.name: path.read_bytes() for path in saved[0].iterdir()}
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(AdapterError, match="No space left on device") as error:
        save_adapter(model, saved[0])
    assert isinstance(error.value.__cause__, OSError)
    assert {path.name: path.read_bytes() for path in saved[0].iterdir()} == before


@torch.no_grad()
def test_without_a_head_to_load_onto(saved):
    folder, model = saved
    headless = build("test_vit")
    headless.reset_classifier(0)
    with pytest.warns(vitlorafa.AdapterWarning, match=naming(str(folder), "head")):
        load_adapter(headless, folder)
    x = images(model)
    assert torch.equal(headless.forward_features(x), model.forward_features(x))


def test_a_folder_that_is_no_adapter(tmp_path):
    model = build("test_vit")
    with pytest.raises(AdapterError, match="from .*absent: no such folder; give a folder of save_adapter"):
        load_adapter(model, tmp_path / "absent")
    with pytest.raises(AdapterError, match="no adapter.json in it"):
        load_adapter(model, tmp_path)


@torch.no_grad()
def test_the_default_is_a_folder_that_peft_reads_too(tmp_path):
    """`test_peft_format` loads it in PEFT."""
    model = inject(build("test_vit"), AdapterConfig(rank=2, seed=0), train_head=True)
    perturb(model)
    files = ["adapter.json", "adapter_config.json", "adapter_model.safetensors"]
    for kwargs in ({}, {"format": "peft"}):
        save_adapter(model, tmp_path / "new", head=True, class_names=list("abcde"), **kwargs)
        assert sorted(path.name for path in (tmp_path / "new").iterdir()) == files
    description = json.loads((tmp_path / "new" / "adapter.json").read_text())
    data = (tmp_path / "new" / "adapter_model.safetensors").read_bytes()
    assert description["sha256"] == hashlib.sha256(data).hexdigest() and description["class_names"] == list("abcde")
    assert torch.equal(load_adapter(build("test_vit"), tmp_path / "new")(images(model)), model(images(model)))
    (tmp_path / "new" / "adapter.json").unlink()  # as earlier versions wrote PEFT's format
    assert torch.equal(load_adapter(build("test_vit"), tmp_path / "new")(images(model)), model(images(model)))


@torch.no_grad()
@pytest.mark.parametrize("why", ["cls_token", "reads the weight", "without A", "asked for"])
def test_the_default_is_our_own_where_peft_cannot_represent_the_adapter(why, tmp_path):
    architecture = "beit_base_patch16_224" if why == "reads the weight" else "test_vit"
    model = inject(build(architecture), AdapterConfig(rank=2, seed=0))
    perturb(model, only="none" if why == "without A" else None)
    if why == "cls_token":
        model.cls_token.requires_grad_(True)
    kwargs = {"without A": {"only_trained": True}, "asked for": {"format": "vitlorafa"}}.get(why, {})
    save_adapter(model, tmp_path, **kwargs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.json", "adapter.safetensors"]
    assert torch.equal(load_adapter(build(architecture), tmp_path)(images(model)), model(images(model)))
