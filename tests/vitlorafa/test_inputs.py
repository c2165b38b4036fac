"""What the package cannot take ends in one sentence with the remedy."""

import types

import pytest
import torch
from messages import naming
from small_models import build, images
from torch import nn

import vitlorafa
from vitlorafa import AdapterConfig, AdapterError, inject, load_adapter, save_adapter

CONFIG = AdapterConfig(rank=2)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: inject(model, CONFIG),
        lambda model: load_adapter(model, "folder"),
        lambda model: save_adapter(model, "folder"),
        vitlorafa.remove,
        vitlorafa.merge,
        vitlorafa.merge_and_unload,
        vitlorafa.classifiers,
        vitlorafa.summary,
        vitlorafa.count_parameters,
        vitlorafa.speed_up,
        vitlorafa.quantise,
        vitlorafa.cast_frozen,
        vitlorafa.matrices,
        lambda model: vitlorafa.set_strength(model, 0.5),
        lambda model: vitlorafa.stack(model, ["folder"]),
        lambda model: list(vitlorafa.adapter_layers(model)),
    ],
)
@pytest.mark.parametrize(
    "model", ["vit_small_patch16_224", None, {"weight": torch.zeros(2)}], ids=["name", "None", "state"]
)
def test_what_is_no_module(call, model):
    with pytest.raises(AdapterError, match=naming("torch.nn.Module", f"not {type(model).__name__}")):
        call(model)


def test_a_pipeline_holds_the_model():
    with pytest.raises(AdapterError, match=naming("not SimpleNamespace", "attribute model")):
        inject(types.SimpleNamespace(model=nn.Linear(2, 2)), CONFIG)


@pytest.mark.parametrize("config", [{"rank": 2}, None, "q,v"])
def test_another_config(config):
    with pytest.raises(AdapterError, match=naming("AdapterConfig", f"not {type(config).__name__}", "lora_alpha")):
        inject(build("test_vit"), config)


def test_a_config_and_a_model_of_peft():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["qkv"])
    with pytest.raises(AdapterError, match=naming("AdapterConfig", "not LoraConfig")):
        inject(build("test_vit"), config)
    model = peft.get_peft_model(build("test_vit"), config)
    for call in (
        lambda: inject(model, CONFIG),
        lambda: load_adapter(model, "folder"),
        lambda: save_adapter(model, "f"),
    ):
        with pytest.raises(AdapterError, match=naming("adapters of PEFT", "merge_and_unload", "unload")):
            call()


@pytest.mark.filterwarnings("ignore")
def test_a_traced_model():
    model = build("test_vit")
    traced = torch.jit.trace(model, images(model))
    with pytest.raises(AdapterError, match=naming("scripted or traced", "before torch.jit")):
        inject(traced, CONFIG)


@pytest.mark.parametrize("call", [load_adapter, save_adapter])
def test_a_folder_that_is_none(call):
    model = inject(build("test_vit"), CONFIG)
    with pytest.raises(AdapterError, match=naming("folder", "not int")):
        call(model, 3)
    with pytest.raises(AdapterError, match=naming("folder", "path", "first")):
        call("folder", model)
