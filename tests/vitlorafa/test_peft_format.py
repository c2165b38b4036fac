import copy
import json
import warnings

import pytest
import torch
from messages import naming
from packaging.version import Version
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from small_models import build, images, perturb

import vitlorafa
from vitlorafa import AdapterConfig, AdapterError, AdapterWarning, adapter_layers, inject, load_adapter, save_adapter
from vitlorafa.adapted import head_parameters

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.numbers
some_blocks = pytest.mark.skipif(
    Version(peft.__version__) < Version("0.21"),
    reason="PEFT before 0.21 finds no layers_pattern at the start of a name",
)

VIT = "vit_tiny_patch16_224"
DISTILLED = "deit_tiny_distilled_patch16_224"
# Among them q_proj, two linears for one fc1, packed SwiGLU, attentions in parallel, head.fc, an attention pool.
ARCHITECTURES = (
    VIT,
    DISTILLED,
    "eva02_base_patch14_224",
    "vit_small_patch16_18x2_224",
    "swin_tiny_patch4_window7_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_giant_patch14_reg4_dinov2",
    "vit_base_patch16_siglip_224",
)


def ours(architecture=VIT, *, head=True, **kwargs):
    """An adapted model that has moved away from its start."""
    model = inject(build(architecture), AdapterConfig(**{"rank": 3, "seed": 0, **kwargs}), train_head=head)
    perturb(model)
    with torch.no_grad():
        for parameter in head_parameters(model).values() if head else ():
            parameter.normal_()
    return model


def theirs(architecture=VIT, *, config=peft.LoraConfig, build_kwargs=None, **kwargs):
    """The same of PEFT."""
    model = peft.get_peft_model(
        build(architecture, **(build_kwargs or {})), config(**{"r": 3, "lora_alpha": 5, **kwargs})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def saved(model, folder, **kwargs):
    with warnings.catch_warnings():  # PEFT's own
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, save_embedding_layers=False, **kwargs)  # "auto" would ask the hub
    return folder


def load_in_peft(folder, architecture=VIT, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of missing and of unexpected keys, in the config and in the tensors
        return peft.PeftModel.from_pretrained(build(architecture, **kwargs), folder).eval()


@torch.no_grad()
def assert_same(one, other, architecture=VIT, tolerance=1e-6, **kwargs):
    """The same logits in float64, up to factors' rounding to float32, and not those of the pretrained model."""
    plain = build(architecture, **kwargs).double()
    x = images(plain).double()
    one, other = (copy.deepcopy(model).double()(x) for model in (one, other))
    torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)
    assert (one - plain(x)).abs().max() > 1e-3


def state(model):
    return {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}


def assert_unchanged(model, before):
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and not hasattr(model, "_vitlorafa")
    assert all(torch.equal(t, after[n]) and r == after[n].requires_grad for n, (t, r) in before.items())


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# From here to PEFT


