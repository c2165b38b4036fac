"""Linear layers that a user names, by a pattern or a mapping, in models of any structure."""

import json
import warnings

import pytest
import torch
from foreign_models import build_foreign, images, run
from messages import naming
from small_models import build, perturb
from torch import nn

import vitlorafa
from vitlorafa import (
    AdapterConfig,
    AdapterError,
    AdapterWarning,
    adapter_layers,
    inject,
    load_adapter,
    save_adapter,
    summary,
)


class Own(nn.Module):
    """A transformer whose attention has names of its own, and a fused layer in another order than q, k, v."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"mix": nn.Linear(8, 24), "back": nn.Linear(8, 8), "up": nn.Linear(8, 16)}) for _ in range(2)
        )
        self.down = nn.ModuleList(nn.Linear(16, 8) for _ in range(2))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.embed(x)
        for layer, down in zip(self.layers, self.down, strict=True):
            v, q, k = layer["mix"](x).chunk(3, -1)
            x = x + layer["back"](nn.functional.scaled_dot_product_attention(q, k, v))
            x = x + down(layer["up"](x).relu())
        return self.head(x.mean(1))


MAPPING = {r"layers\.\d+\.mix": "v,q,k", r"layers\.\d+\.back": "proj", r"layers\.\d+\.up": ["fc1"], r"down\..+": "fc2"}


def own():
    torch.manual_seed(0)
    return Own().eval()


def adapted(**kwargs):
    model = inject(own(), AdapterConfig(rank=2, seed=0, **kwargs), train_head=True)
    perturb(model)
    with torch.no_grad():
        model.head.weight.normal_()
    return model


def projections(model):
    return {name: layer.projections for name, layer in adapter_layers(model)}


x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))


def test_a_mapping_says_which_layer_computes_what():
    model = adapted(sites=MAPPING, targets="q,v,fc2")
    assert projections(model) == {
        "layers.0.mix": ("v", "q"),
        "layers.1.mix": ("v", "q"),
        "down.0": ("fc2",),
        "down.1": ("fc2",),
    }
    assert {layer.starts for name, layer in adapter_layers(model) if "mix" in name} == {(0, 8)}
    v, q, k = model.layers[0]["mix"].delta_weight().chunk(3)
    assert v.any() and q.any() and not k.any()


def test_a_pattern_adapts_the_layers_that_it_matches_in_full():
    model = adapted(targets=r"layers\.1\..*|embed", init_A="uniform")
    assert projections(model) == dict.fromkeys(
        ("embed", "layers.1.mix", "layers.1.back", "layers.1.up"), ("linear",)
    )  # not the head, which trains
    assert model.embed.lora_A.any() and model._vitlorafa.config.inits("linear") == ("uniform", "zero")
    with pytest.raises(AdapterError, match=naming("'layers.1'", "full name of no linear layer", "layers.N.mix")):
        adapted(targets="layers.1")


def test_a_pattern_on_known_layers_keeps_their_projections():
    model = inject(build("test_vit"), AdapterConfig(rank=2, targets=r"blocks\.[01]\.(attn\.qkv|mlp\.fc1)"))
    assert set(projections(model).values()) == {("q", "k", "v"), ("fc1",)} and len(projections(model)) == 4
    model = inject(build_foreign("torchvision"), AdapterConfig(rank=2, targets=r".*_0\.self_attention\..*"))
    assert list(projections(model).values()) == [("q", "k", "v"), ("proj",)]
    pytest.importorskip("transformers")
    siglip = inject(build_foreign("transformers SigLIP"), AdapterConfig(rank=2, targets=r"head\..*"))
    assert "head.attention.in_proj" in projections(siglip)
    perturb(siglip)
    y = run(siglip, images())
    torch.testing.assert_close(run(vitlorafa.merge(siglip), images()), y, atol=1e-5, rtol=1e-5)
    pool = vitlorafa.remove(siglip).head.attention
    assert type(pool) is nn.MultiheadAttention


@torch.no_grad()
@pytest.mark.parametrize("format", ["vitlorafa", "peft"])
@pytest.mark.parametrize(
    "kwargs",
    [{"sites": MAPPING, "targets": "all"}, {"sites": MAPPING, "targets": "q"}, {"targets": ".*(mix|down).*"}],
    ids=["all", "q", "pattern"],
)
def test_saved_and_loaded_into_a_fresh_model(kwargs, format, tmp_path):
    model = adapted(train="BA", **kwargs)
    y = model(x)
    save_adapter(model, tmp_path, head=True, format=format)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdapterWarning)
        other = load_adapter(own(), tmp_path)
    assert torch.equal(other(x), y) and projections(other) == projections(model)
    assert other._vitlorafa.config == model._vitlorafa.config
    torch.testing.assert_close(vitlorafa.merge_and_unload(other)(x), y)
    assert vitlorafa.average([tmp_path, tmp_path], tmp_path / "mean").residual == 0


@torch.no_grad()
@pytest.mark.parametrize("kwargs", [{"sites": MAPPING, "targets": "all"}, {"targets": ".*(mix|down).*"}], ids=str)
def test_a_round_trip_through_peft(kwargs, tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted(**kwargs)
    y = model(x)
    theirs = peft.PeftModel.from_pretrained(own(), save_adapter(model, tmp_path / "a", head=True, format="peft")).eval()
    torch.testing.assert_close(theirs(x), y)
    theirs.save_pretrained(tmp_path / "b", save_embedding_layers=False)
    again = load_adapter(own(), tmp_path / "b")
    torch.testing.assert_close(again(x), y)
    assert again._vitlorafa.config.pattern


def test_summary_names_the_layers_that_a_pattern_leaves_out():
    last = summary(adapted(targets=r"layers\..*")).splitlines()[-1]
    assert "3 linear layers (embed, down.0, down.1)" in last


def test_removed_it_is_as_before():
    model = own()
    before = model(x)
    assert torch.equal(vitlorafa.remove(inject(model, AdapterConfig(targets=".*", rank=2)))(x), before)
    assert all(type(module) is nn.Linear for name, module in model.named_modules() if name.endswith(("mix", "down.0")))


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"targets": r"(q"}, ["targets", "'(q'", "regular expression"]),
        ({"targets": "*"}, ["'*'", "'all'"]),
        ({"targets": "attn.proj"}, ["'attn.proj'", "'proj'"]),
        ({"targets": ["q", r"fc\d"]}, ["2 values", "one pattern alone"]),
        ({"targets": r"fc\d", "blocks": "0"}, ["blocks", "patterns"]),
        ({"sites": {"a": "q"}, "targets": "a.*"}, ["sites", "names such as q"]),
        ({"sites": {}}, ["sites", "map patterns"]),
        ({"sites": "q"}, ["sites", "map patterns", "'q'"]),
        ({"sites": {"a": "qq"}}, ["target", "'qq'"]),
        ({"sites": {"(": "q"}}, ["sites", "'('", "regular expression"]),
        ({"sites": {"a": r"b\d"}}, ["sites", "'a'", "choose from q"]),
    ],
)
def test_an_error_names_the_field_the_value_and_the_remedy(kwargs, named):
    with pytest.raises(AdapterError, match=naming(*named)):
        AdapterConfig(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"sites": {r"layers\.\d": "q"}, "targets": "q"}, ["sites", "no linear layer", "layers.N.mix"]),
        ({"sites": MAPPING | {"embed": "q,k,v"}, "targets": "q"}, ["embed", "equal parts", "leave q, k and v out"]),
        ({"sites": {"embed": "fc1"}, "targets": "q,fc1"}, ["Own has no q", "fc1"]),
    ],
)
def test_a_model_that_does_not_fit_stays_as_it_is(kwargs, named):
    model = own()
    with pytest.raises(AdapterError, match=naming(*named)):
        inject(model, AdapterConfig(rank=2, **kwargs))
    assert not list(adapter_layers(model)) and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kwargs", [{"sites": MAPPING}, {"targets": r"a\.b{1,2}"}], ids=str)
def test_json_round_trip(kwargs):
    config = AdapterConfig(**kwargs)
    assert AdapterConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config and hash(config) == hash(config)
