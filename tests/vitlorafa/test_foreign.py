"""Adapters in models of transformers, torchvision, open_clip and torch itself."""

import copy
import warnings

import pytest
import torch
from adapted import same, snapshot
from foreign_models import FOREIGN, PACKED, build_foreign, images, run
from messages import naming
from small_models import perturb
from torch import nn

import vitlorafa
from vitlorafa import (
    AdapterConfig,
    AdapterError,
    AdapterWarning,
    adapter_layers,
    add_adapter,
    classifiers,
    delete_adapter,
    inject,
    load_adapter,
    save_adapter,
    set_adapter,
    summary,
)

pytestmark = pytest.mark.numbers
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(params=FOREIGN)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return build_foreign(name)


def everything(**kwargs):
    return AdapterConfig(**{"rank": 3, "targets": "all", "seed": 0, **kwargs})


def move_B(model):
    for _, layer in adapter_layers(model):
        layer.lora_B.add_(0.1 * torch.randn_like(layer.lora_B))


def plain_definition(model, adapted):
    """Adds s·B·A to the weights of an unadapted model, rows of packed ones included, without this package's layers."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, layer in adapter_layers(adapted):
            packed = name.endswith(".in_proj")
            weight = parameters[f"{name}_weight" if packed else f"{name}.weight"]
            order = ("q", "k", "v") if packed else layer.projections
            for projection, A, B in zip(layer.projections, layer.lora_A, layer.lora_B, strict=True):
                start = order.index(projection) * len(B)
                weight[start : start + len(B)] += adapted_scale(layer) * B @ A
    return model


def adapted_scale(layer):
    return 2.0 if layer.lora_A.shape[1] == 3 else pytest.fail("these tests have rank 3 and the default alpha")


def test_all_six_projections_of_each_block_are_adapted(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdapterWarning)
        inject(model, everything())
    adapted = [projection for _, layer in adapter_layers(model) for projection in layer.projections]
    assert {projection: adapted.count(projection) for projection in ("q", "k", "v", "proj", "fc2")} == dict.fromkeys(
        ("q", "k", "v", "proj", "fc2"), 2
    )
    assert set(adapted) == {"q", "k", "v", "proj", "fc1", "fc2"}
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_B"}


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_starts_as_the_pretrained_model(model, training):
    model.train(training)
    for module in model.modules():  # torch draws dropout in the order of memory, which may differ
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.manual_seed(2)  # of stochastic depth
    y = run(model, images())
    inject(model, everything())
    torch.manual_seed(2)
    torch.testing.assert_close(run(model, images()), y, **CLOSE)


@pytest.mark.parametrize("compute", ["folded", "separate"])
@pytest.mark.parametrize("targets", ["all", "q,v", "k,proj", "fc1"])
def test_computes_the_plain_definition(name, targets, compute):
    """With and without gradients, of which torch chooses its fast path."""
    model = inject(build_foreign(name), everything(targets=targets, compute=compute))
    perturb(model)
    model.double()
    plain, x = plain_definition(build_foreign(name).double(), model), images().double()
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            torch.testing.assert_close(run(model, x), run(plain, x))
    assert (run(model, x) - run(build_foreign(name).double(), x)).abs().max() > 1e-3


def test_gradients_are_those_of_the_plain_definition(name):
    model = inject(build_foreign(name), everything(train="BA"))
    perturb(model)
    model.double()
    plain, x = plain_definition(build_foreign(name).double(), model), images().double()
    run(model, x).square().sum().backward()
    run(plain, x).square().sum().backward()
    full = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for layer_name, layer in adapter_layers(model):
        packed = layer_name.endswith(".in_proj")
        gradient = full[f"{layer_name}_weight" if packed else f"{layer_name}.weight"]
        for j, start in enumerate(layer.starts):
            A, B = layer.lora_A[j].detach(), layer.lora_B[j].detach()
            rows = gradient[start : start + len(B)]
            torch.testing.assert_close(layer.lora_B.grad[j], 2 * rows @ A.T)
            torch.testing.assert_close(layer.lora_A.grad[j], 2 * B.T @ rows)
            assert layer.lora_B.grad[j].any() and layer.lora_A.grad[j].any(), layer_name


@torch.no_grad()
@pytest.mark.parametrize("targets", ["all", "proj", "q,fc1"])
def test_merge_unmerge_and_remove(model, targets):
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    before, y = snapshot(model), run(model, images())
    inject(model, everything(targets=targets))
    perturb(model)
    adapted, z = snapshot(model), run(model, images())
    torch.testing.assert_close(run(vitlorafa.merge(model), images()), z, **CLOSE)
    vitlorafa.unmerge(model)
    assert same(adapted, snapshot(model)) and torch.equal(run(model, images()), z)
    with vitlorafa.disable_adapter(model):
        torch.testing.assert_close(run(model, images()), y, **CLOSE)
    vitlorafa.remove(vitlorafa.merge(model))
    assert same(before, snapshot(model)) and torch.equal(run(model, images()), y)


@torch.no_grad()
def test_merge_and_unload_gives_a_plain_model(model):
    before = snapshot(model)
    inject(model, everything())
    perturb(model)
    y = run(model, images())
    vitlorafa.merge_and_unload(model)
    after = snapshot(model)
    assert before[1:] == after[1:] and list(before[0]) == list(after[0])
    torch.testing.assert_close(run(model, images()), y, **CLOSE)
    inject(model, everything())  # again


@torch.no_grad()
@pytest.mark.parametrize("targets", ["all", "proj", "v"])
def test_saved_and_loaded_into_a_fresh_model(name, model, targets, tmp_path):
    head = bool(classifiers(model))
    inject(model, everything(targets=targets, train="BA"), train_head=head)
    perturb(model)
    for classifier in classifiers(model):
        for parameter in classifier.parameters():
            parameter.normal_()
    y = run(model, images())
    save_adapter(model, tmp_path, head=head)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdapterWarning)
        assert torch.equal(run(load_adapter(build_foreign(name), tmp_path), images()), y)
        adapted = inject(build_foreign(name), everything(targets=targets, train="BA"), train_head=head)
        assert torch.equal(run(load_adapter(adapted, tmp_path), images()), y)
    with torch.no_grad():
        other = build_foreign(name)
        next(p for n, p in other.named_parameters() if n.endswith(("fc1.weight", "linear1.weight", "0.weight"))
             or "weights_in" in n or "gate_proj" in n or "intermediate" in n or "c_fc" in n).add_(1)  # fmt: skip
    with pytest.warns(AdapterWarning, match="other weights"):
        load_adapter(other, tmp_path)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "kwargs", [{}, {"targets": "q,k,fc1"}, {"targets": "v", "train": "BA"}, {"init_A": "pissa"}], ids=str
)
@pytest.mark.parametrize("name", [name for name in FOREIGN if not name.startswith("TransformerEncoder")])
def test_a_round_trip_through_peft(name, kwargs, tmp_path):
    peft = pytest.importorskip("peft")
    model = build_foreign(name)
    head = bool(classifiers(model))
    targets = "q,k,v,fc1,fc2" if name in PACKED else "all"
    inject(model, everything(**{"targets": targets, **kwargs}), train_head=head)
    perturb(model)
    y = run(model, images())
    save_adapter(model, tmp_path / "ours", head=head, format="peft")
    other = load_adapter(build_foreign(name), tmp_path / "ours")
    assert [n for n, _ in adapter_layers(other)] == [n for n, _ in adapter_layers(model)]
    torch.testing.assert_close(run(other, images()), y, **CLOSE)
    theirs = peft.PeftModel.from_pretrained(build_foreign(name), tmp_path / "ours").eval()
    torch.testing.assert_close(run(theirs, images()), y, atol=1e-4, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    again = load_adapter(build_foreign(name), tmp_path / "theirs")
    torch.testing.assert_close(run(again, images()), y, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("name", "target"), [("torchvision", "self_attention"), ("open_clip", "attn")])
def test_output_projections_of_packed_attention_are_not_exchanged_with_peft(name, target, tmp_path):
    """PEFT adds their update twice."""
    for targets in ("all", "proj"):
        with pytest.raises(AdapterError, match=naming(f"{target}.out_proj", "leave proj out", "format='vitlorafa'")):
            save_adapter(inject(build_foreign(name), everything(targets=targets)), tmp_path / "none", format="peft")
    assert not (tmp_path / "none").exists()
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(build_foreign(name), peft.LoraConfig(r=2, target_modules=[target]))
    for n, parameter in theirs.named_parameters():
        if "lora_" in n:
            parameter.normal_()
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(AdapterError, match=naming(f".{target} ", "output projection", "merge_and_unload")):
        load_adapter(build_foreign(name), tmp_path)


def test_peft_would_ignore_adapters_of_encoder_layers(tmp_path):
    """Its wrapped layers show torch's fast path the pretrained weights."""
    with pytest.raises(AdapterError, match=naming("encoder.layers.0.", "PEFT", "format='vitlorafa'")):
        save_adapter(inject(build_foreign("TransformerEncoder"), everything()), tmp_path, format="peft")


