"""Several adapters on one model, by name: each computes, trains, saves and loads as if it were the only one."""

import copy
import warnings

import pytest
import torch
from messages import naming
from small_models import build, images, perturb
from torch import nn

import vitlorafa
from vitlorafa import (
    AdapterConfig,
    AdapterError,
    AdapterWarning,
    active_adapter,
    adapter_layers,
    add_adapter,
    delete_adapter,
    inject,
    list_adapters,
    load_adapter,
    save_adapter,
    set_adapter,
)

ARCHITECTURE = "vit_small_patch16_224"
CONFIGS = {
    "photo": AdapterConfig(rank=2, seed=0),
    "sketch": AdapterConfig(rank=3, targets="all", train="BA", seed=1),
    "clipart": AdapterConfig(rank=2, targets="qkv", train="A", blocks="last1", seed=2),
}


def move(model, seed):
    """Moves factors and head, as training would, to where the seed says."""
    torch.manual_seed(seed)
    perturb(model)
    with torch.no_grad():
        for parameter in model.get_classifier().parameters():
            parameter.add_(torch.randn_like(parameter))


def alone(name, architecture=ARCHITECTURE):
    """A model with one adapter of `several`."""
    model = inject(build(architecture), CONFIGS[name], train_head=True)
    move(model, list(CONFIGS).index(name))
    return model


def several(architecture=ARCHITECTURE):
    model = build(architecture)
    for place, (name, config) in enumerate(CONFIGS.items()):
        add_adapter(model, name, config, train_head=True)
        set_adapter(model, name)
        move(model, place)
    return model


def state(model):
    return {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}


def assert_state(model, before):
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[n]) and r == after[n].requires_grad for n, (t, r) in before.items())


