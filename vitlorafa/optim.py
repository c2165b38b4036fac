"""Gradient corrections: of all gradients of the trained factor, the one that is closest to full fine-tuning's.

With G = dL/dW, LoRA's gradients are g_B = s·G·Aᵀ and g_A = s·Bᵀ·G, and the steps they induce on W are s·g_B·A and
s·B·g_A. Closest to G, in the Frobenius norm, are those of

    g_B ← (1/s²) g_B (A Aᵀ)⁻¹    with A frozen: LoRA-FA (Zhang et al. 2023), theorem 4.1
    g_A ← (1/s²) (Bᵀ B)⁻¹ g_A    with B frozen: LoRA-FB, theorem A.1

Under SGD the step on W is then G projected onto the rows of A or the columns of B, whatever their lengths and s,
so the learning rate is that of full fine-tuning. If the frozen factor is orthonormal, as by default, the
correction is but the factor 1/s², which Adam does not notice.

PEFT's LoRA-FA optimizer is AdamW with this correction, but multiplies in bfloat16 where it can, inverts
A Aᵀ + 1e-8·I anew in every step, adds eps before the bias of the second moment is corrected, and decays the
weights after the step.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from vitlorafa.errors import AdapterError
from vitlorafa.inject import adapted_state, adapter_layers
from vitlorafa.layers import LoRALinear

# Smallest over largest eigenvalue of A Aᵀ that counts as full rank; rounding a factor to float32 makes some 1e-14.
_FULL_RANK = 1e-10


def correct_gradients(optimizer: Optimizer, model: nn.Module) -> RemovableHandle:
    """Makes each step of an optimizer use corrected gradients (LoRA-FA, theorem 4.1; LoRA-FB, theorem A.1).

    Inverses are computed here, once, and again only when a frozen factor is loaded, moved or changed (not through
    `.data`, which torch does not count). Corrected is what a step sees: afterwards `.grad` is the loss's again, so
    that steps may be repeated and gradients accumulated over them. Clipping before a step acts on the loss's
    gradients, and `GradScaler` works as ever. Closures are corrected after each evaluation; mind that
    a line search then takes the corrected gradient for the loss's.

    Args:
        optimizer: Any of torch's interface. As all its hooks, this one is in no state_dict or copy of it. Factors
            that it does not hold, or that have no gradient, are passed over.
        model: A model that was injected with `gradient_correction=True`.

    Returns:
        A handle; its `remove()` ends the correction.

    Raises:
        AdapterError: If the model is not adapted, its config has no gradient correction, the optimizer holds none
            of its trained factors or corrects them already, or a frozen factor has not full rank (then, or in
            the step after it has changed).
    """
    config = adapted_state(model).config
    if not config.gradient_correction:
        raise AdapterError("the model's config has gradient_correction off: inject with gradient_correction=True")
    correction = _Correction(model, config.train)
    if not correction.held(optimizer):
        raise AdapterError(f"the optimizer holds no lora_{config.train} of this model: pass it those that train")
    before, after = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    for hook in before.values():
        other = getattr(hook, "__self__", None)
        if isinstance(other, _Correction) and not {*other.layers.values()}.isdisjoint(correction.layers.values()):
            raise AdapterError("the optimizer corrects this model's gradients already: remove() that handle first")
    handle = RemovableHandle(before, extra_dict=after)  # one for both
    before[handle.id], after[handle.id] = correction.before, correction.after
    return handle


class _Correction:
    """The hooks around a step, and what they remember."""

    def __init__(self, model: nn.Module, train: str) -> None:
        self.layers = dict(adapter_layers(model))
        self.trained, self.frozen = ("lora_B", "lora_A") if train == "B" else ("lora_A", "lora_B")
        self.inverses: dict[str, tuple[Tensor, int, Tensor]] = {}  # layer -> frozen factor, its version, inverse
        self.swapped: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # during a step: factor, gradient, corrected
        for name, layer in self.layers.items():
            self.inverse(name, layer)

    def held(self, optimizer: Optimizer) -> list[tuple[str, LoRALinear]]:
        """The layers whose trained factor the optimizer holds, now: groups may be added."""
        params = {id(getattr(p, "factor", p)) for group in optimizer.param_groups for p in group["params"]}
        return [(name, layer) for name, layer in self.layers.items() if id(getattr(layer, self.trained)) in params]

    def before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The step's arguments, with a closure that corrects what it computes; without one, corrects now."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            return self.correct(optimizer)

        def corrected() -> Any:
            self.after()
            loss = closure()
            self.correct(optimizer)
            return loss

        return ((args[0], corrected, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": corrected})

    def after(self, *_: Any) -> None:
        """Puts the loss's gradients back where the corrected ones still are."""
        for factor, grad, corrected in self.swapped:
            if factor.grad is corrected:
                factor.grad = grad
        self.swapped = []

    @torch.no_grad()
    def correct(self, optimizer: Optimizer) -> None:
        """Puts corrected gradients, [k, m, r] of B or [k, r, d_in] of A, in the place of the loss's."""
        self.after()  # should the step before have failed, or this one be within another
        for name, layer in self.held(optimizer):
            factor = getattr(layer, self.trained)
            if (grad := factor.grad) is None:
                continue
            inverse = self.inverse(name, layer)
            with torch.autocast(grad.device.type, enabled=False):  # steps may be taken within autocast
                wide = grad.to(inverse.dtype)
                corrected = wide @ inverse if self.trained == "lora_B" else inverse @ wide
            factor.grad = corrected.to(grad.dtype)
            self.swapped.append((factor, grad, factor.grad))

    @torch.no_grad()
    def inverse(self, name: str, layer: LoRALinear) -> Tensor:
        """(1/s²) (A Aᵀ)⁻¹ or (1/s²) (Bᵀ B)⁻¹, [k, r, r], in float32 or better, by Cholesky in float64 on the CPU."""
        factor = getattr(layer, self.frozen).detach()
        seen, version, inverse = self.inverses.get(name, (None, None, factor))
        # The factor as it was seen is held on to, so that no other can come to lie at its address.
        if seen is not None and seen.data_ptr() == factor.data_ptr() and version == factor._version:
            return inverse
        wide = factor.to("cpu", torch.float64)
        gram = wide @ wide.mT if self.frozen == "lora_A" else wide.mT @ wide
        rank = gram.shape[-1]
        if not (gram.isfinite().all() and torch.linalg.matrix_rank(gram, rtol=_FULL_RANK).eq(rank).all()):
            raise AdapterError(f"{name}.{self.frozen} has not full rank {rank}, so its Gram matrix has no inverse")
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram)) / layer.scale**2
        inverse = inverse.to(factor.device, torch.promote_types(factor.dtype, torch.float32))
        self.inverses[name] = (factor, factor._version, inverse)
        return inverse
