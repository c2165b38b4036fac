"""Several adapters over one A in one model, chosen for each image of a batch."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitlorafa import trained
from vitlorafa.adapted import adapted_state, adapter_layers, classifiers, timm_model
from vitlorafa.errors import AdapterError, abbreviate
from vitlorafa.inject import check_unadapted, detach_adapters
from vitlorafa.io import load_adapter
from vitlorafa.saved import SavedAdapter, are_same, check_alike, check_same_size, read_all
from vitlorafa.stacked import Choice, StackedHead, StackedLoRALinear
from vitlorafa.wrappers import named_modules, unwrap

_REMEDY = (
    "adapters can be stacked over one A only, so train them with train='B' and one seed, or combine them with "
    "average(folders, folder, rank=...)"
)


def stack(
    model: nn.Module,
    folders: Iterable[str | os.PathLike[str]],
    *,
    head: bool | Literal["auto"] = "auto",
    prefix: str | None = None,
) -> nn.Module:
    """Loads several adapters over one A, of which each image of a batch can have its own, for inference.

    From then on, `model(images, adapter=i)` computes with adapter i for all images, `model(images, adapter=[0, 2, 1])`
    with one for each; a tensor of indices works too. -1 is the model without an adapter, with its own head. A call
    without `adapter` is an error outside `choose_adapter`. x Aᵀ and the pretrained layers are computed once for the
    whole batch; a batch of n adapters costs about as much as one.

    Nothing of the model trains afterwards, but gradients of the images are computed. `remove` restores the model.

    Args:
        model: Model without adapters, or a module that wraps or holds it, which then takes `adapter=` too.
        folders: Folders of adapters, which differ in nothing but B and the head; adapter i is the i-th of them.
        head: Whether each adapter has its own head too. "auto" means yes if all were saved and the model has one.
        prefix: Name of the timm model within `model`, if it holds several.

    Returns:
        The same model.

    Raises:
        AdapterError: If the model is adapted already, if a folder cannot be loaded onto it, or if adapters differ in
            A, rank, scale, layers, pretrained weights or the number of classes, or changed anything else, such as
            norms; also if the model has an `nn.TransformerEncoderLayer` or an `nn.MultiheadAttention` without
            `batch_first`. The model is then unchanged.

    Warns:
        AdapterWarning: Where `load_adapter` does.
    """
    inner = timm_model(model, prefix)
    check_unadapted(model, inner)
    _check_calls(inner)
    adapters = _read(folders, inner)
    head = _check_heads(inner, adapters, head)
    before = {name: tensor.detach().clone() for name, tensor in _head_tensors(inner).items()}
    factors: list[dict[str, Tensor]] = []
    heads: list[list[nn.Module]] = []
    try:
        for adapter in adapters:
            load_adapter(model, adapter.folder, head=head, prefix=prefix)
            factors.append({name: layer.lora_B.detach().clone() for name, layer in adapter_layers(inner)})
            heads.append(deepcopy(_called_heads(inner)) if head is True else [])
    except BaseException:
        if "_vitlorafa" in vars(inner):
            detach_adapters(model, inner)
        raise
    finally:
        with torch.no_grad():
            for name, tensor in _head_tensors(inner).items():
                tensor.copy_(before[name])
    _convert(model, inner, factors, heads)
    return model


@contextmanager
def choose_adapter(model: nn.Module, adapter: Any) -> Iterator[nn.Module]:
    """Context with one choice of adapters: `with choose_adapter(model, [0, 2]): model.forward_features(images)`.

    For methods other than the call of the model, and where the call is not your own. Calls with `adapter=` inside have
    their own choice. Each thread has its own, too.

    Args:
        model: Model of `stack`.
        adapter: One index for all images, or one for each, as in a call; -1 for none.

    Yields:
        The same model.

    Raises:
        AdapterError: If the model is not that of `stack`, or an index is not one of its adapters.
    """
    layers = [layer for _, layer in adapter_layers(model) if isinstance(layer, StackedLoRALinear)]
    if not layers:
        raise AdapterError("the model has no choice of adapters: call stack(model, folders) first")
    with ExitStack() as contexts:
        for choice in dict.fromkeys(layer.choice for layer in layers):
            contexts.enter_context(choice.use(adapter))
        yield model


def _read(folders: Any, inner: nn.Module) -> list[SavedAdapter]:
    """The adapters in the folders, which can be stacked."""
    adapters = read_all(folders, inner)
    if not adapters:
        raise AdapterError("folders is an empty list: stack needs at least one adapter")
    check_alike(adapters, head=False)
    for adapter in adapters:
        if others := adapter.others_of(head=False):
            raise AdapterError(
                f"{adapter.folder} also changed {abbreviate(sorted(others))}, but only B and the head may differ "
                "between stacked adapters: use load_adapter for this one"
            )
    check_same_size(adapters, "stack adapters that agree")
    _check_same_A(adapters)
    return adapters


def _check_calls(inner: nn.Module) -> None:
    """Refuses models that do not call their layers with one sample after the other."""
    for name, module in named_modules(inner):
        reads_weights = isinstance(module, nn.TransformerEncoderLayer)
        if reads_weights or (isinstance(module, nn.MultiheadAttention) and not module.batch_first):
            why = "reads the weights of its layers" if reads_weights else "has the batch in the second place"
            raise AdapterError(
                f"{name or 'the model'} is an nn.{type(module).__name__}, which {why}, so images cannot have adapters "
                "of their own: load one adapter with load_adapter"
            )


def _check_same_A(adapters: Sequence[SavedAdapter]) -> None:
    first = adapters[0]
    for adapter in adapters:
        for name, factors in adapter.layers.items():
            A, _, start_A, start_B = first.layers[name]
            if not are_same([A, factors.A]) or not are_same([start_B, factors.start_B]):
                raise AdapterError(f"{first.folder} and {adapter.folder} have different A in {name}: {_REMEDY}")
            # Without an adapter, the layer has to be the pretrained one: A·B₀ has to be A₀·B₀.
            if start_A is not None and not are_same([start_A, A]):
                raise AdapterError(f"{adapter.folder} trained A from a part of the weight in {name}: {_REMEDY}")


def _check_heads(inner: nn.Module, adapters: Sequence[SavedAdapter], head: bool | str) -> Any:
    """What `load_adapter` is told about the head: True if the adapters' heads are stacked."""
    if head is not False and trained.has_head(inner):
        _check_classes(adapters)
    if head != "auto" or not trained.has_head(inner):
        return head
    without = [str(adapter.folder) for adapter in adapters if not adapter.head]
    if without and len(without) < len(adapters):
        raise AdapterError(
            f"{abbreviate(without)} was saved without a head, others with one: save all with head=True, or stack with "
            "head=False"
        )
    return not without


