import contextlib
import io
import logging

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.models import backbones, image_sizes, precision
from domainbed_ext.models.inputs import IMAGENET_MEAN
from vitlorafa import AdapterWarning, tuning

NAME = "test_vit"  # timm's own tiny model, 160 px


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model(NAME, num_classes=1000).state_dict(), path)
    return path


def test_weights_of_a_file_are_loaded_but_for_the_head(weights):
    model = backbones.create(NAME, str(weights), num_classes=7)
    state, saved = model.state_dict(), load_file(weights)
    assert state["head.weight"].shape[0] == 7
    assert all(torch.equal(state[key], saved[key]) for key in state if not key.startswith("head."))
    assert model(torch.zeros(1, 3, 160, 160)).shape == (1, 7)


def test_the_head_is_fresh_even_with_as_many_classes(weights):
    torch.manual_seed(1)
    model = backbones.create(NAME, str(weights), num_classes=1000)
    assert not torch.equal(model.head.weight, load_file(weights)["head.weight"])


def test_the_embedded_backbone_comes_with_the_package():
    name = "vit_pico_patch8_32"
    first, second = (backbones.create(name, "pretrained", num_classes=10) for _ in range(2))
    assert torch.equal(first.blocks[0].attn.qkv.weight, second.blocks[0].attn.qkv.weight)
    assert backbones.inputs(name).shape == (3, 32, 32)


def test_input_statistics_are_the_backbones_own_or_imagenets():
    assert backbones.inputs("vit_tiny_patch16_224").mean == (0.5, 0.5, 0.5)
    assert backbones.inputs("vit_tiny_patch16_224", stats="imagenet").mean == IMAGENET_MEAN
    assert backbones.inputs("vit_base_patch16_clip_224.openai").mean[0] == pytest.approx(0.481, abs=1e-3)
    assert backbones.inputs("vit_tiny_patch16_224", image_size=96).size == (96, 96)


def test_another_image_size_resamples_the_position_embedding(weights):
    model = backbones.create(NAME, str(weights), num_classes=3, image_size=64)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_position_embeddings_that_are_resampled_are_reported(weights, capsys):
    backbones.create(NAME, "none", num_classes=3, image_size=64)
    assert "resampled by timm: pos_embed from [1, 101, 64] to [1, 17, 64]" in capsys.readouterr().err
    backbones.create(NAME, "none", num_classes=3, image_size=160)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "size"),
    [("test_resnet", 64), ("test_convnext", 100), ("test_coatnet", 96), ("twins_svt_small", 96), ("test_vit", 96)],
)
def test_any_size_that_a_model_takes(name, size):
    if not timm.is_model(name):
        pytest.skip("newer than this timm")
    model = backbones.create(name, "none", num_classes=3, image_size=size).eval()
    assert model(torch.zeros(1, 3, size, size)).shape == (1, 3)


@pytest.mark.parametrize(
    ("name", "size", "sentence"),
    [
        (NAME, 100, r"test_vit takes no images of 100 × 100 pixels .*it takes 96, 112, its own 160 × 160.*or null"),
        (NAME, 8, r"test_vit takes no images of 8 × 8 pixels .*give image_size in --hparams another value"),
        ("twins_svt_small", 100, "it takes 96, 128, its own 224 × 224"),
        ("vgg11", 8, r"vgg11 takes no images of 8 × 8 pixels"),
    ],
)
def test_a_size_that_a_model_cannot_take_gets_a_sentence(name, size, sentence):
    for call in (lambda: backbones.inputs(name, size), lambda: backbones.create(name, "none", 3, image_size=size)):
        with pytest.raises(BenchmarkError, match=sentence):
            call()


def test_looking_for_a_size_draws_nothing():
    image_sizes._try.cache_clear()
    torch.manual_seed(3)
    with pytest.raises(BenchmarkError):
        backbones.inputs(NAME, 100)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))


def test_a_model_without_a_head_gets_a_sentence(monkeypatch):
    class Encoder(torch.nn.Linear):
        pass

    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: Encoder(1, 1))
    with pytest.raises(BenchmarkError, match="test_vit is no classifier .Encoder has no head."):
        backbones.create(NAME, "none", 3)