@torch.no_grad()
@pytest.mark.parametrize("architecture", [ARCHITECTURE, "beit_base_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_each_is_as_if_alone(architecture):
    """With its own config, layers, factors and head; whichever was active before."""
    model = build(architecture)
    x = images(model)
    plain = model(x)
    before = state(model)

    def moved(model, seed):
        torch.manual_seed(seed)
        perturb(model)

    for place, (name, config) in enumerate(CONFIGS.items()):
        add_adapter(model, name, config)
        assert active_adapter(model) == list(CONFIGS)[max(0, place - 1)]  # as PEFT: adding does not choose
        set_adapter(model, name)
        assert torch.equal(model(x), plain)
        moved(model, place)
    assert list_adapters(model) == list(CONFIGS)
    for name in ("sketch", "photo", "clipart", "photo"):
        set_adapter(model, name)
        expected = inject(build(architecture), CONFIGS[name])
        moved(expected, list(CONFIGS).index(name))
        assert active_adapter(model) == name and torch.equal(model(x), expected(x))
        assert_state(model, state(expected))
    assert torch.equal(vitlorafa.remove(model)(x), plain)
    assert_state(model, before)
    assert list_adapters(model) == []


@torch.no_grad()
def test_each_has_its_own_head():
    model = build(ARCHITECTURE)
    head = model.head.weight.clone()
    model = several()
    for name in CONFIGS:
        set_adapter(model, name)
        assert_state(model, state(alone(name)))
    add_adapter(model, "new", CONFIGS["photo"], train_head=True)  # starts where the first one did
    set_adapter(model, "new")
    assert torch.equal(model.head.weight, head) and model.head.weight.requires_grad
    add_adapter(model, "frozen", CONFIGS["photo"])
    set_adapter(model, "frozen")
    assert torch.equal(model.head.weight, head) and not model.head.weight.requires_grad
    model.requires_grad_(False)
    set_adapter(model, "sketch").requires_grad_(False)
    assert torch.equal(set_adapter(model, "photo").head.weight, alone("photo").head.weight)
    assert torch.equal(set_adapter(model, "sketch").head.weight, alone("sketch").head.weight)


def test_each_trains_with_its_optimizer():
    """Interleaved steps of two adapters are those of two models."""
    one, two = (inject(build(ARCHITECTURE), CONFIGS[name], train_head=True) for name in ("photo", "sketch"))
    model = build(ARCHITECTURE)
    for name in ("photo", "sketch"):
        add_adapter(model, name, CONFIGS[name], train_head=True)
    x = images(model)
    optimizers = {}

    def step(model, key):
        optimizer = optimizers.setdefault(key, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        for name, expected in (("photo", one), ("sketch", two)):
            step(expected, expected)
            step(set_adapter(model, name), name)
            assert_state(model, state(expected))


@torch.no_grad()
def test_statistics_of_a_batch_norm_are_the_adapters_own():
    def probed():
        model = build("test_vit")
        model.head = nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 5))
        return model.eval()

    torch.manual_seed(0)
    pretrained = probed()
    model = copy.deepcopy(pretrained)
    x = images(model, 4)
    for name in ("photo", "sketch"):
        add_adapter(model, name, CONFIGS[name], train_head=True)
    y = set_adapter(model, "photo")(x)
    set_adapter(model, "sketch").train()(x + 1)
    model.eval()
    changed = model(x)
    assert torch.equal(set_adapter(model, "photo")(x), y) and not torch.equal(changed, y)
    assert torch.equal(set_adapter(model, "sketch")(x), changed)
    assert torch.equal(vitlorafa.remove(set_adapter(model, "photo"))(x), pretrained(x))


@torch.no_grad()
def test_merging_strength_and_the_disabled_state_are_of_the_active_one():
    model = several()
    x = images(model)
    vitlorafa.merge(model)
    set_adapter(model, "photo")
    assert all(layer.merged for _, layer in adapter_layers(model))
    assert torch.equal(model(x), vitlorafa.merge(alone("photo"))(x))
    vitlorafa.set_strength(model, 0.5)
    set_adapter(model, "sketch")
    assert torch.equal(vitlorafa.unmerge(model)(x), alone("sketch")(x))
    set_adapter(model, "photo")
    assert torch.equal(model(x), vitlorafa.set_strength(alone("photo"), 0.5)(x))
    vitlorafa.set_strength(model, 1)
    with vitlorafa.disable_adapter(model):
        for function in (set_adapter, delete_adapter):
            with pytest.raises(AdapterError, match="leave disable_adapter"):
                function(model, "sketch" if function is set_adapter else "photo")
    assert torch.equal(model(x), alone("photo")(x))
    merged = vitlorafa.merge_and_unload(set_adapter(copy.deepcopy(model), "sketch"))
    torch.testing.assert_close(merged(x), alone("sketch")(x), atol=1e-4, rtol=1e-4)
    assert list_adapters(merged) == []


@torch.no_grad()
@pytest.mark.parametrize("format", ["vitlorafa", "peft"])
def test_saved_and_loaded_by_name(format, tmp_path):
    model = several()
    x = images(model)
    set_adapter(model, "sketch")
    before = state(model)
    for name in CONFIGS:
        save_adapter(model, tmp_path / name, head=True, adapter=name, format=format)
        assert torch.equal(load_adapter(build(ARCHITECTURE), tmp_path / name)(x), alone(name)(x))
    assert_state(model, before)
    other = build(ARCHITECTURE)
    for name in CONFIGS:
        load_adapter(other, tmp_path / name, adapter=name)
        assert active_adapter(other) == "photo"
    for name in CONFIGS:
        set_adapter(other, name)
        assert_state(other, state(alone(name)))
    load_adapter(other, tmp_path / "photo", adapter="twin")
    load_adapter(other, tmp_path / "clipart", adapter="clipart")  # over the old one
    assert torch.equal(set_adapter(other, "twin")(x), alone("photo")(x))
    assert list_adapters(other) == [*CONFIGS, "twin"]


def test_what_cannot_be_loaded_changes_nothing(tmp_path):
    model = several()
    before = state(model)
    save_adapter(inject(build("test_vit"), CONFIGS["photo"]), tmp_path / "other")
    for name in ("new", "photo", "clipart"):
        with pytest.raises(AdapterError, match=naming("test_vit", "does not fit")):
            load_adapter(model, tmp_path / "other", adapter=name)
        assert_state(model, before)
        assert (active_adapter(model), list_adapters(model)) == ("clipart", list(CONFIGS))
    set_adapter(model, "photo")
    assert_state(model, state(alone("photo")))


@torch.no_grad()
def test_what_else_trained_is_the_adapters_own(tmp_path):
    """If it was loaded; if it trained in this model, its value before is not known."""
    model = inject(build(ARCHITECTURE), CONFIGS["photo"])
    model.norm.weight.requires_grad_(True)
    before = state(model)
    for function in (lambda: add_adapter(model, "new", CONFIGS["photo"]), lambda: delete_adapter(model, "default")):
        with pytest.raises(AdapterError, match=naming("norm.weight", "'default'", "train_head=True", "load_adapter")):
            function()
        assert_state(model, before)
    model.norm.weight.add_(1)
    save_adapter(model, tmp_path)
    x = images(model)
    other = build(ARCHITECTURE)
    for name in ("norms", "again"):
        load_adapter(other, tmp_path, adapter=name)
        add_adapter(other, f"beside {name}", CONFIGS["photo"])
    assert torch.equal(set_adapter(other, "beside norms")(x), build(ARCHITECTURE)(x))
    assert torch.equal(set_adapter(other, "again")(x), model(x)) and other.norm.weight.requires_grad


@torch.no_grad()
def test_deleted():
    model = several()
    delete_adapter(model, "photo")
    assert (active_adapter(model), list_adapters(model)) == ("clipart", ["sketch", "clipart"])
    with pytest.warns(AdapterWarning, match=naming("'clipart'", "'sketch'")):
        delete_adapter(model, "clipart")
    assert_state(model, state(alone("sketch")))
    delete_adapter(model, "sketch")
    assert_state(model, state(build(ARCHITECTURE)))
    assert list_adapters(model) == []


def test_counted_as_in_peft():
    """Inactive adapters are among all parameters, but do not train."""
    model = build("test_vit")
    total = sum(p.numel() for p in model.parameters())
    add_adapter(model, "one", AdapterConfig(rank=2))
    add_adapter(model, "two", AdapterConfig(rank=4), train_head=True)
    factors, head = 6 * 2 * 2 * 64, 5 * 65
    assert vitlorafa.get_nb_trainable_parameters(model) == (factors, total + 2 * factors + 4 * factors + head)
    set_adapter(model, "two")
    assert vitlorafa.get_nb_trainable_parameters(model) == (2 * factors + head, total + 6 * factors)
    assert vitlorafa.get_nb_trainable_parameters(model) == vitlorafa.count_parameters(model)


def test_unknown_and_wrong_names(tmp_path):
    model = build(ARCHITECTURE)
    assert list_adapters(model) == []
    for function in (active_adapter, lambda model: set_adapter(model, "one")):
        with pytest.raises(AdapterError, match="not adapted"):
            function(model)
    for name in ("", 3, None, ["photo"]):
        with pytest.raises(AdapterError, match=naming("name", repr(name))):
            add_adapter(model, name, CONFIGS["photo"])
    assert_state(model, state(build(ARCHITECTURE)))
    inject(model, CONFIGS["photo"])
    assert list_adapters(model) == ["default"] and active_adapter(model) == "default"
    for function in (
        lambda: set_adapter(model, "defualt"),
        lambda: delete_adapter(model, "defualt"),
        lambda: save_adapter(model, tmp_path / "none", adapter="defualt"),
    ):
        with pytest.raises(AdapterError, match=naming("unknown adapter 'defualt'", "'default'")):
            function()
    with pytest.raises(AdapterError, match=naming("'default' already", "delete_adapter")):
        add_adapter(model, "default", CONFIGS["photo"])
    with pytest.raises(AdapterError, match="rank 4000"):
        add_adapter(model, "wide", AdapterConfig(rank=4000))
    assert list_adapters(model) == ["default"]
    with pytest.raises(AdapterError, match="add_adapter"):
        inject(model, CONFIGS["photo"])


@torch.no_grad()
def test_models_inside_others_and_copies():
    network = nn.ModuleDict({"backbone": build(ARCHITECTURE), "probe": nn.Linear(5, 2)})
    add_adapter(network, "photo", CONFIGS["photo"])
    network["probe"].requires_grad_(True)  # all adapters share what is around the timm model
    add_adapter(network, "sketch", CONFIGS["sketch"], prefix="backbone")
    assert network["probe"].weight.requires_grad
    set_adapter(network, "sketch", prefix="backbone")
    assert network["probe"].weight.requires_grad
    perturb(network)
    twin = copy.deepcopy(network)
    x = images(network["backbone"])
    y = network["backbone"](x)
    set_adapter(network, "photo")
    assert torch.equal(twin["backbone"](x), y) and active_adapter(twin) == "sketch"
    assert torch.equal(set_adapter(network, "sketch")["backbone"](x), y)
    assert torch.equal(set_adapter(set_adapter(twin, "photo"), "sketch")["backbone"](x), y)
    vitlorafa.remove(network)
    assert all(p.requires_grad for p in network.parameters())


@torch.no_grad()
def test_a_base_that_changes_between():
    """Moved, converted, cast, made faster or quantised while an adapter was away."""
    model = several()
    x = images(model)
    expected = {name: alone(name)(x) for name in CONFIGS}
    model.double()
    for name in ("photo", "sketch"):
        set_adapter(model, name)
        assert next(layer for _, layer in adapter_layers(model)).lora_A.dtype == torch.float64
        torch.testing.assert_close(model(x.double()).float(), expected[name], atol=1e-4, rtol=1e-4)
    model = vitlorafa.speed_up(several())
    torch.testing.assert_close(set_adapter(model, "photo")(x), expected["photo"], atol=1e-4, rtol=1e-4)
    vitlorafa.cast_frozen(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert (set_adapter(model, "sketch")(x).float() - expected["sketch"]).norm() < 0.1 * expected["sketch"].norm()


@torch.no_grad()
@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_quantised(format, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = vitlorafa.quantise(several(), format)
    for name in CONFIGS:
        expected = vitlorafa.quantise(alone(name), format)
        x = images(model)
        assert not any(isinstance(layer.base, nn.Identity) for _, layer in adapter_layers(model))
        set_adapter(model, name)
        # The layers that only another adapter adapts are quantised in both.
        torch.testing.assert_close(model(x), expected(x), atol=1e-4, rtol=1e-4)
    save_adapter(model, tmp_path, head=True, adapter="sketch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(load_adapter(build(ARCHITECTURE), tmp_path)(x), alone("sketch")(x))


@torch.no_grad()
def test_dropout_and_a_residual_start():
    model = build(ARCHITECTURE)
    x = images(model)
    plain = model(x)
    add_adapter(model, "dropout", AdapterConfig(rank=2, dropout=0.5, seed=0))
    add_adapter(model, "pissa", AdapterConfig(rank=2, train="BA", init_A="pissa"))
    perturb(model)
    y = model(x)
    model.train()
    assert not torch.equal(model(x), model(x))
    set_adapter(model, "pissa")
    assert model.training and torch.equal(model.eval()(x), model(x))
    torch.testing.assert_close(model(x), plain, atol=1e-4, rtol=1e-4)
    assert torch.equal(set_adapter(model, "dropout")(x), y)
    delete_adapter(model, "pissa")
    assert torch.equal(vitlorafa.remove(model)(x), plain)


@torch.no_grad()
def test_averages_and_stacks_of_named_adapters(tmp_path):
    model, one = build(ARCHITECTURE), AdapterConfig(rank=2, seed=0)
    for place, name in enumerate(("photo", "sketch")):
        add_adapter(model, name, one, train_head=True)
        set_adapter(model, name).head.weight.add_(place)
        for _, layer in adapter_layers(model):  # A is the same in both
            layer.lora_B.normal_()
    folders = [save_adapter(model, tmp_path / name, head=True, adapter=name) for name in list_adapters(model)]
    x = images(model)
    outputs = [set_adapter(model, name)(x) for name in list_adapters(model)]
    with pytest.raises(AdapterError, match=naming("already adapted", "remove(model)")):
        vitlorafa.stack(model, folders)
    soup = vitlorafa.average(folders, tmp_path / "soup")
    load_adapter(model, soup, adapter="soup")
    assert soup.residual == 0 and not torch.equal(set_adapter(model, "soup")(x), outputs[0])
    stacked = vitlorafa.stack(vitlorafa.remove(model), folders)
    for place, y in enumerate(outputs):
        torch.testing.assert_close(stacked(x, adapter=place), y, atol=1e-4, rtol=1e-4)
    with pytest.raises(AdapterError, match=naming("several adapters", "remove(model)")):
        add_adapter(stacked, "new", one)