@pytest.mark.parametrize("train", ["B", "A", "BA"])
@pytest.mark.parametrize("targets", ["all", "q,v"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_loads(architecture, targets, train, tmp_path):
    model = ours(architecture, targets=targets, train=train)
    save_adapter(model, tmp_path, head=True, format="peft")
    other = load_in_peft(tmp_path, architecture)
    assert_same(other, model, architecture)
    assert sum(".lora_A." in name for name, _ in other.named_parameters()) == len(list(adapter_layers(model)))


@pytest.mark.parametrize("rank_stabilised", [False, True])
@pytest.mark.parametrize("targets", ["q", "q,k", "q,k,v", "fc1", "v,fc2"])
def test_scale_of_every_layer(targets, rank_stabilised, tmp_path):
    """In a model of twelve blocks, among whose names 1 is also the end of 11."""
    deep = {"depth": 12, "embed_dim": 48}
    config = AdapterConfig(rank=5, alpha=7, targets=targets, rank_stabilised=rank_stabilised)
    model = inject(build(VIT, **deep), config)
    save_adapter(model, tmp_path, format="peft")
    found = {
        name: (module.r["default"], module.scaling["default"])
        for name, module in load_in_peft(tmp_path, **deep).base_model.model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert found == {
        name: (5 * len(layer.projections), pytest.approx(layer.scale, rel=1e-15, abs=0))
        for name, layer in adapter_layers(model)
    }


def test_files(tmp_path):
    model = ours(targets="q,v,fc1", dropout=0.1, rank_stabilised=True)
    save_adapter(model, tmp_path, head=True, format="peft", metadata={"step": 3})
    files = ["adapter.json", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == VIT
    assert config["r"] == 3 and config["rank_pattern"] == {"qkv": 6}
    assert config["use_rslora"] and config["lora_dropout"] == 0.1 and config["modules_to_save"] == ["head"]
    assert config["target_modules"] == [f"blocks.{i}.{name}" for i in range(2) for name in ("attn.qkv", "mlp.fc1")]
    B = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.blocks.1.attn.qkv.lora_B.weight"]
    q, _, v = model.blocks[1].attn.qkv.lora_B[0], None, model.blocks[1].attn.qkv.lora_B[1]
    assert torch.equal(B, torch.block_diag(q, torch.zeros(192, 0), v))
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["vitlorafa"])["metadata"] == {"step": 3}
    dropout = load_in_peft(tmp_path).base_model.model.blocks[0].attn.qkv.lora_dropout["default"]
    assert dropout.p == 0.1


@pytest.mark.parametrize(
    ("architecture", "modules"),
    [(VIT, ["head"]), (DISTILLED, ["head", "head_dist"]), ("swin_tiny_patch4_window7_224", ["head.fc"])],
)
def test_head(architecture, modules, tmp_path):
    model = ours(architecture)
    save_adapter(model, tmp_path, format="peft")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] is None
    assert not torch.allclose(load_in_peft(tmp_path, architecture)(images(model)), model(images(model)), atol=1e-2)
    save_adapter(model, tmp_path, format="peft", head=True)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == modules
    assert_same(load_in_peft(tmp_path, architecture), model, architecture)


def test_merged(tmp_path):
    model = ours(targets="all")
    save_adapter(model, tmp_path / "a", head=True, format="peft")
    save_adapter(vitlorafa.merge(model), tmp_path / "b", head=True, format="peft")
    assert_same(load_in_peft(tmp_path / "b"), model, tolerance=1e-4)  # merged weights are rounded to float32
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("architecture", ["beit_base_patch16_224", "eva_giant_patch14_224", "swinv2_tiny_window8_256"])
def test_attention_that_reads_the_weight(architecture, tmp_path):
    with pytest.raises(AdapterError, match=naming("PEFT", ".attn.qkv", "qkv_bias_separate = True")):
        save_adapter(ours(architecture), tmp_path / "none", format="peft")
    assert not (tmp_path / "none").exists()
    save_adapter(ours(architecture, targets="proj,fc1", head=False), tmp_path, format="peft")

    def separate():
        model = build(architecture)
        for module in model.modules():
            if hasattr(module, "qkv_bias_separate"):
                module.qkv_bias_separate = True
        return model

    model = inject(separate(), AdapterConfig(rank=2))
    perturb(model)
    save_adapter(model, tmp_path, format="peft")
    assert_same(peft.PeftModel.from_pretrained(separate(), tmp_path).eval(), model, architecture)


def test_unknown_format(tmp_path):
    with pytest.raises(AdapterError, match=naming("format 'petf'", "'peft'")):
        save_adapter(ours(), tmp_path / "none", format="petf")
    assert not (tmp_path / "none").exists()


# And back


@pytest.mark.parametrize("train", ["B", "A", "BA"])
@pytest.mark.parametrize("targets", ["all", "k", "q,v,fc2"])
def test_round_trip(targets, train, tmp_path):
    model = ours(
        DISTILLED, targets=targets, train=train, rank_stabilised=True, dropout=0.2, init_A=None, compute="separate"
    )
    save_adapter(model, tmp_path, head=True, format="peft")
    other = load_adapter(build(DISTILLED), tmp_path)
    before, after = state(model), state(other)
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[n][0]) and r == after[n][1] for n, (t, r) in before.items())
    assert other._vitlorafa.config == model._vitlorafa.config


@pytest.mark.parametrize("edited", ["alpha", "trained"])
def test_after_a_change_in_peft(edited, tmp_path):
    """Nothing of ours may outlive what it was about: three adapters on qkv are then one of three times the rank."""
    save_adapter(ours(targets="q,k,v,fc1", dropout=0.1), tmp_path, head=True, format="peft")
    if edited == "alpha":
        edit(tmp_path, lora_alpha=1.5)
    else:
        model = load_in_peft(tmp_path)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        saved(model, tmp_path)
    model = load_adapter(build(VIT), tmp_path)
    assert_same(load_in_peft(tmp_path), model)
    assert model._vitlorafa.config.rank == 9 and model._vitlorafa.config.dropout == 0.1


