"""Adapters into and out of a timm vision transformer, in place.

Layers are found by structure, not by the model's name, and only inside the repeated transformer blocks: the patch
embedding, the head and attention pools hold layers of the same names, and stay as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from vitlorafa.config import TARGETS, AdapterConfig
from vitlorafa.errors import AdapterError
from vitlorafa.layers import QKV, LoRALinear

# Attribute of an attention or MLP module -> the targets that its linear layer computes.
_ATTENTION: dict[str, tuple[str, ...]] = {
    "qkv": QKV,
    "q_proj": ("q",),
    "k_proj": ("k",),
    "v_proj": ("v",),
    "proj": ("proj",),
}
_MLP: dict[str, tuple[str, ...]] = {"fc1": ("fc1",), "fc1_g": ("fc1",), "fc1_x": ("fc1",), "fc2": ("fc2",)}


class Site(NamedTuple):
    """A linear layer of a block."""

    name: str  # within the model
    owner: nn.Module  # the attention or MLP module
    attribute: str  # of the owner
    targets: tuple[str, ...]


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
    """
    if hasattr(model, "_vitlorafa") or any(isinstance(module, LoRALinear) for module in model.modules()):
        raise AdapterError("the model is adapted already: remove(model) or merge_and_unload(model) first")
    sites = linear_sites(model)
    _check_targets(model, sites, config)
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


def linear_sites(model: nn.Module) -> list[Site]:
    """The linear layers of all transformer blocks, adapted or not, in the model's order."""
    sites = []
    for block_name, block in _blocks(model):
        attention = None
        for name, module in block.named_modules(prefix=block_name):
            if attention is not None and name.startswith(attention + "."):
                continue  # such as the MLP that computes Swin v2's position bias
            attributes: dict[str, tuple[str, ...]] = {}
            if _is_attention(module):
                attention, attributes = name, _ATTENTION
            elif _is_mlp(module):
                attributes = _MLP
            sites += [
                Site(f"{name}.{attribute}", module, attribute, targets)
                for attribute, targets in attributes.items()
                if _has(module, attribute)
            ]
    return sites


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
    fused = site.attribute == "qkv"
    if fused and not _stacks_qkv(site.owner):
        raise AdapterError(f"{site.name} does not stack q, k and v in thirds: leave q, k and v out")
    projections = tuple(name for name in site.targets if name in config.targets)
    try:
        layer = LoRALinear(linear, config, projections, fused, generator)
    except AdapterError as error:
        raise AdapterError(f"{site.name}: {error}") from None
    return layer.train(linear.training)


def _stacks_qkv(attention: nn.Module) -> bool:
    """Whether the outputs of qkv are all of q, then of k, then of v.

    Not so in GCViT's global attention (no q) and in EfficientFormer's (unequal widths); and TinyViT's and
    MaxViT's stack by head first.
    """
    by_head = getattr(attention, "head_first", False) or hasattr(attention, "key_dim")
    return not by_head and attention.qkv.out_features == 3 * attention.proj.in_features  # type: ignore


def _blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The innermost elements of a Sequential or ModuleList that hold both an attention and an MLP."""
    blocks = {
        f"{name}.{index}".lstrip("."): element
        for name, container in model.named_modules()
        if isinstance(container, (nn.Sequential, nn.ModuleList))
        for index, element in container.named_children()
        if any(map(_is_attention, element.modules())) and any(map(_is_mlp, element.modules()))
    }
    return [
        (name, block) for name, block in blocks.items() if not any(other.startswith(name + ".") for other in blocks)
    ]


def _is_attention(module: nn.Module) -> bool:
    return _has(module, "proj") and (_has(module, "qkv") or _has(module, "q_proj"))


def _is_mlp(module: nn.Module) -> bool:
    return _has(module, "fc2") and (_has(module, "fc1") or _has(module, "fc1_g"))


def _has(module: nn.Module, child: str) -> bool:
    return module._modules.get(child) is not None


def _check_targets(model: nn.Module, sites: list[Site], config: AdapterConfig) -> None:
    existing = {target for site in sites for target in site.targets}
    if not existing:
        packed = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
        why = (
            f"its attention ({packed[0]}) is a packed nn.MultiheadAttention, which cannot be adapted"
            if packed
            else "it has no transformer blocks with timm's qkv, proj, fc1 and fc2"
        )
        raise AdapterError(f"nothing to adapt in this {type(model).__name__}: {why}")
    missing = [target for target in config.targets if target not in existing]
    if missing:
        names = ", ".join(target for target in TARGETS if target in existing)
        raise AdapterError(f"this {type(model).__name__} has no {', '.join(missing)}: its targets are {names}")