def spoil(path, change):
    state = load_file(path)
    change(state)
    save_file(state, path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.pop("cls_token"), "does not fit test_vit: cls_token is missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra is not in the model"),
        (lambda s: s.update({"cls_token": torch.zeros(1, 1, 3)}), r"cls_token is \[1, 1, 3\] instead of \[1, 1, 64\]"),
    ],
)
def test_weights_that_do_not_fit_are_named(weights, change, sentence):
    spoil(weights, change)
    with pytest.raises(BenchmarkError, match=sentence):
        backbones.create(NAME, str(weights), 7)


def test_weights_of_another_architecture_get_a_sentence(weights):
    with pytest.raises(BenchmarkError, match="does not fit vit_pico_patch8_32: .*; and [0-9]+ more; give a file"):
        backbones.create("vit_pico_patch8_32", str(weights), 7)


def test_files_that_are_no_weights_get_a_sentence(tmp_path):
    with pytest.raises(BenchmarkError, match="no weights file"):
        backbones.create(NAME, str(tmp_path / "none.safetensors"), 7)
    (tmp_path / "torn.safetensors").write_bytes(b"\x08")
    with pytest.raises(BenchmarkError, match="not a complete .safetensors file"):
        backbones.create(NAME, str(tmp_path / "torn.safetensors"), 7)
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(BenchmarkError, match="not a .safetensors file: convert it"):
        backbones.create(NAME, str(tmp_path / "weights.pth"), 7)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("vit_tinny_patch16_224", "unknown backbone 'vit_tinny_patch16_224': did you mean 'vit_tiny_patch16_224'"),
        ("vit_tiny_patch16_224.augrag_in21k", "did you mean 'vit_tiny_patch16_224.augreg_in21k'"),
    ],
)
def test_an_unknown_backbone_gets_the_nearest_name(name, sentence):
    with pytest.raises(BenchmarkError, match=sentence):
        backbones.create(name, "none", 7)


def test_the_hub_client_warns_once_of_a_network_that_is_not_there(monkeypatch):
    client = logging.getLogger("huggingface_hub.utils._http")
    root = logging.getLogger("huggingface_hub")
    written = logging.StreamHandler(stream := io.StringIO())
    monkeypatch.setattr(root, "handlers", [written])

    def offline(*args, **kwargs):
        for attempt in range(6):
            client.warning("no name is known, try %d", attempt)
        client.error("given up")
        raise OSError("the network is unreachable")

    monkeypatch.setattr(timm, "create_model", offline)
    for _ in range(2):  # nothing stays behind for what comes after
        with pytest.raises(BenchmarkError, match="could not get the weights"):
            backbones.create(NAME, "pretrained", 7)
    assert stream.getvalue() == 2 * "no name is known, try 0\ngiven up\n"


def test_weights_that_the_hub_does_not_give_get_a_sentence(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("the network is unreachable")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(BenchmarkError, match="could not get the weights of test_vit .the network is unreachable."):
        backbones.create(NAME, "pretrained", 7)


@pytest.mark.pacs
def test_the_real_vit_tiny_loads(shared_data):
    path = shared_data / "vit_tiny_patch16_224.safetensors"
    model = backbones.create("vit_tiny_patch16_224", str(path), num_classes=7)
    assert torch.equal(model.state_dict()["norm.weight"], load_file(path)["norm.weight"])


@pytest.mark.parametrize(("seconds", "expected"), [(0.008, "bf16"), (0.0095, "float32"), (0.08, "float32")])
@pytest.mark.parametrize("writable", [True, False])
def test_precision_is_bf16_only_where_it_is_clearly_faster(clock, monkeypatch, tmp_path, seconds, expected, writable):
    """Also where the answer cannot be kept."""
    cpu, own, calls = torch.device("cpu"), F.linear, []

    def timed(x, weight):
        calls.append(x.dtype)
        clock.now += seconds if x.dtype == torch.bfloat16 else 0.01
        return own(x, weight)

    monkeypatch.setattr(F, "linear", timed)
    if not writable:
        (tmp_path / "ways").touch()
    assert precision.choose("float32", cpu) == "float32" and not calls
    with contextlib.nullcontext() if writable else pytest.warns(AdapterWarning, match="cannot be written"):
        assert precision.choose("auto", cpu) == expected and set(calls) == {torch.float32, torch.bfloat16}
    calls.clear()
    tuning.pin({})
    assert precision.choose("auto", cpu) == expected and not calls
