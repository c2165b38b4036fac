"""Adapted models under torch.compile, in both ways to compute."""

import shutil

import pytest
import torch
from adapted import AUTOCAST, COMPUTE_AND_DROPOUT, RANK, WAYS, adapted, assert_same, autocast, one_layer, step
from small_models import images
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad, vmap


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield torch.compile
    torch._dynamo.reset()


def test_compiles_into_one_graph_with_the_same_gradients(compiler):
    model = adapted(dropout=0.3, train="BA")
    x = images(model)
    compiled = compiler(model, fullgraph=True, backend="aot_eager")
    for training in (True, False):  # the separate way and the folded one
        model.train(training)
        assert_same(step(model, x, True, forward=compiled), step(model, x, True), low=True)


@AUTOCAST
@pytest.mark.parametrize("projections", [("q", "v"), ("fc1",)])
@COMPUTE_AND_DROPOUT
def test_compiled_layer(compiler, compute, dropout, projections, low):
    layer = one_layer(compute, dropout, projections)
    x = torch.randn(2, 50, 24, requires_grad=True)
    compiled = compiler(layer, fullgraph=True, backend="aot_eager")
    expected = [step(layer, x, low), x.grad]
    x.grad = None
    ours = [step(layer, x, low, forward=compiled), x.grad]
    assert_same(ours[0], expected[0], low)
    assert_same({"x": ours[1]}, {"x": expected[1]}, low)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), autocast(low):
        compiled(x)
    # Neither x nor a mask: nothing but x Aᵀ grows with the batch.
    assert all(t.numel() <= 100 * len(projections) * RANK for t in kept if t.shape[-2:] != (72, 24))


@WAYS
def test_one_compiled_graph_takes_any_batch_and_inference(compiler, compute):
    model = adapted(compute).eval()
    counter = CompileCounter()
    compiled = compiler(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for n in (2, 3, 5):
            torch.testing.assert_close(compiled(images(model, n)), model(images(model, n)))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_inductor_gives_the_same_gradients(compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    layer = one_layer("separate", 0.3, ("fc1",), train="BA")
    x = torch.randn(5, 7, 24, requires_grad=True)
    compiled = compiler(layer, fullgraph=True)
    expected = [step(layer, x), x.grad]
    x.grad = None
    # Draws the seed as torch does, and starts no processes.
    with torch._inductor.config.patch(fallback_random=True, compile_threads=1):
        ours = [step(layer, x, forward=compiled), x.grad]
    assert_same(ours[0], expected[0])
    assert_same({"x": ours[1]}, {"x": expected[1]})


@WAYS
def test_compiles_per_sample_gradients(compiler, compute, unfused):
    """Inside a compiler too torch.func must meet the definition: traced under it, the kernel loses gradients."""
    layer = one_layer(compute)
    x, B = torch.randn(3, 5, 24), {"lora_B": layer.lora_B.detach()}

    def loss(B, x):
        return functional_call(layer, B, (x,)).sin().sum()

    for function in (grad(loss), vmap(grad(loss), (None, 0))):
        compiled = compiler(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(B, x), function(B, x))
