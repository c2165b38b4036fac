"""`vitlorafa.average`: the mean of saved adapters."""

import copy
import json
import math
import os
import warnings

import numpy as np
import pytest
import torch
from messages import naming
from safetensors.torch import load_file, save_file
from small_models import build
from torch import nn

import vitlorafa
from vitlorafa import (
    AdapterConfig,
    AdapterError,
    AdapterWarning,
    adapter_layers,
    average,
    inject,
    load_adapter,
    merge,
    save_adapter,
)
from vitlorafa.low_rank import approximate, product_norm


def trained(architecture="test_vit", seed=0, draw=0, **kwargs):
    """A model whose factors that train are random, as after a training."""
    config = {"rank": 3, "seed": seed, "targets": "all", **kwargs}
    model = inject(build(architecture), AdapterConfig(**config), train_head=True)
    generator = torch.Generator().manual_seed(draw)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def save_all(models, tmp_path, **kwargs):
    return [
        save_adapter(model, tmp_path / f"{i}", **{"head": True, "format": "vitlorafa", **kwargs})
        for i, model in enumerate(models)
    ]


def updates(model):
    """The merged updates, in float64: what `merge` adds to each weight."""
    model = copy.deepcopy(model)
    before = {name: layer.base.weight.double() for name, layer in adapter_layers(model)}
    merge(model)
    return {name: layer.base.weight.double() - before[name] for name, layer in adapter_layers(model)}


def exact_updates(model):
    """The updates by their formula, in float64."""
    return {name: layer.double().delta_weight().detach() for name, layer in adapter_layers(copy.deepcopy(model))}


def mean(values, weights):
    return {name: sum(w * each[name] for w, each in zip(weights, values, strict=True)) for name in values[0]}


def relative(ours, expected):
    """The norm of the difference of all layers, relative to the norm of the expected update."""
    off = sum(float((ours[name] - each).norm() ** 2) for name, each in expected.items())
    return math.sqrt(off / sum(float(each.norm() ** 2) for each in expected.values()))


@pytest.mark.parametrize("train", ["B", "A"])
@torch.no_grad()
def test_mean_of_adapters_with_one_frozen_factor_is_the_mean_of_their_updates(architecture, tmp_path, train):
    models = [trained(architecture, draw=draw, train=train) for draw in range(3)]
    weights = [1, 2, 5]
    result = average(save_all(models, tmp_path), tmp_path / "mean", weights)
    model = load_adapter(build(architecture), result)
    expected = mean([updates(each) for each in models], [each / 8 for each in weights])
    for name, update in updates(model).items():
        torch.testing.assert_close(update, expected[name], rtol=0, atol=1e-6)
        assert update.abs().max() > 1e-2
    assert relative(exact_updates(model), mean([exact_updates(each) for each in models], result.weights)) < 1e-6
    assert result.weights == (0.125, 0.25, 0.625) and result.rank == 3
    assert result.residual == 0 and set(result.residuals.values()) == {0.0}
    for name, head in vitlorafa.head_parameters(model).items():
        torch.testing.assert_close(
            head, mean([vitlorafa.head_parameters(each) for each in models], result.weights)[name]
        )
    frozen = {"B": "lora_A", "A": "lora_B"}[train]
    for (_, ours), (_, first) in zip(adapter_layers(model), adapter_layers(models[0]), strict=True):
        assert torch.equal(getattr(ours, frozen), getattr(first, frozen))


def naive_mean(models):
    """The mean of A and of B, each on its own."""
    model = copy.deepcopy(models[0])
    for layer, *others in zip(
        *([layer for _, layer in adapter_layers(each)] for each in (model, *models)), strict=True
    ):
        for factor in ("lora_A", "lora_B"):
            getattr(layer, factor).copy_(torch.stack([getattr(each, factor) for each in others]).mean(0))
    return model


