import copy

import pytest
import torch
from messages import naming
from small_models import build, images
from torch import nn

from vitlorafa import (
    AdapterConfig,
    AdapterError,
    adapter_layers,
    correct_gradients,
    inject,
    load_adapter,
    merge_and_unload,
    save_adapter,
)

FACTORS = {"B": ("lora_B", "lora_A"), "A": ("lora_A", "lora_B")}  # trained, frozen
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "foreach SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, foreach=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.1, amsgrad=True, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.1),
    "foreach AdamW": lambda p: torch.optim.AdamW(p, 0.1, foreach=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, 0.1, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, 0.1),
}


def adapted(train="B", start="gaussian", dtype=torch.float64, **kwargs):
    """A small model with projections of a fused qkv and plain layers adapted, its trained factors not at zero."""
    frozen = {f"init_{'AB'['BA'.index(train)]}": start}
    config = {"rank": 4, "alpha": 6, "train": train, "targets": "q,v,proj", "seed": 0, "gradient_correction": True}
    model = inject(build("vit_small_patch16_224").to(dtype), AdapterConfig(**config | frozen | kwargs), train_head=True)
    with torch.no_grad():
        for factor in trained(model, train):
            factor.add_(0.1 * torch.randn_like(factor))
    return model


def trained(model, train="B"):
    return [getattr(layer, FACTORS[train][0]) for _, layer in adapter_layers(model)]


def params(model):
    return [p for p in model.parameters() if p.requires_grad]


def loss_of(model, n=4):
    return nn.functional.cross_entropy(model(images(model, n).to(model.head.weight.dtype)), torch.arange(n) % 5)


def draw_gradients(model, seed):
    draw = torch.Generator().manual_seed(seed)
    for p in params(model):
        p.grad = torch.randn(p.shape, generator=draw).to(p.dtype)


def correct_by_hand(model, train="B"):
    """The theorems' formulas as they stand."""
    for _, layer in adapter_layers(model):
        for j, (A, B) in enumerate(zip(layer.lora_A.detach(), layer.lora_B.detach(), strict=True)):
            if train == "B":
                layer.lora_B.grad[j] = layer.lora_B.grad[j] @ torch.linalg.inv(A @ A.T) / layer.scale**2
            else:
                layer.lora_A.grad[j] = torch.linalg.inv(B.T @ B) @ layer.lora_A.grad[j] / layer.scale**2


def assert_same(model, other, **tolerances):
    for p, q in zip(params(model), params(other), strict=True):
        torch.testing.assert_close(p, q, **tolerances)


def gradients_in_step(optimizer, factors):
    """What a step is given, filled in by each step."""
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.__setitem__(slice(None), [p.grad.clone() for p in factors]))
    return seen


@pytest.mark.parametrize("start", ["orthonormal", "gaussian", "kaiming_uniform", "singular"])
@pytest.mark.parametrize("train", ["B", "A"])
def test_solves_the_papers_least_squares_problem(train, start):
    """Equations 5 and 28, each vectorised: full fine-tuning's gradient G is taken from the layer's in and outputs."""
    model = adapted(train, start)
    full = {}

    def watch(layer, inputs, output):
        x = inputs[0].detach().flatten(0, -2)
        output.register_hook(lambda g: full.__setitem__(layer, g.flatten(0, -2).T @ x))

    for _, layer in adapter_layers(model):
        layer.register_forward_hook(watch)
    loss_of(model).backward()
    optimizer = torch.optim.SGD(params(model), 0.0)
    correct_gradients(optimizer, model)
    seen = gradients_in_step(optimizer, trained(model, train))
    optimizer.step()
    for corrected, (_, layer) in zip(seen, adapter_layers(model), strict=True):
        assert len(corrected) == len(layer.projections)
        for g, A, B, first in zip(corrected, layer.lora_A, layer.lora_B, layer.starts, strict=True):
            A, B, G = A.detach(), B.detach(), full[layer][first : first + len(B)]
            system = (
                torch.kron(torch.eye(len(B)), A.T.contiguous())
                if train == "B"
                else torch.kron(B, torch.eye(A.shape[1]))
            )
            solution = torch.linalg.lstsq(layer.scale * system.double(), G.reshape(-1, 1)).solution
            torch.testing.assert_close(g.reshape(-1, 1), solution, rtol=1e-8, atol=1e-12)
            induced = layer.scale * (g @ A if train == "B" else B @ g)
            assert (G * induced).sum() > 0  # dL = -lr ⟨G, induced⟩ < 0
            torch.testing.assert_close((G * induced).sum(), induced.square().sum())  # for it projects G