@torch.no_grad()
@pytest.mark.parametrize("name", PACKED)
def test_copies_state_dicts_and_number_formats(name):
    model = inject(build_foreign(name), everything())
    perturb(model)
    y = run(model, images())
    assert torch.equal(run(copy.deepcopy(model), images()), y)
    other = inject(build_foreign(name), everything(seed=1))
    other.load_state_dict(vitlorafa.merge(model).state_dict())
    torch.testing.assert_close(run(other, images()), y, **CLOSE)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(run(other, images()).float(), y, atol=0.1, rtol=0.1)
    before = {name: tensor.dtype for name, tensor in other.state_dict().items()}
    vitlorafa.cast_frozen(other)
    vitlorafa.remove(other)
    assert set(before.values()) == {torch.float32}


def test_speed_up_changes_nothing_of_other_libraries(model):
    inject(model, everything())
    kinds = [type(module) for module in model.modules()]
    y = run(model, images())
    assert [type(module) for module in vitlorafa.speed_up(model).modules()] == kinds
    assert torch.equal(run(model, images()), y)


def test_the_head_trains_if_there_is_one(name, model):
    heads = {
        "transformers DeiT": ["cls_classifier", "distillation_classifier"],
        "torchvision": ["heads"],
        "open_clip": [],
        **{key: [] for key in ("transformers SigLIP", "transformers CLIP", "transformers DINOv2 SwiGLU")},
        **{key: ["head"] for key in (name for name in FOREIGN if name.startswith("TransformerEncoder"))},
    }.get(name, ["classifier"])
    assert [n for n, child in model.named_children() if child in classifiers(model)] == heads
    if heads:
        inject(model, everything(), train_head=True)
        assert all(p.requires_grad for head in classifiers(model) for p in head.parameters())
    else:
        before = snapshot(model)
        with pytest.raises(AdapterError, match=naming(type(model).__name__, "no head", "classifier", "unfreeze")):
            inject(model, everything(), train_head=True)
        assert same(before, snapshot(model))