def test_damaged_after_the_header(tmp_path):
    save_adapter(ours(targets="q,v"), tmp_path, format="peft")
    file = tmp_path / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = load(file.read_bytes())  # load_file maps the file, which is written again below
    for lost, named in (
        (QKV_B, ["blocks.0.attn.qkv", "A [r, d_in]"]),
        ("blocks.0", ["adapter_model.safetensors", "(blocks.0", "save it again"]),
    ):
        save_file({name: tensor for name, tensor in tensors.items() if lost not in name}, file, header)
        with pytest.raises(AdapterError, match=naming(*named)):
            load_adapter(build(VIT), tmp_path)


def test_one_adapter_in_a_folder(tmp_path):
    for first, second in (("peft", "vitlorafa"), ("vitlorafa", "peft")):
        save_adapter(ours(targets="k"), tmp_path, format=first)
        model = save_adapter(ours(targets="proj"), tmp_path, format=second)
        assert len(list(tmp_path.iterdir())) == (3 if second == "peft" else 2)
        model = load_adapter(build(VIT), tmp_path)
        assert model._vitlorafa.config.targets == ("proj",)
    saved(theirs(target_modules=["qkv"]), save_adapter(ours(), tmp_path / "peft"))  # over ours
    assert load_adapter(build(VIT), tmp_path / "peft")._vitlorafa.config.targets == ("q", "k", "v")
    saved(theirs(target_modules=["qkv"]), save_adapter(ours(), tmp_path / "both", format="vitlorafa"))
    with pytest.raises(AdapterError, match=naming("both", "adapter.safetensors", "adapter_config.json", "delete")):
        load_adapter(build(VIT), tmp_path / "both")


# From PEFT to here


@pytest.mark.parametrize(
    ("architecture", "targets", "kwargs"),
    [
        (VIT, "q,k,v,fc1,fc2", {"target_modules": ["qkv", "fc1", "fc2"], "modules_to_save": ["head"]}),
        (VIT, "q,k,v,proj", {"target_modules": r"blocks\.\d+\.attn\.(qkv|proj)"}),
        (VIT, "all", {"target_modules": "all-linear", "modules_to_save": ["head"]}),
        (VIT, "all", {"target_modules": "all-linear", "exclude_modules": ["head"], "use_rslora": True}),
        (VIT, "proj", {"target_modules": ["attn.proj"], "lora_dropout": 0.3, "init_lora_weights": "gaussian"}),
        pytest.param(
            VIT,
            "q,k,v",
            {
                "target_modules": ["qkv"],
                "layers_to_transform": [0, 1],
                "layers_pattern": "blocks",
                "init_lora_weights": False,
            },
            marks=some_blocks,
        ),
        (VIT, "fc1", {"target_modules": ["fc1"], "init_lora_weights": "orthogonal", "r": 4}),
        (
            VIT,
            "q,k,v,proj,fc1",
            {
                "target_modules": ["qkv", "attn.proj", "fc1"],
                "rank_pattern": {"fc1": 7, r"^blocks\.0\.attn\.proj": 2},
                "alpha_pattern": {"qkv": 3.5, "0.attn.proj|fc1": 11},
            },
        ),
        (
            VIT,
            "q,k,v,fc2",
            {"target_modules": ["qkv", "fc2"], "rank_pattern": {"qkv": 6}, "use_rslora": True},
        ),
        (DISTILLED, "fc2", {"target_modules": ["fc2"], "modules_to_save": ["head", "head_dist"]}),
        ("eva02_base_patch14_224", "q,v,fc1", {"target_modules": ["q_proj", "v_proj", "fc1_g", "fc1_x"]}),
        ("swin_tiny_patch4_window7_224", "q,k,v,fc1", {"target_modules": ["qkv", "fc1"], "modules_to_save": ["head"]}),
        ("vit_giant_patch14_reg4_dinov2", "q,k,v,fc1,fc2", {"target_modules": ["qkv", "fc1", "fc2"]}),
        ("vit_small_patch16_18x2_224", "q,k,v", {"target_modules": ["qkv"], "modules_to_save": ["head"]}),
    ],
)
def test_what_peft_wrote(architecture, targets, kwargs, tmp_path):
    model = theirs(architecture, **kwargs)
    saved(model, tmp_path)
    other = load_adapter(build(architecture), tmp_path)
    assert_same(other, model, architecture)
    config = other._vitlorafa.config
    assert config.train == "BA" and config.dropout == kwargs.get("lora_dropout", 0)
    assert config.targets == AdapterConfig(targets=targets).targets
    assert config.rank == max([kwargs.get("r", 3), *kwargs.get("rank_pattern", {}).values()])
    assert config.rank_stabilised == kwargs.get("use_rslora", False)
    heads = head_parameters(other)
    trained = {n for n, p in other.named_parameters() if p.requires_grad}
    assert trained >= {f"{name}.lora_{factor}" for name, _ in adapter_layers(other) for factor in "AB"}
    assert trained & heads.keys() == (heads.keys() if "modules_to_save" in kwargs else set())