@pytest.mark.parametrize("train", ["B", "A"])
def test_steps_descend(train):
    model = adapted(train, "kaiming_uniform")
    optimizer = torch.optim.SGD(trained(model, train), 1e-3)
    correct_gradients(optimizer, model)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(loss_of(model))
        losses[-1].backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


@pytest.mark.parametrize("train", ["B", "A"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_steps_on_corrected_gradients(name, train):
    model = adapted(train)
    other = copy.deepcopy(model)
    optimizer, by_hand = OPTIMIZERS[name](params(model)), OPTIMIZERS[name](params(other))
    correct_gradients(optimizer, model)
    for step in range(3):
        for each in (model, other):
            draw_gradients(each, step)
        correct_by_hand(other, train)
        optimizer.step()
        by_hand.step()
    assert_same(model, other)


@pytest.mark.parametrize("positional", [True, False])
@pytest.mark.parametrize("name", ["AdamW", "LBFGS"])
def test_closures_are_corrected_after_each_evaluation(name, positional):
    model = adapted()
    other = copy.deepcopy(model)

    def train(model, hooked):
        make = OPTIMIZERS.get(name, lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3))
        optimizer = make(params(model))
        if hooked:
            correct_gradients(optimizer, model)

        def closure():
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            if not hooked:
                correct_by_hand(model)
            return loss

        return [(optimizer.step(closure) if positional else optimizer.step(closure=closure)).item() for _ in range(2)]

    assert train(model, True) == pytest.approx(train(other, False), rel=1e-9)
    assert_same(model, other)


class Twice(torch.optim.SGD):
    """Evaluates twice a step, and takes it by a step that torch hooks too, once there was a plain SGD."""

    def step(self, closure):
        closure()
        return super().step(closure)


def test_closures_may_accumulate_and_steps_be_nested():
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    model = adapted()
    optimizer = Twice(trained(model), 1.0)
    correct_gradients(optimizer, model)
    draw_gradients(model, 0)
    raw, start = [p.grad.clone() for p in trained(model)], [p.detach().clone() for p in trained(model)]
    for _ in range(2):  # on 3 and 5 times the gradient
        optimizer.step(lambda: [p.grad.add_(g) for p, g in zip(trained(model), raw, strict=True)])
    optimizer.zero_grad()
    draw_gradients(model, 0)
    correct_by_hand(model)
    for p, before in zip(trained(model), start, strict=True):
        torch.testing.assert_close(p, before - 8 * p.grad)


@pytest.mark.parametrize("train", ["B", "A"])
def test_for_an_orthonormal_factor_it_is_the_scale_alone(train):
    model = adapted(train, "orthonormal")
    other = copy.deepcopy(model)
    scale = 6 / 4
    optimizer, plain = (
        torch.optim.SGD(trained(model, train), 0.1 * scale**2),
        torch.optim.SGD(trained(other, train), 0.1),
    )
    correct_gradients(optimizer, model)
    for each, step in ((model, optimizer), (other, plain)):
        for _ in range(3):
            step.zero_grad()
            loss_of(each).backward()
            step.step()
    assert_same(model, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["foreach SGD", "fused AdamW"])  # which write on the gradients they are given
def test_afterwards_the_gradient_is_the_losss_again(name):
    """So steps may repeat, and gradients accumulate over steps, without correcting twice."""
    model = adapted()
    optimizer = OPTIMIZERS[name](trained(model))
    correct_gradients(optimizer, model)
    seen = gradients_in_step(optimizer, trained(model))
    loss_of(model).backward()
    before = [p.grad for p in trained(model)]
    values = [g.clone() for g in before]
    optimizer.step()
    first = list(seen)
    optimizer.step()
    assert all(p.grad is g for p, g in zip(trained(model), before, strict=True))
    for g, value, once, twice in zip(before, values, first, seen, strict=True):
        assert torch.equal(g, value) and torch.equal(once, twice) and not torch.allclose(once, value)
    for g in before:
        g.add_(g.clone())
    optimizer.step()
    for once, doubled in zip(first, seen, strict=True):
        torch.testing.assert_close(doubled, 2 * once)


def test_a_step_may_free_its_gradients():
    model = adapted()
    optimizer = torch.optim.SGD(trained(model), 0.1)
    optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())
    correct_gradients(optimizer, model)
    draw_gradients(model, 0)
    optimizer.step()
    assert all(p.grad is None for p in trained(model))


