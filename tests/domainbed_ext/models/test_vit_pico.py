"""The packaged backbone: its file, its registration, what its features are worth, and the script that makes it."""

import hashlib
import json

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open

from domainbed_ext import pretrain
from domainbed_ext.datasets.digits import ENVIRONMENTS, NUM_CLASSES
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.models.glyphs import CLASSES, draw, missing_fonts, render
from domainbed_ext.models.vit_pico import NAME, WEIGHTS

all_fonts = pytest.mark.skipif(bool(missing_fonts()), reason="needs the fonts of matplotlib 3.11")


def test_weights_are_small_and_those_of_the_record():
    data = WEIGHTS.read_bytes()
    record = json.loads(WEIGHTS.with_suffix(".json").read_text())
    assert len(data) <= 2_000_000
    assert record["sha256"] == hashlib.sha256(data).hexdigest()
    assert record["model"] == NAME
    assert record["steps"] > 0 and record["made_by"].startswith("python -m domainbed_ext.pretrain")


def test_weights_fit_strictly_without_a_head():
    with safe_open(WEIGHTS, "pt") as file:
        names = set(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.float16}
    model = timm.create_model(NAME, pretrained=True)
    assert set(model.state_dict()) == names  # num_classes is 0 by default, and the load is then strict
    assert set(timm.create_model(NAME, num_classes=10).state_dict()) - names == {"head.weight", "head.bias"}


def test_timm_loads_the_weights_below_any_head():
    bare = timm.create_model(NAME, pretrained=True)
    model = timm.create_model(NAME, pretrained=True, num_classes=7)
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model.forward_head(model.forward_features(images), pre_logits=True), bare(images))
    assert model(images).shape == (2, 7)
    assert f"{NAME}.glyphs" in timm.list_models(pretrained=True)


def test_own_input_statistics():
    config = timm.data.resolve_model_data_config(timm.create_model(NAME))
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == config["std"] == (0.5, 0.5, 0.5)


def test_other_input_size_resamples_positions():
    model = timm.create_model(NAME, pretrained=True, img_size=64, num_classes=3)
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 3)


def test_linear_probing_transfers_and_leaves_a_gap():
    accuracies = pretrain.linear_probe(timm.create_model(NAME, pretrained=True))
    assert list(accuracies) == list(ENVIRONMENTS)
    for left_out, accuracy in accuracies.items():
        assert accuracy["in_domain"] > 0.7, left_out
        assert accuracy["out_of_domain"] > 2.5 / NUM_CLASSES, left_out
    in_domain, out_of_domain = (
        np.mean([accuracy[key] for accuracy in accuracies.values()]) for key in ("in_domain", "out_of_domain")
    )
    assert in_domain > out_of_domain + 0.05
    recorded = json.loads(WEIGHTS.with_suffix(".json").read_text())["linear_probe_on_digits_shift"]
    for left_out, accuracy in accuracies.items():  # the record has the weights before rounding
        assert accuracy == pytest.approx(recorded[left_out], abs=0.02)


@all_fonts
def test_glyphs_have_variants_and_follow_the_generator():
    bank = render()
    assert len(bank.count) == len(CLASSES) == len(set(CLASSES)) and int(bank.count.min()) >= 3
    assert int(bank.count.sum()) == len(bank.masks) and bool((bank.masks.amax((1, 2, 3)) > 0.5).all())
    images, ink, labels = draw(bank, 16, torch.Generator().manual_seed(3))
    again, _, _ = draw(bank, 16, torch.Generator().manual_seed(3))
    assert torch.equal(images, again)
    assert images.shape == (16, 3, 32, 32) and ink.shape == (16, 1, 32, 32) and labels.shape == (16,)
    assert float(images.min()) >= 0 and float(images.max()) <= 1
    plain, ink, _ = draw(bank, 16, torch.Generator().manual_seed(3), styled=0)
    assert torch.equal(plain, ink.expand_as(plain))


@all_fonts
def test_pretraining_repeats_to_the_byte(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "linear_probe", lambda model: {})  # slow, and tested above
    monkeypatch.setattr(pretrain, "_TEST_IMAGES", 16)
    outs = [tmp_path / "a.safetensors", tmp_path / "deeper" / "b.safetensors"]
    for out in outs:
        pretrain.main(["--steps", "3", "--batch_size", "16", "--threads", "1", "--out", str(out)])
    assert outs[0].read_bytes() == outs[1].read_bytes()
    record = json.loads(outs[0].with_suffix(".json").read_text())
    assert record["steps"] == 3 and record["sha256"] == hashlib.sha256(outs[0].read_bytes()).hexdigest()
    timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"file": str(outs[0])})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split("  ")[0] for line in lines] == 2 * ["step 0", "step 2"]  # progress where there is no bar


@pytest.mark.parametrize("argument", ["--steps", "--batch_size", "--threads"])
def test_pretraining_refuses_nothing_to_do(argument, tmp_path):
    with pytest.raises(BenchmarkError, match="too small, give 1 or more"):
        pretrain.main([argument, "0", "--out", str(tmp_path / "x.safetensors")])


def test_pretraining_says_what_cannot_be_written_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "pretrain", lambda *_: pytest.fail("trained"))
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchmarkError, match="cannot write"):
        pretrain.main(["--out", str(tmp_path / "file" / "x.safetensors")])


def test_a_font_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("domainbed_ext.models.glyphs._FONTS", ("DejaVuSans", "cmti11"))
    with pytest.raises(BenchmarkError, match=r"has no font cmti11: upgrade it"):
        render()
