"""Several adapters over one A in one model, chosen for each image."""

import copy
import functools
import pickle
import threading
import warnings

import numpy as np
import pytest
import timm
import torch
from messages import naming
from small_models import build, images
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vitlorafa
from vitlorafa import (
    AdapterConfig,
    AdapterError,
    AdapterWarning,
    adapter_layers,
    choose_adapter,
    inject,
    load_adapter,
    stack,
)

CHOICE = [1, 0, -1, 1]


def small(**kwargs):
    return build("test_vit", depth=2, **kwargs)


def save(folder, draw, model=None, head=True, format="vitlorafa", **config):
    """Saves an adapter with the B and the head of a random draw, over the A of the config's seed."""
    model = small() if model is None else model
    inject(model, AdapterConfig(**{"rank": 4, "targets": "all", "seed": 0, **config}), train_head=head)
    torch.manual_seed(draw)
    with torch.no_grad():
        for _, layer in adapter_layers(model):
            layer.lora_B.add_(0.1 * torch.randn_like(layer.lora_B))
        for parameter in vitlorafa.head_parameters(model).values() if head else ():
            parameter.add_(torch.randn_like(parameter))
    return vitlorafa.save_adapter(model, folder, head=head, format=format)


@pytest.fixture
def folders(tmp_path):
    """Two adapters over one A of test_vit, with their heads."""
    return [save(tmp_path / name, seed) for seed, name in enumerate(("first", "second"), 1)]


def alone(folders, x, make=small, choice=CHOICE, **kwargs):
    """What each image's own adapter alone gives for it."""
    outputs = [load_adapter(make(), folder, **kwargs)(x) for folder in folders]
    outputs.append(make()(x))
    return torch.stack([outputs[i][n] for n, i in enumerate(choice)])


@torch.no_grad()
def test_each_image_gets_what_its_own_adapter_alone_gives(architecture, tmp_path):
    make = functools.partial(build, architecture)
    folders = [save(tmp_path / str(seed), seed, make()) for seed in (1, 2)]
    model = stack(make(), folders)
    x = images(model, 4)
    ours, expected = model(x, adapter=CHOICE), alone(folders, x, make)
    assert (ours - expected).norm() <= 1e-5 * expected.norm()
    assert (expected - make()(x)).norm() > 0.1 * expected.norm()


@torch.no_grad()
def test_one_number_for_all_images_is_that_adapter_alone(folders):
    model = stack(small(), folders)
    x = images(model, 4)
    for adapter in (0, 1, -1, np.int64(1), torch.tensor(0)):
        assert torch.equal(model(x, adapter=adapter), alone(folders, x, choice=[int(adapter)] * 4))


@torch.no_grad()
def test_indices_may_be_of_any_kind(folders):
    model = stack(small(), folders)
    x = images(model, 4)
    expected = model(x, adapter=torch.tensor(CHOICE))
    for adapter in (CHOICE, tuple(CHOICE), np.array(CHOICE), torch.tensor(CHOICE, dtype=torch.int8)):
        assert torch.equal(model(x, adapter=adapter), expected)


@pytest.mark.parametrize(
    ("adapter", "named"),
    [
        (None, ["none", "is chosen (2)", "adapter=0", "choose_adapter"]),
        (2, ["0 to 1", "not 2"]),
        (-2, ["-1", "not -2"]),
        ([0, 2, 0, 0], ["0 to 1", "not 2"]),
        (torch.tensor([0, 0, -3, 0]), ["0 to 1", "not -3"]),
        ([0.0, 1.0, 0.0, 0.0], ["one of these for each image", "1.0"]),
        ([[0], [1], [0], [0]], ["one of these for each image"]),
        (True, ["0 to 1", "True"]),
        ("first", ["0 to 1", "'first'"]),
        ([0, 1], ["2 indices", "4 images"]),
    ],
)
def test_refuses_other_choices(folders, adapter, named):
    model = stack(small(), folders)
    x = images(model, 4)
    with pytest.raises(AdapterError, match=naming(*named)):
        model(x, adapter=adapter)
    assert model(x, adapter=0).shape == (4, 5)  # nothing is left of the call that failed


def test_remove_restores_the_model(folders):
    model = small()
    before, head, flags = model(images(model)), model.head, {n: p.requires_grad for n, p in model.named_parameters()}
    stack(model, folders)
    assert not any(p.requires_grad for p in model.parameters())
    vitlorafa.remove(model)
    assert torch.equal(model(images(model)), before) and model.head is head
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert not model._forward_pre_hooks and not model._forward_hooks
    with pytest.raises(TypeError, match="adapter"):
        model(images(model), adapter=0)


