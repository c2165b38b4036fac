"""Weights in the layouts people have them in, onto timm models."""

import re

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.models import backbones, weight_files

NAME = "test_vit"  # timm's own tiny model, 160 px
IMAGES = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))


def small(name=NAME, **options):
    model = timm.create_model(name, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def loaded(name, path, **options):
    """A model with other weights, after those of a file were loaded onto it."""
    torch.manual_seed(7)
    model = small(name, **options)
    weight_files.load(model, name, path)
    return model


def assert_same_features(one, other, size=160):
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(one.forward_features(images), other.forward_features(images), atol=1e-5)


@pytest.fixture
def saved(tmp_path):
    def save(tensors):
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, tmp_path / "w.safetensors")
        return tmp_path / "w.safetensors"

    return save


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "_orig_mod.module.", "model.", "backbone.", "state_dict.", "state_dict.model.backbone."],
)
def test_prefixes_of_wrappers_are_left_out_and_reported(saved, prefix, capsys):
    model = small()
    path = saved({prefix + name: tensor for name, tensor in model.state_dict().items()})
    assert_same_features(loaded(NAME, path), model)
    assert f"read without the prefix '{prefix}'" in capsys.readouterr().err


def test_tensors_beside_the_model_are_named(saved, capsys):
    model = small()
    inside = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    path = saved({**inside, "criterion.weight": torch.ones(3), "epoch": torch.tensor(3)})
    assert_same_features(loaded(NAME, path), model)
    assert re.search(r"not used: (criterion.weight; epoch|epoch; criterion.weight)$", capsys.readouterr().err.strip())


@pytest.mark.parametrize("prefixes", [("student.", "teacher."), ("", "ema.")])
def test_a_file_of_several_models_is_refused(saved, prefixes):
    state = small().state_dict()
    path = saved({prefix + name: tensor for prefix in prefixes for name, tensor in state.items()})
    named = ", ".join(map(repr, prefixes))
    with pytest.raises(BenchmarkError, match=f"holds this model 2 times, under the prefixes {re.escape(named)}"):
        loaded(NAME, path)


def test_a_part_of_a_model_is_refused_under_a_prefix_too(saved):
    state = {f"module.{name}": tensor for name, tensor in small().state_dict().items()}
    del state["module.blocks.3.mlp.fc1.bias"]
    with pytest.raises(BenchmarkError, match=r"does not fit test_vit: blocks.3.mlp.fc1.bias is missing; give"):
        loaded(NAME, saved(state))


def test_position_embeddings_of_another_size_are_resampled_and_reported(saved, capsys):
    model = small(img_size=96)
    path = saved(model.state_dict())
    ours = backbones.create(NAME, str(path), 3).eval()
    assert ours.pos_embed.shape == (1, 101, 64)
    assert re.search(r"resampled by timm: pos_embed from \[1, 37, 64\] to \[1, 101, 64\]", capsys.readouterr().err)
    model.set_input_size(img_size=160)
    assert_same_features(ours, model)


def test_position_embeddings_are_resampled_once_to_the_size_of_the_images(saved):
    model = small(img_size=96)
    ours = backbones.create(NAME, str(saved(model.state_dict())), 3, image_size=96).eval()
    assert torch.equal(ours.pos_embed, model.pos_embed)


def test_patches_of_another_size_are_refused(saved):
    path = saved(small("vit_tiny_patch16_224", depth=1).state_dict())
    with pytest.raises(BenchmarkError, match=r"\[192, 3, 16, 16\] \(patches of 16 pixels\) instead of .*of 8 pixels"):
        loaded("vit_small_patch8_224", path, embed_dim=192, depth=1)


def test_a_head_of_other_classes_does_not_matter(saved):
    model = small(num_classes=11)
    assert_same_features(loaded(NAME, saved(model.state_dict())), model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(saved, dtype):
    state = small().state_dict()
    state["blocks.0.attn.proj.weight"] = state["blocks.0.attn.proj.weight"].to(dtype)
    with pytest.raises(BenchmarkError, match=r"blocks.0.attn.proj.weight is (int8|float8_e4m3fn) instead of float32"):
        loaded(NAME, saved(state))


def test_batch_norm_without_its_count_of_batches(saved):
    model = small("test_resnet")
    state = {name: tensor for name, tensor in model.state_dict().items() if "num_batches" not in name}
    assert_same_features(loaded("test_resnet", saved(state)), model)


def test_a_folder_holds_weights(saved, tmp_path):
    model = small()
    path = saved(model.state_dict())
    assert_same_features(loaded(NAME, tmp_path), model)
    save_file(load_file(path), tmp_path / "other.safetensors")
    with pytest.raises(BenchmarkError, match="holds several .safetensors files and no model.safetensors"):
        weight_files.find(tmp_path)
    path.rename(tmp_path / "model.safetensors")
    assert weight_files.find(tmp_path).name == "model.safetensors"


def test_a_folder_of_pickles_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(BenchmarkError, match=r"pytorch_model.bin is not a .safetensors file: convert it"):
        weight_files.find(tmp_path)


def transformers_state(model, names, prefix, layer_names):
    """A timm model's tensors as transformers names them: the inverse of what is tested."""
    state = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "blocks" and parts[2] == "attn" and parts[3] == "qkv":
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                state[f"{prefix}encoder.layer.{parts[1]}.attention.attention.{part}.{parts[4]}"] = third
        elif parts[0] == "blocks":
            inner, _, kind = ".".join(parts[2:]).rpartition(".")
            state[f"{prefix}encoder.layer.{parts[1]}.{layer_names.get(f'{inner}.{kind}', f'{inner}.{kind}')}"] = tensor
        elif name in names:
            state[prefix + names[name]] = tensor
        else:
            state[name.replace("head_dist", "distillation_classifier").replace("head", "classifier")] = tensor
    return state


EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "reg_token": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
VIT = {
    f"{ours}.{kind}": f"{theirs}.{kind}"
    for ours, theirs in {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }.items()
    for kind in ("weight", "bias")
}
DINOV2 = {
    **{f"attn.proj.{kind}": f"attention.output.dense.{kind}" for kind in ("weight", "bias")},
    **{f"ls{i}.gamma": f"layer_scale{i}.lambda1" for i in (1, 2)},
}
SWIGLU = {
    **DINOV2,
    **{f"mlp.fc1.{kind}": f"mlp.weights_in.{kind}" for kind in ("weight", "bias")},
    **{f"mlp.fc2.{kind}": f"mlp.weights_out.{kind}" for kind in ("weight", "bias")},
}
SMALL = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}
SMALL14 = {**SMALL, "img_size": 28}