@pytest.mark.parametrize(
    ("kwargs", "layers", "others"),
    [
        pytest.param(
            {"target_modules": ["qkv"], "layers_to_transform": [0], "layers_pattern": "blocks"},
            ["blocks.0.attn.qkv"],
            "blocks.1.attn.qkv",
            marks=some_blocks,
        ),
        (
            {"target_modules": ["qkv", "blocks.1.mlp.fc1"]},
            ["blocks.0.attn.qkv", "blocks.1.attn.qkv", "blocks.1.mlp.fc1"],
            "blocks.0.mlp.fc1",
        ),
    ],
)
def test_layers_of_some_blocks(kwargs, layers, others, tmp_path):
    model = theirs(**kwargs)
    saved(model, tmp_path / "theirs")
    with pytest.warns(AdapterWarning, match=naming(f"has no adapter for {others}")):
        other = load_adapter(build(VIT), tmp_path / "theirs")
    assert [name for name, _ in adapter_layers(other)] == layers
    for format in ("peft", "vitlorafa"):
        save_adapter(other, tmp_path / format, format=format)
        with warnings.catch_warnings():
            warnings.simplefilter("error", AdapterWarning)
            assert_same(load_adapter(build(VIT), tmp_path / format), model)
    assert_same(load_in_peft(tmp_path / "peft"), model)


def test_pattern_of_one_layer(tmp_path):
    model = theirs(
        target_modules=["attn.proj"],
        rank_pattern={"blocks.1.attn.proj": 2},
        alpha_pattern={"1.attn.proj": 40},
        build_kwargs={"depth": 12, "embed_dim": 48},
    )
    saved(model, tmp_path)
    other = load_adapter(build(VIT, depth=12, embed_dim=48), tmp_path)
    assert_same(other, model, depth=12, embed_dim=48)
    assert [layer.lora_A[0, 2:].any().item() for _, layer in adapter_layers(other)] == [i != 1 for i in range(12)]
    # What is padded stays zero: neither factor of it has a gradient.
    other(images(other)).square().sum().backward()
    layer = other.blocks[1].attn.proj
    assert layer.lora_A.grad[0, :2].any() and layer.lora_B.grad[0, :, :2].any()
    assert not layer.lora_A.grad[0, 2:].any() and not layer.lora_B.grad[0, :, 2:].any()


def test_go_on_with_one_factor(tmp_path):
    model = theirs(target_modules=["qkv"], modules_to_save=["head"])
    saved(model, tmp_path)
    other = inject(build(VIT), AdapterConfig(rank=3, alpha=5, train="B", targets="q,k,v"), train_head=True)
    assert_same(load_adapter(other, tmp_path), model)
    assert not any(layer.lora_A.requires_grad for _, layer in adapter_layers(other))
    headless = build(VIT)
    headless.reset_classifier(0)
    load_adapter(headless, tmp_path, head=False)
    x = images(headless)
    torch.testing.assert_close(headless.forward_features(x), other.forward_features(x), atol=1e-5, rtol=1e-5)


LORA = {"target_modules": ["qkv"]}


@pytest.mark.parametrize(
    ("named", "kwargs"),
    [
        (["patch_embed.proj", "target_modules", "merge_and_unload"], {"target_modules": ["proj"]}),
        (["head", "target_modules"], {"target_modules": "all-linear"}),
        (["use_dora=True", "merge_and_unload"], LORA | {"use_dora": True}),
        (["lora_bias=True"], LORA | {"lora_bias": True}),
        (["bias='all'"], LORA | {"bias": "all"}),
        (
            ["init_lora_weights='pissa'", "path_initial_model"],
            LORA | {"init_lora_weights": "pissa"},
        ),
        (["init_lora_weights='olora'"], LORA | {"init_lora_weights": "olora"}),
        (["norm.weight", "norm.bias", "neither LoRA nor"], LORA | {"modules_to_save": ["norm", "head"]}),
        (["rank 100", "64"], LORA | {"r": 100}),
        (["dropout", "below 1"], LORA | {"lora_dropout": 1.0}),
    ],
)
def test_refusals(named, kwargs, tmp_path):
    saved(theirs(build_kwargs={"embed_dim": 64, "num_heads": 2}, **kwargs), tmp_path)
    model = build(VIT, embed_dim=64, num_heads=2)
    before = state(model)
    with pytest.raises(AdapterError, match=naming(*named)):
        load_adapter(model, tmp_path, head=False)
    assert_unchanged(model, before)