@torch.no_grad()
def test_mean_of_both_factors_is_not_the_mean_of_the_updates(tmp_path):
    k = 3
    models = [trained(seed=each, draw=each, train="BA") for each in range(k)]
    folders = save_all(models, tmp_path)
    expected = mean([exact_updates(each) for each in models], [1 / k] * k)
    # Of k² products of independent factors, naive means keep 1/k of the k own ones, and add the others.
    assert relative(exact_updates(naive_mean(models)), expected) == pytest.approx(math.sqrt((k - 1) / k), abs=0.05)
    with pytest.raises(
        AdapterError, match=naming("neither A nor B", "blocks.0.attn.qkv", "than 3", "one seed", "rank=")
    ):
        average(folders, tmp_path / "mean")
    assert not (tmp_path / "mean").exists()
    residuals = {}
    for rank in (3, 6, 9, 12):
        result = average(folders, tmp_path / f"mean{rank}", rank=rank)
        model = load_adapter(build("test_vit"), result)
        assert {layer.lora_A.shape[1] for _, layer in adapter_layers(model)} == {rank} == {result.rank}
        assert relative(exact_updates(model), expected) == pytest.approx(result.residual, abs=1e-6)
        for name, update in exact_updates(model).items():
            off = float((update - expected[name]).norm() / expected[name].norm())
            assert off == pytest.approx(result.residuals[name], abs=1e-6)
        residuals[rank] = result.residual
    assert residuals[3] > residuals[6] > 0.1 and max(residuals[9], residuals[12]) < 1e-12
    # No other update of this rank is closer than that of the largest singular values.
    best = 0.0
    model = models[0]
    for name, layer in adapter_layers(model):
        for start in layer.starts:
            rows = expected[name][start : start + layer.lora_B.shape[1]]
            best += float(torch.linalg.svdvals(rows)[6:].square().sum())
    total = sum(float(each.square().sum()) for each in expected.values())
    assert residuals[6] == pytest.approx(math.sqrt(best / total), rel=1e-9)


@torch.no_grad()
def test_rank_leaves_what_is_exact_and_lowers_the_rest(tmp_path):
    folders = save_all([trained(draw=draw) for draw in range(2)], tmp_path)
    exact, same = (average(folders, tmp_path / name, rank=rank) for name, rank in (("exact", None), ("same", 3)))
    ours, theirs = (load_file(each.folder / "adapter.safetensors") for each in (exact, same))
    assert same.residual == 0 and all(torch.equal(ours[name], each) for name, each in theirs.items())
    lower = average(folders, tmp_path / "lower", rank=2)
    model = load_adapter(build("test_vit"), lower)
    expected = exact_updates(load_adapter(build("test_vit"), exact))
    assert 0.1 < lower.residual == pytest.approx(relative(exact_updates(model), expected), abs=1e-6)
    for _, layer in adapter_layers(model):  # the frozen factor is orthonormal again
        torch.testing.assert_close(layer.lora_A @ layer.lora_A.mT, torch.eye(2).expand(len(layer.starts), 2, 2))
        assert layer.scale == 2 and layer.lora_B.requires_grad and not layer.lora_A.requires_grad


@torch.no_grad()
def test_adapters_of_other_ranks_and_scales(tmp_path):
    models = [trained(), trained(rank=5, alpha=5, draw=1, seed=1), trained(rank=4, rank_stabilised=True, draw=2)]
    folders = save_all(models, tmp_path)
    for other, named in ((1, ["has rank 5", "has 3", "rank="]), (2, ["has rank 4", "has 3", "rank="])):
        with pytest.raises(AdapterError, match=naming(str(folders[0]), str(folders[other]), *named)):
            average([folders[0], folders[other]], tmp_path / "none")
    scaled = save_adapter(trained(alpha=3), tmp_path / "scaled", head=True)
    with pytest.raises(AdapterError, match=naming(str(scaled), "has scale 1", "has 2", "rank=")):
        average([folders[0], scaled], tmp_path / "none")
    result = average(folders, tmp_path / "mean", rank=12)
    expected = mean([exact_updates(each) for each in models], result.weights)
    assert relative(exact_updates(load_adapter(build("test_vit"), result)), expected) < 1e-6
    assert result.residual < 1e-12
    with pytest.raises(AdapterError, match=naming("rank 65", "64", "blocks.0.attn.qkv")):
        average(folders, tmp_path / "none", rank=65)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("train", ["B", "A"])
@torch.no_grad()
def test_start_that_all_share_is_kept(tmp_path, train):
    models = [trained(draw=draw, train=train, init_A="pissa", targets="q,v,fc1") for draw in range(3)]
    result = average(save_all(models, tmp_path), tmp_path / "mean")
    model = load_adapter(build("test_vit"), result)
    assert relative(exact_updates(model), mean([exact_updates(each) for each in models], result.weights)) < 1e-6
    assert all(layer.start_A is not None for _, layer in adapter_layers(model))


