"""Several adapters on one model, by name, with the meaning that they have in PEFT: one of them is active.

The active adapter is in the model, and all functions of the package are about it. The others are kept beside the model,
outside of its parameters and its state dict, and take no time in a forward pass. An adapter has its own config, layers
and factors, its own head if that trains with it, and whatever else trained or was loaded with it. What is in the model
before the first adapter is the start of each.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from vitlorafa.adapted import (
    adapted_state,
    adapter_layers,
    changed_buffers,
    check_one_adapter,
    outside_parameters,
    timm_model,
)
from vitlorafa.config import AdapterConfig
from vitlorafa.errors import AdapterError, abbreviate, unknown, warn
from vitlorafa.inject import detach_adapters, inject, inject_layers
from vitlorafa.layers import LoRALinear
from vitlorafa.sharding import is_sharded
from vitlorafa.trained import factors, state_tensors
from vitlorafa.wrappers import named_modules, named_parameters, unwrap


@dataclass
class _Kept:
    """An adapter that is not active.

    Attributes:
        config: Configuration.
        layers: Adapted layers by name, without their bases.
        others: Parameters and buffers that belong to the adapter beside its factors, such as its head, by name.
        seed: Seed that the factors were drawn from, if it is known.
    """

    config: AdapterConfig
    layers: dict[str, LoRALinear]
    others: dict[str, Tensor]
    seed: int | None


def add_adapter(
    model: nn.Module, name: str, config: AdapterConfig, *, train_head: bool = False, prefix: str | None = None
) -> nn.Module:
    """Adds an adapter of a name. It is not active before `set_adapter`, unless it is the model's first.

    All adapters start from the pretrained model, whatever was trained before: with `train_head`, the new head has the
    values that the head had before the first adapter.

    Args:
        model: Model, adapted or not, or a module that wraps or holds it.
        name: Name of the adapter. That of `inject` is "default".
        config: Configuration of the adapter; other adapters may have other ones.
        train_head: Whether the classifier trains with this adapter, which then has its own.
        prefix: Name of the timm model within `model`, if it holds several.

    Returns:
        The same model.

    Raises:
        AdapterError: If the model has an adapter of this name, or where `inject` and `set_adapter` raise one. The model
            is then unchanged.
    """
    inner = timm_model(model, prefix)
    _check_name(name)
    if name in _names(inner):
        raise AdapterError(f"the model has an adapter {name!r} already: choose another name, or delete_adapter first")
    with using_adapter(model, inner, name):
        inject(model, config, train_head=train_head, prefix=prefix)
    return model


def set_adapter(model: nn.Module, name: str, *, prefix: str | None = None) -> nn.Module:
    """Makes an adapter the active one: it computes, trains, and is merged and saved.

    A merged model stays merged, with the update of the other adapter. Parameters are the same objects whenever their
    adapter is active, so each adapter can keep its optimizer.

    Args:
        model: Adapted model, or a module that wraps or holds it.
        name: Name of the adapter.
        prefix: Name of the timm model within `model`, if it holds several.

    Returns:
        The same model.

    Raises:
        AdapterError: If there is no adapter of this name, if the model is sharded, if adapters are disabled or stacked,
            or if parameters beside factors and head train whose values before training are not known. The model is
            then unchanged.
    """
    inner = timm_model(model, prefix)
    adapters = _adapters_with(inner, name)
    if adapters[name] is not None:
        before, merged = active_adapter(inner), _is_merged(inner)
        with _same_outside(model, inner):
            adapters[before] = _take_out(model, inner)
            _put_in(model, inner, adapters, name, merged)
    return model


def delete_adapter(model: nn.Module, name: str, *, prefix: str | None = None) -> nn.Module:
    """Deletes an adapter with its head. If it was active, the first of the others becomes active.

    Deleting the last adapter restores the model as it was before the first one; `remove`, which does so whatever the
    number of adapters, keeps the trained head.

    Args:
        model: Adapted model, or a module that wraps or holds it.
        name: Name of the adapter.
        prefix: Name of the timm model within `model`, if it holds several.

    Returns:
        The same model.

    Raises:
        AdapterError: If there is no adapter of this name, or where `set_adapter` raises one.

    Warns:
        AdapterWarning: If the adapter was active and another one is now.
    """
    inner = timm_model(model, prefix)
    adapters = _adapters_with(inner, name)
    others = [each for each in adapters if each != name]
    if not others:
        _take_out(model, inner)
    elif adapters[name] is None:
        set_adapter(model, others[0], prefix=prefix)
        warn(f"adapter {name!r} was active and is deleted: {others[0]!r} is active now")
    del adapters[name]
    return model


def list_adapters(model: nn.Module, *, prefix: str | None = None) -> list[str]:
    """The names of a model's adapters, in the order in which they were added; none if it is not adapted.

    Args:
        model: Model, or a module that wraps or holds it.
        prefix: Name of the timm model within `model`, if it holds several.
    """
    return list(_names(timm_model(model, prefix)))


def active_adapter(model: nn.Module, *, prefix: str | None = None) -> str:
    """The name of the active adapter; "default" if it came from `inject`.

    Args:
        model: Adapted model, or a module that wraps or holds it.
        prefix: Name of the timm model within `model`, if it holds several.

    Raises:
        AdapterError: If the model is not adapted.
    """
    adapters = adapted_state(timm_model(model, prefix)).adapters
    return next(name for name, kept in adapters.items() if kept is None)


def inactive_parameters(inner: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of the adapters that are not active, their heads included.

    Args:
        inner: The timm model, adapted or not.
    """
    for kept in _names(inner).values():
        for layer in kept.layers.values() if kept else ():
            yield from layer.parameters()
        yield from (tensor for tensor in (kept.others.values() if kept else ()) if isinstance(tensor, nn.Parameter))