@torch.no_grad()
@pytest.mark.parametrize("name", ["transformers DINOv2", "torchvision", "TransformerEncoder"])
def test_stacked_or_refused(name, tmp_path):
    outputs = []
    for i in range(2):
        model = inject(build_foreign(name), everything(), train_head=True)
        for _, layer in adapter_layers(model):
            layer.lora_B.normal_()
        save_adapter(model, tmp_path / str(i), head=True)
        outputs.append(run(model, images()))
    folders, model = [tmp_path / "0", tmp_path / "1"], build_foreign(name)
    if name == "TransformerEncoder":
        with pytest.raises(
            AdapterError, match=naming("encoder.layers.0", "nn.TransformerEncoderLayer", "load_adapter")
        ):
            vitlorafa.stack(model, folders)
        return
    with vitlorafa.choose_adapter(vitlorafa.stack(model, folders), [1, 0, 1]):
        y = run(model, images())
    torch.testing.assert_close(y, torch.stack([outputs[1][0], outputs[0][1], outputs[1][2]]), atol=1e-4, rtol=1e-4)


def test_a_lone_encoder_layer():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    y = layer(x)
    inject(layer, everything())
    names = {"linear1", "linear2", "self_attn.in_proj", "self_attn.out_proj"}
    assert {name for name, _ in adapter_layers(layer)} == names
    torch.testing.assert_close(layer(x), y, **CLOSE)