@torch.no_grad()
@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(folders, make):
    model = stack(small(), folders)
    x = images(model, 4)
    expected = model(x, adapter=CHOICE)
    other = make(model)
    with choose_adapter(model, 0):  # of the other model
        assert torch.equal(other(x, adapter=CHOICE), expected)
        with pytest.raises(AdapterError, match="is chosen"):
            other(x)
    assert not vitlorafa.remove(other)._forward_pre_hooks and model._forward_pre_hooks


def test_compiles_into_one_graph(tmp_path):
    make = functools.partial(build, "test_vit", depth=1)
    model = stack(make(), [save(tmp_path / str(draw), draw, make()) for draw in (1, 2)])
    x = images(model, 4)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    try:
        for adapter in (torch.tensor(CHOICE), 1):
            with torch.no_grad():
                torch.testing.assert_close(compiled(x, adapter=adapter), model(x, adapter=adapter))
    finally:
        torch._dynamo.reset()


class Around(nn.Module):
    """A module with another forward, such as Lightning's."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model(batch["images"]).log_softmax(1)


@torch.no_grad()
def test_modules_around_the_model_take_the_choice_too(folders):
    model = small()
    around = stack(Around(model), folders)
    x = images(model, 4)
    expected = alone(folders, x).log_softmax(1)
    torch.testing.assert_close(around({"images": x}, adapter=CHOICE), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(x, adapter=CHOICE).log_softmax(1), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(AdapterError, match=naming("3 indices", "4 images")):
        around({"images": x}, adapter=CHOICE[:3])
    vitlorafa.remove(around)
    assert not around._forward_pre_hooks and not model._forward_pre_hooks


@torch.no_grad()
def test_choose_adapter(folders):
    model = stack(small(), folders)
    x = images(model, 4)
    with choose_adapter(model, CHOICE):
        features = model.forward_features(x)
        assert torch.equal(model(x), model(x, adapter=CHOICE))
        torch.testing.assert_close(model(x, adapter=0), alone(folders, x, choice=[0] * 4))
        with pytest.raises(AdapterError, match="not 9"):
            model(x, adapter=9)
        assert torch.equal(model.forward_features(x), features)
    with pytest.raises(AdapterError, match="is chosen"):
        model.forward_features(x)
    with pytest.raises(AdapterError, match="2 indices for 4 images"), choose_adapter(model, [0, 1]):
        model.forward_features(x)
    with pytest.raises(AdapterError, match=naming("stack(model, folders)")), choose_adapter(small(), 0):
        pass


@torch.no_grad()
def test_each_thread_has_its_own_choice(folders):
    """Two threads meet within the model, each with another adapter."""
    model = stack(small(), folders)
    x = images(model, 4)
    expected = [model(x, adapter=i) for i in range(2)]
    meeting, found = threading.Barrier(2, timeout=60), [None, None]

    def meet(*_):
        meeting.wait()

    model.blocks[0].register_forward_pre_hook(meet)

    @torch.no_grad()
    def compute(i):
        found[i] = model(x, adapter=i)

    threads = [threading.Thread(target=compute, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append(function)
        return function(*args, **kwargs or {})


@torch.no_grad()
def test_operations_do_not_grow_with_the_adapters_of_a_batch(folders, tmp_path):
    model = stack(small(), [*folders, *(save(tmp_path / str(seed), seed) for seed in (3, 4))], head=False)
    x, calls = images(model, 4), []
    for adapter in ([0, 0, 0, 0], [0, 1, 2, 3]):
        with Count() as count:
            model(x, adapter=adapter)
        calls.append(count.calls)
    assert calls[0] == calls[1] and len(calls[0]) > 50


@torch.no_grad()
def test_heads(folders, tmp_path):
    x = images(small(), 4)
    own = stack(small(), folders, head=False)(x, adapter=CHOICE)
    torch.testing.assert_close(own, alone(folders, x, head=False), atol=1e-4, rtol=1e-4)
    headless = small()
    headless.reset_classifier(0)
    stack(headless, folders, head=False)
    assert headless(x, adapter=CHOICE).shape == (4, headless.num_features)
    without = save(tmp_path / "without", 3, head=False)
    assert not torch.equal(stack(small(), [without])(x, adapter=0), small()(x))
    with pytest.raises(AdapterError, match=naming("without", "head=True", "head=False")):
        stack(small(), [*folders, without])
    with pytest.raises(AdapterError, match=naming("without", "no head")):
        stack(small(), [*folders, without], head=True)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"seed": 1}, ["different A", "blocks.0.attn.qkv", "train='B'", "one seed", "average("]),
        ({"train": "BA"}, ["different A", "train='B'"]),
        ({"rank": 3}, ["rank", "3", "4"]),
        ({"alpha": 1}, ["scale", "0.25", "2"]),
        ({"targets": "q,k"}, ["adapts q and k", "targets"]),
        ({"blocks": "0"}, ["blocks.1.attn.qkv", "adapts nothing"]),
    ],
)
def test_refuses_adapters_that_differ_in_more_than_B(folders, tmp_path, other, named):
    check_refused(small(), [*folders, save(tmp_path / "other", 3, **other)], ["other", "first", *named])


def check_refused(model, folders, named, **kwargs):
    """A refusal names these words, and leaves the model as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(AdapterError, match=naming(*named)):
        stack(model, folders, **kwargs)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not model._forward_pre_hooks


