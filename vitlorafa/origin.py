"""The model that an adapter was trained on: its pretrained weights, input and class names.

Weights are compared by a digest of the linear layers in the adapted part of the model, such as `blocks`: about 4,096
evenly spaced values of each layer, which takes milliseconds. Embeddings and head depend on image size and classes, so
they do not count. There are digests of the values in float32, in bfloat16 and in float16, where one rounding of the
weights gives them. So a model in half precision has one digest in common with the float32 model that it was rounded
from. A model that `vitlorafa.quantise` quantised keeps the digests of its weights before; one that another package
quantised has none.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitlorafa.errors import abbreviate
from vitlorafa.layers import LoRALinear
from vitlorafa.packed_attention import INPUT, is_packed
from vitlorafa.quantised_weight import quantised_weight
from vitlorafa.sharding import gather
from vitlorafa.wrappers import join, named_modules

_VALUES = 4096
_BEFORE = "_vitlorafa_digests"  # attribute of a quantised model
_EXACT = (torch.float64, torch.float32)
_ROUNDED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_INPUT = ("mean", "std", "input_size", "interpolation")


def digests(model: nn.Module, layers: Collection[str]) -> dict[str, str]:
    """Digests of the pretrained weights by the format that they are rounded to; empty for a model without values.

    Args:
        model: The timm model, adapted or not.
        layers: Names of the layers that are or will be adapted.
    """
    if any(quantised_weight(module) is not None for module in model.modules()):
        return dict(vars(model).get(_BEFORE, {}))
    parts = {name.partition(".")[0] for name in layers}
    weights = {name: weight for name, weight in _weights(model) if name.partition(".")[0] in parts}
    if not weights or any(weight.is_meta for weight in weights.values()):
        return {}
    sums = {
        name: hashlib.blake2b(digest_size=16)
        for name, rounded in _ROUNDED.items()
        if all(weight.dtype in (*_EXACT, rounded) for weight in weights.values())
    }
    for name, weight in weights.items() if sums else ():
        values = gather(weight).reshape(-1)
        values = values[:: max(1, len(values) // _VALUES)].cpu().contiguous()
        for rounded, content in sums.items():
            content.update(f"{name} {tuple(weight.shape)}".encode())
            content.update(values.to(_ROUNDED[rounded]).view(torch.uint8).numpy().data)
    return {name: content.hexdigest() for name, content in sums.items()}


def remember_digests(model: nn.Module, layers: Collection[str]) -> None:
    """Stores the digests in the model before its weights are quantised.

    Args:
        model: The timm model, adapted or not.
        layers: Names of the layers that are or will be adapted.
    """
    setattr(model, _BEFORE, digests(model, layers))


def describe_model(model: nn.Module, class_names: Sequence[str] | None = None) -> dict[str, Any]:
    """A model's architecture, pretrained tag, input and class names as JSON values, from timm's `pretrained_cfg`.

    Args:
        model: The timm model. If its images are not normalised as timm would, its `pretrained_cfg` has to say so.
        class_names: Names in the order of the logits; if None, those in `pretrained_cfg["label_names"]`.
    """
    cfg = _cfg(model)
    # transformers' models have a config with the name that they were loaded by.
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    values = {**cfg, **({"input_size": (*cfg.get("input_size", (3,))[:1], *size)} if size else {})}
    names = cfg.get("label_names") if class_names is None else class_names
    return {
        "architecture": cfg.get("architecture") or (name if isinstance(name, str) else None) or None,
        "tag": cfg.get("tag") or None,
        "input": {name: _to_list(values[name]) for name in _INPUT if values.get(name) is not None},
        "class_names": None if names is None else list(names),
    }


def mismatches(saved: Mapping[str, Any], model: nn.Module, own_digests: Mapping[str, str], head: bool) -> Iterator[str]:
    """Sentences about the differences between a model and the one that an adapter was trained on.

    Args:
        saved: Description of the adapter; entries that older versions did not write are not compared.
        model: The timm model that the adapter is loaded onto.
        own_digests: Digests of the model's pretrained weights.
        head: Whether the head is loaded too.
    """
    own = describe_model(model) | {"digests": own_digests}
    names = model_name(saved) or "its backbone", model_name(own) or type(model).__name__
    difference = differing_model(saved, own)
    if difference == "weights":
        yield (
            f"the adapter was trained on other weights of {names[0]} than those of this {names[1]}, so outputs will "
            "differ: create the model with the weights that the adapter was trained on"
        )
    elif difference == "name":
        yield f"the adapter was trained on {names[0]}, but this model is {names[1]}: it is loaded anyway"
    saved_input, differing = saved.get("input") or {}, differing_input(saved, own)
    if differing:
        values = "; ".join(f"{name} {saved_input[name]}, this model {own['input'][name]}" for name in differing)
        yield f"the adapter was trained with another input ({values}): preprocess images as in training"
    classes, own_classes = saved.get("class_names"), own["class_names"]
    if head and classes and own_classes and classes != own_classes:
        yield f"the saved head has the classes {abbreviate(classes)}; this model had {abbreviate(own_classes)}"


def model_name(description: Mapping[str, Any]) -> str | None:
    """A model's architecture with its pretrained tag, as in `timm.create_model`; None if it is not known.

    Args:
        description: Description of the model or of an adapter.
    """
    architecture, tag = description.get("architecture"), description.get("tag")
    return f"{architecture}.{tag}" if architecture and tag else architecture


def differing_model(saved: Mapping[str, Any], other: Mapping[str, Any]) -> Literal["weights", "name"] | None:
    """What differs between the models of two descriptions; None if nothing does, as far as they tell.

    Args:
        saved: Description of an adapter, or of a model with its digests.
        other: Another one.
    """
    digests, others = saved.get("digests") or {}, other.get("digests") or {}
    common = digests.keys() & others.keys()
    if any(digests[name] != others[name] for name in common):
        return "weights"
    # Names are written alike only by versions that write digests, or by none.
    comparable = not common and ("digests" in saved) == ("digests" in other)
    names = {model_name(saved), model_name(other)} - {None}
    return "name" if comparable and len(names) > 1 else None


def differing_input(saved: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of the settings of a model's input that two descriptions know and that differ.

    Args:
        saved: Description of an adapter or of a model.
        other: Another one.
    """
    inputs = saved.get("input") or {}, other.get("input") or {}
    common = [name for name in _INPUT if all(name in each for each in inputs)]
    return [name for name in common if inputs[0][name] != inputs[1][name]]


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    adapted = {layer.base: layer for layer in model.modules() if isinstance(layer, LoRALinear)}
    for name, module in named_modules(model):
        if isinstance(module, nn.MultiheadAttention) and is_packed(module):
            yield join(name, INPUT), module.in_proj_weight
        if isinstance(module, nn.Linear) and module.weight.is_floating_point():
            layer = adapted.get(module)
            yield (name.removesuffix(".base"), layer.pretrained_weight) if layer else (name, module.weight)


def _cfg(model: nn.Module) -> dict[str, Any]:
    return dict(getattr(model, "pretrained_cfg", None) or {})


def _to_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
