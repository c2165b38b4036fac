"""Adding adapters to a vision transformer in place, merging them, and removing them."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from vitlorafa.adapted import (
    Adapted,
    adapted_models,
    adapted_state,
    adapter_layers,
    changed_buffers,
    check_one_adapter,
    head_buffers,
    head_parameters,
    outside_parameters,
    timm_model,
    with_state,
)
from vitlorafa.config import AdapterConfig
from vitlorafa.errors import AdapterError, join_words, warn
from vitlorafa.gaps import describe_gaps
from vitlorafa.heads import find_heads
from vitlorafa.inputs import check_config, check_model
from vitlorafa.layers import FastLinear, LoRALinear
from vitlorafa.named_sites import ANY, config_sites
from vitlorafa.origin import digests
from vitlorafa.packed_attention import pack, unpack
from vitlorafa.quantised_linear import dequantise
from vitlorafa.quantised_weight import quantised_weight
from vitlorafa.sharding import is_sharded, reduces_gradients
from vitlorafa.sites import Site, check_targets, has_equal_parts, in_blocks
from vitlorafa.wrappers import named_buffers, named_modules, named_parameters, unwrap


def inject(
    model: nn.Module, config: AdapterConfig, *, train_head: bool = False, prefix: str | None = None
) -> nn.Module:
    """Adds adapters to a vision transformer in place and freezes everything else.

    Layers are found by structure in models of timm, transformers, torchvision and open_clip and in
    `nn.TransformerEncoder`; `config.targets` as a pattern, or `config.sites`, names those of any other model.

    Args:
        model: Pretrained model, or a module that holds it, such as a Lightning module or transformers' TimmWrapper; the
            whole module is frozen. Wrap it in DDP or shard it afterwards, not before.
        config: Configuration of the adapters.
        train_head: Whether the classifier stays trainable: timm's `get_classifier()`, or a linear layer that is called
            classifier, head, heads or fc.
        prefix: Name of the timm model within `model`, such as "backbone". If None, the only timm model is adapted; if
            there are several, all layers in `model` are.

    Returns:
        The same model. Its modules stay in training or evaluation mode.

    Raises:
        AdapterError: If the model is already adapted or sharded, has no layers to adapt or lacks a target or a block,
            if a target is neither a plain nor a quantised linear layer, or if the rank exceeds a layer's width. The
            model is then unchanged.

    Warns:
        AdapterWarning: If some blocks lack a target or have linear layers but no attention, if targets are "all" but
            much of the model is convolutions, or if the model is wrapped in DDP.
    """
    check_model(model)
    check_config(config)
    inner = timm_model(model, prefix)
    check_unadapted(model, inner)
    every = config_sites(inner, config)
    check_targets(inner, every, ())
    sites = in_blocks(inner, every, config.blocks)
    check_targets(inner, sites, () if config.pattern else config.targets)
    if not (config.pattern or config.sites) and (left_out := describe_gaps(inner, config, find_heads(inner))):
        warn(left_out)
    layers = {site.name: config.chosen(site.targets) for site in sites}
    return inject_layers(model, inner, config, layers, train_head=train_head)


def inject_layers(
    model: nn.Module,
    inner: nn.Module,
    config: AdapterConfig,
    layers: Mapping[str, Collection[str]],
    *,
    train_head: bool = False,
    blank: bool = False,
    kept: Mapping[str, LoRALinear] | None = None,
) -> nn.Module:
    """`inject` for named layers, such as those in a file, instead of all layers of the config's targets.

    Args:
        model: The timm model, or a module that holds it.
        inner: The timm model.
        config: Configuration of the adapters.
        layers: Targets by layer name; layers that the model does not have are ignored.
        train_head: Whether the classifier stays trainable.
        blank: Whether factors are zeros, which a file's are loaded over, instead of the config's initialisation.
        kept: Adapted layers by name of an adapter that was taken out of the model; new ones if None.
    """
    check_unadapted(model, inner)
    root, sites = unwrap(model), config_sites(inner, config)
    check_targets(inner, sites, ())
    sites = [site for site in sites if set(site.targets) & set(layers.get(site.name, ()))]
    head = set(head_parameters(inner).values()) if train_head else set()
    generator = config.generator() if kept is None else torch.Generator()
    if kept is None:
        adapters = [_adapt(site, config, layers[site.name], generator, blank) for site in sites]
    else:
        adapters = [kept[site.name].put_on(site.layer) for site in sites]

    if reduces_gradients(model):
        warn(
            "DistributedDataParallel does not reduce the gradients of adapters that are added after wrapping: "
            "to train, inject first, then wrap"
        )
    adapted = Adapted(
        config,
        {name: p.requires_grad for name, p in named_parameters(inner)},
        {name: buffer.detach().clone() for name, buffer in named_buffers(inner)},
        digests(inner, [site.name for site in sites]),
        originals={name: p.detach().clone() for name, p in named_parameters(inner) if p in head},
        seed=None if blank or kept else generator.initial_seed(),
    )
    outside = outside_parameters(root, inner)
    if outside:
        before = {name: p.requires_grad for name, p in outside.items()}
        root._vitlorafa_outside = before | vars(root).get("_vitlorafa_outside", {})
    for parameter in [*inner.parameters(), *outside.values()]:
        parameter.requires_grad_(parameter in head)
    for site, layer in zip(sites, adapters, strict=True):
        unpack(site.owner)
        setattr(site.owner, site.attribute, layer)
        # BEiT, EVA and Swin v2 read qkv's weight instead of calling the layer, unless they add the bias separately.
        if site.attribute == "qkv" and getattr(site.owner, "qkv_bias_separate", True) is False:
            site.owner.qkv_bias_separate = True  # type: ignore[assignment]
            adapted.joint_bias.append(site.name.rpartition(".")[0])
    inner._vitlorafa = adapted  # type: ignore[assignment]
    return model


def remove(model: nn.Module) -> nn.Module:
    """Undoes `inject`: restores the original layers, their exact weights, and each `requires_grad`.

    Buffers that changed in training, such as the running statistics of a frozen BatchNorm, are restored too, unless
    `load_state_dict` loaded other pretrained weights. Other trained parts, such as the head or unfrozen norms, keep
    their values and statistics.

    Args:
        model: Adapted model, merged or not.

    Returns:
        The same model.

    Raises:
        AdapterError: If the model is not adapted.
    """
    unmerge(model)
    for inner in adapted_models(model):
        _restore_buffers(inner)
        detach_adapters(model, inner)
    return model


def merge(model: nn.Module) -> nn.Module:
    """Adds each update to the weight of its layer, so that inference costs no more than with the pretrained model.

    Args:
        model: Adapted model; its adapters do not train while they are merged.

    Returns:
        The same model.

    Raises:
        AdapterError: If the model is not adapted, has several adapters, or is sharded.
    """
    _check_switchable(model)
    for inner in adapted_models(model):
        check_one_adapter(inner)
    if is_sharded(model):
        raise AdapterError("the model is sharded: save the adapter, then load and merge it in an unsharded model")
    for _, layer in adapter_layers(model):
        layer.merge()
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Undoes `merge` and restores the exact pretrained weights.

    Args:
        model: Adapted model.

    Returns:
        The same model.

    Raises:
        AdapterError: If the model is not adapted.
    """
    _check_switchable(model)
    for _, layer in adapter_layers(model):
        layer.unmerge()
    return model


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Adds each update to the weight of its layer permanently and removes the adapters: a plain timm model again.

    Quantised layers become linear layers with dequantised weights, to which updates are added. They are not quantised
    again, which would round updates away.

    Args:
        model: Adapted model.

    Returns:
        The same model, with each `requires_grad` as before `inject`.

    Raises:
        AdapterError: If the model is not adapted.
    """
    merge(model)
    for inner in adapted_models(model):
        detach_adapters(model, inner)
        pack(dequantise(inner))
    return model


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Context in which the model runs without its adapters, merged or not: `with disable_adapter(model): ...`.

    Args:
        model: Adapted model.

    Yields:
        The same model.

    Raises:
        AdapterError: If the model is not adapted.
    """
    adapted_models(model)
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