@torch.no_grad()
def test_padding_which_torch_turns_into_nested_tensors():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    plain = nn.TransformerEncoder(layer, 2).eval()
    model = inject(copy.deepcopy(plain), everything())
    x, padding = torch.randn(2, 5, 32), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    torch.testing.assert_close(model(x, src_key_padding_mask=padding), plain(x, src_key_padding_mask=padding), **CLOSE)
    perturb(model)
    merged = vitlorafa.merge_and_unload(copy.deepcopy(model))
    torch.testing.assert_close(model(x, src_key_padding_mask=padding), merged(x, src_key_padding_mask=padding), **CLOSE)


def test_one_tower_of_a_model_with_two():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    text = transformers.CLIPTextConfig(**sizes, vocab_size=20, bos_token_id=0, eos_token_id=1).to_dict()
    vision = transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=16).to_dict()
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    inject(model, everything(), prefix="vision_model")
    assert len(list(adapter_layers(model.vision_model))) == 6 and not list(adapter_layers(model.text_model))
    assert all(p.requires_grad == n.endswith("lora_B") for n, p in model.named_parameters())


def test_summary_names_layers_and_what_is_left_out(model):
    lines = summary(inject(model, everything())).splitlines()
    assert len(lines) == 2 + len(list(adapter_layers(model)))  # nothing is
    assert lines[-1].startswith("model")


class Hybrid(nn.Module):
    """Convolutions in front of a transformer, and blocks without an attention behind it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 16, 16)
        self.stage = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(2)))
        self.narrow = nn.Linear(64, 32)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2)
        self.mixer = nn.Sequential(*(nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 32)) for _ in range(3)))

    def forward(self, x):
        return self.mixer(self.encoder(self.narrow(self.stage(self.stem(x)).flatten(2).transpose(1, 2))))


def test_what_is_left_out_of_a_hybrid_is_said():
    named = ["Hybrid", "3 blocks (mixer.0, mixer.1, mixer.2)", "2 convolutions (stage.0, stage.1) with 52 %", "frozen"]
    with pytest.warns(AdapterWarning, match=naming(*named)):
        model = inject(Hybrid(), everything())
    assert [word for word in named if word not in summary(model).splitlines()[-1]] == []
    with pytest.warns(AdapterWarning) as warned:
        inject(Hybrid(), everything(targets="q,v"))
    assert "convolutions" not in str(warned[0].message)


@torch.no_grad()
def test_several_adapters_by_name(name, model):
    before, plain = run(model, images()), snapshot(model)
    add_adapter(model, "all", everything())
    perturb(model)
    expected = run(model, images())
    add_adapter(model, "two", everything(targets="q,v"))
    set_adapter(model, "two")
    torch.testing.assert_close(run(model, images()), before, **CLOSE)
    set_adapter(model, "all")
    torch.testing.assert_close(run(model, images()), expected, **CLOSE)
    delete_adapter(model, "two")
    delete_adapter(model, "all")
    assert same(plain, snapshot(model))


@torch.no_grad()
@pytest.mark.parametrize("targets", ["all", "q,v"])
def test_the_frozen_factor_is_drawn_again(name, model, targets, tmp_path):
    inject(model, everything(targets=targets))
    move_B(model)
    save_adapter(model, tmp_path, only_trained=True)
    loaded = load_adapter(build_foreign(name), tmp_path)
    torch.testing.assert_close(run(loaded, images()), run(model, images()), **CLOSE)


@torch.no_grad()
def test_layers_of_a_pattern_have_named_adapters_and_a_frozen_factor(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    fresh, x = copy.deepcopy(model), torch.randn(4, 8)
    before = model(x)
    add_adapter(model, "both", AdapterConfig(rank=2, targets=r"\d", seed=0))
    move_B(model)
    expected = model(x)
    add_adapter(model, "first", AdapterConfig(rank=2, targets=r"^0$"))
    set_adapter(model, "first")
    torch.testing.assert_close(model(x), before)
    save_adapter(model, tmp_path, only_trained=True, adapter="both")
    torch.testing.assert_close(load_adapter(fresh, tmp_path)(x), expected)