@torch.no_grad()
def test_start_at_a_part_of_the_weight_where_both_factors_train(tmp_path):
    models = [trained(draw=draw, train="BA", init_A="pissa", targets="q,v") for draw in range(2)]
    for model in models:  # small beside the start, as after a training
        for _, layer in adapter_layers(model):
            layer.lora_A.copy_(layer.start_A + 0.1 * (layer.lora_A - layer.start_A))
            layer.lora_B.copy_(layer.start_B + 0.1 * (layer.lora_B - layer.start_B))
    folders = save_all(models, tmp_path)
    expected = mean([exact_updates(each) for each in models], [0.5, 0.5])
    kept, without = (average(folders, tmp_path / f"{rank}", rank=rank) for rank in (3, 4))
    for result in (kept, without):
        model = load_adapter(build("test_vit"), result)
        assert relative(exact_updates(model), expected) == pytest.approx(result.residual, abs=1e-4)
        assert {layer.start_A is None for _, layer in adapter_layers(model)} == {result is without}
    assert 0 < kept.residual < 0.5 * without.residual
    mixed = save_adapter(trained(draw=5, targets="q,v"), tmp_path / "zero", head=True)
    result = average([folders[0], mixed], tmp_path / "mixed", rank=9)
    expected = mean([exact_updates(models[0]), exact_updates(trained(draw=5, targets="q,v"))], [0.5, 0.5])
    assert relative(exact_updates(load_adapter(build("test_vit"), result)), expected) < 1e-5


def with_statistics(draw):
    """An adapted model whose head has a BatchNorm, and which trained a norm and counted its steps."""
    model = build("test_vit")
    model.head = nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 5))
    inject(model, AdapterConfig(rank=2, seed=0), train_head=True)
    model.norm.weight.requires_grad_(True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(draw)))
        model.head[0].running_mean.fill_(draw)
        model.head[0].running_var.fill_(1 + draw)
        model.head[0].num_batches_tracked.fill_(10 * draw + 1)
    return model


@torch.no_grad()
def test_head_norms_and_statistics_are_averaged(tmp_path):
    models = [with_statistics(draw) for draw in (0, 1, 4)]
    result = average(save_all(models, tmp_path), tmp_path / "mean", [2, 1, 1])
    model = build("test_vit")
    model.head = nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 5))
    load_adapter(model, result)
    assert torch.equal(model.head[0].running_mean, torch.full((64,), 1.25))
    assert torch.equal(model.head[0].running_var, torch.full((64,), 2.25))
    assert model.head[0].num_batches_tracked == 14  # 13.5
    for name in ("norm.weight", "head.1.weight", "head.1.bias", "blocks.3.attn.qkv.lora_B"):
        each = [m.get_parameter(name) for m in (model, *models)]
        torch.testing.assert_close(each[0], each[1] / 2 + each[2] / 4 + each[3] / 4)
    assert model.norm.weight.requires_grad


def test_mean_of_copies_is_the_same_adapter(tmp_path):
    folder = save_adapter(trained(), tmp_path / "one", head=True, format="vitlorafa")
    result = average([folder, str(folder), folder], tmp_path / "mean", np.array([0.1, 0.2, 0.6]))
    before, after = (load_file(each / "adapter.safetensors") for each in (folder, result.folder))
    assert before.keys() == after.keys() and all(torch.equal(before[name], each) for name, each in after.items())


def test_description_tells_what_was_averaged(tmp_path):
    models = [trained(draw=draw) for draw in range(2)]
    folders = [
        save_adapter(
            model, tmp_path / name, head=True, class_names=list("abcde"), metadata={"data": "PACS", "trial": name}
        )
        for model, name in zip(models, "xy", strict=True)
    ]
    result = average(iter(folders), str(tmp_path / "mean"), [3, 1], metadata={"note": "soup"})
    assert os.fspath(result) == str(tmp_path / "mean") and result.folder == tmp_path / "mean"
    description, first = (json.loads((each / "adapter.json").read_text()) for each in (result.folder, folders[0]))
    assert description.pop("metadata") == {
        "data": "PACS",
        "note": "soup",
        "average": {
            "folders": [str(each) for each in folders],
            "weights": [0.75, 0.25],
            "rank": 3,
            "residual": 0.0,
            "residuals": result.residuals,
        },
    }
    for changed in ("metadata", "sha256"):
        first.pop(changed), description.pop(changed, None)
    assert description == first
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(build("test_vit"), result)