def _restore_buffers(inner: nn.Module) -> None:
    """Restores buffers to their values before `inject`, except those of modules that trained."""
    if any(layer.reloaded for _, layer in adapter_layers(inner)):
        return
    modules = dict(named_modules(inner))
    heads = head_buffers(inner)
    with torch.no_grad():
        for name, buffer in changed_buffers(inner).items():
            owner = modules[name.rpartition(".")[0]]
            trained = name in heads or any(p.requires_grad for p in owner.parameters(recurse=False))
            before = adapted_state(inner).buffers.get(name)
            if not trained and before is not None and before.shape == buffer.shape:
                buffer.copy_(before)


def _check_switchable(model: nn.Module) -> None:
    """Raises while adapters are disabled: merging or removing them would then leave wrong weights."""
    for inner in adapted_models(model):
        if any(layer.disabled for _, layer in adapter_layers(inner)):
            raise AdapterError("the adapters are disabled: leave disable_adapter(model) first")


def detach_adapters(model: nn.Module, inner: nn.Module) -> None:
    """Removes the adapters from a timm model without merging or unmerging them first.

    Args:
        model: The timm model, or a module that holds it.
        inner: The timm model.
    """
    adapted = adapted_state(inner)
    modules = dict(named_modules(inner))
    for name, layer in list(adapter_layers(inner)):
        owner, _, attribute = name.rpartition(".")
        setattr(modules[owner], attribute, layer.without_adapter())
    for name in adapted.stacked_heads:
        owner, _, attribute = name.rpartition(".")
        setattr(modules[owner], attribute, modules[name].own)
    for handle in adapted.hooks:
        handle.remove()
    for name in adapted.joint_bias:
        modules[name].qkv_bias_separate = False  # type: ignore[assignment]
    pack(inner)
    for name, parameter in named_parameters(inner):
        # A part that was replaced since, such as a head or a quantised weight, keeps what it has.
        parameter.requires_grad_(adapted.requires_grad.get(name, parameter.requires_grad))
    del inner._vitlorafa
    root = unwrap(model)
    if "_vitlorafa_outside" in vars(root) and not with_state(root):
        outside: dict[str, bool] = root._vitlorafa_outside  # type: ignore[assignment]
        for name, parameter in named_parameters(root):
            parameter.requires_grad_(outside.get(name, parameter.requires_grad))
        del root._vitlorafa_outside