def test_refuses_what_cannot_be_stacked(folders, tmp_path):
    weights = small()
    nn.init.normal_(weights.blocks[0].attn.qkv.weight)
    check_refused(small(), [*folders, save(tmp_path / "weights", 3, weights)], ["other weights", "first"])
    model = small()
    model.reset_classifier(7)
    seven = save(tmp_path / "seven", 3, copy.deepcopy(model))
    check_refused(small(), [*folders, seven], ["7 classes", "5", "head=False"])
    check_refused(model, folders, ["5", "7", "head=False"])  # seen when the first is loaded
    stack(small(), [*folders, seven], head=False)
    norms = small()
    inject(norms, AdapterConfig(rank=4, targets="all", seed=0), train_head=True)
    norms.norm.weight.requires_grad_(True)
    norms = vitlorafa.save_adapter(norms, tmp_path / "norms", head=True)
    check_refused(small(), [norms, norms], ["norms", "norm.weight", "load_adapter"])
    for none in ([], folders[0], str(folders[0]), 3):
        check_refused(small(), none, ["folders", "list"])
    check_refused(small(), [*folders, tmp_path / "nothing"], ["nothing", "cannot read"])


def test_a_warning_that_is_an_error_leaves_the_model(tmp_path):
    other = small()
    other.pretrained_cfg = {**other.pretrained_cfg, "mean": (0.0, 0.0, 0.0)}
    folders = [save(tmp_path / "same", 1), save(tmp_path / "other", 2, other)]
    model = small()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(AdapterWarning, match="another input"):
            stack(model, folders)
    x = images(model)
    assert torch.equal(model(x), small()(x)) and not list(adapter_layers(model))


def test_what_needs_one_adapter_is_refused(folders, tmp_path):
    model = stack(small(), folders)
    for operation in (
        vitlorafa.merge,
        vitlorafa.merge_and_unload,
        lambda model: vitlorafa.save_adapter(model, tmp_path / "new"),
        lambda model: load_adapter(model, folders[0]),
    ):
        with pytest.raises(AdapterError, match=naming("several adapters", "remove(model)", "load_adapter")):
            operation(model)
    for operation in (lambda model: inject(model, AdapterConfig(rank=2)), lambda model: stack(model, folders)):
        with pytest.raises(AdapterError, match=naming("already adapted", "remove(model)")):
            operation(model)
    with pytest.raises(AdapterError, match=naming("several weights", "remove(model)")):
        model.blocks[0].attn.qkv.delta_weight()
    assert not (tmp_path / "new").exists() and model(images(model), adapter=0).shape == (2, 5)


@torch.no_grad()
def test_strength_and_disabling_hold_for_all_adapters(folders):
    model = stack(small(), folders)
    x = images(model, 4)
    vitlorafa.set_strength(model, 0.5)
    halves = [vitlorafa.set_strength(load_adapter(small(), folder), 0.5)(x) for folder in folders]
    expected = torch.stack([halves[i][n] for n, i in enumerate((1, 0, 0, 1))])
    torch.testing.assert_close(model(x, adapter=[1, 0, 0, 1]), expected, atol=1e-4, rtol=1e-4)
    with vitlorafa.disable_adapter(model), choose_adapter(model, 0):
        assert torch.equal(model.forward_features(x), small().forward_features(x))