def test_accumulated_gradients_are_corrected_once():
    model = adapted()
    other = copy.deepcopy(model)
    optimizer, by_hand = OPTIMIZERS["AdamW"](params(model)), OPTIMIZERS["AdamW"](params(other))
    correct_gradients(optimizer, model)
    for _ in range(2):
        for each in (model, other):
            for n in (2, 3):
                loss_of(each, n).backward()
        correct_by_hand(other)
        for each in (optimizer, by_hand):
            each.step()
            each.zero_grad()
    assert_same(model, other)


@pytest.mark.parametrize("name", ["AdamW", "fused AdamW"])  # unscaled before the step, and in it
def test_scaled_gradients(name):
    model = adapted(dtype=torch.float32)
    other = copy.deepcopy(model)
    optimizer, plain = OPTIMIZERS[name](params(model)), OPTIMIZERS[name](params(other))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step, each in ((optimizer, model), (plain, other)):
        correct_gradients(step, each)
    for infinite in (False, True, False):
        for step, each in ((optimizer, model), (plain, other)):
            step.zero_grad()
            loss = loss_of(each)
            if each is model:
                scaler.scale(loss).backward()
                if infinite:  # a step that the scaler skips
                    trained(model)[0].grad[0, 0, 0] = torch.inf
                scaler.step(step)
                scaler.update()
            elif not infinite:
                loss.backward()
                step.step()
    assert_same(model, other, rtol=1e-5, atol=1e-5)


def test_in_float32_also_when_stepping_within_autocast():
    model = adapted(dtype=torch.float32)
    optimizer = torch.optim.SGD(params(model), 0.1)
    correct_gradients(optimizer, model)
    draw_gradients(model, 0)
    seen = gradients_in_step(optimizer, trained(model))
    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step()
    correct_by_hand(model)
    for factor, g in zip(trained(model), seen, strict=True):
        torch.testing.assert_close(g, factor.grad)


def test_half_precision_factors_keep_their_dtype():
    model = adapted(dtype=torch.float32).bfloat16()
    optimizer = torch.optim.SGD(params(model), 0.1)
    correct_gradients(optimizer, model)
    draw_gradients(model, 0)
    seen = gradients_in_step(optimizer, trained(model))
    optimizer.step()
    model.double()
    correct_by_hand(model)
    for factor, g in zip(trained(model), seen, strict=True):
        assert g.dtype == torch.bfloat16
        torch.testing.assert_close(g.double(), factor.grad, rtol=2**-8, atol=1e-6)


def test_a_handle_ends_it():
    model = adapted()
    optimizer = torch.optim.SGD(trained(model), 0.1)
    with correct_gradients(optimizer, model):
        pass
    correct_gradients(optimizer, model).remove()
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    draw_gradients(model, 0)
    seen = gradients_in_step(optimizer, trained(model))
    optimizer.step()
    assert all(torch.equal(g, p.grad) for g, p in zip(seen, trained(model), strict=True))