def test_other_methods(tmp_path):
    for config, kwargs in ((peft.VeraConfig, {"target_modules": ["fc1"]}), (peft.LoHaConfig, LORA)):
        model = peft.get_peft_model(build(VIT), config(r=2, **kwargs))
        kind = config.__name__.removesuffix("Config").upper()
        with pytest.raises(AdapterError, match=naming(kind, "LORA", "merge_and_unload")):
            load_adapter(build(VIT), saved(model, tmp_path / kind))


def tensors_edit(change):
    def apply(folder):
        tensors = load((folder / "adapter_model.safetensors").read_bytes())
        save_file(change(tensors), folder / "adapter_model.safetensors")

    return apply


QKV_B = "base_model.model.blocks.0.attn.qkv.lora_B.weight"


@pytest.mark.parametrize(
    ("named", "damage"),
    [
        (
            ["adapter_model.bin", "safe_serialization=True"],
            lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        ),
        (["cannot read"], lambda f: (f / "adapter_model.safetensors").unlink()),
        (["cannot read"], lambda f: (f / "adapter_model.safetensors").write_bytes(b"12345678{")),
        (["cannot read", "line 1"], lambda f: (f / "adapter_config.json").write_text("{")),
        (["adapter_config.json", "PEFT"], lambda f: (f / "adapter_config.json").write_text("[]")),
        (["peft_type None", "LORA"], lambda f: (f / "adapter_config.json").write_text("{}")),
        (["alpha", "number", "'x'"], lambda f: edit(f, lora_alpha="x")),
        (["a_new_variant=1", "merge_and_unload"], lambda f: edit(f, a_new_variant=1)),
        (["any layer"], tensors_edit(lambda t: {})),
        (["A [r, d_in]", "blocks.0.attn.qkv"], tensors_edit(lambda t: {k: v for k, v in t.items() if k != QKV_B})),
        (["A [r, d_in]", "blocks.0.attn.qkv"], tensors_edit(lambda t: t | {QKV_B: t[QKV_B][:, :1].contiguous()})),
        (["64, 3]", "192, 3]"], tensors_edit(lambda t: t | {QKV_B: t[QKV_B][:192].contiguous()})),
        (
            ["blocks.0.attn.qkv.lora_magnitude_vector", "neither LoRA nor"],
            tensors_edit(lambda t: t | {QKV_B.replace("lora_B.weight", "lora_magnitude_vector"): torch.ones(1)}),
        ),
        (
            ["head", "num_classes=4"],
            tensors_edit(lambda t: {k: v[:4].contiguous() if ".head." in k else v for k, v in t.items()}),
        ),
        (["head", "head=False"], tensors_edit(lambda t: {k: v for k, v in t.items() if ".head." not in k})),
    ],
)
def test_damaged(named, damage, peft_folder):
    damage(peft_folder)
    model = build(VIT)
    before = state(model)
    with pytest.raises(AdapterError, match=naming(*named)):
        load_adapter(model, peft_folder, head=True)
    assert_unchanged(model, before)


@pytest.fixture
def peft_folder(tmp_path):
    return saved(theirs(target_modules=["qkv"], modules_to_save=["head"]), tmp_path)


@pytest.mark.parametrize(
    ("architecture", "named"),
    [
        ("eva02_base_patch14_224", ["blocks.0.attn.qkv, blocks.1.attn.qkv", "Eva"]),
        ("vit_small_patch16_224", ["vit_small_", "[3, 3, 192]"]),
    ],
)
def test_wrong_model(architecture, named, peft_folder):
    model = build(architecture)
    before = state(model)
    with pytest.raises(AdapterError, match=naming(*named)):
        load_adapter(model, peft_folder, head=False)
    assert_unchanged(model, before)


def test_attention_pool(tmp_path):
    """Layers outside of the blocks are named by a pattern."""
    architecture = "vit_base_patch16_siglip_224"
    model = theirs(architecture, target_modules=["fc1", "fc2"])
    loaded = load_adapter(build(architecture), saved(model, tmp_path))
    assert {"attn_pool.mlp.fc1", "attn_pool.mlp.fc2"} <= {name for name, _ in adapter_layers(loaded)}
    assert loaded._vitlorafa.config.pattern
    assert_same(loaded, model, architecture)
