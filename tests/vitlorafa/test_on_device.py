"""The adapters on a GPU where there is one, and the same tests on the CPU."""

import contextlib
import importlib
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from adapted import adapted, assert_same, loss_of, trained
from small_models import build, images
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from vitlorafa import AdapterConfig, cast_frozen, inject, load_adapter, merge_and_unload, save_adapter
from vitlorafa.ops import autograd, dispatch, lora_linear, reference, use_backend
from vitlorafa.ops import dropout as masks

LOW = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@pytest.fixture
def without_waits(device):
    """A context in which waiting for the GPU is an error."""

    @contextlib.contextmanager
    def context():
        if device.type == "cpu":
            yield
            return
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return context


@pytest.fixture(params=["eager", "triton"])
def backend(request, device, monkeypatch):
    """A backend in use, and its function of masks; on the CPU, Triton's kernels are interpreted."""
    name = request.param
    if name == "eager":
        return masks.dropout_mask
    pytest.importorskip("triton")
    if device.type == "cpu":
        monkeypatch.setitem(
            autograd.BACKENDS, "interpreted", kernels := importlib.import_module("test_triton").interpreted
        )
        monkeypatch.setattr(dispatch, "_choose_backend", lambda x: "interpreted")
        return kernels.dropout_mask
    use_backend("triton")
    request.addfinalizer(lambda: use_backend("eager"))
    return importlib.import_module("vitlorafa.ops.triton").dropout_mask


def distance(actual, exact):
    return (actual.double() - exact).norm()


# Rows, inputs, outputs of a projection, projections, rank: tiles that are full, that are not, and single rows.
SHAPES = [(128, 64, 64, 1, 16), (70, 75, 21, 3, 3), (1, 33, 17, 1, 5), (131, 48, 48, 2, 65)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("fold", "dropout"), [(True, 0.0), (False, 0.0), (False, 0.3)])
def test_the_layer_is_the_definition_in_float64(device, backend, monkeypatch, fold, dropout, shape, dtype):
    monkeypatch.setattr(reference, "dropout_mask", backend)
    N, d_in, m, k, r = shape
    starts = tuple(range(0, k * m, m))
    draw = torch.Generator().manual_seed(1)
    seed = torch.tensor(2**40 + 5)

    def random(*size):
        return torch.randn(*size, generator=draw).to(device)

    def squared_errors():
        x, g = random(N, d_in).to(dtype), random(N, k * m).to(dtype)
        weight, bias = random(k * m, d_in) / d_in**0.5, random(k * m)
        A, B = random(k, r, d_in) / d_in**0.5, random(k, m, r)

        def run(function, to, **kwargs):
            inputs = [
                each.detach().to(to or each.dtype).requires_grad_(place != 1) for place, each in enumerate((x, weight))
            ]
            inputs[1].requires_grad_(False)
            inputs.append(bias.to(to or bias.dtype))
            factors = [each.detach().to(to or each.dtype).requires_grad_() for each in (A, B)]
            y = function(*inputs, *factors, 0.7, starts=starts, dropout=dropout, **kwargs)
            y.backward(g.to(y.dtype))
            return [y.detach(), inputs[0].grad, *(each.grad for each in factors)]

        ours = run(lora_linear, None, seed=int(seed), fold=fold)
        exact = run(reference.lora_linear, torch.float64, seed=seed)
        plain = run(reference.lora_linear, dtype, seed=seed)
        assert all(one.device.type == device.type and one.isfinite().all() for one in ours)
        # A sum of one product has no error to compare with, but for the rounding of the result.
        return torch.tensor(
            [
                [distance(one, truth) ** 2, distance(naive, truth) ** 2, distance(truth.to(dtype), truth) ** 2]
                for one, truth, naive in zip(ours, exact, plain, strict=True)
            ]
        )

    # The few sums of a single row have small errors by luck, on one processor or another.
    ours, naive, rounding = sum(squared_errors() for _ in range(16 if N == 1 else 1)).sqrt().T
    assert (ours <= 2 * naive.maximum(rounding)).all()


def test_no_rows_are_no_error(device, backend):
    x = torch.empty(0, 24, device=device, requires_grad=True)
    A, B = torch.randn(1, 3, 24, device=device), torch.randn(1, 16, 3, device=device, requires_grad=True)
    y = lora_linear(x, torch.randn(16, 24, device=device), None, A, B, 1.0)
    y.sum().backward()
    assert y.shape == (0, 16) and not B.grad.any() and x.grad.shape == (0, 24)