def test_passes_over_what_it_does_not_hold_or_has_no_gradient():
    model = adapted()
    mine, others = trained(model)[:2], trained(model)[2:]
    optimizer = torch.optim.SGD(mine, 0.0)
    correct_gradients(optimizer, model)
    draw_gradients(model, 0)
    raw = [p.grad.clone() for p in trained(model)]
    mine[0].grad = None
    seen = gradients_in_step(optimizer, [mine[1], *others, model.head.weight])
    head = model.head.weight.grad.clone()
    optimizer.step()
    assert mine[0].grad is None
    assert not torch.allclose(seen[0], raw[1])
    assert all(map(torch.equal, seen[1:], [*raw[2:], head]))
    optimizer.add_param_group({"params": others})
    optimizer.step()
    assert not any(map(torch.allclose, seen[1:-1], raw[2:])) and torch.equal(seen[-1], head)


class CountInverses(torch.overrides.TorchFunctionMode):
    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.cholesky_inverse
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("train", ["B", "A"])
def test_inverts_once_and_keeps_nothing_on_the_model(train):
    model = adapted(train)
    names = set(model.state_dict())
    optimizer = torch.optim.AdamW(params(model), 0.1)
    with CountInverses() as inverses:
        correct_gradients(optimizer, model)
        for step in range(4):
            draw_gradients(model, step)
            optimizer.step()
    assert inverses.count == len(list(adapter_layers(model))) == 4
    assert set(model.state_dict()) == names


def load_state(model, other, folder):
    model.load_state_dict(other.state_dict())


def assign_state(model, other, folder):
    for (_, layer), (_, loaded) in zip(adapter_layers(model), adapter_layers(other), strict=True):
        layer.load_state_dict({"lora_A": loaded.lora_A.detach().clone()}, strict=False, assign=True)


def load_saved(model, other, folder):
    load_adapter(model, save_adapter(other, folder))


def replace_data(model, other, folder):
    for (_, layer), (_, loaded) in zip(adapter_layers(model), adapter_layers(other), strict=True):
        layer.lora_A.data = loaded.lora_A.detach().clone()


def convert(model, other, folder):
    load_state(model, other, folder)
    model.float().double()


