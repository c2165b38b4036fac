"""Adapters into and out of a timm vision transformer, in place."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vitlorafa.config import AdapterConfig
from vitlorafa.errors import AdapterError, warn
from vitlorafa.layers import STACKS, LoRALinear
from vitlorafa.origin import digests
from vitlorafa.sharding import is_sharded, reduces_gradients
from vitlorafa.sites import Site, check_targets, gaps, linear_sites, stacks
from vitlorafa.wrappers import join, named_buffers, named_modules, named_parameters, plain_name, unwrap


@dataclass
class _Adapted:
    """What an adapted model remembers, as its attribute `_vitlorafa`, in names so that it can be copied."""

    config: AdapterConfig
    requires_grad: dict[str, bool]  # of each parameter, before
    buffers: dict[str, Tensor] = field(default_factory=dict)  # of a state dict, before
    digests: dict[str, str] = field(default_factory=dict)  # of the pretrained weights, see `vitlorafa.origin`
    joint_bias: list[str] = field(default_factory=list)  # attentions that computed qkv and its bias in one


def inject(
    model: nn.Module, config: AdapterConfig, *, train_head: bool = False, prefix: str | None = None
) -> nn.Module:
    """Adapts a timm vision transformer in place and freezes everything else.

    Args:
        model: The pretrained model, or a module that holds it, such as a Lightning module or transformers'
            TimmWrapper; all of that is frozen. Wrap it in DDP or shard it after, not before.
        config: What to adapt, and how.
        train_head: Whether the classifier, timm's `get_classifier()`, stays trainable.
        prefix: Name of the timm model within `model`, such as "backbone". If None, it is the only one there is; where
            there are several, all are adapted as one.

    Returns:
        The same model. The modes of its modules (`train`, `eval`) are as before.

    Raises:
        AdapterError: If the model is adapted already, is sharded, has nothing to adapt or no such target, has a
            target that is not a plain linear layer, or is narrower than the rank. The model is then as before.

    Warns:
        AdapterWarning: If some blocks have no such target, or hold linear layers but no attention, or if the model is
            wrapped in DDP.
    """
    inner = timm_model(model, prefix)
    _check_unadapted(model, inner)
    sites = linear_sites(inner)
    check_targets(inner, sites, config.targets)
    if left_out := gaps(inner, sites, config.targets, classifiers(inner)):
        warn(left_out)
    return inject_layers(model, inner, config, {site.name: config.targets for site in sites}, train_head=train_head)


def inject_layers(
    model: nn.Module,
    inner: nn.Module,
    config: AdapterConfig,
    layers: Mapping[str, Collection[str]],
    *,
    train_head: bool = False,
) -> nn.Module:
    """`inject` for layers that are named, such as those that a file holds, whatever else the config's targets are.

    Args:
        model: The timm model, or what holds it.
        inner: The timm model.
        config: How to adapt.
        layers: Targets by the layer's name. Passed over is what the model does not have.
        train_head: Whether the classifier stays trainable.
    """
    _check_unadapted(model, inner)
    root, sites = unwrap(model), linear_sites(inner)
    check_targets(inner, sites, ())
    sites = [site for site in sites if set(site.targets) & set(layers.get(site.name, ()))]
    head = set(head_parameters(inner).values()) if train_head else set()
    generator = config.generator()
    adapters = [_adapt(site, config, layers[site.name], generator) for site in sites]

    if reduces_gradients(model):
        warn(
            "DistributedDataParallel reduces the gradients of the parameters that it found, not of adapters put in "
            "since: to train, inject first and wrap then"
        )
    adapted = _Adapted(
        config,
        {name: p.requires_grad for name, p in named_parameters(inner)},
        {name: buffer.detach().clone() for name, buffer in named_buffers(inner)},
        digests(inner, [site.name for site in sites]),
    )
    outside = outside_parameters(root, inner)
    if outside:
        before = {name: p.requires_grad for name, p in outside.items()}
        root._vitlorafa_outside = before | vars(root).get("_vitlorafa_outside", {})
    for parameter in [*inner.parameters(), *outside.values()]:
        parameter.requires_grad_(parameter in head)
    for site, layer in zip(sites, adapters, strict=True):
        setattr(site.owner, site.attribute, layer)
        # BEiT, EVA and Swin v2 read qkv's weight instead of calling it, unless told to add the bias apart.
        if site.attribute == "qkv" and getattr(site.owner, "qkv_bias_separate", True) is False:
            site.owner.qkv_bias_separate = True  # type: ignore[assignment]
            adapted.joint_bias.append(site.name.rpartition(".")[0])
    inner._vitlorafa = adapted  # type: ignore[assignment]
    return model


def remove(model: nn.Module) -> nn.Module:
    """Undoes `inject`: the model's own layers and weights, bit for bit, and each `requires_grad` as it was.

    Buffers that training changed, such as the running statistics of a frozen BatchNorm, are as before too, unless
    `load_state_dict` brought other pretrained weights. What trained beside the adapters, such as the head or norms that
    were unfrozen, keeps its values and its statistics.

    Args:
        model: An adapted model, merged or not.

    Returns:
        The same model.

    Raises:
        AdapterError: If the model is not adapted.
    """
    unmerge(model)
    for inner in _adapted_models(model):
        _restore_buffers(inner)
        take_out(model, inner)
    return model


def merge(model: nn.Module) -> nn.Module:
    """Adds each update to its layer's weight, so that the model runs at its pretrained cost.

    Args:
        model: An adapted model; adapters do not train while merged.

    Returns:
        The same model.

    Raises:
        AdapterError: If the model is not adapted, or is sharded.
    """
    _check_switchable(model)
    if is_sharded(model):
        raise AdapterError("the model is sharded: save the adapter, and load and merge it in a model that is whole")
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
    _check_switchable(model)
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
    for inner in _adapted_models(model):
        take_out(model, inner)
    return model


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
    _adapted_models(model)
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
    for name, module in named_modules(model):
        if isinstance(module, LoRALinear):
            yield name, module


def adapted_state(model: nn.Module) -> _Adapted:
    """What `inject` left on the model, or on the one inside of it.

    Raises:
        AdapterError: If the model is not adapted, or several inside of it are.
    """
    inner, *others = _adapted_models(model)
    if others:
        raise _several(model, "adapted models", [inner, *others])
    return inner._vitlorafa  # type: ignore[return-value]


def timm_model(model: nn.Module, prefix: str | None = None) -> nn.Module:
    """The model that is adapted, or to be adapted, inside of whatever wraps or holds it.

    Args:
        model: A timm model, or a module that holds it.
        prefix: Its name within `model`. If None, it is the adapted one, or the timm model; where there is none, or are
            several, it is all of `model`.

    Raises:
        AdapterError: If there is no module of that name, or several models are adapted.
    """
    modules = dict(named_modules(model))
    if prefix is not None:
        if plain_name(prefix) not in modules:
            parts = ", ".join(name for name, _ in modules[""].named_children())
            raise AdapterError(f"there is no {prefix!r} in this {type(modules['']).__name__}, which holds {parts}")
        return timm_model(modules[plain_name(prefix)])
    adapted = [module for module in modules.values() if "_vitlorafa" in vars(module)]
    if len(adapted) > 1:
        raise _several(model, "adapted models", adapted)
    found = adapted or _timm_models(model)
    return found[0] if len(found) == 1 else modules[""]


def outside_parameters(model: nn.Module, inner: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module, by name, that are neither in this model inside of it nor in another adapted one."""
    theirs = {parameter for inside in (inner, *_with_state(model)) for parameter in inside.parameters()}
    return {name: parameter for name, parameter in named_parameters(model) if parameter not in theirs}


