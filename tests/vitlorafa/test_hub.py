"""Adapters on the hub: the real client against a local server."""

import copy
import json
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import TOKEN, Hub
from messages import naming
from small_models import build, images, perturb

import vitlorafa
from vitlorafa import AdapterConfig, AdapterError, ModelCard, from_pretrained, inject, push_to_hub

huggingface_hub = pytest.importorskip("huggingface_hub")
REPO = "you/sketches"
FILES = {"README.md", "adapter.json", "adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = Hub()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub.running():
        yield hub


def trained(**kwargs):
    model = inject(build("test_vit"), AdapterConfig(**{"rank": 2, "seed": 0, **kwargs}), train_head=True)
    model.pretrained_cfg = {**model.pretrained_cfg, "architecture": "test_vit", "tag": "r160_in1k"}
    perturb(model)
    with torch.no_grad():
        model.head.weight.normal_()
    return model


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


@torch.no_grad()
def test_there_and_back(hub, tmp_path):
    model = trained()
    address = push_to_hub(model, REPO, token=TOKEN, class_names=list("abcde"), metadata={"step": 3})
    assert address == f"{hub.url}/{REPO}" and hub.commits == ["Upload adapter"]
    assert set(hub.repos[REPO]) - {".gitattributes"} == FILES
    x = images(model)
    cache = tmp_path / "mine"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", vitlorafa.AdapterWarning)  # of the tag, which only the trained one has
        other = from_pretrained(build("test_vit"), REPO, cache_dir=cache)
        assert torch.equal(other(x), model(x))
        asked = len(hub.requests)
        again = from_pretrained(build("test_vit"), REPO, cache_dir=cache, local_files_only=True, adapter="mine")
    assert len(hub.requests) == asked and torch.equal(again(x), model(x))
    assert vitlorafa.list_adapters(again) == ["mine"]
    assert not list(cache.rglob("README.md"))  # only what is needed


@torch.no_grad()
def test_another_upload_replaces_the_first(hub, tmp_path):
    """Also that of another format: a repository with the files of both could not be loaded."""
    push_to_hub(trained(), REPO, token=TOKEN)
    model = trained(rank=3)
    model.cls_token.requires_grad_(True)  # which PEFT cannot represent
    push_to_hub(model, REPO, token=TOKEN, head=False, commit_message="With a class token")
    assert hub.commits == ["Upload adapter", "With a class token"]
    assert set(hub.repos[REPO]) - {".gitattributes"} == {"README.md", "adapter.json", "adapter.safetensors"}
    assert "PEFT" not in hub.repos[REPO]["README.md"].decode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", vitlorafa.AdapterWarning)
        other = from_pretrained(build("test_vit"), REPO, cache_dir=tmp_path)
    assert torch.equal(other.forward_features(images(model)), model.forward_features(images(model)))


def test_the_card(hub):
    card = ModelCard(
        dataset="PACS",
        held_out="sketch",
        metrics={"accuracy on sketch": (0.55, 0.52, 0.58), "accuracy on photo": 0.9},
        licence="mit",
        details={"steps": 300},
        versions={"torch": "2.7"},
        description="Trained for a test.",
    )
    push_to_hub(trained(), REPO, card=card, token=TOKEN, class_names=["a|b", *"cdef"])
    text = hub.repos[REPO]["README.md"].decode()
    values = front_matter(text)
    assert (values["license"], values["library_name"]) == ("mit", "peft")
    assert values["base_model"] == "timm/test_vit.r160_in1k" and "lora-fa" in values["tags"]
    (result,) = values["model-index"][0]["results"]
    assert result["dataset"]["type"] == "PACS" and "sketch" in result["dataset"]["name"]
    assert [(each["name"], each["value"]) for each in result["metrics"]] == [
        ("accuracy on sketch", 0.55), ("accuracy on photo", 0.9)
    ]  # fmt: skip
    for part in (
        "| accuracy on sketch | 0.55 | 0.52 to 0.58 |",
        "| accuracy on photo | 0.9 | not known |",
        "held out",
        "Trained for a test.",
        'timm.create_model("test_vit.r160_in1k", pretrained=True, num_classes=5)',
        f'from_pretrained(model, "{REPO}")',
        f'PeftModel.from_pretrained(model, "{REPO}")',
        "| steps | 300 |",
        "| torch | 2.7 |",
        "a\\|b, c, d, e, f",
        "## Licence\n\nmit",
    ):
        assert part in text, part
    push_to_hub(trained(train="BA"), "you/plain", token=TOKEN, head=False)
    text = hub.repos["you/plain"]["README.md"].decode()
    assert "num_classes=0" in text and "Results" not in text and "model-index" not in front_matter(text)
    assert "license" not in front_matter(text) and "None was stated" in text
    assert f"| vitlorafa | {vitlorafa.__version__} |" in text


def test_the_card_says_how_to_load_it(hub, monkeypatch):
    """Its code runs as it is, but for the pretrained weights."""
    push_to_hub(trained(), REPO, token=TOKEN)
    blocks = re.findall(r"```python\n(.*?)```", hub.repos[REPO]["README.md"].decode(), re.DOTALL)
    plain = build("test_vit")
    monkeypatch.setattr("timm.create_model", lambda name, pretrained, num_classes: copy.deepcopy(plain))
    ours, pefts = blocks
    exec(ours, {})
    pytest.importorskip("peft")
    folder = huggingface_hub.snapshot_download(REPO)  # PEFT knows no other address than the hub's
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(pefts.replace(REPO, folder), {})


def test_the_documentation(hub, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "push_to_hub" in code]
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    model, other = trained(), build("test_vit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", vitlorafa.AdapterWarning)
        exec(code, {"model": model, "another_model": other, "names": list("abcde")})
    assert torch.equal(other(images(model)), model(images(model)))
    assert (
        "| accuracy on sketch | 0.713 | 0.698 to 0.728 |" in hub.repos["you/pacs_without_sketch"]["README.md"].decode()
    )


def test_a_named_adapter(hub, tmp_path):
    model = trained()
    vitlorafa.add_adapter(model, "other", AdapterConfig(rank=3), train_head=False)
    push_to_hub(model, REPO, token=TOKEN, adapter="other")
    assert vitlorafa.active_adapter(model) == "default"
    description = json.loads(hub.repos[REPO]["adapter.json"])
    assert (description["config"]["rank"], description["head"]) == (3, [])
    with pytest.raises(AdapterError, match="unknown adapter 'none'"):
        push_to_hub(model, REPO, token=TOKEN, adapter="none")


def test_a_folder_is_read_where_it_is(hub, tmp_path, monkeypatch):
    model = trained()
    monkeypatch.chdir(tmp_path)
    vitlorafa.save_adapter(model, "you/local", head=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", vitlorafa.AdapterWarning)
        other = from_pretrained(build("test_vit"), "you/local")
    assert torch.equal(other(images(model)), model(images(model))) and hub.requests == []


def test_errors_are_one_sentence(hub, tmp_path, monkeypatch):
    with pytest.raises(AdapterError, match=naming("you/absent", "no folder", "hf auth login")):
        from_pretrained(build("test_vit"), "you/absent", cache_dir=tmp_path)
    with pytest.raises(AdapterError, match=naming("../you/absent", "no such folder")):
        from_pretrained(build("test_vit"), "../you/absent")
    with pytest.raises(AdapterError, match=naming(f"upload to {REPO}", "token")) as error:
        push_to_hub(trained(), REPO, token="hf_wrong")
    assert "\n" not in str(error.value)
    with pytest.raises(AdapterError, match="not adapted"):
        push_to_hub(build("test_vit"), REPO, token=TOKEN)
    for wrong in ("many", (1, 2), (0.5, 0.6, 0.7)):
        with pytest.raises(AdapterError, match=naming("metric 'accuracy'")):
            ModelCard(metrics={"accuracy": wrong})
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(AdapterError, match=re.escape("pip install 'vitlorafa[hub]'")):
        push_to_hub(trained(), REPO)