@pytest.mark.parametrize("change", [load_state, assign_state, load_saved, replace_data, convert])
def test_follows_the_frozen_factor(change, tmp_path):
    model, other = adapted(), adapted(seed=1)
    optimizer = torch.optim.SGD(trained(model), 0.0)
    correct_gradients(optimizer, model)
    draw_gradients(model, 0)
    seen = gradients_in_step(optimizer, trained(model))
    optimizer.step()
    stale = list(seen)
    change(model, other, tmp_path)
    draw_gradients(model, 0)
    with CountInverses() as inverses:
        optimizer.step()
        optimizer.step()
    correct_by_hand(model)
    for factor, g, before in zip(trained(model), seen, stale, strict=True):
        torch.testing.assert_close(g, factor.grad, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(g, before)
    assert inverses.count == len(seen)


@pytest.mark.parametrize("spoil", [lambda A: A.zero_(), lambda A: A[1, 2].copy_(A[1, :2].sum(0)), lambda A: A.div_(0)])
def test_a_frozen_factor_without_full_rank_gets_a_sentence(spoil):
    model = adapted(dtype=torch.float32)
    optimizer = torch.optim.SGD(trained(model), 0.1)
    correct_gradients(optimizer, model)
    draw_gradients(model, 0)
    spoilt = model.blocks[1].attn.qkv.lora_A
    before = spoilt.detach().clone()
    with torch.no_grad():
        spoil(spoilt)
    named = naming("blocks.1.attn.qkv.lora_A", "rank 4", "init_A")
    with pytest.raises(AdapterError, match=named):
        optimizer.step()
    with pytest.raises(AdapterError, match=named):
        correct_gradients(torch.optim.SGD(trained(model), 0.1), model)
    with torch.no_grad():
        spoilt.copy_(before)
    seen = gradients_in_step(optimizer, trained(model))
    optimizer.step()  # may be repeated: what had been corrected before the error is not corrected again
    draw_gradients(model, 0)
    correct_by_hand(model)
    for factor, g in zip(trained(model), seen, strict=True):
        torch.testing.assert_close(g, factor.grad)


def test_refusals():
    model = adapted()
    optimizer = torch.optim.SGD(params(model), 0.1)
    with pytest.raises(AdapterError, match=naming("lora_B", "parameters that train")):
        correct_gradients(torch.optim.SGD(model.head.parameters(), 0.1), model)
    with pytest.raises(AdapterError, match=naming("gradient_correction=True")):
        correct_gradients(optimizer, adapted(gradient_correction=False))
    handle = correct_gradients(optimizer, model)
    with pytest.raises(AdapterError, match=naming("already", "remove()")):
        correct_gradients(optimizer, model)
    handle.remove()
    correct_gradients(optimizer, model)
    with pytest.raises(AdapterError, match=naming("inject(model, config)")):
        correct_gradients(optimizer, merge_and_unload(model))


@pytest.mark.parametrize("bfloat16", [False, True])
def test_trains_as_pefts_lora_fa_optimizer(bfloat16, monkeypatch):
    """20 steps from the same start factors, on the same data.

    PEFT's is AdamW but for its eps, added to √v before v's bias is corrected: AdamW's eps must follow it step by
    step. Beside the theorem, PEFT adds 1e-8·I to A Aᵀ, which float32 does not notice here, and multiplies g_B by
    the inverse in bfloat16 where accelerate finds it: turned off, the runs agree; left on, to bfloat16's digits.
    """
    peft = pytest.importorskip("peft")
    if not bfloat16:
        monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)
    monkeypatch.setattr("peft.optimizers.lorafa.infer_device", lambda: "cpu")
    model = adapted(start="kaiming_uniform", dtype=torch.float32, targets="proj,fc1,fc2", alpha=8)
    theirs = peft.get_peft_model(
        build("vit_small_patch16_224"),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=r"blocks.*\.(proj|fc1|fc2)", modules_to_save=["head"]),
    )
    pairs = []
    with torch.no_grad():
        for name, layer in adapter_layers(model):
            other = theirs.base_model.model.get_submodule(name)
            other.lora_A["default"].weight.copy_(layer.lora_A[0])
            other.lora_B["default"].weight.copy_(layer.lora_B[0])
            assert other.scaling["default"] == layer.scale
            pairs.append((layer.lora_B, other.lora_B["default"].weight))
    start = [B.detach().clone() for B, _ in pairs]
    optimizer = torch.optim.AdamW(params(model), lr=1e-3, weight_decay=0.0)
    correct_gradients(optimizer, model)
    their_optimizer = peft.optimizers.create_lorafa_optimizer(theirs, r=4, lora_alpha=8, lr=1e-3)
    data = torch.randn(20, 8, 3, 32, 32)
    losses, their_losses = [], []
    for step, x in enumerate(data, 1):
        optimizer.param_groups[0]["eps"] = 1e-6 / (1 - 0.999**step) ** 0.5
        for each, update, record in ((model, optimizer, losses), (theirs, their_optimizer, their_losses)):
            update.zero_grad()
            loss = nn.functional.cross_entropy(each(x), torch.arange(8) % 5)
            loss.backward()
            update.step()
            record.append(loss.item())
    tolerance = 5e-3 if bfloat16 else 1e-5
    assert losses == pytest.approx(their_losses, rel=tolerance)
    for (ours, other), before in zip(pairs, start, strict=True):
        moved = (ours - before).norm()
        assert (ours[0] - other).norm() < tolerance * moved
        assert moved > 0.05 * before.norm()
