"""Adapters that are saved without their frozen factor, which is drawn again when they are read."""

import json

import pytest
import torch
from messages import naming
from safetensors.torch import load_file
from small_models import build, images

import vitlorafa
from vitlorafa import AdapterConfig, AdapterError, adapter_layers, inject, load_adapter, save_adapter


def trained(architecture="test_vit", **kwargs):
    model = inject(build(architecture), AdapterConfig(**{"rank": 2, "seed": 3, **kwargs}), train_head=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model


def describe(folder):
    return json.loads((folder / "adapter.json").read_text())


@torch.no_grad()
@pytest.mark.parametrize("init", [None, "gaussian", "uniform,v=kaiming_uniform"])
@pytest.mark.parametrize("train", ["B", "A"])
def test_round_trip(architecture, train, init, tmp_path):
    kwargs = {"targets": "all" if architecture.startswith("vit") else "q,v", "train": train}
    model = trained(architecture, **kwargs, **({f"init_{'AB'.replace(train, '')}": init} if init else {}))
    save_adapter(model, tmp_path, head=True, only_trained=True)
    assert {name[-1] for name in load_file(tmp_path / "adapter.safetensors") if ".lora_" in name} == {train}
    other = load_adapter(build(architecture), tmp_path)
    assert torch.equal(other(images(model)), model(images(model)))
    save_adapter(other, tmp_path / "again", head=True, only_trained=True)  # of a loaded adapter
    assert describe(tmp_path / "again") == describe(tmp_path)


@torch.no_grad()
@pytest.mark.numbers
def test_other_formats_and_a_seed_that_nobody_gave(tmp_path):
    for number, (before, after) in enumerate([("float", "bfloat16"), ("double", "double"), ("half", "half")]):
        model = build("test_vit")
        inject(getattr(model, before)(), AdapterConfig(rank=2))  # its seed is drawn
        getattr(model, after)()
        save_adapter(model, tmp_path / f"{number}", only_trained=True)
        other = load_adapter(getattr(build("test_vit"), after)(), tmp_path / f"{number}")
        for (_, layer), (_, again) in zip(adapter_layers(model), adapter_layers(other), strict=True):
            assert torch.equal(layer.lora_A, again.lora_A.to(layer.lora_A.dtype))
        assert isinstance(describe(tmp_path / f"{number}")["config"]["seed"], int)


def test_drawn_by_another_number_of_threads(tmp_path):
    """The last bits of a QR decomposition depend on it."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        model = inject(build("vit_small_patch16_224", embed_dim=192), AdapterConfig(rank=4, targets="fc2", seed=0))
        torch.set_num_threads(1)
        save_adapter(model, tmp_path, only_trained=True)
        other = load_adapter(build("vit_small_patch16_224", embed_dim=192), tmp_path)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    for (_, layer), (_, again) in zip(adapter_layers(model), adapter_layers(other), strict=True):
        assert torch.equal(layer.lora_A, again.lora_A)


@torch.no_grad()
def test_what_else_reads_them(tmp_path):
    """Averages, stacks and named adapters; each of them saved whole again."""
    models = [trained(), trained()]
    small, whole = ([tmp_path / f"{kind}{i}" for i in range(2)] for kind in ("small", "whole"))
    for model, *folders in zip(models, small, whole, strict=True):
        for folder, only in zip(folders, (True, False), strict=True):
            save_adapter(model, folder, head=True, only_trained=only, format="vitlorafa")
    size = [(folders[0] / "adapter.safetensors").stat().st_size for folders in (small, whole)]
    assert size[0] < 0.7 * size[1]
    x = images(models[0])
    assert vitlorafa.average([small[0], whole[1]], tmp_path / "soup").residual == 0
    vitlorafa.average(whole, tmp_path / "expected")
    assert (
        load_file(tmp_path / "soup" / "adapter.safetensors").keys()
        == load_file(tmp_path / "expected" / "adapter.safetensors").keys()
    )
    loaded = [load_adapter(build("test_vit"), tmp_path / name)(x) for name in ("soup", "expected")]
    assert torch.equal(*loaded)
    assert torch.equal(
        vitlorafa.stack(build("test_vit"), small)(x, adapter=1), vitlorafa.stack(build("test_vit"), whole)(x, adapter=1)
    )
    model = load_adapter(build("test_vit"), small[0], adapter="one")
    load_adapter(model, small[1], adapter="two")
    save_adapter(model, tmp_path / "two", head=True, adapter="two", only_trained=True)
    assert torch.equal(load_adapter(build("test_vit"), tmp_path / "two")(x), models[1](x))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda frozen: frozen.update(seed=4), ["another A", torch.__version__, "torch 0.0", "only_trained=False"]),
        (lambda frozen: frozen.update(digest="0"), ["another A", "only_trained=False"]),
        (lambda frozen: frozen.pop("widths"), ["widths", "save it again"]),
        (lambda frozen: frozen.update(dtype="none"), ["none", "save it again"]),
        (lambda frozen: frozen.update(threads=0), ["save it again"]),
    ],
)
def test_another_factor_is_refused(change, named, tmp_path):
    save_adapter(trained(), tmp_path, only_trained=True)
    description = describe(tmp_path)
    description["frozen"]["torch"] = "0.0"
    change(description["frozen"])
    (tmp_path / "adapter.json").write_text(json.dumps(description))
    for read in (
        lambda: load_adapter(build("test_vit"), tmp_path),
        lambda: vitlorafa.average([tmp_path] * 2, tmp_path / "mean"),
    ):
        with pytest.raises(AdapterError, match=naming(str(tmp_path), *named)):
            read()


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"train": "BA"}, ["both factors"]),
        ({"init_A": "singular"}, ["singular", "weights"]),
        ({"init_A": "pissa"}, ["pissa", "weights"]),
    ],
)
def test_what_no_seed_draws_is_not_left_out(kwargs, named, tmp_path):
    with pytest.raises(AdapterError, match=naming("only_trained=False", *named)):
        save_adapter(trained(**kwargs), tmp_path / "none", only_trained=True)
    assert not (tmp_path / "none").exists()


@torch.no_grad()
def test_a_factor_that_has_changed_is_not_left_out(tmp_path):
    model = trained()
    next(layer for _, layer in adapter_layers(model)).lora_A.add_(1)
    with pytest.raises(AdapterError, match=naming("A is not", "seed 3", "only_trained=False")):
        save_adapter(model, tmp_path, only_trained=True)
    with pytest.raises(AdapterError, match=naming("PEFT", "only_trained=False")):
        save_adapter(model, tmp_path, only_trained=True, format="peft")
    unknown = inject(build("test_vit"), AdapterConfig(rank=2))
    save_adapter(unknown, tmp_path / "whole")
    with pytest.raises(AdapterError, match=naming("seed", "not known", "only_trained=False")):
        save_adapter(load_adapter(build("test_vit"), tmp_path / "whole"), tmp_path, only_trained=True)
