"""LoRA-Pro's gradient correction, where both factors train, against its closed form and brute-force minimisation."""

import pytest
import torch
from small_models import build, images
from torch import nn

from vitlorafa import AdapterConfig, AdapterError, adapter_layers, correct_gradients, inject, parameter_groups
from vitlorafa.optim import _closest_step

SCALE = 1.5


def problem(rank=3, rank_B=3, d_out=9, d_in=7, seed=0):
    """A, B of some rank, and a full gradient G with the gradients that it causes; in float64."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    A, G = normal(rank, d_in), normal(d_out, d_in)
    B = normal(d_out, rank_B) @ normal(rank_B, rank)
    return A, B, G, SCALE * B.T @ G, SCALE * G @ A.T


def closest(A, B, g_A, g_B):
    return [each[0] for each in _closest_step(A[None], B[None], g_A[None], g_B[None], SCALE)]


def step_on_weight(A, B, g_A, g_B):
    return SCALE * (B @ g_A + g_B @ A)


def test_is_the_papers_closed_form():
    A, B, _, g_A, g_B = problem()
    linalg = pytest.importorskip("scipy.linalg")
    inverse_B, inverse_A = torch.linalg.inv(B.T @ B), torch.linalg.inv(A @ A.T)
    C = -inverse_B @ g_A @ A.T / SCALE**2
    X = torch.from_numpy(linalg.solve_sylvester((B.T @ B).numpy(), (A @ A.T).numpy(), C.numpy()))
    ours_A, ours_B = closest(A, B, g_A, g_B)
    torch.testing.assert_close(ours_A, inverse_B @ g_A / SCALE**2 + X @ A)
    projection = torch.eye(9, dtype=torch.float64) - B @ inverse_B @ B.T
    torch.testing.assert_close(ours_B, projection @ g_B @ inverse_A / SCALE**2 - B @ X)


@pytest.mark.parametrize("rank_B", [0, 1, 2, 3])
def test_no_other_step_is_closer_to_the_full_gradient(rank_B):
    """All steps are linear in (g_A, g_B), so the closest one is a least-squares problem."""
    A, B, G, g_A, g_B = problem(rank_B=rank_B)
    columns = []
    for index in range(g_A.numel() + g_B.numel()):
        unit = torch.zeros(g_A.numel() + g_B.numel(), dtype=torch.float64)
        unit[index] = 1
        part_A, part_B = unit[: g_A.numel()].view_as(g_A), unit[g_A.numel() :].view_as(g_B)
        columns.append(step_on_weight(A, B, part_A, part_B).flatten())
    M = torch.stack(columns, dim=1)
    best = (M @ torch.linalg.lstsq(M, G.flatten()[:, None], driver="gelsd").solution).view_as(G)
    torch.testing.assert_close(step_on_weight(A, B, *closest(A, B, g_A, g_B)), best, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("rank_B", [1, 3])
def test_of_these_steps_the_gradients_are_the_closest_to_loras(rank_B):
    A, B, _, g_A, g_B = problem(rank_B=rank_B)
    ours_A, ours_B = closest(A, B, g_A, g_B)

    def distance(X):
        return ((ours_A + X @ A - g_A) ** 2).sum() + ((ours_B - B @ X - g_B) ** 2).sum()

    X = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    distance(X).backward()
    torch.testing.assert_close(X.grad, torch.zeros_like(X), atol=1e-9, rtol=0)
    for seed in range(5):
        other = 0.1 * torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert distance(other) >= distance(torch.zeros_like(other))
        moved = step_on_weight(A, B, ours_A + other @ A, ours_B - B @ other)
        torch.testing.assert_close(moved, step_on_weight(A, B, ours_A, ours_B))


def test_where_b_is_zero_b_alone_moves():
    A, B, _, g_A, g_B = problem(rank_B=0)
    assert not B.any()
    ours_A, ours_B = closest(A, B, g_A, g_B)
    assert not ours_A.any()
    torch.testing.assert_close(ours_B, g_B @ torch.linalg.inv(A @ A.T) / SCALE**2)  # LoRA-FA's


def adapted(dtype=torch.float64, **kwargs):
    config = {"rank": 4, "alpha": 6, "train": "BA", "targets": "q,v,proj", "seed": 0, "gradient_correction": True}
    return inject(build("vit_small_patch16_224").to(dtype), AdapterConfig(**config | kwargs), train_head=True)


def params(model):
    return [p for p in model.parameters() if p.requires_grad]


def loss_of(model):
    return nn.functional.cross_entropy(model(images(model, 4).to(model.head.weight.dtype)), torch.arange(4))


def test_a_step_of_sgd_moves_the_weights_by_the_projected_full_gradient():
    """To first order in the rate, for each projection of a model whose full gradients are those of unfrozen weights."""
    model = adapted()
    with torch.no_grad():
        for _, layer in adapter_layers(model):
            layer.lora_B.add_(0.1 * torch.randn_like(layer.lora_B))
    optimizer = torch.optim.SGD(params(model), 1e-6)
    correct_gradients(optimizer, model)
    for _, layer in adapter_layers(model):
        layer.base.weight.requires_grad_(True)
    loss_of(model).backward()
    before = {name: layer.delta_weight().detach() for name, layer in adapter_layers(model)}
    factors = {
        name: (layer.lora_A.detach().clone(), layer.lora_B.detach().clone()) for name, layer in adapter_layers(model)
    }
    optimizer.step()
    for name, layer in adapter_layers(model):
        moved = (before[name] - layer.delta_weight().detach()) / 1e-6
        for j, start in enumerate(layer.starts):
            A, B = factors[name][0][j], factors[name][1][j]
            G = layer.base.weight.grad[start : start + len(B)]
            onto_B, onto_A = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
            expected = onto_B @ G + (G - onto_B @ G) @ onto_A
            torch.testing.assert_close(moved[start : start + len(B)], expected, atol=1e-4, rtol=1e-4)


def test_it_trains_from_its_start_and_gradients_are_the_losss_again():
    model = adapted(dtype=torch.float32)
    optimizer = torch.optim.AdamW(params(model), 1e-2, fused=True)
    correct_gradients(optimizer, model)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        raw = [p.grad.clone() for p in params(model)]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params(model), raw, strict=True))
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(layer.lora_A.isfinite().all() and layer.lora_B.isfinite().all() for _, layer in adapter_layers(model))


def test_an_optimizer_has_to_hold_both_factors():
    model = adapted()
    for factor in ("lora_A", "lora_B"):
        optimizer = torch.optim.SGD([getattr(layer, factor) for _, layer in adapter_layers(model)], 0.1)
        with pytest.raises(AdapterError, match="the optimizer holds no lora_B and lora_A of this model"):
            correct_gradients(optimizer, model)


def test_b_may_have_a_rate_of_its_own():
    model = adapted()
    groups = parameter_groups(model, lr=1e-3, lr_B_ratio=4)
    assert [group["lr"] for group in groups] == [1e-3, 4e-3, 1e-3]
    names = {id(p): name for name, p in model.named_parameters()}
    A, B, others = ({names[id(p)] for p in group["params"]} for group in groups)
    assert all(name.endswith("lora_A") for name in A) and all(name.endswith("lora_B") for name in B)
    assert len(A) == len(B) == len(list(adapter_layers(model))) and others == {"head.weight", "head.bias"}
    assert sum(len(group["params"]) for group in groups) == len(params(model))
    torch.optim.AdamW(groups, weight_decay=0.1)
    only = parameter_groups(model, lr=1e-3, parameters=[model.head.weight])
    assert only == [{"params": [model.head.weight], "lr": 1e-3}]


@pytest.mark.parametrize(
    ("kwargs", "rates", "sentence"),
    [
        (
            {"train": "B"},
            {},
            "parameter_groups is for adapters whose factors both train, but A is frozen: adapt the model",
        ),
        ({"train": "A"}, {}, "parameter_groups is for adapters whose factors both train, but B is frozen"),
        ({}, {"lr_B_ratio": 0}, "lr_B_ratio must be a finite number above 0, not 0"),
        ({}, {"lr_B_ratio": "16"}, "lr_B_ratio must be a finite number above 0, not '16'"),
        ({}, {"lr": float("nan")}, "lr must be a finite number above 0, not nan"),
    ],
)
def test_rates_that_cannot_be(kwargs, rates, sentence):
    with pytest.raises(AdapterError, match=sentence):
        parameter_groups(adapted(**kwargs), **{"lr": 1e-3, **rates})