@contextmanager
def using_adapter(model: nn.Module, inner: nn.Module, name: str | None) -> Iterator[None]:
    """Context in which an adapter is active, or in which the model has none, so that one can be added.

    Args:
        model: The timm model, or a module that holds it.
        inner: The timm model.
        name: Name of the adapter, which the one that is added gets. If None, the active one stays.

    Raises:
        AdapterError: If the active adapter cannot be taken out of the model, or the name is not a string.
    """
    if name is not None:
        _check_name(name)
    adapters = _names(inner)
    if name is None or (name in adapters and adapters[name] is None):
        yield
        return
    if not adapters:
        yield
        adapted_state(inner).adapters = {name: None}
        return
    before, merged = active_adapter(inner), _is_merged(inner)
    with _same_outside(model, inner):
        adapters[before] = _take_out(model, inner)
        if name in adapters:
            _put_in(model, inner, adapters, name)
        try:
            yield
        finally:
            if "_vitlorafa" in vars(inner):  # it is not if nothing could be added
                adapters[name] = _take_out(model, inner)
            _put_in(model, inner, adapters, before, merged)


def _check_name(name: object) -> None:
    if not (isinstance(name, str) and name):
        raise AdapterError(f"the name of an adapter must be a string with letters, such as 'sketch', not {name!r}")


def _names(inner: nn.Module) -> dict[str, _Kept | None]:
    return adapted_state(inner).adapters if "_vitlorafa" in vars(inner) else {}


def _adapters_with(inner: nn.Module, name: str) -> dict[str, _Kept | None]:
    """All adapters, of which one has to have this name."""
    adapters: dict[str, _Kept | None] = adapted_state(inner).adapters
    if name not in adapters:
        raise unknown("adapter", name, adapters)
    return adapters


def _is_merged(inner: nn.Module) -> bool:
    return any(layer.merged for _, layer in adapter_layers(inner))


def _take_out(model: nn.Module, inner: nn.Module) -> _Kept:
    """Takes the active adapter out of the model, which is then the one before the first adapter."""
    check_one_adapter(inner)
    if is_sharded(model):
        raise AdapterError("the model is sharded: add and choose adapters before fully_shard or FSDP")
    adapted, layers = adapted_state(inner), dict(adapter_layers(inner))
    if any(layer.disabled for layer in layers.values()):
        raise AdapterError("the adapters are disabled: leave disable_adapter(model) first")
    others = _others(inner)
    originals = adapted.buffers | adapted.originals
    if lost := [name for name in others if name not in originals]:
        raise AdapterError(
            f"{abbreviate(lost)} trains beside adapter {active_adapter(inner)!r}, and its value before training is not "
            "known: let the head train by train_head=True, and load adapters that trained other parts by "
            "load_adapter(..., adapter=name)"
        )
    for layer in layers.values():
        layer.unmerge()
    for name, tensor in others.items():
        original = originals[name].to(tensor.device, tensor.dtype, copy=True)
        is_parameter = isinstance(tensor, nn.Parameter)
        _replace(inner, name, nn.Parameter(original, requires_grad=False) if is_parameter else original)
    detach_adapters(model, inner)
    for layer in layers.values():
        layer.take_off()
    return _Kept(adapted.config, layers, others, adapted.seed)


def _put_in(
    model: nn.Module, inner: nn.Module, adapters: dict[str, _Kept | None], name: str, merged: bool = False
) -> None:
    """Makes an adapter the active one of a model without adapters."""
    kept = adapters[name]
    assert kept is not None
    layers = {layer: kept.layers[layer].projections for layer in kept.layers}
    inject_layers(model, inner, kept.config, layers, kept=kept.layers)
    adapted, here = adapted_state(inner), state_tensors(inner)
    adapted.originals = {each: here[each] for each in kept.others if each not in adapted.buffers}
    for each, tensor in kept.others.items():
        tensor.data = tensor.data.to(here[each].device, here[each].dtype)
        _replace(inner, each, tensor)
    adapted.seed = kept.seed
    adapters[name] = None
    adapted.adapters = adapters
    if merged:
        for _, layer in adapter_layers(inner):
            layer.merge()


def _others(inner: nn.Module) -> dict[str, Tensor]:
    """What belongs to the active adapter beside its factors, by name."""
    names = [name for name, parameter in named_parameters(inner) if parameter.requires_grad]
    names += [*changed_buffers(inner), *adapted_state(inner).originals]
    tensors, own = state_tensors(inner), factors(inner)
    return {name: tensors[name] for name in dict.fromkeys(names) if name in tensors and name not in own}


def _replace(inner: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts another parameter or buffer in the place of one."""
    owner, _, attribute = name.rpartition(".")
    module = dict(named_modules(inner))[owner]
    places = module._parameters if isinstance(tensor, nn.Parameter) else module._buffers
    places[attribute] = tensor  # type: ignore[assignment]


@contextmanager
def _same_outside(model: nn.Module, inner: nn.Module) -> Iterator[None]:
    """Context after which the parameters around the timm model train as before: all adapters share them."""
    flags = {parameter: parameter.requires_grad for parameter in outside_parameters(unwrap(model), inner).values()}
    yield
    for parameter, requires_grad in flags.items():
        parameter.requires_grad_(requires_grad)