@torch.no_grad()
def test_a_faster_model_gives_the_same(folders):
    x = images(small(), 4)
    expected = alone(folders, x)
    for first, second in ((vitlorafa.speed_up, stack), (stack, vitlorafa.speed_up)):
        model = small()
        for step in (first, second):
            step(model, folders) if step is stack else step(model)
        torch.testing.assert_close(model(x, adapter=CHOICE), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_and_autocast(tmp_path, dropout):
    folders = [save(tmp_path / str(seed), seed, dropout=dropout) for seed in (1, 2)]
    model = stack(small(), folders)
    x = images(model, 4)
    expected = alone(folders, x)
    with torch.autocast("cpu", torch.bfloat16):
        low, plain = model(x, adapter=CHOICE), alone(folders, x)
    assert low.dtype == torch.bfloat16
    assert (low.float() - expected).norm() <= 2 * (plain.float() - expected).norm()
    assert torch.equal(model(x, adapter=CHOICE), model(x, adapter=CHOICE))  # nothing is dropped in evaluation


@torch.no_grad()
def test_starts_at_a_part_of_the_weight(tmp_path):
    """Without an adapter the layer is the pretrained one, though the frozen weight is a residual."""
    folders = [save(tmp_path / str(seed), seed, targets="q,fc1", init_A="pissa") for seed in (1, 2)]
    model = stack(small(), folders)
    x = images(model, 4)
    torch.testing.assert_close(model(x, adapter=CHOICE), alone(folders, x), atol=1e-3, rtol=1e-3)
    both = save(tmp_path / "both", 3, train="BA", targets="q,fc1", init_A="pissa")
    moved = load_adapter(small(), both)
    next(adapter_layers(moved))[1].lora_A.add_(1)
    check_refused(small(), [vitlorafa.save_adapter(moved, both)], ["both", "trained A"])


def test_gradients_reach_the_images(folders):
    model = stack(small(), folders)
    x = images(model, 4).requires_grad_()
    model(x, adapter=CHOICE).sin().sum().backward()
    ours, x.grad = x.grad, None
    alone(folders, x).sin().sum().backward()
    torch.testing.assert_close(ours, x.grad, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_folders_in_pefts_format(folders, tmp_path):
    peft = [save(tmp_path / f"peft{seed}", seed, format="peft") for seed in (1, 2)]
    x = images(small(), 4)
    ours = stack(small(), peft)(x, adapter=CHOICE)
    assert torch.equal(ours, stack(small(), folders)(x, adapter=CHOICE))


@torch.no_grad()
def test_a_model_that_reads_the_device_of_a_weight(tmp_path):
    """ConViT does; who computes with the weight gets no number, rather than those of one adapter."""
    config = {"img_size": 32, "depth": 2, "embed_dim": 12, "local_up_to_layer": 1, "num_classes": 5}

    def make():
        torch.manual_seed(0)
        return timm.create_model("convit_tiny", **config).eval()

    folders = [save(tmp_path / str(draw), draw, make()) for draw in (1, 2)]
    model = stack(make(), folders)
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(model(x, adapter=CHOICE), alone(folders, x, make), atol=1e-4, rtol=1e-4)
    weight, base = (layer.blocks[0].attn.qk.weight for layer in (model, make()))
    assert weight.isnan().all() and (weight.shape, weight.dtype) == (base.shape, base.dtype)
    with vitlorafa.disable_adapter(model):
        assert torch.equal(model.blocks[0].attn.qk.weight, base)


@torch.no_grad()
def test_a_list_of_heads(tmp_path):
    config = {"embed_dim": (16, 32), "depth": ((1, 1, 0),), "num_heads": (2, 2), "mlp_ratio": (2, 2, 1)}

    def make():
        torch.manual_seed(0)
        return timm.create_model("crossvit_9_240", num_classes=5, **config).eval()

    folders = [save(tmp_path / str(draw), draw, make(), targets="q,v,proj") for draw in (1, 2)]
    model = stack(make(), folders)
    x = torch.randn(4, 3, 240, 240)
    torch.testing.assert_close(model(x, adapter=CHOICE), alone(folders, x, make), atol=1e-4, rtol=1e-4)
    assert torch.equal(vitlorafa.remove(model)(x), make()(x))


@torch.no_grad()
def test_a_quantised_base(folders):
    pytest.importorskip("bitsandbytes")

    def make():
        return vitlorafa.quantise(small().requires_grad_(False), "int8")

    model = stack(make(), folders)
    x = images(model, 4)
    torch.testing.assert_close(model(x, adapter=CHOICE), alone(folders, x, make), atol=1e-4, rtol=1e-4)
