"""Adapted models: what `inject` stores in them, and where their adapters, heads and other parts are."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vitlorafa.config import AdapterConfig
from vitlorafa.errors import AdapterError
from vitlorafa.heads import find_heads
from vitlorafa.layers import LoRALinear
from vitlorafa.wrappers import join, named_buffers, named_modules, named_parameters, plain_name, unwrap


@dataclass
class Adapted:
    """What `inject` stores in a model's attribute `_vitlorafa`: names instead of modules, so that it can be copied.

    Attributes:
        config: Configuration of the adapters.
        requires_grad: Value of each parameter before `inject`.
        buffers: Buffers of the state dict before `inject`.
        digests: Digests of the pretrained weights, see `vitlorafa.origin`.
        joint_bias: Names of attentions whose option to add the bias separately was switched on.
        stacked_heads: Names of classifiers that `stack` replaced.
        hooks: Handles of the hooks of `stack`.
        adapters: What is kept of each adapter by name, see `vitlorafa.named_adapters`; None for the active one.
        originals: Values of the head and of other loaded parts before the adapter trained or was loaded.
        seed: Seed that the factors were drawn from; None if it is not known.
    """

    config: AdapterConfig
    requires_grad: dict[str, bool]
    buffers: dict[str, Tensor] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    joint_bias: list[str] = field(default_factory=list)
    stacked_heads: list[str] = field(default_factory=list)
    hooks: list[RemovableHandle] = field(default_factory=list)
    adapters: dict[str, Any] = field(default_factory=lambda: {"default": None})
    originals: dict[str, Tensor] = field(default_factory=dict)
    seed: int | None = None


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The adapted layers with their names, in the model's order; none if the model is not adapted.

    Args:
        model: Model, or a module that holds it.
    """
    for name, module in named_modules(model):
        if isinstance(module, LoRALinear):
            yield name, module


def adapted_models(model: nn.Module) -> list[nn.Module]:
    """The adapted timm models in a module.

    Args:
        model: Any module.

    Raises:
        AdapterError: If there is none.
    """
    adapted = with_state(model)
    if not adapted:
        raise AdapterError("the model is not adapted: call inject(model, config) first")
    return adapted


def adapted_state(model: nn.Module) -> Adapted:
    """What `inject` stored in the model, or in the one inside it.

    Raises:
        AdapterError: If the model is not adapted, or several models inside it are.
    """
    inner, *more = adapted_models(model)
    if more:
        raise _ambiguous(model, "adapted models", [inner, *more])
    return inner._vitlorafa  # type: ignore[return-value]


def with_state(model: nn.Module) -> list[nn.Module]:
    """The adapted timm models in a module; none if it is not adapted.

    Args:
        model: Any module.
    """
    return [module for _, module in named_modules(model) if "_vitlorafa" in vars(module)]


def check_one_adapter(inner: nn.Module) -> None:
    """Checks that `stack` has not given a timm model several adapters.

    Args:
        inner: The timm model, adapted or not.

    Raises:
        AdapterError: If it has several.
    """
    if "_vitlorafa" in vars(inner) and adapted_state(inner).hooks:
        raise AdapterError(
            "the model has several adapters, stacked for inference: call remove(model), then load_adapter with one of "
            "them"
        )


def timm_model(model: nn.Module, prefix: str | None = None) -> nn.Module:
    """The adapted timm model, or the one to adapt, inside the modules that wrap or hold it.

    Args:
        model: The timm model, or a module that holds it.
        prefix: Name of the timm model within `model`. If None, the adapted model, otherwise the only timm model,
            otherwise `model` itself.

    Raises:
        AdapterError: If there is no module of that name, or several models are adapted.
    """
    modules = dict(named_modules(model))
    if prefix is not None:
        if plain_name(prefix) not in modules:
            parts = ", ".join(name for name, _ in modules[""].named_children())
            raise AdapterError(f"prefix {prefix!r} is not in this {type(modules['']).__name__}: it has {parts}")
        return timm_model(modules[plain_name(prefix)])
    adapted = [module for module in modules.values() if "_vitlorafa" in vars(module)]
    if len(adapted) > 1:
        raise _ambiguous(model, "adapted models", adapted)
    candidates = adapted or _timm_models(model)
    return candidates[0] if len(candidates) == 1 else modules[""]


def _timm_models(model: nn.Module) -> list[nn.Module]:
    """The timm models in a module, without those inside other timm models."""
    models: dict[str, nn.Module] = {}
    for name, module in named_modules(model):
        if hasattr(module, "get_classifier") and not any(name.startswith(join(outer, "")) for outer in models):
            models[name] = module
    return list(models.values())


def _ambiguous(model: nn.Module, kind: str, models: list[nn.Module]) -> AdapterError:
    names = ", ".join(name for name, module in named_modules(model) if module in models)
    return AdapterError(f"this {type(unwrap(model)).__name__} holds several {kind} ({names}): choose one by prefix=")


def outside_parameters(model: nn.Module, inner: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module, by name, that are neither in this timm model nor in another adapted one inside it.

    Args:
        model: Module that holds the timm model.
        inner: The timm model.
    """
    inside = {parameter for each in (inner, *with_state(model)) for parameter in each.parameters()}
    return {name: parameter for name, parameter in named_parameters(model) if parameter not in inside}


def classifiers(model: nn.Module) -> tuple[nn.Module, ...]:
    """The classifier; several for models such as distilled ones and VOLO; none for a model without a head.

    Args:
        model: The timm model, or a module that holds it.
    """
    return tuple(find_heads(timm_model(model)))


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The classifier's parameters by their names in the timm model.

    Args:
        model: The timm model, or a module that holds it.

    Raises:
        AdapterError: If the model has no classifier.
    """
    wanted = {parameter for head in classifiers(model) for parameter in head.parameters()}
    if not wanted:
        models = _timm_models(model)
        if len(models) > 1:
            raise _ambiguous(model, "timm models", models)
        if models:
            raise AdapterError("the model has no head: create it with num_classes above 0")
        raise AdapterError(
            f"this {type(unwrap(model)).__name__} has no head, a linear layer named classifier, head, heads or fc: "
            "leave train_head and head out, and unfreeze what should train after inject, which is saved too"
        )
    return {name: parameter for name, parameter in named_parameters(timm_model(model)) if parameter in wanted}


def head_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The classifier's buffers, such as the statistics of a BatchNorm, by their names in the timm model."""
    wanted = {buffer for head in classifiers(model) for buffer in head.buffers()}
    return {name: buffer for name, buffer in named_buffers(timm_model(model)) if buffer in wanted}


def changed_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of an adapted model, by name, that changed since `inject`."""
    before = adapted_state(model).buffers
    return {
        name: buffer
        for name, buffer in named_buffers(timm_model(model))
        if name not in before or not _is_same(before[name], buffer)
    }


def _is_same(before: Tensor, after: Tensor) -> bool:
    if before.shape != after.shape or before.is_meta or after.is_meta:
        return before.shape == after.shape
    return torch.equal(before.to(after.device, after.dtype), after)
