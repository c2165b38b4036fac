"""Which layers of timm's families are adapted: a small member of each that has transformer blocks."""

import json
import re
import warnings

import pytest
import timm
import torch
from messages import naming
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import perturb
from torch import nn

import vitlorafa
from vitlorafa import (
    AdapterConfig,
    AdapterError,
    AdapterWarning,
    adapter_layers,
    inject,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)
from vitlorafa.adapted import head_parameters

# Name -> how to build a small one, and patterns of the linear layers that stay as they are.
ADAPTED: dict[str, tuple[dict, tuple[str, ...]]] = {
    "cait_xxs24_224": ({"img_size": 32, "depth": 2}, (r"attn\.proj_[lw]",)),
    "convit_tiny": ({"img_size": 32, "depth": 12}, (r"attn\.pos_proj",)),
    "crossvit_tiny_240": ({}, (r"(revert_)?projs\.\d+\.\d+",)),
    "edgenext_xx_small": ({}, (r"stages\.\d\.blocks\.\d\.mlp\.fc[12]",)),
    "mobilevit_xxs": ({}, ()),
    "mvitv2_tiny": ({"img_size": 64}, (r"shortcut_proj_attn",)),
    "naflexvit_base_patch16_gap": ({"depth": 2, "embed_dim": 48, "num_heads": 3}, (r"embeds\.proj",)),
    "pit_ti_224": ({}, (r"pool\.fc",)),
    "pvt_v2_b0": ({}, ()),
    "test_vit_relpos": ({"img_size": 32}, (r"rel_pos\.mlp\.fc[12]",)),
    "tnt_s_patch16_224": ({"img_size": 32, "depth": 2}, (r"(blocks\.\d+\.)?proj",)),
    "twins_pcpvt_small": ({"img_size": 64, "depths": (1, 1, 1, 2)}, ()),
    "twins_svt_small": ({"img_size": 64, "depths": (2, 2, 2, 2)}, ()),
    "vit_tiny_r_s16_p8_224": ({"img_size": 64, "depth": 2}, ()),
    "vitamin_small_224": ({"depth": 2}, ()),
    "volo_d1_224": ({"img_size": 32}, (r"attn\.attn", "aux_head")),
    "xcit_nano_12_p8_224": ({"img_size": 32, "depth": 2, "cls_attn_layers": 1}, ()),
}


def small(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **ADAPTED[name][0]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def images(name):
    size = ADAPTED[name][0].get("img_size") or timm.get_pretrained_cfg(name).input_size[1]
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=ADAPTED)
def name(request):
    if not timm.is_model(request.param):
        pytest.skip("newer than this timm")
    return request.param


@pytest.fixture
def adapted(name):
    model = small(name)
    linears = {n for n, module in model.named_modules() if isinstance(module, nn.Linear)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdapterWarning)
        inject(model, AdapterConfig(rank=2, targets="all", train="BA", seed=0))
    return model, linears


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_all_linear_layers_of_blocks_are_adapted_and_act(name, adapted):
    """Each layer gets a gradient, and stacks as assumed: the merged model computes the same."""
    model, linears = adapted
    kept = (*ADAPTED[name][1], r"head(\.\w+)?")
    left = linears - {n for n, _ in adapter_layers(model)}
    assert not [n for n in left if not re.search(rf"(^|\.)({'|'.join(kept)})$", n)]
    perturb(model)
    x = images(name)
    y = model(x)
    y.square().sum().backward()
    for layer_name, layer in adapter_layers(model):
        assert layer.lora_A.grad.flatten(1).any(1).all(), layer_name
    with torch.no_grad():
        torch.testing.assert_close(merge(model)(x), y, atol=1e-3, rtol=1e-3)
        unmerge(model)


@pytest.mark.parametrize(("name", "attribute"), [("convit_tiny", "qk"), ("pvt_v2_b0", "kv"), ("twins_svt_small", "kv")])
@pytest.mark.parametrize("target", ["k", "q,k", "k,v"])
def test_a_projection_in_a_stack_of_two_is_that_part(name, attribute, target):
    """k alone is the second half of qk, and the first of kv."""
    model = inject(small(name), AdapterConfig(rank=2, targets=target, seed=0))
    perturb(model)
    stack = {"qk": ["q", "k"], "kv": ["k", "v"]}[attribute]
    layer = next(layer for n, layer in adapter_layers(model) if n.endswith(f".{attribute}"))
    halves = layer.delta_weight().chunk(2)
    assert [bool(half.any()) for half in halves] == [part in target.split(",") for part in stack]


@pytest.mark.parametrize(
    ("name", "named"),
    [
        (
            "crossvit_tiny_240",
            ["CrossVit", "6 blocks (blocks.0.fusion.0", "fc1, fc2"],
        ),
        ("edgenext_xx_small", ["EdgeNeXt", "frozen", "9 blocks (stages.0.blocks.0", "attention"]),
        ("volo_d1_224", ["VOLO", "4 blocks (network.0.0", "without q, k"]),
    ],
)
def test_blocks_that_are_left_out_are_named(name, named):
    with pytest.warns(AdapterWarning, match=naming(*named)):
        inject(small(name), AdapterConfig(rank=2, targets="all"))


