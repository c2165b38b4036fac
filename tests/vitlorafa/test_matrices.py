"""Factors as matrices, for optimizers that want them."""

import copy

import pytest
import torch
from adapted import adapted, loss_of
from messages import naming
from small_models import images
from torch import nn

from vitlorafa import AdapterConfig, AdapterError, adapter_layers, correct_gradients, matrices

MUON = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
}


def backward(model):
    loss_of(model(images(model))).backward()


def factors(model, train="B"):
    return [getattr(layer, f"lora_{factor}") for _, layer in adapter_layers(model) for factor in train]


@pytest.mark.parametrize("train", ["A", "B", "BA"])
def test_matrices_are_the_trained_factors(train):
    model = adapted(train=train)
    expected = [slice_ for factor in factors(model, sorted(train)) for slice_ in factor]
    found = matrices(model)
    assert len(found) == len(expected) and all(matrix.dim() == 2 for matrix in found)
    assert all(m.data_ptr() == e.data_ptr() and torch.equal(m, e) for m, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_of_matrices_steps_as_one_of_the_factors(name):
    one, other = adapted(), adapted()
    optimizers = OPTIMIZERS[name](matrices(one)), OPTIMIZERS[name](factors(other))
    for _ in range(3):
        for model, optimizer in zip((one, other), optimizers, strict=True):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
    for mine, plain in zip(factors(one), factors(other), strict=True):
        torch.testing.assert_close(mine, plain)


def test_gradients_are_the_models():
    model = adapted()
    found = matrices(model)
    assert all(matrix.grad is None for matrix in found)
    backward(model)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    norm = torch.stack([matrix.grad.norm() for matrix in found]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)
    backward(model)  # accumulates
    assert torch.stack([matrix.grad.norm() for matrix in found]).norm() > 1e-2
    torch.optim.SGD(found, 0.1).zero_grad(set_to_none=False)
    assert not any(factor.grad.any() for factor in factors(model))
    torch.optim.SGD(found, 0.1).zero_grad()
    assert all(factor.grad is None for factor in factors(model))


def test_a_model_that_was_converted_or_loaded_since_is_still_trained():
    model = adapted()
    optimizer = torch.optim.SGD(matrices(model), 0.1)
    model.double()
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    before = [factor.detach().clone() for factor in factors(model)]
    loss_of(model(images(model).double())).backward()
    optimizer.step()
    for factor, was in zip(factors(model), before, strict=True):
        torch.testing.assert_close(factor, was - 0.1 * factor.grad)


def test_corrected_gradients_reach_matrices():
    steps = []
    for take in (matrices, factors):
        torch.manual_seed(0)
        model = adapted()
        vars(model)["_vitlorafa"].config = AdapterConfig(rank=4, targets="all", gradient_correction=True, alpha=2)
        optimizer = torch.optim.SGD(take(model), 0.1)
        correct_gradients(optimizer, model)
        backward(model)
        optimizer.step()
        steps.append([factor.detach() for factor in factors(model)])
    for mine, plain in zip(*steps, strict=True):
        torch.testing.assert_close(mine, plain)


def test_matrices_are_not_saved_or_copied_apart_from_their_model(tmp_path):
    model = adapted()
    found = matrices(model)
    with pytest.raises(AdapterError, match=naming("matrices(model)", "copied", "save the model")):
        torch.save(found[0], tmp_path / "matrix.pt")
    with pytest.raises(AdapterError, match=naming("matrices(model)", "copied")):
        copy.deepcopy(found[0])
    twin, theirs = copy.deepcopy((model, found))
    assert theirs[0].data_ptr() == factors(twin)[0].data_ptr() != found[0].data_ptr()


def test_models_without_trained_factors_are_refused():
    model = adapted()
    for factor in factors(model):
        factor.requires_grad_(False)
    with pytest.raises(AdapterError, match=naming("requires_grad", "lora_A", "lora_B")):
        matrices(model)
    with pytest.raises(AdapterError, match=naming("inject(model, config)")):
        matrices(nn.Linear(2, 2))


@MUON
def test_muon_moves_the_model_as_it_moves_matrices_of_their_own():
    model = adapted(train="BA")
    backward(model)
    copies = []
    for matrix in matrices(model):
        copies.append(nn.Parameter(matrix.detach().clone()))
        copies[-1].grad = matrix.grad.clone()
    before = [matrix.clone() for matrix in copies]
    for params in (matrices(model), copies):
        torch.optim.Muon(params, lr=0.02).step()
    moved = [part for factor in factors(model, "AB") for part in factor]
    assert all(torch.equal(mine, copied) for mine, copied in zip(moved, copies, strict=True))
    assert not any(torch.equal(mine, was) for mine, was in zip(moved, before, strict=True))


@MUON
def test_muon_resumes(tmp_path):
    def make():
        model = adapted()
        return model, torch.optim.Muon(matrices(model), lr=0.02)

    def step(model, optimizer):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()

    model, optimizer = make()
    step(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    step(model, optimizer)
    twin, resumed = make()
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    twin.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    step(twin, resumed)
    for mine, other in zip(factors(model), factors(twin), strict=True):
        assert torch.equal(mine, other)


@MUON
def test_muon_refuses_the_stacks_themselves():
    """The reason for matrices: should torch accept more dimensions one day, this tells."""
    with pytest.raises(ValueError, match="2D"):
        torch.optim.Muon(factors(adapted()), lr=0.02)
