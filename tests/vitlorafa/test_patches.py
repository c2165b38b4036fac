import importlib

import pytest
import torch
import torch.nn.functional as F
from small_models import build, images
from torch import nn
from torch.autograd import gradcheck
from torch.func import grad, vmap

from vitlorafa import cast_frozen, speed_up, tuning, use_ways
from vitlorafa.convolutions import FastConv2d, PatchConv2d, cuts_patches
from vitlorafa.kept_ways import machine_file
from vitlorafa.ops.patches import convolve_patches

pytestmark = pytest.mark.numbers

ops = importlib.import_module("vitlorafa.ops.patches")
# images, channels, height, width, outputs, height and width of a patch
SHAPES = [(2, 3, 32, 48, 24, 16, 16), (1, 1, 5, 7, 3, 1, 1), (3, 2, 13, 17, 5, 4, 3), (2, 3, 16, 16, 7, 16, 16)]


@pytest.fixture(autouse=True)
def _by_matmul():
    use_ways({"patches": "matmul"})


def tensors(B, C, H, W, d, p, q, dtype=torch.float32):
    made = torch.randn(B, C, H, W), torch.randn(d, C, p, q) / (C * p * q) ** 0.5, torch.randn(d)
    return [t.to(dtype).requires_grad_() for t in made]


def run(function, inputs):
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = function(*leaves)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    return [y.detach(), *(t.grad for t in leaves)]


def convolved(x, weight, bias):
    return F.conv2d(x, weight, bias, stride=weight.shape[2:])


@pytest.mark.parametrize("shape", SHAPES)
def test_is_torchs_convolution(shape):
    inputs = tensors(*shape)
    torch.testing.assert_close(run(convolve_patches, inputs), run(convolved, inputs), rtol=1e-4, atol=1e-4)
    x, weight, _ = inputs
    torch.testing.assert_close(convolve_patches(x, weight), convolved(x, weight, None), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_is_as_near_to_float64_as_torchs_in_bfloat16(shape):
    inputs = tensors(*shape, torch.bfloat16)
    truth = run(convolved, [t.double() for t in inputs])
    for ours, plain, exact in zip(run(convolve_patches, inputs), run(convolved, inputs), truth, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - exact).norm() <= 2 * (plain - exact).norm() + 1e-6


def test_derivatives_are_those_of_finite_differences():
    assert gradcheck(ops._multiply, tensors(*SHAPES[2], torch.float64))


@pytest.mark.parametrize("change", [lambda t: t.contiguous(memory_format=torch.channels_last), lambda t: t.flip(3)])
def test_images_may_have_any_strides(change):
    x, weight, bias = tensors(*SHAPES[0])
    torch.testing.assert_close(convolve_patches(change(x), weight, bias), convolved(change(x), weight, bias))


def test_computes_in_autocasts_format():
    inputs = tensors(*SHAPES[0])
    with torch.autocast("cpu", torch.bfloat16):
        ours, expected = run(convolve_patches, inputs), run(convolved, inputs)
    assert ours[0].dtype == torch.bfloat16 and ours[1].dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_default_has_the_bits_of_torchs(dtype):
    use_ways({})
    inputs = tensors(*SHAPES[0], dtype)
    assert all(map(torch.equal, run(convolve_patches, inputs), run(convolved, inputs)))


def test_no_images_and_too_small_ones_are_torchs_own():
    _, weight, bias = tensors(*SHAPES[0])
    assert convolve_patches(torch.empty(0, 3, 32, 32), weight, bias).shape == (0, 24, 2, 2)
    with pytest.raises(RuntimeError, match="Kernel size"):
        convolve_patches(torch.empty(1, 3, 8, 32), weight, bias)
    with pytest.raises(RuntimeError, match="channels"):
        convolve_patches(torch.empty(1, 2, 32, 32), weight, bias)


def test_compilers_and_transforms_see_a_convolution():
    x, weight, bias = (t.detach() for t in tensors(*SHAPES[0]))
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(
        convolve_patches, fullgraph=True, backend=lambda gm, _: graphs.append(gm.code) or gm.forward
    )
    assert torch.equal(compiled(x, weight, bias), convolved(x, weight, bias)) and "conv2d" in graphs[0]
    torch._dynamo.reset()
    per_image = vmap(grad(lambda w, one: convolve_patches(one[None], w, bias).sin().sum()), (None, 0))(weight, x)
    assert per_image.shape == (2, *weight.shape)


def test_both_ways_are_timed_once(clock):
    use_ways({})
    large = tensors(4, 3, 224, 224, 64, 16, 16, torch.bfloat16)
    convolve_patches(*large)
    with torch.no_grad():
        convolve_patches(*large)
    convolve_patches(*tensors(*SHAPES[0]))  # too small to matter
    asked = [name for name in tuning.answers() if name.startswith("patches")]
    what = "images, 14 x 14 patches of 3 x 16 x 16 to 64, 1 thread"
    assert asked == [f"patches: bfloat16, forward and backward, 4 {what}", f"patches: bfloat16, forward, 4 {what}"]
    kept = machine_file().read()
    assert all(set(kept[name].seconds) == {"torch", "matmul"} for name in asked)


@pytest.mark.parametrize("cast_first", [False, True])
def test_models_get_it_and_keep_their_logits(cast_first):
    model = build("test_vit").requires_grad_(False)
    x, names = images(model), set(model.state_dict())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        for change in (cast_frozen, speed_up) if cast_first else (speed_up, cast_frozen):
            change(model)
        ours = model(x)
    layer = model.patch_embed.proj
    assert type(layer) is PatchConv2d and layer.weight.dtype == torch.bfloat16
    assert set(model.state_dict()) == names
    torch.testing.assert_close(ours, expected, rtol=0.02, atol=0.02)
    assert model(x).dtype == torch.float32


def test_other_convolutions_are_not_taken_for_patches():
    class Own(nn.Conv2d):
        pass

    assert cuts_patches(nn.Conv2d(3, 4, 2, 2)) and cuts_patches(FastConv2d(3, 4, (2, 3), (2, 3), padding="valid"))
    others = [
        nn.Conv2d(3, 4, 2, 1),
        nn.Conv2d(3, 4, 2, 2, padding=1),
        nn.Conv2d(3, 4, 2, 2, padding="valid", dilation=2),
        nn.Conv2d(4, 4, 2, 2, groups=2),
        Own(3, 4, 2, 2),
        nn.Conv1d(3, 4, 2, 2),
        nn.Linear(2, 2),
    ]
    assert not any(map(cuts_patches, others))