@pytest.mark.parametrize(
    ("name", "options", "prefix", "layers"),
    [
        ("vit_small_patch16_224", SMALL, "vit.", VIT),
        ("vit_small_patch16_224", SMALL, "", VIT),  # ViTModel, without a head
        ("vit_small_patch16_224", SMALL, "model.vit.", VIT),
        ("deit_tiny_distilled_patch16_224", SMALL, "deit.", VIT),
        ("vit_small_patch14_dinov2", SMALL14, "dinov2.", DINOV2),
        ("vit_giant_patch14_dinov2", SMALL14, "", SWIGLU),
    ],
)
def test_the_layout_of_transformers(saved, name, options, prefix, layers, capsys):
    model = small(name, **options)
    state = transformers_state(model, EMBEDDINGS, prefix, layers)
    state |= {f"{prefix}pooler.dense.weight": torch.ones(2, 2), f"{prefix}embeddings.mask_token": torch.ones(1, 1, 48)}
    assert_same_features(loaded(name, saved(state), **options), model, options["img_size"])
    said = capsys.readouterr().err
    assert "read in the layout of transformers; not used: " in said and "mask_token" in said


def test_the_layout_of_transformers_with_registers(saved):
    """There the class token has a position embedding of its own, in timm it is added to the token."""
    name, options = "vit_small_patch14_reg4_dinov2", SMALL14
    model = small(name, **options)
    state = transformers_state(model, EMBEDDINGS, "", DINOV2)
    of_class = torch.randn(1, 1, 48)
    state["embeddings.cls_token"] = model.cls_token.detach() - of_class
    state["embeddings.position_embeddings"] = torch.cat([of_class, model.pos_embed.detach()], dim=1)
    assert_same_features(loaded(name, saved(state), **options), model, 28)


def test_the_layout_of_transformers_of_another_size_is_resampled(saved, capsys):
    model = small("vit_small_patch16_224", **SMALL)
    path = saved(transformers_state(model, EMBEDDINGS, "vit.", VIT))
    ours = loaded("vit_small_patch16_224", path, **{**SMALL, "img_size": 64})
    assert "resampled by timm: pos_embed from [1, 5, 48] to [1, 17, 48]" in capsys.readouterr().err
    model.set_input_size(img_size=64)
    assert_same_features(ours, model, 64)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.pop("vit.encoder.layer.1.attention.attention.key.bias"), "blocks.1.attn.qkv.bias is missing"),
        (lambda s: s.update({"vit.encoder.layer.1.adapter.weight": torch.ones(1)}), "adapter.weight is not in the mod"),
    ],
)
def test_a_transformers_file_that_fits_only_partly_is_refused(saved, change, sentence):
    state = transformers_state(small("vit_small_patch16_224", **SMALL), EMBEDDINGS, "vit.", VIT)
    change(state)
    with pytest.raises(BenchmarkError, match=sentence):
        loaded("vit_small_patch16_224", saved(state), **SMALL)


def test_other_layouts_that_timm_knows_are_converted(saved, capsys):
    """OpenAI's CLIP, of which timm takes the image tower."""
    name, options = "vit_base_patch16_clip_quickgelu_224", SMALL
    model = small(name, **options, num_classes=0)
    renames = {
        "patch_embed.proj": "conv1",
        "pos_embed": "positional_embedding",
        "blocks.": "transformer.resblocks.",
        "norm_pre": "ln_pre",
        "qkv.": "in_proj_",
        "attn.proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "cls_token": "class_embedding",
    }
    state = {"visual.proj": torch.randn(48, 8), "logit_scale": torch.tensor(1.0)}
    for key, tensor in model.state_dict().items():
        new = re.sub(r"^norm\.", "ln_post.", re.sub(r"norm([12])", r"ln_\1", key))
        for ours, theirs in renames.items():
            new = new.replace(ours, theirs)
        state[f"visual.{new}"] = tensor.flatten(0, -2) if key == "pos_embed" else tensor
    state["visual.class_embedding"] = state["visual.class_embedding"].flatten()
    assert_same_features(loaded(name, saved(state), **options), model, 32)
    assert "converted by timm" in capsys.readouterr().err
