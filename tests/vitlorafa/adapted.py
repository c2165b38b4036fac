"""Adapted models and layers that train, and what a step makes of them."""

import pytest
import torch
from small_models import build, perturb
from torch import nn

from vitlorafa import AdapterConfig, LoRALinear, inject
from vitlorafa.layers import QKV

RANK = 4
TARGETS = ("q", "v", "proj", "fc1", "fc2")
WAYS = pytest.mark.parametrize("compute", ["folded", "separate"])
# With dropout the folded way is the separate one, until evaluation.
COMPUTE_AND_DROPOUT = pytest.mark.parametrize(
    ("compute", "dropout"), [("folded", 0.0), ("separate", 0.0), ("folded", 0.3)]
)
AUTOCAST = pytest.mark.parametrize("low", [False, True], ids=["float32", "autocast"])


def adapted(compute="folded", dropout=0.0, train="B", architecture="vit_small_patch16_224", seed=0, **kwargs):
    """A model in training mode whose factors have moved."""
    model = build(architecture, **{"depth": 1, **kwargs})
    config = AdapterConfig(rank=RANK, targets=TARGETS, train=train, compute=compute, dropout=dropout, seed=seed)
    inject(model, config)
    perturb(model)
    return model.train()


def one_layer(compute="folded", dropout=0.0, projections=("q", "k", "v"), **kwargs):
    config = AdapterConfig(rank=RANK, seed=0, compute=compute, dropout=dropout, **kwargs)
    layer = LoRALinear(
        nn.Linear(24, 72).requires_grad_(False), config, projections, QKV if len(projections[0]) == 1 else ()
    )
    nn.init.normal_(layer.lora_B)
    return layer


def autocast(low=True):
    """Autocast if `low`, which may be the dtype."""
    return torch.autocast("cpu", low if isinstance(low, torch.dtype) else torch.bfloat16, enabled=bool(low))


def loss_of(y):
    return y.float().sin().sum() if y.dtype in (torch.bfloat16, torch.float16) else y.sin().sum()


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model):
    return {name: p.grad for name, p in trained(model).items()}


def step(model, x, low=False, seed=5, forward=None):
    """The output and the gradients of a forward and a backward pass."""
    model.zero_grad()
    torch.manual_seed(seed)
    with autocast(low):
        y = (model if forward is None else forward)(x)
    loss_of(y).backward()
    return {"y": y.detach(), **gradients(model)}


def assert_same(ours, expected, low=False):
    """Equal up to the order of sums, and, in low precision, to the roundings of both, which processors differ in."""
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name].dtype == value.dtype and value.abs().sum() > 0, name
        off = (ours[name] - value).float().norm() / value.float().norm()
        assert off < (0.06 if low else 1e-5), (name, off)


def snapshot(model):
    """All that `remove` must restore."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: (type(module), module.training) for name, module in model.named_modules()},
    )


def same(before, after):
    """Whether two snapshots are equal, to the last bit and in their order."""
    return (
        before[1:] == after[1:]
        and list(before[0]) == list(after[0])
        and all(torch.equal(a, b) for a, b in zip(before[0].values(), after[0].values(), strict=True))
    )