def check_unadapted(model: nn.Module, inner: nn.Module) -> None:
    """Checks that adapters can be added to a model.

    Args:
        model: The timm model, or a module that holds it.
        inner: The timm model.

    Raises:
        AdapterError: If it is adapted or sharded.
    """
    if any(isinstance(module, LoRALinear) for module in inner.modules()):
        raise AdapterError(
            "the model is already adapted: call remove(model) or merge_and_unload(model) first, or add_adapter for a "
            "second adapter beside it"
        )
    if is_sharded(model):
        raise AdapterError("the model is sharded: call inject or load_adapter before fully_shard or FSDP")


def _adapt(
    site: Site, config: AdapterConfig, targets: Collection[str], generator: torch.Generator, blank: bool
) -> LoRALinear:
    linear, remedy = site.layer, f"leave {join_words(site.targets)} out"
    if ANY in site.targets:
        remedy = "choose a pattern that leaves it out"
    if not _is_plain(linear) and quantised_weight(linear) is None:
        raise AdapterError(f"{site.name} is a {type(linear).__name__}, not a plain linear layer: {remedy}")
    stack = site.targets if len(site.targets) > 1 else ()
    if stack and not has_equal_parts(site):
        raise AdapterError(f"{site.name} does not stack {join_words(stack)} in equal parts: {remedy}")
    projections = tuple(name for name in site.targets if name in targets)
    try:
        layer = LoRALinear(linear, config, projections, stack, generator, blank)
    except AdapterError as error:
        raise AdapterError(f"{site.name}: {error}") from None
    return layer.train(linear.training)


def _is_plain(linear: nn.Module) -> bool:
    """Whether it is torch's linear layer or a `FastLinear`, with a weight that is not parametrised."""
    return (
        isinstance(linear, nn.Linear)
        and type(linear).forward in (nn.Linear.forward, FastLinear.forward)
        and type(linear.weight) is nn.Parameter
        and linear.weight.is_floating_point()
    )
