"""Adapted models under torch.func, in both ways to compute."""

import copy

import pytest
import torch
from adapted import (
    AUTOCAST,
    WAYS,
    adapted,
    assert_same,
    autocast,
    loss_of,
    one_layer,
    step,
    trained,
)
from small_models import images
from torch.func import functional_call, grad, jacrev, jvp, vmap

pytestmark = pytest.mark.numbers


@AUTOCAST
@WAYS
def test_per_sample_gradients(unfused, compute, low):
    model = adapted(compute, train="BA")
    x = images(model, 3)
    parameters = {name: p.detach() for name, p in trained(model).items()}

    def loss(parameters, image):
        with autocast(low):
            return loss_of(functional_call(model, parameters, (image[None],)))

    ours = vmap(grad(loss), (None, 0))(parameters, x)
    for i, image in enumerate(x):
        expected = step(model, image[None], low)
        del expected["y"]
        assert_same({name: g[i] for name, g in ours.items()}, expected, low)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_dropout_of_samples_follows_the_randomness_of_vmap():
    layer = one_layer(dropout=0.5)
    x = torch.randn(7, 24).expand(3, 7, 24)
    torch.manual_seed(2)
    alone = layer(x[0])
    torch.manual_seed(2)
    same = vmap(layer, randomness="same")(x)
    torch.testing.assert_close(same, alone.expand_as(same))
    different = vmap(layer, randomness="different")(x)
    assert not torch.allclose(different[0], different[1]) and not torch.allclose(different[1], different[2])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(layer)(x)


@WAYS
def test_stacked_adapters_are_separate_models(unfused, compute):
    models = [adapted(compute, seed=0) for _ in range(3)]
    for i, model in enumerate(models):
        for p in trained(model).values():
            p.data.mul_(i)
    x = images(models[0])
    stacked = {name: torch.stack([dict(m.named_parameters())[name] for m in models]) for name in trained(models[0])}
    y = vmap(lambda parameters: functional_call(models[0], parameters, (x,)))(stacked)
    torch.testing.assert_close(y, torch.stack([model(x) for model in models]), atol=1e-5, rtol=1e-5)


@WAYS
def test_forward_mode_and_jacobians(unfused, compute):
    model = adapted(compute, train="BA").double()
    x = images(model).double()
    parameters = {name: p.detach() for name, p in trained(model).items()}
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}

    def logits(parameters):
        return functional_call(model, parameters, (x,))

    y, tangent = jvp(logits, (parameters,), (direction,))
    eps = 1e-6
    ahead, behind = ({n: p + e * direction[n] for n, p in parameters.items()} for e in (eps, -eps))
    torch.testing.assert_close(y, model(x))
    torch.testing.assert_close(tangent, (logits(ahead) - logits(behind)) / (2 * eps), rtol=1e-5, atol=1e-5)
    jacobian = jacrev(logits)(parameters)
    along = sum((jacobian[name] * direction[name]).flatten(2).sum(-1) for name in parameters)
    torch.testing.assert_close(along, tangent)


@WAYS
def test_forward_mode_outside_of_torch_func_is_refused_not_wrong(compute):
    layer = one_layer(compute)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        layer(torch.autograd.forward_ad.make_dual(torch.randn(3, 24), torch.randn(3, 24)))


@WAYS
def test_functional_call_outside_of_a_transform_takes_the_kernel_and_the_given_weights(compute):
    """Weights that come and go may get each other's address: no cast may be mistaken for theirs."""
    layer = one_layer(compute)
    x = torch.randn(5, 24)
    with torch.no_grad(), autocast():
        for i in range(6):
            y = functional_call(layer, {"base.weight": layer.base.weight * i}, (x,))
            other = copy.deepcopy(layer)
            other.base.weight.mul_(i)
            assert torch.equal(y, other(x))


@WAYS
def test_weights_replaced_between_calls_are_seen(compute):
    layer, x = one_layer(compute), torch.randn(5, 24)
    with torch.no_grad(), autocast():
        for _ in range(6):
            layer(x)
            for factor in (3, 0.5):  # the second may get the address of what the first replaced
                layer.base.weight.data = layer.base.weight.data * factor
            assert torch.equal(layer(x), copy.deepcopy(layer)(x))
