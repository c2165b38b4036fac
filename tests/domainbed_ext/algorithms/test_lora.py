"""The options of adapters as hyperparameters: where they start, which blocks they are on, and their learning rates."""

import copy
import json

import pytest
import torch

from domainbed_ext.algorithms.names import get_algorithm_class
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.hparams_registry import resolve
from vitlorafa import adapter_layers

SHAPE = (3, 32, 32)
LATER = {"init_A": None, "init_B": None, "rank_stabilised": False, "blocks": None}


def make(name, weights="none", **hparams):
    torch.manual_seed(0)
    settings = {**resolve(name, "DigitsShift"), "weights": weights, "precision": "float32", **hparams}
    return get_algorithm_class(name)(SHAPE, 10, 3, settings)


def batches():
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(4, *SHAPE, generator=draw), torch.arange(4)) for _ in range(3)]


def config_of(algorithm):
    return algorithm.backbone._vitlorafa.config


@pytest.mark.parametrize("name", ["BA", "BOnly", "AOnly", "LoRAPro"])
def test_the_defaults_do_what_earlier_versions_did(name):
    hparams = resolve(name, "DigitsShift", 1)
    assert {key: hparams[key] for key in LATER} == LATER
    algorithm = make(name)
    old = {key: value for key, value in resolve(name, "DigitsShift").items() if key not in {*LATER, "lr_B_ratio"}}
    torch.manual_seed(0)
    earlier = get_algorithm_class(name)(SHAPE, 10, 3, {**old, "weights": "none", "precision": "float32"})
    assert config_of(earlier) == config_of(algorithm) and len(algorithm.optimizer.param_groups) == 1
    assert [algorithm.update(batches()) for _ in range(2)] == [earlier.update(batches()) for _ in range(2)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("BOnly@init_A=singular,blocks=0-1", {"init_A": "singular", "blocks": (0, 1)}),
        ("BOnly@init_A=uniform+fc2=gaussian,targets=q+v+fc2", {"init_A": "q=uniform,v=uniform,fc2=gaussian"}),
        ("AOnly@init_B=singular_minor", {"init_B": "singular_minor", "init_A": "zero"}),
        ("BOnly@init_A=pissa", {"init_A": "pissa", "init_B": "pissa", "train": "B"}),
        ("BA@init_A=pissa,use_rslora=true", {"init_A": "pissa", "init_B": "pissa", "rank_stabilised": True}),
        ("BA@blocks=last2", {"blocks": (-2, -1)}),
        ("BA@blocks=0+3", {"blocks": (0, 3)}),
        ("BA@blocks=1", {"blocks": (1,)}),
        ("LoRAPro@layers_to_transform=-1", {"blocks": (-1,), "gradient_correction": True}),
    ],
)
def test_a_name_sets_them(name, expected):
    algorithm = make(name)
    config = config_of(algorithm)
    assert {key: getattr(config, key) for key in expected} == expected
    losses = [algorithm.update(batches())["loss"] for _ in range(5)]
    assert losses[-1] < losses[0]


def test_one_spelling_is_kept_of_values_in_json():
    text = json.dumps({"init_A": {"all": "uniform", "fc2": "gaussian"}, "blocks": [0, -1]})
    hparams = resolve("BOnly", "DigitsShift", hparams=text)
    assert (hparams["init_A"], hparams["blocks"]) == ("all=uniform,fc2=gaussian", "0,-1")
    assert resolve("BOnly@blocks=3", "DigitsShift")["blocks"] == "3"
    assert resolve("BOnly@blocks=null", "DigitsShift")["blocks"] is None


def test_only_the_chosen_blocks_are_adapted():
    algorithm = make("BOnly@blocks=last2")
    assert {name.split(".")[1] for name, _ in adapter_layers(algorithm.backbone)} == {"2", "3"}


def test_a_start_at_a_part_of_the_weight_predicts_as_the_pretrained_model():
    images = torch.randn(5, *SHAPE)
    plain, residual = make("BOnly", weights="pretrained"), make("BOnly@init_A=pissa", weights="pretrained")
    torch.testing.assert_close(residual.eval().predict(images), plain.eval().predict(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["BA@init_A=pissa", "BOnly@init_A=milora,blocks=0-1", "LoRAPro", "BA@lr_B_ratio=4"])
def test_what_was_saved_predicts_the_same_and_training_resumes_exactly(name, tmp_path):
    algorithm, images = make(name), torch.randn(3, *SHAPE)
    algorithm.update(batches())
    algorithm.save(tmp_path)
    fresh = make(name)
    fresh.load(tmp_path)
    assert torch.equal(algorithm.eval().predict(images), fresh.eval().predict(images))
    resumed = make(name)
    resumed.load_training_state(copy.deepcopy(algorithm.training_state()))
    assert [algorithm.update(batches()) for _ in range(2)] == [resumed.update(batches()) for _ in range(2)]


def test_b_has_a_rate_of_its_own_and_the_head_has_as():
    algorithm = make("BA@lr_B_ratio=8,lr=0.001")
    rates = {id(p): group["lr"] for group in algorithm.optimizer.param_groups for p in group["params"]}
    named = {name: rates[id(p)] for name, p in algorithm.named_parameters() if p.requires_grad}
    assert {rate for name, rate in named.items() if name.endswith("lora_B")} == {0.008}
    assert {rate for name, rate in named.items() if not name.endswith("lora_B")} == {0.001}
    assert any("head" in name for name in named) and len(named) == len(rates)


def test_lora_pro_steps_on_corrected_gradients():
    seen = []
    algorithm = make("LoRAPro@rank=4")
    B = algorithm.backbone.blocks[0].attn.qkv.lora_B
    algorithm.optimizer.register_step_pre_hook(lambda *_: seen.append(B.grad.clone()))
    algorithm.update(batches())
    A = algorithm.backbone.blocks[0].attn.qkv.lora_A.detach()  # has not moved, as B was zero
    expected = B.grad @ torch.linalg.inv(A @ A.mT) / config_of(algorithm).scale ** 2
    torch.testing.assert_close(seen[0], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("BOnly@init_A=pisa", "BOnly on vit_pico_patch8_32: unknown initialisation of A 'pisa': did you mean 'pissa'"),
        ("BOnly@init_A=zero", "BOnly on vit_pico_patch8_32: A and B both start at zero"),
        ("BOnly@init_A=uniform+fc2=gaussian,targets=q", "init_A names fc2, which is not adapted: add it to targets"),
        ("BA@blocks=2-7", "BA on vit_pico_patch8_32: .* has 4 blocks, so blocks may be -4 to 3, not 4, 5, 6, 7"),
        ("BA@blocks=all", "blocks must be whole numbers, or a string such as '0-5' or 'last4', not 'all'"),
        ("BA@lr_B_ratio=0", "BA: lr_B_ratio must be a finite number above 0, not 0"),
        ("BA@lr_B_ratio=-2", "BA: lr_B_ratio must be a finite number above 0, not -2"),
        ("BOnly@lr_B_ratio=4", "'lr_B_ratio' belongs to BA, LoRAPro: leave it out"),
        ("BA@lr_B_ratio=high", "lr_B_ratio in the name .* should be of type float, not 'high'"),
        ("BA@rank_stabilised=1", "rank_stabilised in the name .* should be of type bool, not 1"),
    ],
)
def test_values_that_cannot_be_get_a_sentence(name, sentence):
    with pytest.raises(BenchmarkError, match=sentence):
        make(name)
