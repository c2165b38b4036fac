"""Adapted models under what else torch and timm do with a model, in both ways to compute."""

import copy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from adapted import (
    AUTOCAST,
    COMPUTE_AND_DROPOUT,
    RANK,
    WAYS,
    adapted,
    assert_same,
    autocast,
    gradients,
    loss_of,
    one_layer,
    step,
    trained,
)
from small_models import build, images
from timm.layers import set_reentrant_ckpt, use_reentrant_ckpt
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from vitlorafa import adapter_layers, use_ways
from vitlorafa.ops.linear import can_fuse

pytestmark = pytest.mark.numbers

# Several processes

DDP = """
    import os
    import sys
    from datetime import timedelta
    import torch
    import torch.distributed as dist

    folder, rank = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=500)
    )
    cases, x = torch.load(f"{folder}/cases.pt", weights_only=False)
    results = []
    for model, low in cases:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # the second forward pass refuses if a parameter was left without a gradient
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                y = parallel(x.chunk(2)[rank])
            y.float().sin().sum().backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert parallel._get_ddp_logging_data()["num_parameter_tensors"] == len(trained)
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        results.append(trained)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # torch's threads may abort a process that exits as others do
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
def test_two_processes_get_the_gradients_of_the_joined_batch(tmp_path):
    cases = [(adapted("folded"), False), (adapted("separate", train="BA"), False), (adapted("folded"), True)]
    x = images(cases[0][0], 6)
    torch.save((cases, x), tmp_path / "cases.pt")
    command = [sys.executable, "-c", textwrap.dedent(DDP), str(tmp_path)]
    root = Path(__file__).parents[2]  # where the package may be imported from without being installed
    pipes = {"cwd": root, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen([*command, str(rank)], **pipes) for rank in (0, 1)]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=600)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for (model, low), ours, other in zip(cases, first, second, strict=True):
        expected = step(model, x, low)
        del expected["y"]
        assert_same({name: 2 * g for name, g in ours.items()}, expected, low)  # DDP takes the mean
        torch.testing.assert_close(ours, other, rtol=0, atol=0)


# Gradient checkpointing


@pytest.fixture(params=[False, True], ids=["not reentrant", "reentrant"])
def reentrant(request):
    before = use_reentrant_ckpt()
    set_reentrant_ckpt(request.param)
    yield request.param
    set_reentrant_ckpt(before)


@AUTOCAST
@COMPUTE_AND_DROPOUT
def test_checkpointing_changes_nothing(reentrant, compute, dropout, low):
    model = adapted(compute, dropout, train="BA", depth=2, proj_drop_rate=0.1)  # timm's own dropout draws as well
    x = images(model).requires_grad_(reentrant)  # reentrant blocks want an input with a gradient, adapted or not
    expected = step(model, x, low)
    model.set_grad_checkpointing()
    ours = step(model, x, low)
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name


# Copies


def sgd(model, x, low=False, steps=2):
    optimizer = torch.optim.SGD(trained(model).values(), 0.05)
    for _ in range(steps):
        step(model, x, low)
        optimizer.step()


@AUTOCAST
@COMPUTE_AND_DROPOUT
def test_a_copy_trains_apart(compute, dropout, low):
    model = adapted(compute, dropout)
    x = images(model)
    step(model, x, low)
    before = copy.deepcopy(model.state_dict())
    twin = copy.deepcopy(model)
    sgd(twin, x, low)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    sgd(model, x, low)
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
        assert torch.equal(value, before[name]) != name.endswith("lora_B"), name


@AUTOCAST
@WAYS
@pytest.mark.parametrize("average", [ModelEmaV2, ModelEmaV3])
def test_moving_averages_follow(average, compute, low):
    model = adapted(compute)
    x = images(model)
    ema = average(model, decay=0.75)
    expected = {name: p.detach().clone() for name, p in trained(model).items()}
    with torch.no_grad(), autocast(low):
        before = ema(x)
    for _ in range(3):
        sgd(model, x, low, steps=1)
        ema.update(model)
        expected = {name: 0.75 * value + 0.25 * trained(model)[name].detach() for name, value in expected.items()}
    torch.testing.assert_close(dict(trained(ema.module)), expected, check_device=False)
    with torch.no_grad(), autocast(low):
        assert not torch.equal(ema(x), before)
        torch.testing.assert_close(ema(x), functional_call(ema.module, expected, (x,)), atol=1e-4, rtol=1e-4)


@COMPUTE_AND_DROPOUT
def test_a_pickled_model_is_the_same_and_trains_on(compute, dropout, tmp_path):
    model = adapted(compute, dropout)
    x = images(model)
    torch.save(model, tmp_path / "before.pt")
    sgd(model, x, low=True, steps=1)
    torch.save(model, tmp_path / "after.pt")
    sizes = [(tmp_path / f"{name}.pt").stat().st_size for name in ("before", "after")]
    assert sizes[1] < 1.02 * sizes[0] + 4 * sum(p.numel() for p in trained(model).values())  # gradients, but no casts
    loaded = torch.load(tmp_path / "after.pt", weights_only=False)
    for low in (True, False):
        expected = step(model, x, low)
        assert all(torch.equal(value, expected[name]) for name, value in step(loaded, x, low).items())


@WAYS
def test_state_dict_into_a_fresh_model(compute):
    model, fresh = adapted(compute), adapted(compute, seed=9)
    x = images(model)
    sgd(model, x, low=True, steps=1)
    step(fresh, x, low=True)
    assert not torch.equal(fresh(x), model(x))
    fresh.load_state_dict(model.state_dict(), strict=True)
    for low in (True, False):
        expected = step(model, x, low)
        assert all(torch.equal(value, expected[name]) for name, value in step(fresh, x, low).items())
    assert {name.rpartition(".")[2] for name in model.state_dict() if "lora" in name} == {"lora_A", "lora_B"}


# Grad modes


@AUTOCAST
@COMPUTE_AND_DROPOUT
def test_trains_after_inference_mode(compute, dropout, low):
    model, other = adapted(compute, dropout), adapted(compute, dropout)
    x = images(model)
    with torch.inference_mode(), autocast(low):
        y = model(x)
        model.eval()
        model(x)
    assert y.is_inference()
    assert_same(step(model.train(), x, low), step(other, x, low), low)


LINEAR = "_linear_pointwise" if can_fuse(torch.bfloat16) else "addmm"  # in bfloat16, if it is fused where it can be


class Count(TorchDispatchMode):
    """Products by their number of operations, and what else makes new tensors, of how many elements from which."""

    def __init__(self):
        super().__init__()
        self.products, self.made = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "matmul", "linear", LINEAR):
            left, right = args[-2:] if "add" in name else args[:2]
            self.products.append(2 * left.numel() * right.shape[0 if "linear" in name else -1])
        if isinstance(out, torch.Tensor) and not func.is_view and (name.endswith("_") or out is not args[0]):
            self.made.append((name, out.numel(), args[0].data_ptr() if isinstance(args[0], torch.Tensor) else None))
        return out

    def casts_of(self, tensor):
        return sum(name == "_to_copy" and source == tensor.data_ptr() for name, _, source in self.made)


@AUTOCAST
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_folded_way_takes_one_small_product(mode, low):
    layer, x = one_layer(), torch.randn(50, 24)
    with mode(), autocast(low), Count() as count:
        y = layer(x)
    assert not y.requires_grad and y.grad_fn is None
    assert sorted(count.products) == sorted([2 * 72 * RANK * 24, 2 * 50 * 24 * 72])  # B A, and the layer


def test_keeps_nothing_without_gradients():
    model = adapted().requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        y = model(images(model))
    assert not y.requires_grad and not kept


@COMPUTE_AND_DROPOUT
def test_everything_frozen_still_gives_the_gradient_of_x(compute, dropout):
    model = adapted(compute, dropout)
    x = images(model).requires_grad_()
    step(model, x)
    expected, x.grad = x.grad, None
    model.requires_grad_(False)
    step(model, x)
    torch.testing.assert_close(x.grad, expected)
    assert all(p.grad is None for p in model.parameters())


@COMPUTE_AND_DROPOUT
def test_gradient_of_x_alone(compute, dropout):
    model = adapted(compute, dropout)
    x = images(model).requires_grad_()
    step(model, x)
    model.zero_grad()
    torch.manual_seed(5)
    (gx,) = torch.autograd.grad(loss_of(model(x)), x)
    assert torch.equal(gx, x.grad)
    assert all(p.grad is None for p in model.parameters())


@AUTOCAST
@COMPUTE_AND_DROPOUT
def test_two_backward_passes_add_up(compute, dropout, low):
    model = adapted(compute, dropout, train="BA")
    x = images(model).requires_grad_()
    once = step(model, x, low)
    model.zero_grad()
    torch.manual_seed(5)
    with autocast(low):
        loss = loss_of(model(x))
    loss.backward(retain_graph=True)
    loss.backward()
    assert all(torch.equal(g, 2 * once[name]) for name, g in gradients(model).items())


@AUTOCAST
@WAYS
def test_accumulation_is_the_joined_batch(compute, low):
    model = adapted(compute, train="BA")
    x = images(model, 6)
    joined = step(model, x, low)
    model.zero_grad()
    for part in x.split([4, 2]):
        with autocast(low):
            loss = loss_of(model(part))
        loss.backward()
    del joined["y"]
    assert_same(gradients(model), joined, low)


def test_backward_inside_of_autocast_is_the_same():
    model = adapted(dropout=0.3, train="BA")
    x = images(model)
    expected = step(model, x, low=True)
    model.zero_grad()
    torch.manual_seed(5)
    with autocast():
        loss_of(model(x)).backward()
    assert all(torch.equal(g, expected[name]) for name, g in gradients(model).items())


@AUTOCAST
@COMPUTE_AND_DROPOUT
@pytest.mark.parametrize("changed", ["lora_A", "lora_B", "base.weight"])
def test_what_changes_before_backward_is_refused_or_does_not_matter(changed, compute, dropout, low):
    layer = one_layer(compute, dropout)
    x = torch.randn(50, 24, requires_grad=True)
    expected = [step(layer, x, low)["lora_B"], x.grad.clone()]
    layer.lora_B.grad = x.grad = None
    torch.manual_seed(5)
    with autocast(low):
        loss = loss_of(layer(x))
    with torch.no_grad():
        layer.get_parameter(changed).mul_(2)
    if changed == "base.weight" and low:  # what was kept is a cast of it: the gradients are those of the forward pass
        loss.backward()
        assert torch.equal(layer.lora_B.grad, expected[0]) and torch.equal(x.grad, expected[1])
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@AUTOCAST
@COMPUTE_AND_DROPOUT
def test_optimizers_that_write_through_data_are_seen(compute, dropout, low):
    """Nothing made of the factors outlives a call, for a write through `data` raises no version."""
    layer, other = one_layer(compute, dropout), one_layer(compute, dropout)
    x = torch.randn(50, 24)
    step(layer, x, low)
    for name in ("lora_A", "lora_B"):
        layer.get_parameter(name).data.mul_(2)
    other.load_state_dict(layer.state_dict())
    expected = step(other, x, low)
    assert all(torch.equal(value, expected[name]) for name, value in step(layer, x, low).items())


# Precision, layout and size


@pytest.mark.parametrize("how", ["bfloat16", "float16 autocast"])
@COMPUTE_AND_DROPOUT
def test_low_precision_is_near_float64(compute, dropout, how):
    model = adapted(compute, dropout, train="BA")
    x = images(model)
    exact = step(copy.deepcopy(model).double(), x.double())
    if how == "bfloat16":
        model.bfloat16()
        ours = step(model, x.bfloat16())
        assert {value.dtype for value in ours.values()} == {torch.bfloat16}
    else:
        ours = step(model, x, low=torch.float16)
    assert_same({name: value.double() for name, value in ours.items()}, exact, low=True)


def test_folded_and_separate_agree_in_float64():
    ours, expected = (adapted(compute, train="BA").double() for compute in ("folded", "separate"))
    x = images(ours).double().requires_grad_()
    for name, value in step(ours, x).items():
        torch.testing.assert_close(value, step(expected, x)[name], rtol=1e-9, atol=1e-11)


@COMPUTE_AND_DROPOUT
def test_loss_scaling_in_float16(compute, dropout):
    model = adapted(compute, dropout)
    x = images(model)
    optimizer = torch.optim.SGD(trained(model).values(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    for overflow in (True, False):
        optimizer.zero_grad()
        torch.manual_seed(5)
        with autocast(torch.float16):
            loss = loss_of(model(x))
        scaler.scale(loss * (torch.inf if overflow else 1)).backward()
        scaler.step(optimizer)  # left out if a gradient is not finite, which must come through
        scaler.update()
        assert all(torch.equal(p, before[name]) == overflow for name, p in trained(model).items())
    expected = step(adapted(compute, dropout).double(), x.double())
    del expected["y"]
    assert_same({name: g.double() for name, g in gradients(model).items()}, expected, low=True)


@COMPUTE_AND_DROPOUT
def test_channels_last_images(compute, dropout):
    model = adapted(compute, dropout)
    x = images(model)
    expected = step(model, x)
    model = model.to(memory_format=torch.channels_last)
    assert_same(step(model, x.to(memory_format=torch.channels_last)), expected)


@AUTOCAST
@COMPUTE_AND_DROPOUT
@pytest.mark.parametrize("n", [0, 1, 3])
def test_odd_numbers_of_tokens_and_small_batches(n, compute, dropout, low):
    model = adapted(compute, dropout, architecture="vit_small_patch14_reg4_dinov2", train="BA")  # 4 + 4 + 1 tokens
    x = images(model, n).requires_grad_()
    ours = step(model, x, low)
    assert ours["y"].shape == (n, 5) and x.grad.shape == x.shape
    if n == 0:
        assert all(ours[name].shape == p.shape and not ours[name].any() for name, p in trained(model).items())
    elif not dropout:
        for _, layer in adapter_layers(model):  # the same in plain torch, to which a weight is a weight
            layer.forward = lambda x, layer=layer: nn.functional.linear(x, layer.weight, layer.bias)
        assert_same(ours, step(model, x, low), low)


# Counts


@pytest.mark.parametrize("projections", [("q", "k", "v"), ("q", "v"), ("fc1",)])
@COMPUTE_AND_DROPOUT
def test_products_and_casts_of_a_step_under_autocast(compute, dropout, projections):
    if can_fuse(torch.bfloat16):
        use_ways({"linear": "fused"})
    N, d, k = 2 * 50, 24, len(projections)
    m, d_out = 72 if k == 1 else d, 72
    layer = one_layer(compute, dropout, projections)
    x = torch.randn(2, 50, d, requires_grad=True)
    g = torch.randn(2, 50, d_out).bfloat16()

    def once():
        with autocast():
            y = layer(x)
        y.backward(g)

    once()
    layer.lora_B.grad = x.grad = None
    with Count() as count:
        once()
    full, narrow, fold = 2 * N * d * d_out, 2 * N * d * k * RANK, 2 * d * m * k * RANK
    wide = [2 * N * m * RANK] * k  # one for each projection
    if dropout:  # x Aᵀ and its update of y; backward, through both
        small = [narrow, *wide, *wide, *wide, narrow]
    else:
        small = [fold, narrow, *wide] + (wide if compute == "separate" else [])
    assert sorted(count.products) == sorted([full, full, *small])
    # The sum W + s B A is rounded, not W; but for slices that no projection reaches, which are W.
    whole = k * m == d_out or compute == "separate" or dropout
    assert count.casts_of(layer.base.weight) == (0 if whole else 1)
    assert count.casts_of(x) == 1  # autocast's own
    if not dropout:
        # All of an activation's size that is made: x in low precision, y, its update, and the gradient of x, twice.
        update = [] if compute == "folded" else ["addmm_"] * k
        large = [name for name, size, _ in count.made if size >= N * d]
        assert large == ["_to_copy", LINEAR, *update, "mm", "_to_copy"]


# Memory


def kept_bytes(model, x, low):
    """What is kept for backward, each storage once, without parameters and weights in whatever precision."""
    weights = {p.shape for p in model.parameters()} | {p.shape[::-1] for p in model.parameters()}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in parameters and t.shape not in weights:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast(low):
        loss_of(model(x))
    return sum(storages.values())


@AUTOCAST
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@WAYS
def test_a_model_keeps_the_floor_and_x_A(compute, dropout, low):
    floor = build("vit_small_patch16_224").requires_grad_(False).train()
    model = adapted(compute, dropout, depth=2)
    x = images(model, 3).requires_grad_()  # so that every layer passes a gradient on
    layers = list(adapter_layers(model))
    tokens = 5
    small = sum(3 * tokens * len(layer.projections) * RANK for _, layer in layers) * (2 if low else 4)
    seeds = 8 * len(layers) if dropout else 0
    assert kept_bytes(model, x, low) == kept_bytes(floor, x, low) + small + seeds
