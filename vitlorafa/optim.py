"""Gradients and learning rates of the factors: LoRA-FA's and LoRA-Pro's gradient correction, and LoRA+.

Gradient correction gives the factors the gradients whose step on W is closest to that of full fine-tuning. With
G = dL/dW, LoRA's gradients are g_B = s·G·Aᵀ and g_A = s·Bᵀ·G, and the steps that they cause on W are s·g_B·A and
s·B·g_A. The steps closest to G in the Frobenius norm are those of

    g_B ← (1/s²) g_B (A Aᵀ)⁻¹                       with A frozen: LoRA-FA (Zhang et al. 2023), theorem 4.1
    g_A ← (1/s²) (Bᵀ B)⁻¹ g_A                       with B frozen: LoRA-FB, theorem A.1
    g_A ← (1/s²) (Bᵀ B)⁻¹ g_A + X A                 if both train: LoRA-Pro (Wang et al. 2024), theorem 2.1
    g_B ← (1/s²) (I − B (Bᵀ B)⁻¹ Bᵀ) g_B (A Aᵀ)⁻¹ − B X

In LoRA-Pro, every X gives the same step s·(B·g_A + g_B·A). The one chosen keeps the gradients closest to LoRA's
(theorem 2.3): it solves the Sylvester equation Bᵀ B X + X A Aᵀ = −(1/s²) (Bᵀ B)⁻¹ g_A Aᵀ. Where a factor does not have
full rank, as B at its start at zero, pseudo-inverses take the place of inverses; the step stays the closest.

Under SGD, the step on W is then G projected onto the rows of A, the columns of B, or both. It depends neither on their
lengths nor on s, so the learning rate of full fine-tuning applies. If the frozen factor is orthonormal, as by default,
the correction is only the factor 1/s², which has no effect under Adam. Adam's moments are those of the corrected
gradients; LoRA-Pro's authors call this their efficient mode. In their other mode the moments have the size of W.

PEFT's LoRA-FA optimizer is AdamW with this correction, but it multiplies in bfloat16 where possible, inverts
A Aᵀ + 1e-8·I in every step, adds eps before it corrects the bias of the second moment, and decays the weights after
the step.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from vitlorafa.adapted import adapted_state, adapter_layers
from vitlorafa.errors import AdapterError
from vitlorafa.layers import LoRALinear
from vitlorafa.sharding import assign, gather, own_part

# Smallest ratio of eigenvalues of A Aᵀ that counts as full rank; rounding a factor to float32 causes about 1e-14.
_FULL_RANK = 1e-10
# The same if both factors train. Gradients, which are float32 at best, have errors that an inverse would enlarge.
_NOT_ZERO = 1e-8


def parameter_groups(
    model: nn.Module, *, lr: float, lr_B_ratio: float = 16.0, parameters: Iterable[nn.Parameter] | None = None
) -> list[dict[str, Any]]:
    """Parameter groups in which B has a higher learning rate than A (LoRA+, Hayou et al. 2024).

    `torch.optim.AdamW(parameter_groups(model, lr=1e-4, lr_B_ratio=16))` trains A at 1e-4, B at 1.6e-3, and everything
    else that trains, such as the head, at 1e-4.

    Args:
        model: Adapted model, or a module that holds it.
        lr: Learning rate of A and of everything else.
        lr_B_ratio: Learning rate of B relative to that of A. The paper recommends 16 where A starts at random.
        parameters: Parameters to group; if None, all of the model that require a gradient.

    Returns:
        Groups for an optimizer, with "params" and "lr": A, B, and the others if there are any.

    Raises:
        AdapterError: If the model is not adapted, a factor is frozen, or a rate is not above 0.
    """
    for name, value in {"lr": lr, "lr_B_ratio": lr_B_ratio}.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise AdapterError(f"{name} must be a finite number above 0, not {value!r}")
    adapted_state(model)
    factors = {"A": [layer.lora_A for _, layer in adapter_layers(model)]}
    factors["B"] = [layer.lora_B for _, layer in adapter_layers(model)]
    for factor, tensors in factors.items():
        if not all(tensor.requires_grad for tensor in tensors):
            raise AdapterError(
                f"parameter_groups is for adapters whose factors both train, but {factor} is frozen: adapt the model "
                "with train='BA', or give the optimizer the parameters that require a gradient"
            )
    chosen = [p for p in model.parameters() if p.requires_grad] if parameters is None else list(parameters)
    kinds = {id(tensor): factor for factor, tensors in factors.items() for tensor in tensors}
    rates = {"A": lr, "B": lr_B_ratio * lr, None: lr}
    groups = [{"params": [p for p in chosen if kinds.get(id(p)) == kind], "lr": rate} for kind, rate in rates.items()]
    return [group for group in groups if group["params"]]


def correct_gradients(optimizer: Optimizer, model: nn.Module) -> RemovableHandle:
    """Makes each step of an optimizer use corrected gradients: LoRA-FA's, LoRA-FB's, or LoRA-Pro's if both train.

    With a frozen factor, inverses are computed once here, and again only after that factor was loaded, moved or changed
    (not through `.data`, which torch does not track), or the strength was set. If both train, they are computed in
    every step. Only the step sees corrected gradients; afterwards `.grad` is the loss's gradient again, so steps can be
    repeated and gradients accumulated across them. Gradient clipping before a step acts on the loss's gradients, and
    `GradScaler` works as usual. A closure's gradients are corrected after each evaluation; a line search then uses the
    corrected gradient as if it were the loss's.

    Args:
        optimizer: Any torch optimizer. Like all optimizer hooks, this one is not in its state_dict or in copies.
            Factors that the optimizer does not hold, or that have no gradient, are skipped.
        model: Model that was adapted with `gradient_correction=True`.

    Returns:
        A handle; its `remove()` ends the correction.

    Raises:
        AdapterError: If the model is not adapted, its config has no gradient correction, the optimizer holds no trained
            factor of it (or only one of two) or corrects them already, or a frozen factor does not have full rank (also
            in a later step).
    """
    config = adapted_state(model).config
    if not config.gradient_correction:
        raise AdapterError("the model was adapted without gradient correction: inject with gradient_correction=True")
    correction = _BothFactors(model) if config.train == "BA" else _OneFactor(model, config.train)
    if not correction.layers_in(optimizer):
        names = " and ".join(f"lora_{factor}" for factor in config.train)
        raise AdapterError(f"the optimizer holds no {names} of this model: create it with the parameters that train")
    before, after = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    for hook in before.values():
        other = getattr(hook, "__self__", None)
        if isinstance(other, _Correction) and not {*other.layers.values()}.isdisjoint(correction.layers.values()):
            raise AdapterError(
                "the optimizer already corrects this model's gradients: call remove() of that handle first"
            )
    handle = RemovableHandle(before, extra_dict=after)  # one handle for both hooks
    before[handle.id], after[handle.id] = correction.before_step, correction.after_step
    return handle


class _Correction:
    """The hooks before and after a step, with their state."""

    def __init__(self, model: nn.Module, trained: tuple[str, ...]) -> None:
        self.layers = dict(adapter_layers(model))
        self.trained = trained
        self.swapped: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # during a step: factor, gradient, corrected

    def corrected(self, name: str, layer: LoRALinear, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The corrected gradients of a layer's trained factors, in the order of `trained`."""
        raise NotImplementedError

    def layers_in(self, optimizer: Optimizer) -> list[tuple[str, LoRALinear]]:
        """The layers whose trained factors the optimizer holds at this moment; groups can be added later."""
        params = {id(getattr(p, "factor", p)) for group in optimizer.param_groups for p in group["params"]}
        return [
            (name, layer)
            for name, layer in self.layers.items()
            if all(id(getattr(layer, factor)) in params for factor in self.trained)
        ]

    def before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Corrects the gradients; with a closure, returns arguments with one that corrects after each evaluation."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            return self.correct(optimizer)

        def corrected() -> Any:
            self.after_step()
            loss = closure()
            self.correct(optimizer)
            return loss

        return ((args[0], corrected, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": corrected})

    def after_step(self, *_: Any) -> None:
        """Restores the loss's gradients where the corrected ones are still in place."""
        for factor, grad, corrected in self.swapped:
            if factor.grad is corrected:
                factor.grad = grad
        self.swapped = []

    @torch.no_grad()
    def correct(self, optimizer: Optimizer) -> None:
        """Replaces the loss's gradients, [k, m, r] of B and [k, r, d_in] of A, by corrected ones."""
        self.after_step()  # if the previous step failed, or this one is nested in another
        for name, layer in self.layers_in(optimizer):
            factors = [getattr(layer, factor) for factor in self.trained]
            grads = tuple(factor.grad for factor in factors if factor.grad is not None)
            if len(grads) < len(factors):
                continue
            with torch.autocast(factors[0].device.type, enabled=False):  # a step may run within autocast
                corrected = self.corrected(name, layer, tuple(map(gather, grads)))
            for factor, grad, value in zip(factors, grads, corrected, strict=True):
                factor.grad = torch.empty_like(grad)
                assign(factor.grad, value)
                self.swapped.append((factor, grad, factor.grad))


class _OneFactor(_Correction):
    """Theorems 4.1 and A.1 of LoRA-FA: the other factor is frozen."""

    def __init__(self, model: nn.Module, train: str) -> None:
        self.frozen = "lora_A" if train == "B" else "lora_B"
        self.inverses: dict[str, tuple[Tensor, Any, Tensor]] = {}  # layer -> frozen factor, its state, inverse
        super().__init__(model, (f"lora_{train}",))
        for name, layer in self.layers.items():
            self.inverse(name, layer)

    def corrected(self, name: str, layer: LoRALinear, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """(1/s²) g_B (A Aᵀ)⁻¹, or (1/s²) (Bᵀ B)⁻¹ g_A."""
        inverse = self.inverse(name, layer)
        wide = grads[0].to(inverse.dtype)
        return (wide @ inverse if self.frozen == "lora_A" else inverse @ wide,)

    @torch.no_grad()
    def inverse(self, name: str, layer: LoRALinear) -> Tensor:
        """(1/s²) (A Aᵀ)⁻¹ or (1/s²) (Bᵀ B)⁻¹, [k, r, r], in float32 or better, by Cholesky in float64 on the CPU."""
        factor = own_part(getattr(layer, self.frozen).detach())
        cached, state, inverse = self.inverses.get(name, (None, None, factor))
        # Keeps the factor alive, so that no other tensor gets its address.
        if cached is not None and cached.data_ptr() == factor.data_ptr() and state == (factor._version, layer.scale):
            return inverse
        wide = gather(getattr(layer, self.frozen)).to("cpu", torch.float64)
        gram = wide @ wide.mT if self.frozen == "lora_A" else wide.mT @ wide
        rank = gram.shape[-1]
        if not (gram.isfinite().all() and torch.linalg.matrix_rank(gram, rtol=_FULL_RANK).eq(rank).all()):
            raise AdapterError(
                f"{name}.{self.frozen} does not have full rank {rank}, so its Gram matrix has no inverse: use another "
                f"init_{self.frozen[-1]}, or gradient_correction=False"
            )
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram)) / layer.scale**2
        inverse = inverse.to(factor.device, torch.promote_types(factor.dtype, torch.float32))
        self.inverses[name] = (factor, (factor._version, layer.scale), inverse)
        return inverse


class _BothFactors(_Correction):
    """LoRA-Pro, theorems 2.1 and 2.3: both factors train."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, ("lora_A", "lora_B"))

    def corrected(self, name: str, layer: LoRALinear, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The gradients of A and B whose step on W is closest to that of full fine-tuning."""
        tensors = gather(layer.lora_A), gather(layer.lora_B), *grads
        device = torch.device("cpu") if layer.lora_A.is_mps else layer.lora_A.device  # mps has no float64
        A, B, g_A, g_B = (tensor.to(device, torch.float64) for tensor in tensors)
        corrected = _closest_step(A, B, g_A, g_B, layer.scale)
        return tuple(each.to(layer.lora_A.device) for each in corrected)


def _closest_step(A: Tensor, B: Tensor, g_A: Tensor, g_B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """LoRA-Pro's gradients of A [k, r, d_in] and B [k, m, r], by the eigenvectors of both Gram matrices.

    With Bᵀ B = P diag(p) Pᵀ and A Aᵀ = Q diag(q) Qᵀ, the Sylvester equation Bᵀ B X + X A Aᵀ = C is solved by
    X = P [(Pᵀ C Q)ᵢⱼ / (pᵢ + qⱼ)] Qᵀ.
    """
    p, P = torch.linalg.eigh(B.mT @ B)
    q, Q = torch.linalg.eigh(A @ A.mT)
    inverse_B, inverse_A = ((V * _reciprocal(v)[:, None, :]) @ V.mT for v, V in ((p, P), (q, Q)))
    g_A = inverse_B @ g_A / scale**2
    g_B = g_B @ inverse_A / scale**2
    g_B = g_B - B @ (inverse_B @ (B.mT @ g_B))
    C = -g_A @ A.mT
    X = P @ (P.mT @ C @ Q * _reciprocal((p[:, :, None] + q[:, None, :]).flatten(1)).view_as(C)) @ Q.mT
    return g_A + X @ A, g_B - B @ X


def _reciprocal(eigenvalues: Tensor) -> Tensor:
    """1/v, and 0 for those that count as zero, [k, n]."""
    zero = eigenvalues <= _NOT_ZERO * eigenvalues.amax(dim=1, keepdim=True)
    return torch.where(zero, 0, 1 / torch.where(zero, 1, eigenvalues))