def test_without_heads(tmp_path):
    models = [trained(), trained(draw=1)]
    models[1].reset_classifier(7)
    folders = save_all(models, tmp_path)
    with pytest.raises(AdapterError, match=naming(*map(str, folders), "7 classes", "5", "head=False")):
        average(folders, tmp_path / "mean")
    result = average(folders, tmp_path / "mean", head=False)
    assert not [name for name in load_file(result.folder / "adapter.safetensors") if "head" in name]
    plain = build("test_vit")
    plain.reset_classifier(3)
    load_adapter(plain, result)
    headless = save_adapter(models[0], tmp_path / "headless")
    for pair in ([folders[0], headless], [headless, folders[0]]):
        with pytest.raises(AdapterError, match=naming(f"{headless} lacks head", str(folders[0]), "head=False")):
            average(pair, tmp_path / "none")
    average([folders[0], headless], tmp_path / "mean", head=False)


def test_classes_of_other_names(tmp_path):
    folders = [
        save_adapter(trained(), tmp_path / names, head=True, class_names=list(names)) for names in ("abcde", "abced")
    ]
    with pytest.raises(AdapterError, match=naming(*map(str, folders), "classes", "a, b, c, ...", "head=False")):
        average(folders, tmp_path / "mean")
    result = average(folders, tmp_path / "mean", head=False)
    assert json.loads((result.folder / "adapter.json").read_text())["class_names"] is None


def other_weights():
    model = build("test_vit")
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight.mul_(1.01)
    return inject(model, AdapterConfig(rank=3, seed=0, targets="all"))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (other_weights, ["other weights", "test_vit.r160_in1k", "one pretrained model"]),
        (lambda: trained("vit_small_patch16_224"), ["vit_small_patch16_224", "test_vit", "one pretrained model"]),
        (lambda: trained(targets="q,v"), ["adapts q and v in blocks.0.attn.qkv", "q, k and v", "same targets"]),
        (lambda: trained(blocks="first2"), ["adapts nothing in blocks.2.attn.qkv", "same targets and blocks"]),
        (lambda: trained(seed=1, draw=1), ["neither A nor B", "blocks.0.attn.qkv", "rank="]),
    ],
)
def test_adapters_that_do_not_belong_together(tmp_path, make, named):
    folders = save_all([trained(), make()], tmp_path, head=False)
    parts = named if "neither" in named[0] else [*map(str, folders), *named]
    with pytest.raises(AdapterError, match=naming(*parts)):
        average(folders, tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_other_parts_that_trained(tmp_path):
    models = [trained(), trained(draw=1)]
    models[1].norm.bias.requires_grad_(True)
    folders = save_all(models, tmp_path)
    with pytest.raises(AdapterError, match=naming(f"{folders[0]} lacks norm.bias", str(folders[1]))):
        average(folders, tmp_path / "mean")


def test_another_input_is_a_warning(tmp_path):
    folders = save_all([trained(), trained(draw=1)], tmp_path)
    path = folders[1] / "adapter.json"
    description = json.loads(path.read_text())
    description["input"]["input_size"] = [3, 96, 96]
    path.write_text(json.dumps(description))
    with pytest.warns(AdapterWarning, match=naming(*map(str, folders), "input_size")):
        result = average(folders, tmp_path / "mean")
    assert json.loads((result.folder / "adapter.json").read_text())["input"]["input_size"] == [3, 32, 32]


@pytest.fixture
def pair(tmp_path):
    return save_all([trained(), trained(draw=1)], tmp_path)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (lambda pair: {"folders": str(pair[0])}, ["folders must be a list", "/0'"]),
        (lambda pair: {"folders": pair[0]}, ["folders must be a list"]),
        (lambda pair: {"folders": None}, ["folders must be a list", "None"]),
        (lambda pair: {"folders": [pair[0], 3]}, ["folders must be paths", "not int"]),
        (lambda pair: {"folders": [pair[0], torch.nn.Linear(1, 1)]}, ["folders must be paths", "not Linear"]),
        (lambda pair: {"folders": []}, ["at least two", "0"]),
        (lambda pair: {"folders": pair[:1]}, ["at least two", "1"]),
        (lambda pair: {"folders": [*pair, pair[0] / "none"]}, ["cannot read", "/none"]),
        (lambda pair: {"folder": pair[0] / "." / "../0"}, ["one of the averaged", "another folder"]),
        (lambda pair: {"weights": [1]}, ["weights has 1", "2 adapters"]),
        (lambda pair: {"weights": 1}, ["weights must be a list", "1"]),
        (lambda pair: {"weights": [1, -1]}, ["weights", "0 or more", "-1"]),
        (lambda pair: {"weights": [1, math.nan]}, ["weights", "finite", "nan"]),
        (lambda pair: {"weights": [1, math.inf]}, ["weights", "finite", "inf"]),
        (lambda pair: {"weights": [0, 0]}, ["sum of weights", "above 0"]),
        (lambda pair: {"weights": [1, "2"]}, ["weight", "number", "'2'"]),
        (lambda pair: {"rank": 0}, ["rank", "at least 1", "0"]),
        (lambda pair: {"rank": 2.5}, ["rank", "whole number", "2.5"]),
        (lambda pair: {"metadata": {"x": object()}}, ["metadata['x']", "object"]),
        (lambda pair: {"metadata": {"average": 1}}, ["metadata", "'average'", "rename"]),
        (lambda pair: {"metadata": [1]}, ["metadata", "dict"]),
    ],
)
def test_bad_input(pair, tmp_path, arguments, named):
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(AdapterError, match=naming(*named)) as error:
        average(**{"folders": pair, "folder": tmp_path / "mean"} | arguments(pair))
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def damage_tensor(folder, name, change):
    tensors = load_file(folder / "adapter.safetensors")
    change(tensors, name)
    vitlorafa.adapter_folder.write(
        folder,
        vitlorafa.adapter_folder.encode(json.loads((folder / "adapter.json").read_text()), tensors),
    )


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("blocks.0.attn.qkv.lora_B", lambda t, n: t[n].fill_(math.nan), ["not finite", "blocks.0.attn.qkv.lora_B"]),
        ("head.weight", lambda t, n: t[n].fill_(math.inf), ["not finite", "head.weight", "leave it out"]),
        ("blocks.0.attn.qkv.lora_B", lambda t, n: t.pop(n), ["blocks.0.attn.qkv", "B [3, m, 3]", "save it again"]),
        ("head.bias", lambda t, n: t.pop(n), ["lacks head.bias", "save it again"]),
        (
            "blocks.0.attn.qkv.lora_A",
            lambda t, n: t.update({n: t[n][:, :2].contiguous()}),
            ["blocks.0.attn.qkv", "A [3, 3, d_in]", "save it again"],
        ),
    ],
)
def test_damaged_adapter(pair, tmp_path, name, change, named):
    damage_tensor(pair[1], name, change)
    with pytest.raises(AdapterError, match=naming(str(pair[1]), *named)):
        average(pair, tmp_path / "mean")