def _check_classes(adapters: Sequence[SavedAdapter]) -> None:
    first = adapters[0]
    for adapter in adapters:
        for name in first.head.keys() & adapter.head.keys():
            classes = [each.head[name].shape[:1].numel() for each in (first, adapter)]
            if classes[0] != classes[1]:
                raise AdapterError(
                    f"the head of {adapter.folder} has {classes[1]} classes, but that of {first.folder} has "
                    f"{classes[0]}: stack adapters with as many classes, or with head=False"
                )


def _head_tensors(inner: nn.Module) -> dict[str, Tensor]:
    return trained.head_tensors(inner) if trained.has_head(inner) else {}


def _called_heads(inner: nn.Module) -> list[nn.Module]:
    """The classifiers, or those in them where a model such as CrossViT has a list of them, which is not called."""
    return [each for head in classifiers(inner) for each in (head if isinstance(head, nn.ModuleList) else (head,))]


def _convert(
    model: nn.Module,
    inner: nn.Module,
    factors: Sequence[Mapping[str, Tensor]],
    heads: Sequence[Sequence[nn.Module]],
) -> None:
    """Makes a model with one adapter one with several.

    Args:
        model: The timm model, or a module that holds it.
        inner: The timm model.
        factors: Factors B of each adapter by layer.
        heads: Classifiers of each adapter; none without heads.
    """
    choice, adapted = Choice(len(factors)), adapted_state(inner)
    for name, layer in adapter_layers(inner):
        StackedLoRALinear.convert(layer, [each[name] for each in factors], choice)
    modules = dict(named_modules(inner))
    places = {module: name for name, module in modules.items()}
    for own, *each in zip(_called_heads(inner), *heads, strict=True) if heads[0] else ():
        owner, _, attribute = places[unwrap(own)].rpartition(".")
        setattr(modules[owner], attribute, StackedHead(each, own, choice).train(own.training))
        adapted.stacked_heads.append(places[unwrap(own)])
    inner.requires_grad_(False)
    adapted.hooks += choice.add_hooks(unwrap(model), inner)
