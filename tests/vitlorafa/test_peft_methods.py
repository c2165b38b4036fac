from importlib.metadata import version
from importlib.util import find_spec

import pytest
import small_models

from vitlorafa import AdapterError, linear_sites, peft_methods
from vitlorafa.peft_methods import PEFT_METHODS, Sizes, apply_peft, peft_config

needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="needs PEFT")
IS_OLD = find_spec("peft") is not None and tuple(map(int, version("peft").split(".")[:2])) < (0, 21)


def model_and_layers():
    model = small_models.build("test_vit")
    return model, [site.name for site in linear_sites(model)]


@needs_peft
@pytest.mark.parametrize("name", PEFT_METHODS)
def test_a_method_adapts_a_vit_by_its_config_alone(name):
    model, layers = model_and_layers()
    try:
        adapted = apply_peft(model, name, Sizes(rank=4, alpha=8), layers).train()
    except AdapterError as error:
        if IS_OLD:
            pytest.skip(str(error))
        raise
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert 0 < sum(p.numel() for p in trained) < sum(p.numel() for p in adapted.parameters())
    adapted(small_models.images(model)).square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trained)


@needs_peft
def test_rank_scaling_dropout_and_steps_reach_the_config():
    config = peft_config("dora", Sizes(3, 5.0, 0.25), ["fc1"], use_rslora=True)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_dora) == (3, 5.0, 0.25, True)
    assert config.use_rslora and set(config.target_modules) == {"fc1"}
    ada = peft_config("adalora", Sizes(4, steps=100), ["fc1"])
    assert (ada.target_r, ada.init_r, ada.total_step, ada.tinit, ada.tfinal) == (4, 6, 100, 10, 30)
    assert set(peft_config("ia3", Sizes(), ["a.fc1", "a.fc2"]).feedforward_modules) == {"a.fc2"}


@needs_peft
@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("doar", {}, ["unknown method of PEFT", "'dora'"]),
        ("c3a", {"block_size": 48}, ["PEFT refuses C3A (PEFT) here", "48"]),
        ("dora", {"no_such_option": 1}, ["PEFT", "no_such_option", "newer"]),
        pytest.param(
            "velora",
            {"velora_config": {"num_groups": 0}},
            ["PEFT refuses VeLoRA (PEFT)", "num_groups"],
            marks=pytest.mark.skipif(IS_OLD, reason="needs PEFT 0.21"),
        ),
    ],
)
def test_a_refusal_is_one_sentence(name, options, words):
    model, layers = model_and_layers()
    with pytest.raises(AdapterError) as error:
        apply_peft(model, name, Sizes(), layers, **options)
    assert [word for word in words if word not in str(error.value)] == [] and "\n" not in str(error.value)


@needs_peft
def test_a_class_that_an_older_peft_lacks(monkeypatch):
    import peft

    monkeypatch.delattr(peft, "RoadConfig")
    with pytest.raises(AdapterError, match=r"PEFT .* does not have RoAd \(PEFT\).* newer"):
        peft_config("road", Sizes(), ["fc1"])


def test_without_peft_the_line_that_installs_it_is_said(monkeypatch):
    monkeypatch.setattr(peft_methods, "find_spec", lambda name: None)
    with pytest.raises(AdapterError, match=r"pip install 'vitlorafa\[peft\]'"):
        peft_config("lora", Sizes(), ["fc1"])


def test_every_method_names_its_paper_and_has_a_label_of_its_own():
    assert all(
        method.paper.startswith(("https://arxiv.org/abs/", "https://openreview.net/"))
        for method in PEFT_METHODS.values()
    )
    assert len({method.label for method in PEFT_METHODS.values()}) == len(PEFT_METHODS)