def test_damaged_config(pair, tmp_path):
    path = pair[1] / "adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config": {"rnk": 2}}))
    with pytest.raises(AdapterError, match=naming(str(pair[1]), "'rnk'", "'rank'")):
        average(pair, tmp_path / "mean")


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (3, 3)])
@pytest.mark.parametrize("inner", [1, 2, 9])
def test_approximation_is_that_of_the_product(shape, inner):
    m, d = shape
    left, right = torch.randn(m, inner, dtype=torch.float64), torch.randn(inner, d, dtype=torch.float64)
    product = left @ right
    U, S, Vh = torch.linalg.svd(product)
    assert product_norm(left, right) == pytest.approx(float(product.norm()))
    for rank in (1, 2, 3):
        best = approximate(left, right, rank)
        assert (best.U.shape, best.S.shape, best.V.shape) == ((m, rank), (rank,), (rank, d))
        torch.testing.assert_close(best.U * best.S @ best.V, U[:, :rank] * S[:rank] @ Vh[:rank])
        assert best.error == pytest.approx(float(S[rank:].norm()), abs=1e-12)


def without_header(folder):
    """As PEFT writes it."""
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, {"format": "pt"})
    return folder


@torch.no_grad()
def test_folders_in_pefts_format(tmp_path):
    models = [trained(draw=draw) for draw in range(2)]
    folders = save_all(models, tmp_path, format="peft")
    own = save_adapter(models[1], tmp_path / "own", head=True)
    expected = mean([exact_updates(each) for each in models], [0.5, 0.5])
    for pair in (folders, [folders[0], own]):
        result = average(pair, tmp_path / "mean")
        assert relative(exact_updates(load_adapter(build("test_vit"), result)), expected) < 1e-6
    bare = [without_header(folder) for folder in folders]
    with pytest.raises(AdapterError, match=naming(str(bare[0]), "PEFT", "pass the model")):
        average(bare, tmp_path / "none")
    plain = build("test_vit")
    before = copy.deepcopy(plain.state_dict())
    result = average(bare, tmp_path / "bare", model=nn.Sequential(plain))
    model = load_adapter(build("test_vit"), result)
    ours = exact_updates(model)
    assert ours.keys() == expected.keys() and relative(ours, expected) < 1e-6
    torch.testing.assert_close(model.head.weight, (models[0].head.weight + models[1].head.weight) / 2)
    assert plain.state_dict().keys() == before.keys()
