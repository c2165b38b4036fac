"""Adapters into and out of a timm vision transformer, in place."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from vitlorafa.config import AdapterConfig
from vitlorafa.errors import AdapterError, warn
from vitlorafa.layers import STACKS, LoRALinear
from vitlorafa.sites import Site, check_targets, gaps, linear_sites, stacks


@dataclass
class _Adapted:
    """What an adapted model remembers, as its attribute `_vitlorafa`, in names so that it can be copied."""

    config: AdapterConfig
    requires_grad: dict[str, bool]  # of each parameter, before
    joint_bias: list[str] = field(default_factory=list)  # attentions that computed qkv and its bias in one


def inject(model: nn.Module, config: AdapterConfig, *, train_head: bool = False) -> nn.Module:
    """Adapts a timm vision transformer in place and freezes everything else.

    Args:
        model: The pretrained model.
        config: What to adapt, and how.
        train_head: Whether the classifier, timm's `get_classifier()`, stays trainable.

    Returns:
        The same model. The modes of its modules (`train`, `eval`) are as before.

    Raises:
        AdapterError: If the model is adapted already, has nothing to adapt or no such target, has a target
            that is not a plain linear layer, or is narrower than the rank. The model is then as before.

    Warns:
        AdapterWarning: If some blocks have no such target, or hold linear layers but no attention.
    """
    if hasattr(model, "_vitlorafa") or any(isinstance(module, LoRALinear) for module in model.modules()):
        raise AdapterError("the model is adapted already: remove(model) or merge_and_unload(model) first")
    sites = linear_sites(model)
    check_targets(model, sites, config.targets)
    if left_out := gaps(model, sites, config.targets, classifiers(model)):
        warn(left_out)
    sites = [site for site in sites if set(site.targets) & set(config.targets)]
    head = head_parameters(model) if train_head else {}
    generator = config.generator()
    layers = [_adapt(site, config, generator) for site in sites]

    adapted = _Adapted(config, {name: p.requires_grad for name, p in model.named_parameters()})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in head)
    for site, layer in zip(sites, layers, strict=True):
        setattr(site.owner, site.attribute, layer)
        # BEiT, EVA and Swin v2 read qkv's weight instead of calling it, unless told to add the bias apart.
        if site.attribute == "qkv" and getattr(site.owner, "qkv_bias_separate", True) is False:
            site.owner.qkv_bias_separate = True  # type: ignore[assignment]
            adapted.joint_bias.append(site.name.rpartition(".")[0])
    model._vitlorafa = adapted  # type: ignore[assignment]
    return model


def remove(model: nn.Module) -> nn.Module:
    """Undoes `inject`: the model's own layers and weights, bit for bit, and each `requires_grad` as it was.

    Args:
        model: An adapted model, merged or not. A trained head keeps its values.

    Returns:
        The same model.

    Raises:
        AdapterError: If the model is not adapted.
    """
    unmerge(model)
    return _unload(model)


def merge(model: nn.Module) -> nn.Module:
    """Adds each update to its layer's weight, so that the model runs at its pretrained cost.

    Args:
        model: An adapted model; adapters do not train while merged.

    Returns:
        The same model.

    Raises:
        AdapterError: If the model is not adapted.
    """
    adapted_state(model)
    for _, layer in adapter_layers(model):
        layer.merge()
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Undoes `merge`, bit for bit.

    Args:
        model: An adapted model.

    Returns:
        The same model.

    Raises:
        AdapterError: If the model is not adapted.
    """
    adapted_state(model)
    for _, layer in adapter_layers(model):
        layer.unmerge()
    return model


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Adds each update to its layer's weight for good and takes the adapters out: a plain timm model again.

    Args:
        model: An adapted model.

    Returns:
        The same model, each `requires_grad` as it was before `inject`.

    Raises:
        AdapterError: If the model is not adapted.
    """
    merge(model)
    return _unload(model)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Runs the model without its adapters, also while they are merged: `with disable_adapter(model): ...`.

    Args:
        model: An adapted model.

    Yields:
        The same model.

    Raises:
        AdapterError: If the model is not adapted.
    """
    adapted_state(model)
    before = [(layer, layer.merged, layer.disabled) for _, layer in adapter_layers(model)]
    try:
        for layer, _, _ in before:
            layer.unmerge()
            layer.disabled = True
        yield model
    finally:
        for layer, merged, disabled in before:
            layer.disabled = disabled
            if merged:
                layer.merge()


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The adapted layers with their names, in the model's order; none if the model is not adapted."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def adapted_state(model: nn.Module) -> _Adapted:
    """What `inject` left on the model.

    Raises:
        AdapterError: If the model is not adapted.
    """
    state = getattr(model, "_vitlorafa", None)
    if state is None:
        raise AdapterError("the model is not adapted: inject(model, config) first")
    return state


def classifiers(model: nn.Module) -> tuple[nn.Module, ...]:
    """The classifier, or both of a distilled model; none if it has no such thing."""
    found = model.get_classifier() if hasattr(model, "get_classifier") else ()  # type: ignore[operator]
    return found if isinstance(found, tuple) else (found,)


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The classifier's parameters by their names in the model.

    Raises:
        AdapterError: If the model has no classifier.
    """
    wanted = {parameter for head in classifiers(model) for parameter in head.parameters()}
    if not wanted:
        raise AdapterError("the model has no head: create it with num_classes above 0")
    return {name: parameter for name, parameter in model.named_parameters() if parameter in wanted}


def _unload(model: nn.Module) -> nn.Module:
    adapted = adapted_state(model)
    for name, layer in list(adapter_layers(model)):
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, layer.base)
    for name in adapted.joint_bias:
        model.get_submodule(name).qkv_bias_separate = False  # type: ignore[assignment]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(adapted.requires_grad.get(name, True))  # a head replaced since is trainable
    del model._vitlorafa
    return model


def _adapt(site: Site, config: AdapterConfig, generator: torch.Generator) -> LoRALinear:
    linear = getattr(site.owner, site.attribute)
    # A subclass with a forward of its own, or a weight that is no plain parameter: quantised, parametrised.
    if (
        not isinstance(linear, nn.Linear)
        or type(linear).forward is not nn.Linear.forward
        or type(linear.weight) is not nn.Parameter
        or not linear.weight.is_floating_point()
    ):
        raise AdapterError(f"{site.name} is no plain linear layer but {type(linear).__name__}: leave it out")
    stack = STACKS.get(site.attribute, ())
    if stack and not stacks(site):
        raise AdapterError(f"{site.name} does not stack {_and(stack)} in equal parts: leave {_and(stack)} out")
    projections = tuple(name for name in site.targets if name in config.targets)
    try:
        layer = LoRALinear(linear, config, projections, stack, generator)
    except AdapterError as error:
        raise AdapterError(f"{site.name}: {error}") from None
    return layer.train(linear.training)


def _and(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