def classifiers(model: nn.Module) -> tuple[nn.Module, ...]:
    """The classifier, or all of a model of several, such as a distilled one or VOLO; none if it has no such thing."""
    inner = timm_model(model)
    found = inner.get_classifier() if hasattr(inner, "get_classifier") else ()  # type: ignore[operator]
    heads = [head for head in (found if isinstance(found, tuple) else (found,)) if head is not None]
    within = {module for head in heads for module in head.modules()}
    # VOLO's auxiliary head, whose logits are added, is not among what it gives, but in its config.
    named = (getattr(inner, "pretrained_cfg", None) or {}).get("classifier") or ()
    named = (named,) if isinstance(named, str) else named
    heads += [module for name, module in named_modules(inner) if name in named and module not in within]
    return tuple(heads)


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The classifier's parameters by their names in the timm model.

    Raises:
        AdapterError: If the model has no classifier.
    """
    wanted = {parameter for head in classifiers(model) for parameter in head.parameters()}
    if not wanted:
        models = _timm_models(model)
        if len(models) > 1:
            raise _several(model, "timm models", models)
        raise AdapterError("the model has no head: create it with num_classes above 0")
    return {name: parameter for name, parameter in named_parameters(timm_model(model)) if parameter in wanted}


def head_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The classifier's buffers, such as a BatchNorm's statistics, by their names in the timm model."""
    wanted = {buffer for head in classifiers(model) for buffer in head.buffers()}
    return {name: buffer for name, buffer in named_buffers(timm_model(model)) if buffer in wanted}