def test_a_mask_is_that_of_its_seed(device, backend):
    def mask(seed, *shape):
        return backend(list(shape), device, 0.25, torch.tensor(seed))

    one = mask(5, 64, 96)
    assert torch.equal(one, mask(5, 64, 96)) and not torch.equal(one, mask(6, 64, 96))
    assert one.float().mean().item() == pytest.approx(0.75, abs=0.03)


def test_global_seeds_repeat_a_step(device, backend):
    model = adapted(dropout=0.3, train="BA").to(device)
    x = images(model).to(device)

    def step(seed):
        model.zero_grad()
        torch.manual_seed(seed)
        loss_of(model(x)).backward()
        return torch.cat([each.grad.flatten() for each in trained(model).values()])

    assert torch.equal(step(3), step(3)) and not torch.equal(step(3), step(4))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_compiled_model_has_no_graph_breaks_and_the_same_gradients(device, dropout):
    torch._dynamo.reset()
    model = adapted(dropout=dropout, train="BA").to(device)
    x = images(model).to(device)
    # The GPU's compiler is what users get there; the CPU's would take a C++ compiler and a minute.
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    results = []
    for forward in (model, compiled):
        model.zero_grad()
        torch.manual_seed(5)
        if dropout and device.type == "cuda":  # Inductor draws the seed itself unless it is told
            with torch._inductor.config.patch(fallback_random=True):
                loss_of(forward(x)).backward()
        else:
            loss_of(forward(x)).backward()
        results.append({name: each.grad.clone() for name, each in trained(model).items()})
    torch._dynamo.reset()
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", LOW, ids=LOW.values())
def test_autocast_is_near_float32(device, backend, dtype):
    model = adapted(train="BA").to(device)
    x = images(model).to(device)
    gradients = []
    for low in (False, True):
        model.zero_grad()
        with torch.autocast(device.type, dtype, enabled=low):
            y = model(x)
        assert y.dtype == (dtype if low else torch.float32)
        y.float().sin().sum().backward()
        gradients.append({name: each.grad.clone() for name, each in trained(model).items()})
    assert all(each.dtype == torch.float32 for each in gradients[1].values())
    assert_same(gradients[1], gradients[0], low=True)


def test_a_scaled_loss_gives_the_same_gradients(device, backend):
    gradients = []
    for scale in (None, 2.0**10):
        model = adapted(train="BA").to(device)
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], fused=True)
        scaler = GradScaler(device.type, init_scale=scale or 1.0)
        with torch.autocast(device.type, torch.float16):
            loss = model(images(model).to(device)).float().sin().sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients.append({name: each.grad.clone() for name, each in trained(model).items()})
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (scale or 1.0)
    assert_same(gradients[1], gradients[0], low=True)


def test_a_step_does_not_wait_for_the_device(device, backend, without_waits):
    model = cast_frozen(adapted(dropout=0.3, train="BA")).to(device)
    x = images(model).to(device)
    for context in (contextlib.nullcontext, without_waits):  # the first step sets up libraries and kernels
        with context(), torch.autocast(device.type, torch.bfloat16):
            loss_of(model(x)).backward()
    assert all(each.grad.isfinite().all() for each in trained(model).values())


def test_one_process_of_ddp_has_the_same_gradients(device, tmp_path):
    name = "nccl" if device.type == "cuda" else "gloo"
    if not getattr(dist, f"is_{name}_available")():
        pytest.skip(f"torch has no {name} here")
    model = adapted(train="BA").to(device)
    x = images(model).to(device)
    loss_of(model(x)).backward()
    expected = {name: each.grad.clone() for name, each in trained(model).items()}
    model.zero_grad()
    dist.init_process_group(
        name, init_method=f"file://{tmp_path}/store", rank=0, world_size=1, timeout=timedelta(seconds=60)
    )
    try:
        parallel = DistributedDataParallel(model, device_ids=[0] if device.type == "cuda" else None)
        loss_of(parallel(x)).backward()
        assert_same({name: each.grad for name, each in trained(model).items()}, expected)
    finally:
        dist.destroy_process_group()


def test_an_adapter_moves_between_devices(device, tmp_path):
    model = inject(build("test_vit"), AdapterConfig(rank=2, seed=0), train_head=True).to(device)
    x = images(model)
    with torch.no_grad():
        for each in trained(model).values():
            each.add_(0.1)
        expected = model.eval()(x.to(device)).cpu()
        save_adapter(model, tmp_path / "adapter", head=True)
        loaded = build("test_vit")
        load_adapter(loaded, tmp_path / "adapter")
        torch.testing.assert_close(loaded.eval()(x), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(merge_and_unload(model)(x.to(device)).cpu(), expected, rtol=1e-3, atol=1e-3)