@pytest.mark.parametrize("name", ["test_vit", "swinv2_tiny_window8_256", "convit_tiny", "twins_svt_small"])
def test_models_that_are_adapted_in_full_give_no_warning(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdapterWarning)
        inject(timm.create_model(name), AdapterConfig(rank=2, targets="all"))


def test_convolutions_of_squeeze_and_excite_are_none_of_ours():
    with torch.device("meta"):
        model = timm.create_model("maxvit_tiny_tf_224")
    inject(model, AdapterConfig(rank=2, targets="all"))
    names = [name for name, _ in adapter_layers(model)]
    assert len(names) == 11 * 8 and not any(".se." in name for name in names)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        (
            "coatnet_nano_rw_224",
            ["MaxxVit", "proj", "qkv", "head.fc"],
        ),
        ("vit_pwee_patch16_reg1_gap_256", ["blocks.N.in_proj, blocks.N.attn_out_proj"]),
        ("gmlp_ti16_224", ["MlpMixer", "blocks.N.mlp_channels.fc1"]),
        ("levit_128s", ["stages.N.blocks.N.attn.qkv.linear"]),
        ("nextvit_small", ["NextViT", "fc1, fc2", "q, k, v, proj"]),
        ("gcvit_xxtiny", ["stages.0.blocks.1.attn.qkv", "leave q, k and v out"]),
        ("efficientformer_l1", ["token_mixer.qkv", "leave q, k and v out"]),
    ],
)
def test_what_cannot_be_adapted_gets_the_names_that_were_looked_for(name, named):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(AdapterError, match=naming(*named)):
        inject(model, AdapterConfig(rank=2, targets="all"))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "targets"), [("cait_xxs24_224", "q,v"), ("tnt_s_patch16_224", "all"), ("volo_d1_224", "all")]
)
def test_a_round_trip_through_peft(name, targets, tmp_path):
    """Layers of one, two and three projections, some of them adapted, and a head whose name ends another's."""
    peft = pytest.importorskip("peft")
    model = inject(small(name), AdapterConfig(rank=2, targets=targets, seed=0), train_head=True)
    perturb(model)
    with torch.no_grad():
        for parameter in head_parameters(model).values():
            parameter.normal_()
        x = images(name)
        y = model(x)
        save_adapter(model, tmp_path / "ours", head=True, format="peft")
        theirs = peft.PeftModel.from_pretrained(small(name), tmp_path / "ours").eval()
        torch.testing.assert_close(theirs(x), y, atol=1e-4, rtol=1e-4)
        theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
        for folder in ("ours", "theirs"):
            torch.testing.assert_close(load_adapter(small(name), tmp_path / folder)(x), y, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("format", ["vitlorafa", "peft"])
@pytest.mark.parametrize("name", ["twins_svt_small", "volo_d1_224"])
def test_folders_of_versions_that_adapted_fewer_layers(name, format, tmp_path, monkeypatch):
    """Exactly the layers of the file are adapted, and the parts of the head that it does not hold stay."""
    known = {"qkv": vitlorafa.sites._ATTENTION["qkv"], "proj": ("proj",)}
    with monkeypatch.context() as patch:
        patch.setattr(vitlorafa.sites, "_ATTENTION", known)
        patch.setattr(vitlorafa.sites, "_INPUTS", ("qkv",))
        model = small(name)
        cfg, model.pretrained_cfg = model.pretrained_cfg, model.pretrained_cfg | {"classifier": "head"}
        inject(model, AdapterConfig(rank=2, targets="all", seed=0), train_head=True)
        perturb(model)
        with torch.no_grad():
            model.head.weight.normal_()
        monkeypatch.setattr(vitlorafa.io.origin, "digests", lambda model, layers: {})
        save_adapter(model, tmp_path, head=True, format=format)
        model.pretrained_cfg = cfg
    _forget(tmp_path, "extra", "outside", "digests", "class_names", "input", "tag")
    with pytest.warns(AdapterWarning, match=naming(str(tmp_path), "has no adapter for")) as warned:
        other = load_adapter(small(name), tmp_path)
    assert [n for n, _ in adapter_layers(other)] == [n for n, _ in adapter_layers(model)]
    assert torch.equal(other(images(name)), model(images(name)))
    assert any("aux_head.weight" in str(w.message) for w in warned) == (name == "volo_d1_224")


def _forget(folder, *keys):
    """Leaves out of a folder's description what earlier versions did not write."""
    own, file = folder / "adapter.json", folder / "adapter_model.safetensors"
    if own.exists():
        own.write_text(
            json.dumps({key: value for key, value in json.loads(own.read_text()).items() if key not in keys})
        )
    if not file.exists():
        return
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["vitlorafa"])
    header = {key: value for key, value in header.items() if key not in keys}
    save_file(load_file(file), file, {"format": "pt", "vitlorafa": json.dumps(header)})


def test_all_heads_train_where_logits_are_added():
    """VOLO adds its auxiliary head's, which timm's get_classifier() leaves out."""
    names = head_parameters(small("volo_d1_224"))
    assert {name.partition(".")[0] for name in names} == {"head", "aux_head"} and len(names) == 4


def test_a_model_can_be_adapted_again_after_it_was_merged(name, adapted):
    model, linears = adapted
    vitlorafa.merge_and_unload(model)
    assert {n for n, module in model.named_modules() if isinstance(module, nn.Linear)} == linears
