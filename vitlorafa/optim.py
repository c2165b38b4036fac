"""Gradient correction: the gradient of the trained factor whose step on W is closest to that of full fine-tuning.

With G = dL/dW, LoRA's gradients are g_B = s·G·Aᵀ and g_A = s·Bᵀ·G, and the steps that they cause on W are s·g_B·A and
s·B·g_A. The steps closest to G in the Frobenius norm are those of

    g_B ← (1/s²) g_B (A Aᵀ)⁻¹    with A frozen: LoRA-FA (Zhang et al. 2023), theorem 4.1
    g_A ← (1/s²) (Bᵀ B)⁻¹ g_A    with B frozen: LoRA-FB, theorem A.1

Under SGD, the step on W is then G projected onto the rows of A or the columns of B. It depends neither on their lengths
nor on s, so the learning rate of full fine-tuning applies. If the frozen factor is orthonormal, as by default, the
correction is only the factor 1/s², which has no effect under Adam.

PEFT's LoRA-FA optimizer is AdamW with this correction, but it multiplies in bfloat16 where possible, inverts
A Aᵀ + 1e-8·I in every step, adds eps before it corrects the bias of the second moment, and decays the weights after
the step.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from vitlorafa.errors import AdapterError
from vitlorafa.inject import adapted_state, adapter_layers
from vitlorafa.layers import LoRALinear

# Smallest ratio of eigenvalues of A Aᵀ that counts as full rank; rounding a factor to float32 causes about 1e-14.
_FULL_RANK = 1e-10


def correct_gradients(optimizer: Optimizer, model: nn.Module) -> RemovableHandle:
    """Makes each step of an optimizer use corrected gradients (LoRA-FA, theorem 4.1; LoRA-FB, theorem A.1).

    Inverses are computed once here, and again only after a frozen factor was loaded, moved or changed (not through
    `.data`, which torch does not track). Only the step sees corrected gradients; afterwards `.grad` is the loss's
    gradient again, so steps can be repeated and gradients accumulated across them. Gradient clipping before a step acts
    on the loss's gradients, and `GradScaler` works as usual. A closure's gradients are corrected after each evaluation;
    a line search then uses the corrected gradient as if it were the loss's.

    Args:
        optimizer: Any torch optimizer. Like all optimizer hooks, this one is not in its state_dict or in copies.
            Factors that the optimizer does not hold, or that have no gradient, are skipped.
        model: Model that was adapted with `gradient_correction=True`.

    Returns:
        A handle; its `remove()` ends the correction.

    Raises:
        AdapterError: If the model is not adapted, its config has no gradient correction, the optimizer holds no trained
            factor of it or corrects them already, or a frozen factor does not have full rank (also in a later step).
    """
    config = adapted_state(model).config
    if not config.gradient_correction:
        raise AdapterError("the model was adapted without gradient correction: inject with gradient_correction=True")
    correction = _Correction(model, config.train)
    if not correction.layers_in(optimizer):
        raise AdapterError(
            f"the optimizer holds no lora_{config.train} of this model: create it with the parameters that train"
        )
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

    def __init__(self, model: nn.Module, train: str) -> None:
        self.layers = dict(adapter_layers(model))
        self.trained, self.frozen = ("lora_B", "lora_A") if train == "B" else ("lora_A", "lora_B")
        self.inverses: dict[str, tuple[Tensor, int, Tensor]] = {}  # layer -> frozen factor, its version, inverse
        self.swapped: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # during a step: factor, gradient, corrected
        for name, layer in self.layers.items():
            self.inverse(name, layer)

    def layers_in(self, optimizer: Optimizer) -> list[tuple[str, LoRALinear]]:
        """The layers whose trained factor the optimizer holds at this moment; groups can be added later."""
        params = {id(getattr(p, "factor", p)) for group in optimizer.param_groups for p in group["params"]}
        return [(name, layer) for name, layer in self.layers.items() if id(getattr(layer, self.trained)) in params]

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
        """Replaces the loss's gradients, [k, m, r] of B or [k, r, d_in] of A, by corrected ones."""
        self.after_step()  # if the previous step failed, or this one is nested in another
        for name, layer in self.layers_in(optimizer):
            factor = getattr(layer, self.trained)
            if (grad := factor.grad) is None:
                continue
            inverse = self.inverse(name, layer)
            with torch.autocast(grad.device.type, enabled=False):  # a step may run within autocast
                wide = grad.to(inverse.dtype)
                corrected = wide @ inverse if self.trained == "lora_B" else inverse @ wide
            factor.grad = corrected.to(grad.dtype)
            self.swapped.append((factor, grad, factor.grad))

    @torch.no_grad()
    def inverse(self, name: str, layer: LoRALinear) -> Tensor:
        """(1/s²) (A Aᵀ)⁻¹ or (1/s²) (Bᵀ B)⁻¹, [k, r, r], in float32 or better, by Cholesky in float64 on the CPU."""
        factor = getattr(layer, self.frozen).detach()
        cached, version, inverse = self.inverses.get(name, (None, None, factor))
        # Keeps the factor alive, so that no other tensor gets its address.
        if cached is not None and cached.data_ptr() == factor.data_ptr() and version == factor._version:
            return inverse
        wide = factor.to("cpu", torch.float64)
        gram = wide @ wide.mT if self.frozen == "lora_A" else wide.mT @ wide
        rank = gram.shape[-1]
        if not (gram.isfinite().all() and torch.linalg.matrix_rank(gram, rtol=_FULL_RANK).eq(rank).all()):
            raise AdapterError(
                f"{name}.{self.frozen} does not have full rank {rank}, so its Gram matrix has no inverse: use another "
                f"init_{self.frozen[-1]}, or gradient_correction=False"
            )
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram)) / layer.scale**2
        inverse = inverse.to(factor.device, torch.promote_types(factor.dtype, torch.float32))
        self.inverses[name] = (factor, factor._version, inverse)
        return inverse