def changed_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of an adapted model, by name, that have not the values that they had before `inject`."""
    before = adapted_state(model).buffers
    return {
        name: buffer
        for name, buffer in named_buffers(timm_model(model))
        if name not in before or not _is_same(before[name], buffer)
    }


def _is_same(before: Tensor, now: Tensor) -> bool:
    if before.shape != now.shape or before.is_meta or now.is_meta:
        return before.shape == now.shape
    return torch.equal(before.to(now.device, now.dtype), now)


def _restore_buffers(inner: nn.Module) -> None:
    """Buffers as they were before `inject`, but for those of modules that trained."""
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


def _with_state(model: nn.Module) -> list[nn.Module]:
    return [module for _, module in named_modules(model) if "_vitlorafa" in vars(module)]


def _adapted_models(model: nn.Module) -> list[nn.Module]:
    found = _with_state(model)
    if not found:
        raise AdapterError("the model is not adapted: inject(model, config) first")
    return found


def _timm_models(model: nn.Module) -> list[nn.Module]:
    """The timm models in a module, without those inside of others."""
    found: dict[str, nn.Module] = {}
    for name, module in named_modules(model):
        if hasattr(module, "get_classifier") and not any(name.startswith(join(outer, "")) for outer in found):
            found[name] = module
    return list(found.values())


def _several(model: nn.Module, what: str, found: list[nn.Module]) -> AdapterError:
    names = ", ".join(name for name, module in named_modules(model) if module in found)
    return AdapterError(f"this {type(unwrap(model)).__name__} holds several {what} ({names}): say which by prefix=")


def _check_switchable(model: nn.Module) -> None:
    """That adapters can be merged or taken out: not while they are disabled, for that would end in other weights."""
    for inner in _adapted_models(model):
        if any(layer.disabled for _, layer in adapter_layers(inner)):
            raise AdapterError("the adapters are disabled: leave disable_adapter(model) first")


def take_out(model: nn.Module, inner: nn.Module) -> None:
    """Takes the adapters out of a model inside of another, as they are, merged or not."""
    adapted = adapted_state(inner)
    modules = dict(named_modules(inner))
    for name, layer in list(adapter_layers(inner)):
        owner, _, attribute = name.rpartition(".")
        setattr(modules[owner], attribute, layer.base)
    for name in adapted.joint_bias:
        modules[name].qkv_bias_separate = False  # type: ignore[assignment]
    for name, parameter in named_parameters(inner):
        parameter.requires_grad_(adapted.requires_grad.get(name, True))  # a head replaced since is trainable
    del inner._vitlorafa
    root = unwrap(model)
    if "_vitlorafa_outside" in vars(root) and not _with_state(root):
        outside: dict[str, bool] = root._vitlorafa_outside  # type: ignore[assignment]
        for name, parameter in named_parameters(root):
            parameter.requires_grad_(outside.get(name, parameter.requires_grad))
        del root._vitlorafa_outside


def _check_unadapted(model: nn.Module, inner: nn.Module) -> None:
    if any(isinstance(module, LoRALinear) for module in inner.modules()):
        raise AdapterError("the model is adapted already: remove(model) or merge_and_unload(model) first")
    if is_sharded(model):
        raise AdapterError("the model is sharded: inject, or load_adapter, before fully_shard or FSDP")


def _adapt(site: Site, config: AdapterConfig, targets: Collection[str], generator: torch.Generator) -> LoRALinear:
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
    projections = tuple(name for name in site.targets if name in targets)
    try:
        layer = LoRALinear(linear, config, projections, stack, generator)
    except AdapterError as error:
        raise AdapterError(f"{site.name}: {error}") from None
    return layer.train(linear.training)


def _and(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
