"""What an adapter belongs to: the weights that it was trained on, their input and the names of its classes.

Weights are told apart by a digest of the linear layers in the part of the model that is adapted, such as `blocks`: some
4,096 values of each, evenly spaced, which take milliseconds. Embeddings and the head, which depend on image size and
classes, are left out. There is a digest of the values in float32, in bfloat16 and in float16, as far as each follows
from the weights by one rounding: so a model in half precision has a digest in common with what it was rounded from.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitlorafa.errors import abbreviate
from vitlorafa.layers import LoRALinear
from vitlorafa.sharding import gather
from vitlorafa.wrappers import named_modules

_VALUES = 4096
_EXACT = (torch.float64, torch.float32)
_ROUNDED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_INPUT = ("mean", "std", "input_size", "interpolation")


def digests(model: nn.Module, layers: Collection[str]) -> dict[str, str]:
    """Digests of the pretrained weights, by the format that they are rounded to; none of what holds no values.

    Args:
        model: A timm model, adapted or not.
        layers: Names of its adapted layers, or of those to be.
    """
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


def describe_model(model: nn.Module, class_names: Sequence[str] | None = None) -> dict[str, Any]:
    """What timm's `pretrained_cfg` says of a model, as JSON can hold it: architecture, tag, input and class names.

    Args:
        model: A timm model. If its images are normalised in another way than timm's default, its `pretrained_cfg` has
            to hold that.
        class_names: In the order of the logits; those of `pretrained_cfg["label_names"]` if None.
    """
    cfg = _cfg(model)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    found = {**cfg, **({"input_size": (*cfg.get("input_size", (3,))[:1], *size)} if size else {})}
    names = cfg.get("label_names") if class_names is None else class_names
    return {
        "architecture": cfg.get("architecture"),
        "tag": cfg.get("tag") or None,
        "input": {name: _plain(found[name]) for name in _INPUT if found.get(name) is not None},
        "class_names": None if names is None else list(names),
    }


def mismatches(saved: Mapping[str, Any], model: nn.Module, here: Mapping[str, str], head: bool) -> Iterator[str]:
    """Sentences on what an adapter was trained with and the model has not.

    Args:
        saved: The adapter's description; what an older one does not say is not asked for.
        model: The timm model that it is loaded onto.
        here: Digests of the model's pretrained weights.
        head: Whether the head is loaded too.
    """
    own = describe_model(model)
    there = saved.get("digests") or {}
    common = there.keys() & here.keys()
    names = [_name(description) for description in (saved, own)]
    if any(there[name] != here[name] for name in common):
        yield (
            f"the adapter was trained on weights of {names[0]} that are not those of this {names[1]}, so its outputs "
            "will not be what they were: create the model with the weights that it was trained on"
        )
    elif not common and "digests" in saved and None not in names and names[0] != names[1]:
        yield f"the adapter was trained on {names[0]}, and this is a {names[1]}: it is loaded all the same"
    theirs = saved.get("input") or {}
    differing = [name for name in _INPUT if name in theirs and name in own["input"]]
    differing = [name for name in differing if theirs[name] != own["input"][name]]
    if differing:
        told = "; ".join(f"{name} {theirs[name]}, here {own['input'][name]}" for name in differing)
        yield f"the adapter was trained on other images than this model's ({told}): feed it the same"
    classes, classes_here = saved.get("class_names"), own["class_names"]
    if head and classes and classes_here and classes != classes_here:
        yield f"the saved head's classes are {abbreviate(classes)}, and this model's were {abbreviate(classes_here)}"


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    adapted = {layer.base: layer for layer in model.modules() if isinstance(layer, LoRALinear)}
    for name, module in named_modules(model):
        if isinstance(module, nn.Linear) and module.weight.is_floating_point():
            layer = adapted.get(module)
            yield (name.removesuffix(".base"), layer.pretrained_weight) if layer else (name, module.weight)


def _cfg(model: nn.Module) -> dict[str, Any]:
    return dict(getattr(model, "pretrained_cfg", None) or {})


def _name(description: Mapping[str, Any]) -> str | None:
    architecture, tag = description.get("architecture"), description.get("tag")
    return f"{architecture}.{tag}" if architecture and tag else architecture


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
