"""An adapter says what it belongs to, and loading warns where the model is another."""

import copy
import json
import warnings

import pytest
import timm
import torch
from messages import naming
from small_models import build, perturb

import vitlorafa
from vitlorafa import AdapterConfig, AdapterError, AdapterWarning, inject, load_adapter, save_adapter

OTHER_WEIGHTS = naming("weights", "test_vit.r160_in1k", "this test_vit", "outputs will differ")


def adapted(model=None, **kwargs):
    model = inject(model or build("test_vit"), AdapterConfig(rank=2), **kwargs)
    perturb(model)
    return model


def other_weights():
    model = build("test_vit")
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight.mul_(1.01)
    return model


def description(folder):
    return json.loads((folder / "adapter.json").read_text())


def quietly(model, folder, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_adapter(model, folder, **kwargs)


def test_what_is_kept(tmp_path):
    save_adapter(adapted(train_head=True), tmp_path, head=True, class_names=["a", "b", "c", "d", "e"])
    said = description(tmp_path)
    assert (said["architecture"], said["tag"]) == ("test_vit", "r160_in1k")
    assert said["class_names"] == ["a", "b", "c", "d", "e"]
    assert said["input"] == {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "input_size": [3, 32, 32],
        "interpolation": "bicubic",
    }
    assert said["digests"].keys() == {"float32", "bfloat16", "float16"}


@pytest.mark.parametrize("names", ["abcde", ["a", "b"], [1, 2, 3, 4, 5]])
def test_class_names_that_are_none(names, tmp_path):
    with pytest.raises(AdapterError, match="class_names"):
        save_adapter(adapted(train_head=True), tmp_path / "none", head=True, class_names=names)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("format", ["vitlorafa", "peft"])
def test_other_weights_of_the_same_architecture(format, tmp_path):
    save_adapter(adapted(), tmp_path, format=format)
    quietly(build("test_vit"), tmp_path)
    with pytest.warns(AdapterWarning, match=OTHER_WEIGHTS) as warned:
        load_adapter(other_weights(), tmp_path)
    assert len(warned) == 1 and warned[0].filename == __file__
    with pytest.warns(AdapterWarning, match=OTHER_WEIGHTS):
        load_adapter(inject(other_weights(), AdapterConfig(rank=2)), tmp_path)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_weights_in_another_precision(low, merge, tmp_path):
    model = adapted()
    save_adapter(vitlorafa.merge(model) if merge else model, tmp_path / "float32")
    save_adapter(adapted(build("test_vit").to(low)), tmp_path / "low")
    save_adapter(copy.deepcopy(model).to(low), tmp_path / "cast")
    for folder in ("float32", "low", "cast"):
        for dtype in (torch.float32, low):
            quietly(build("test_vit").to(dtype), tmp_path / folder)
            if dtype is torch.float32 or folder == "float32":
                with pytest.warns(AdapterWarning, match=OTHER_WEIGHTS):
                    load_adapter(other_weights().to(dtype), tmp_path / folder)


def test_what_does_not_matter(tmp_path):
    """Image size, classes, head, and what a state dict brought."""
    model = adapted()
    save_adapter(model, tmp_path)
    for kwargs in ({"num_classes": 9}, {"num_classes": 0}):
        other = build("test_vit", **kwargs)
        other.load_state_dict(
            {n: v for n, v in build("test_vit").state_dict().items() if "head" not in n}, strict=False
        )
        quietly(other, tmp_path)
    other = inject(other_weights(), AdapterConfig(rank=2))
    other.load_state_dict(model.state_dict())
    quietly(vitlorafa.merge(other), tmp_path)
    save_adapter(other, tmp_path / "again")
    assert description(tmp_path / "again")["digests"] == description(tmp_path)["digests"]
    other.load_state_dict(inject(other_weights(), AdapterConfig(rank=2)).state_dict())
    save_adapter(other, tmp_path / "again")
    with pytest.warns(AdapterWarning, match=OTHER_WEIGHTS):
        load_adapter(build("test_vit"), tmp_path / "again")


def test_formats_that_cannot_be_compared(tmp_path):
    model = build("test_vit").half()
    model.pretrained_cfg = {**model.pretrained_cfg, "tag": "else"}
    save_adapter(adapted(model), tmp_path)
    with pytest.warns(AdapterWarning, match=naming("test_vit.else", "test_vit.r160_in1k", "loaded")):
        load_adapter(build("test_vit").bfloat16(), tmp_path)


@pytest.mark.parametrize(
    ("cfg", "named"),
    [
        ({"mean": (0.1, 0.2, 0.3)}, ["mean [0.5, 0.5, 0.5]", "[0.1, 0.2, 0.3]"]),
        ({"std": (1, 1, 1), "interpolation": "nearest"}, ["std ", "interpolation bicubic", "nearest"]),
        ({"label_names": ["e", "d", "c", "b", "a"]}, ["head", "classes", "a, b, c, ...", "e, d, c, ..."]),
    ],
)
def test_other_images_and_classes(cfg, named, tmp_path):
    save_adapter(adapted(train_head=True), tmp_path, head=True, class_names=list("abcde"))
    model = build("test_vit")
    model.pretrained_cfg = {**model.pretrained_cfg, **cfg}
    with pytest.warns(AdapterWarning, match=naming(*named)) as warned:
        load_adapter(model, tmp_path)
    assert len(warned) == 1
    if "label_names" in cfg:
        quietly(build("test_vit"), tmp_path, head=False)


def test_another_size_of_images(tmp_path):
    save_adapter(adapted(), tmp_path)
    larger = timm.create_model("test_vit", img_size=48, num_classes=5)
    weights = {n: v for n, v in build("test_vit").state_dict().items() if n != "pos_embed"}
    larger.load_state_dict(weights, strict=False)
    with pytest.warns(AdapterWarning, match=naming("input_size [3, 32, 32]", "[3, 48, 48]")) as warned:
        load_adapter(larger, tmp_path)
    assert len(warned) == 1


def test_folders_of_earlier_versions_say_nothing(tmp_path):
    save_adapter(adapted(), tmp_path, format="vitlorafa")
    said = description(tmp_path)
    for key in ("tag", "input", "class_names", "digests", "extra", "outside"):
        del said[key]
    (tmp_path / "adapter.json").write_text(json.dumps(said))
    quietly(other_weights(), tmp_path)


def test_models_that_are_none_of_timms(tmp_path):
    model = build("test_vit")
    del model.pretrained_cfg
    save_adapter(adapted(model), tmp_path)
    assert description(tmp_path)["architecture"] is None and description(tmp_path)["input"] == {
        "input_size": [3, 32, 32]
    }
    quietly(build("test_vit"), tmp_path)
