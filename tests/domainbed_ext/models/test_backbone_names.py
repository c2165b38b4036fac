"""Names of backbones: timm's, the hub's, and folders."""

import json

import pytest
import timm
import timm.models
import torch
from safetensors.torch import save_file

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.models import backbone_names, backbones
from domainbed_ext.runs.arguments import parse
from domainbed_ext.runs.identity import Computations, contradicts, name

MEAN = [0.1, 0.2, 0.3]


MINE = {"img_size": 96, "depth": 2}


def make_folder(folder, model_args=MINE):
    """A model as timm's hub layout has it: config.json and model.safetensors."""
    folder.mkdir()
    model = timm.create_model("test_vit", num_classes=4, **MINE)
    trained_on = {"input_size": [3, 96, 96], "mean": MEAN, "std": [0.5, 0.5, 0.5], "fixed_input_size": True}
    trained_on |= {"classifier": "head", "first_conv": "patch_embed.proj"}
    config = {"architecture": "test_vit", "num_classes": 4, "model_args": model_args, "pretrained_cfg": trained_on}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return model


@pytest.fixture
def folder(tmp_path):
    make_folder(tmp_path / "mine")
    return tmp_path / "mine"


@pytest.mark.parametrize("scheme", ["timm/", "hf-hub:timm/", "hf_hub:timm/", "https://huggingface.co/timm/"])
def test_timms_models_by_the_names_of_their_repositories(scheme):
    known = "vit_tiny_patch16_224.augreg_in21k"
    assert backbone_names.parse(scheme + known) == backbone_names.parse(known)
    assert backbone_names.identity(scheme + known) == known
    assert backbones.inputs(scheme + known).mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("scheme", ["", "local-dir:"])
def test_a_folder_is_a_backbone(folder, scheme, monkeypatch):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    for path in (str(folder), "./mine", "~/mine", "$HOME/mine"):
        assert backbones.inputs(scheme + path).shape == (3, 96, 96)
        assert backbones.inputs(scheme + path).mean == tuple(MEAN)
        model = backbones.create(scheme + path, "pretrained", 7)
        assert len(model.blocks) == 2 and model(torch.zeros(1, 3, 96, 96)).shape == (1, 7)
        saved = backbones.create(scheme + path, str(folder / "model.safetensors"), 7).state_dict()
        for key, tensor in model.state_dict().items():
            assert key.startswith("head.") or torch.equal(tensor, saved[key])
        random = backbones.create(scheme + path, "none", 7)
        assert not torch.equal(random.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_a_folder_at_another_size_of_images(folder):
    model = backbones.create(str(folder), "pretrained", 7, image_size=64)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_a_run_is_told_by_what_is_in_the_folder(folder, tmp_path):
    def computed(path):
        args = parse(["--backbone", str(path), "--algorithm", "LP"])
        return Computations().of(args)

    before = computed(folder)
    moved = folder.rename(tmp_path / "moved")
    assert name(computed(moved)) == name(before)
    record = {"args": {}, "hparams": {"backbone": str(moved), "weights": "pretrained"}}
    assert not contradicts(before, {**record, "weights_digest": before["weights"]})
    make_folder(tmp_path / "other")
    assert name(computed(tmp_path / "other")) != name(before)
    assert computed(tmp_path / "other")["hparams"] == before["hparams"]
    (moved / "config.json").write_text((moved / "config.json").read_text().replace("0.1", "0.4"))
    assert computed(moved)["hparams"] != before["hparams"]


@pytest.mark.parametrize(
    ("spelled", "sentence"),
    [
        ("timm/vit_tinny_patch16_224", "unknown backbone 'vit_tinny_patch16_224': did you mean 'vit_tiny_patch16_224'"),
        ("timm/vit_tiny_patch16_224.augrag_in21k", "did you mean 'vit_tiny_patch16_224.augreg_in21k'"),
        ("google/vit-base-patch16-224", "one on the Hugging Face hub is hf-hub:google/vit-base-patch16-224"),
        ("./nowhere", "there is no such folder"),
        (r"C:\models\vit", "there is no such folder"),
        ("local-dir:nowhere", "no .*nowhere/config.json: give --backbone a folder with timm's config.json"),
    ],
)
def test_names_that_are_nothing_get_a_sentence(spelled, sentence):
    with pytest.raises(BenchmarkError, match=sentence):
        backbone_names.parse(spelled)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "config.json is not timm's"),
        ("[]", "config.json is not timm's"),
        (
            '{"architectures": ["ViTForImageClassification"]}',
            "not timm's .no 'architecture'.: name the timm model",
        ),
        ('{"architecture": "test_vitt"}', "unknown architecture in .*: 'test_vitt': did you mean 'test_vit'"),
        ('{"architecture": "test_vit", "pretrained_cfg": {"input_size": 96}}', "config.json .*is not timm's"),
        ('{"architecture": "test_vit", "pretrained_cfg": {"mean": "grey"}}', "config.json .*is not timm's"),
    ],
)
def test_a_config_that_is_not_timms_gets_a_sentence(tmp_path, text, sentence):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BenchmarkError, match=sentence):
        backbone_names.parse(str(tmp_path))


def test_model_arguments_that_are_not_the_architectures_get_a_sentence(tmp_path):
    make_folder(tmp_path / "mine", {"no_such_argument": 3})
    with pytest.raises(BenchmarkError, match="cannot be built .*no_such_argument"):
        backbones.create(str(tmp_path / "mine"), "pretrained", 3)


def test_a_folder_of_pickles_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BenchmarkError, match=r"pytorch_model.bin is not a .safetensors file: convert it"):
        backbones.create(str(folder), "pretrained", 3)


def test_a_model_of_the_hub(monkeypatch):
    asked = []

    def config(repository, **_):
        asked.append(repository)
        trained_on = {"input_size": [3, 64, 64], "mean": MEAN, "std": MEAN}
        return trained_on, "test_vit", {}

    backbone_names._of_hub.cache_clear()
    monkeypatch.setattr(backbone_names, "load_model_config_from_hf", config)
    assert backbone_names.parse("hf_hub:someone/model").input_size == (3, 64, 64)
    assert backbone_names.parse("hf-hub:someone/model").timm == "hf-hub:someone/model"
    assert asked == ["someone/model"]


def test_a_model_of_the_hub_that_cannot_be_had(monkeypatch):
    def offline(repository, **_):
        raise OSError("the network is unreachable")

    monkeypatch.setattr(backbone_names, "load_model_config_from_hf", offline)
    with pytest.raises(BenchmarkError, match="could not get config.json of hf-hub:a/b .the network is unreachable."):
        backbone_names.parse("hf-hub:a/b")
